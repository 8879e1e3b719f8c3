"""GRPO, written out: sampling, token log-probabilities, advantages, loss (Shao et al., 2024).

A `model` is a causal language model of transformers, a prompt a list of ids; all else are tensors.
Letters, in the whole project: P prompts, G responses per prompt, B = P * G rows (the G of a prompt
adjacent), T generator tokens of a response (right-padded), N verifier tokens, V vocabulary, D the
model's width, L padded length, K response tokens of a batch.  Masks come from lengths.  Nats.

Deliberate departures from the papers:
 1. A masked *reward* (whitespace, special tokens) gets advantage 0, which removes its term of the
    policy gradient; the KL covers every response token, the stop included, and |y| counts them all.
 2. The papers give neither the divisor of the deviation nor its epsilon: ddof 1 and 1e-4 (TRL's).
 3. Top-k and top-p change what is sampled; log-probabilities are those of the whole distribution.
 4. Where a group's rewards deviate by less than `min_std` nats (rounding) the advantage is 0.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def pad(rows: list, device=None):
    """B lists of ids -> ids [B, L], right-padded with 0, and lengths [B]."""
    lengths = [len(row) for row in rows]
    ids = [list(row) + [0] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(lengths, device=device)


def model_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """[..., D] last hidden states -> [..., V] float32 logits, as the model's own forward makes it:
    Gemma 2 and 3n cap them softly, Cohere multiplies, Granite divides.  Checked at loading."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """[B, V] logits -> [B] token ids.  temperature 0 = greedy; top_k 0 and top_p 1 are off.
    top_k (ties with the k-th stay), then top_p, on the tempered distribution: the smallest set of
    most probable tokens whose mass reaches top_p; of (.5, .3, .2), .8 keeps two, .4 one.
    FloatingPointError: NaN or +inf (-inf forbids a token).  ValueError: settings out of range."""
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: out of range")
    if not logits.max(-1).values.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights have blown up")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token suffices
        back = order.argsort(-1)  # to the vocabulary's order: the inverse of the permutation
        logits = logits.masked_fill(beyond.gather(-1, back), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def sample(model, prompt_ids: list, group_size: int, *, max_new_tokens: int, stop_ids: list,
           batch_tokens: int = 131_072, **settings):
    """y ~ pi_old: G responses to each of P prompts -> ids [B, T], lengths [B]; row i*G + g is y_g.
    A response ends with the first of `stop_ids`, which belongs to it and to its length, or at
    `max_new_tokens`; behind it `ids` is 0.  settings: `draw`'s.  A batch, of one group at least,
    has at most `batch_tokens` in its cache.  ValueError: an empty prompt."""
    if not prompt_ids or not all(prompt_ids) or min(group_size, max_new_tokens) < 1:
        raise ValueError("sample needs prompts, tokens in each, group_size and max_new_tokens > 0")
    longest = max(map(len, prompt_ids)) + max_new_tokens
    size = max(1, batch_tokens // (group_size * longest))  # prompts in a batch
    parts = [prompt_ids[i : i + size] for i in range(0, len(prompt_ids), size)]
    done = [_sample(model, p, group_size, max_new_tokens, stop_ids, settings) for p in parts]
    ids, lengths = map(torch.cat, zip(*done))
    return ids[:, : int(lengths.max())], lengths


@torch.no_grad()
def _sample(model, prompt_ids, G, max_new_tokens, stop_ids, settings):
    """One batch of `sample`, ids [B, max_new_tokens].  Each prompt is prefilled once, left-padded,
    and its cache expanded to G rows; rows that have ended leave once they are half of the batch."""
    tokens, lengths = pad([p[::-1] for p in prompt_ids], model.device)  # [P, L]
    attend = response_mask(lengths, tokens.shape[1]).flip(1).long()  # [P, L]
    out = model.base_model(input_ids=tokens.flip(1), attention_mask=attend, use_cache=True,
                           position_ids=(attend.cumsum(1) - 1).clamp(min=0))
    cache, stop = out.past_key_values, torch.tensor(stop_ids, device=model.device)
    cache.batch_repeat_interleave(G)
    attend = attend.repeat_interleave(G, 0)  # [B, L]
    logits = model_logits(model, out.last_hidden_state[:, -1]).repeat_interleave(G, 0)  # [B, V]
    ids = torch.zeros(len(attend), max_new_tokens, dtype=torch.long, device=model.device)
    lengths = torch.zeros_like(ids[:, 0])
    row = torch.arange(len(ids), device=model.device)  # which row of `ids` a row of the batch is
    running = torch.ones_like(row, dtype=torch.bool)
    for t in range(max_new_tokens):
        token = draw(logits, **settings)  # [rows of the batch]
        ids[row[running], t] = token[running]
        lengths[row[running]] = t + 1
        running = running & ~torch.isin(token, stop)
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if 2 * left <= len(row):
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            row, token, attend, running = row[keep], token[keep], attend[keep], running[keep]
        attend = torch.cat([attend, torch.ones_like(attend[:, :1])], 1)
        out = model.base_model(input_ids=token[:, None], attention_mask=attend, use_cache=True,
                               position_ids=attend.sum(1, keepdim=True) - 1, past_key_values=cache)
        logits = model_logits(model, out.last_hidden_state[:, -1])
    return ids, lengths


def response_mask(lengths: torch.Tensor, T: int) -> torch.Tensor:
    """[B] lengths -> [B, T] bool: lengths (2, 3), T 3 -> [[1, 1, 0], [1, 1, 1]]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def token_logprobs(model, prompt_ids: list, ids, lengths, *, temperature=1.0, entropy=False,
                   chunk: int = 1024):
    """log p(y_t | prompt, y_<t) -> [B, T] nats, float32, 0 behind a row's end; with `entropy` a
    pair: these, and the entropies of the distributions drawn from, [B, T] nats, without gradient.
    prompt_ids: B lists; ids [B, T], lengths [B]; temperature: the one that sampled.  Padding is on
    the right, where causal attention never looks: a row scores as it does alone.  Logits are made
    for `chunk` tokens at a time, and again in the backward pass if there are several chunks: there
    is no [B, T, V].  ValueError: shapes that do not fit, an empty prompt."""
    B, T = ids.shape
    fits = len(prompt_ids) == len(lengths) == B > 0 and all(prompt_ids) and int(lengths.max()) <= T
    if not fits or temperature <= 0:
        raise ValueError(f"token_logprobs: {len(prompt_ids)} prompts (none empty), ids {(B, T)}"
                         f", lengths {tuple(lengths.shape)} (at most T), temperature {temperature}")
    rows = [list(p) + y[:n] for p, y, n in zip(prompt_ids, ids.tolist(), lengths.tolist())]
    starts = torch.tensor([len(p) for p in prompt_ids], device=ids.device)  # [B]
    row, t = response_mask(lengths, T).nonzero(as_tuple=True)  # [K] each
    hidden = model.base_model(input_ids=pad(rows, ids.device)[0], use_cache=False).last_hidden_state
    hidden, target = hidden[row, starts[row] + t - 1], ids[row, t]  # [K, D]: the state before y_t

    def score(hidden, target):
        logits = model_logits(model, hidden) / temperature  # [chunk, V]
        logz = logits.logsumexp(-1)
        logp = logits.gather(-1, target[:, None])[:, 0] - logz
        with torch.no_grad():
            p = (logits - logz[:, None]).exp() if entropy else logp
            return logp, torch.special.entr(p).sum(-1) if entropy else p

    parts = list(zip(hidden.split(chunk), target.split(chunk)))
    if len(parts) > 1 and torch.is_grad_enabled():
        score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    zeros = torch.zeros(B, T, device=ids.device)
    scored = zip(*[score(*part) for part in parts])
    logp, entropies = (zeros.index_put((row, t), torch.cat(values)) for values in scored)
    return (logp, entropies) if entropy else logp


def position_advantages(rewards, mask, group_size: int, *, scale=True, min_std: float = 0.06):
    """CME, "per-position advantages": rewards [B, T] nats, mask [B, T] bool -> [B, T] float32.
    At each position t of a group, over the responses M_t that are unmasked there:
        A_t = (r_t - mean_{M_t} r_t) / (std_{M_t} r_t + 1e-4)      ddof 1; scale=False: not divided
    and 0 where masked, where |M_t| < 2, and where the deviation is below `min_std`.  NaN counts as
    masked; an infinite reward flattens its column.  ValueError: shapes, a broken group.
    A group of three, rewards [[-1, -2], [-3, -2], [-5, 0]], mask [[1, 1], [1, 1], [1, 0]]: column 0
    has mean -3, std 2, advantages 1, 0, -1 (to 1e-4); in column 1 two count and are equal: 0."""
    B, T = rewards.shape
    if B % group_size or mask.shape != rewards.shape:
        raise ValueError(f"rewards {B, T}, mask {tuple(mask.shape)}: groups of {group_size} rows?")
    r = rewards.double().reshape(-1, group_size, T)  # [P, G, T]
    m = (mask.bool() & ~rewards.isnan()).reshape(-1, group_size, T)
    n = m.sum(1, keepdim=True)  # [P, 1, T]
    centred = torch.where(m, r - torch.where(m, r, 0).sum(1, keepdim=True) / n.clamp(min=1), 0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    scaled = centred / (std + 1e-4) if scale else centred
    return torch.where((n >= 2) & (std >= min_std), scaled, 0).reshape(B, T).float()


def group_advantages(rewards: torch.Tensor, group_size: int, *, scale: bool = True):
    """GRPO: rewards [B] -> [B] float32, A_i = (r_i - mean r) / (std r + 1e-4) over each group.
    NaN = missing: left out, advantage 0.  A group of four, [1, 2, 3, nan] -> [-1, 0, 1, 0]."""
    column = rewards[:, None]
    every = torch.ones_like(column, dtype=torch.bool)
    return position_advantages(column, every, group_size, scale=scale, min_std=0)[:, 0]


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, *, beta: float, clip_low: float = 0.2,
              clip_high: float = 0.2, responses=None):
    """CME Eq. 2, negated -> loss, stats.  logp, old_logp, mask [B, T]; advantages [B] or [B, T].
        loss = 1/B sum_i 1/|y_i| sum_t -(min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL)
        rho = exp(logp - old_logp)    KL = exp(ref - logp) - (ref - logp) - 1    (k3, Schulman)
    mask: true on every response token, the stop included; |y_i| is its sum.  ref_logp [B, T], or
    None at beta 0.  responses: B of the whole optimiser step, so that micro-batches add up; so do
    the stats: loss, kl (to the reference), approx_kl (to the policy that sampled), clipfrac.
    On-policy with one centred advantage per response the loss *value* is beta KL, its gradient is
    not 0: responses of two tokens and of one, logp = old, beta 0, advantages (0.5, -0.5) -> loss 0,
    gradient -0.125, -0.125 in the first and 0.25 in the second."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages  # [B, 1] or [B, T]
    if beta and ref_logp is None:
        raise ValueError("beta is not 0: grpo_loss needs ref_logp")
    ref_logp = logp if ref_logp is None else ref_logp
    shapes = [tuple(x.shape) for x in (logp, old_logp, ref_logp, mask, advantages)]
    if len(set(shapes[:4])) > 1 or shapes[4] not in (shapes[0], (len(mask), 1)):
        raise ValueError(f"logp, old_logp, ref_logp, mask, advantages {shapes} do not fit together")

    def k3(x):  # estimates KL(p || q) from samples of p; x = log q - log p
        return x.exp() - x - 1

    mask = mask.bool()
    weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * (responses or len(mask)))  # [B, T]
    log_ratio = torch.where(mask, logp - old_logp.detach(), 0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    kl = k3(torch.where(mask, ref_logp.detach() - logp, 0))
    per_token = -torch.min(ratio * advantages, clipped * advantages) + (beta * kl if beta else 0)
    loss = (torch.where(mask, per_token, 0) * weight).sum()
    outside = torch.where(advantages < 0, ratio < 1 - clip_low, ratio > 1 + clip_high)
    terms = {"kl": kl, "approx_kl": k3(log_ratio), "clipfrac": outside & (advantages != 0)}
    stats = {name: (term * weight).sum().detach() for name, term in terms.items()}
    return loss, {"loss": loss.detach(), **stats}
