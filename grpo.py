"""GRPO, written out: sampling, token log-probabilities, advantages, loss (Shao et al., 2024).

A `model` is a causal language model of transformers (peft's: its .base_model.model), a prompt a
list of ids, responses are tensors.  Notation, in the whole project: P prompts, G responses each,
B = P * G rows (the G of a prompt adjacent), T generator tokens of a response (right-padded), N of
the verifier, V vocabulary, D hidden size, L padded length, K tokens of a batch.

Deliberate departures from the papers:
 1. A token whose *reward* is masked (whitespace, special) gets advantage 0, so no policy gradient;
    the KL covers every response token, the stop included, and |y| counts them all.
 2. The papers give neither the std's divisor nor its epsilon: here ddof 1 and 1e-4, as in TRL.
 3. Top-k and top-p only change what is sampled; log-probabilities are of the full distribution.
 4. Rewards *at a position* with a std below `min_std` nats (rounding) get advantage 0."""

import contextlib
from functools import partial
from os.path import commonprefix  # of any lists, not only of paths

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def pad(rows: list, device=None):
    """B lists of ids -> ids [B, L], right-padded with 0, and lengths [B]."""
    lengths = [len(row) for row in rows]
    ids = [list(row) + [0] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(lengths, device=device)


def model_logits(model, hidden: torch.Tensor, *head) -> torch.Tensor:
    """[..., D] last hidden states -> [..., V] float32 logits, as the model's own forward gives them
    (checked at loading): Gemma 2 and 3n soft-cap them, Cohere multiplies, Granite divides.
    head: weight (and bias) of a part of the vocabulary, if only that is wanted."""
    config = model.config.get_text_config()
    logits = (F.linear(hidden, *head) if head else model.get_output_embeddings()(hidden)).float()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """[B, V] logits -> [B] token ids.  temperature 0 = greedy; top_k 0 and top_p 1 = off.
    After temperature come top_k (ties with the k-th stay) and then top_p, which keeps the smallest
    set of most probable tokens whose mass reaches it: of (.5, .3, .2), .8 keeps two, .4 one.
    FloatingPointError: NaN or +inf (-inf forbids a token).  ValueError: settings out of range."""
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: out of range")
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights have blown up")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, n = logits.softmax(-1), 512  # n: how many to sort, rarely all V
        while (top := p.topk(min(n, p.shape[1]))).values.sum(-1).min() < top_p and n < p.shape[1]:
            n *= 8
        beyond = top.values.cumsum(-1) - top.values >= top_p  # the mass before it is enough
        logits = logits.masked_fill((p >= 0).scatter(-1, top.indices, beyond), -torch.inf)
    upto = logits.softmax(-1).cumsum(-1)  # [B, V]; right=True: never a token of probability 0
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device) * upto[:, -1:]
    return torch.searchsorted(upto, u, right=True)[:, 0]


def read(model, ids, attend, cache=None, place=None):
    """Runs the model on ids [B, n] after the L tokens in a cache; attend [B, L + n], 0: padding
    (or, given the ids' positions `place` [B, n], a float mask [B, 1, n, L + n] to add to scores)
    -> hidden states [B, n, D], the cache.  ValueError: the model keeps no cache."""
    name = "cache" if "cache" in model.base_model.forward.__annotations__ else "past_key_values"
    place = (attend.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :] if place is None else place
    settings = {"attention_mask": attend, "position_ids": place, "use_cache": True, name: cache}
    out = model.base_model(input_ids=ids, **settings)
    cache = getattr(out, name)  # transformers 5.24 renamed it
    if cache is None or cache.get_seq_length() < attend.shape[-1]:
        raise ValueError("the model keeps no cache: turn gradient checkpointing off")
    return out.last_hidden_state, cache


def prefill(model, prompt_ids: list, prompt_of: torch.Tensor):
    """Reads P prompts, left-padded, each once, and a shared prefix only once: in sorted order, a
    prompt joins those before it if they share more than half.  prompt_of [B]: each row's prompt
    -> hidden state of each row's last token [B, 1, D], a cache of B rows, attention mask [B, L]."""
    heads, head_of = [], [0] * len(prompt_ids)
    for i in sorted(range(len(prompt_ids)), key=lambda i: list(prompt_ids[i])):
        head, last = list(prompt_ids[i][:-1]), heads[-1] if heads else []
        common, longer = commonprefix([last, head]), max(len(last), len(head))
        heads = [*heads[:-1], common] if 2 * len(common) > longer else [*heads, head]
        head_of[i] = len(heads) - 1
    tails = [prompt[len(heads[h]) :] for prompt, h in zip(prompt_ids, head_of)]
    saved = sum(map(len, prompt_ids)) - sum(map(len, heads + tails))  # tokens not read again
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", 0) or ()), getattr(config, "sliding_window", None)}
    if saved < 1000 or kinds - {"full_attention", None} or config.model_type in ("gpt_neo", "mpt"):
        heads, head_of, tails = [[]], [0] * len(prompt_ids), prompt_ids  # some models count padding
    attend, cache = torch.zeros(len(heads), 0, dtype=int, device=model.device), None
    for rows, of in ((heads, head_of), (tails, prompt_of)):
        ids, lengths = pad([row[::-1] for row in rows], model.device)
        attend = torch.cat([attend, response_mask(lengths, ids.shape[1]).flip(1).long()], 1)
        if ids.numel():
            hidden, cache = read(model, ids.flip(1), attend, cache)
            cache.batch_select_indices(torch.as_tensor(of, device=model.device))
        attend = attend[of]
    return hidden[prompt_of, -1:], cache, attend


def stepper(model, cache, attend, room: int):
    """A cache of L tokens, attend [B, L] -> step(token [B, 1], attend [B, L + 1], then [B, L + 2]
    ...) -> hidden states [B, 1, D], up to `room` times.  The cache is allocated once (transformers
    copies it at every token), but for windows, Bloom, Falcon; on CUDA a step is one graph, unless
    its capture fails (a GPU sync), which breaks torch's default generator: give `draw` its own."""
    kinds = {type(layer).__name__ for layer in cache.layers}
    if kinds != {"DynamicLayer"} or model.config.model_type in ("bloom", "falcon", "gpt_neo"):
        return lambda token, attend: read(model, token, attend, cache)[0]
    L, on, cuda = attend.shape[1], attend.device.type, attend.is_cuda
    end = L + room if cuda else L  # attend to [:end]; a CUDA graph's shapes are fixed
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else model.dtype
    mask = torch.zeros_like(attend, dtype=dtype).masked_fill(attend == 0, -torch.inf)
    mask = F.pad(mask, (0, room), value=-torch.inf)[:, None, None]  # [B, 1, 1, L + room]
    position, at = attend.sum(1, keepdim=True), torch.tensor([L], device=attend.device)
    token = torch.zeros_like(position)  # [B, 1]; a graph rereads the same tensors: changed in place
    def put(kept, *new, **_):  # replaces DynamicLayer.update, which copies everything
        for buffer, values in zip(kept, new):
            buffer.index_copy_(2, at, values.to(dtype))
        return [x[:, :, :end] for x in kept]
    for layer in cache.layers:  # a later stepper adds 0: x already has its room
        layer.keys, layer.values = kept = [F.pad(x.to(dtype), (0, 0, 0, L + room - x.shape[2]))
                                           for x in (layer.keys, layer.values)]
        layer.update = partial(put, kept)  # not layer: a reference cycle would keep the memory
    run = forward = lambda: read(model, token, mask[..., :end], cache, position)[0]
    if cuda:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(attend.device)
        stream.wait_stream(torch.cuda.current_stream(attend.device))
        with torch.cuda.stream(stream):
            forward()  # warm-up, as set-up must not be captured; the first step overwrites its K, V
        with contextlib.suppress(RuntimeError):
            with torch.cuda.graph(graph, stream=stream):
                hidden = forward()
            run = lambda: graph.replay() or hidden
    def step(new, _):  # ignores attend: its mask is kept here
        nonlocal end
        token.copy_(new)
        mask.index_fill_(3, at, 0)
        end += 0 if cuda else 1
        hidden = run()
        position.add_(1), at.add_(1)
        return hidden
    return step


@torch.no_grad()
def sample(model, prompt_ids: list, group_size: int, *, max_new_tokens: int, stop_ids: list,
           **settings):
    """y ~ pi_old: G responses to each of P prompts -> ids [B, T], lengths [B]; row i*G + g is y_g.
    A response ends with its first token in `stop_ids`, which counts as part of it, or at
    `max_new_tokens`; after it `ids` is 0.  settings: those of `draw`.  Finished rows leave the
    batch once they are an eighth of it, on CUDA half.  ValueError: an empty prompt."""
    if not prompt_ids or not all(prompt_ids) or min(group_size, max_new_tokens) < 1:
        raise ValueError("sample needs prompts, none empty; group_size and max_new_tokens > 0")
    row = torch.arange(len(prompt_ids) * group_size, device=model.device)  # its place in `ids`
    hidden, cache, attend = prefill(model, prompt_ids, row // group_size)
    step = stepper(model, cache, attend, max_new_tokens) if max_new_tokens > 1 else None
    ids = torch.zeros(len(row), max_new_tokens, dtype=torch.long, device=model.device)
    lengths, stop = torch.zeros_like(row), torch.tensor(stop_ids, device=model.device)
    running = torch.ones_like(row, dtype=torch.bool)
    for t in range(max_new_tokens):
        token = draw(model_logits(model, hidden[:, -1]), **settings)  # [rows of the batch]
        ids[row, t] = token * running
        lengths[row] += running
        running = running & ~torch.isin(token, stop)
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if len(row) - left >= len(row) / (2 if ids.is_cuda else 8):  # enough have ended
            keep, step = running.nonzero()[:, 0], None  # frees the old step before the new one
            cache.batch_select_indices(keep)
            row, token, attend, running = row[keep], token[keep], attend[keep], running[keep]
            step = stepper(model, cache, attend, max_new_tokens - t)
        attend = torch.cat([attend, torch.ones_like(token[:, None])], 1)
        hidden = step(token[:, None], attend)
    return ids[:, : int(lengths.max())], lengths


def response_mask(lengths: torch.Tensor, T: int) -> torch.Tensor:
    """[B] lengths -> [B, T] bool: lengths (2, 3), T 3 -> [[1, 1, 0], [1, 1, 1]]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def token_logprobs(model, prompt_ids: list, ids, lengths, *, temperature=1.0, entropy=False,
                   chunk: int = 0):
    """log p(y_t | prompt, y_<t) -> [B, T] nats, float32, 0 after a row's end; with `entropy` a
    pair: these, and the entropies without top-k and top-p, [B, T] nats, no gradient.
    prompt_ids: B lists; ids [B, T], lengths [B]; temperature: as in sampling.  Equal prompts are
    read once; padding is masked or after a row's end, so a row scores as it would alone.  Logits
    are computed for `chunk` vocabulary entries at a time (0: 2^25 logits, on CUDA 2^27), again in
    the backward pass if in several chunks: no [B, T, V].  ValueError: shapes, empty prompts."""
    B, T = ids.shape
    fits = len(prompt_ids) == len(lengths) == B > 0 and all(prompt_ids) and int(lengths.max()) <= T
    if not fits or temperature <= 0:
        raise ValueError("token_logprobs: B prompts, none empty; lengths [B] <= T; temperature > 0")
    number, longest = {}, int(lengths.max())  # a prompt is read once for all of its responses
    prompt_of = [number.setdefault(tuple(p), len(number)) for p in prompt_ids]
    hidden, cache, attend = prefill(model, list(number), torch.tensor(prompt_of, device=ids.device))
    if longest > 1:  # the last token of a response predicts nothing: it is not read
        y = torch.where(response_mask(lengths, T), ids, 0)[:, : longest - 1]
        attend = torch.cat([attend, torch.ones_like(y)], 1)
        hidden = torch.cat([hidden, read(model, y, attend, cache)[0]], 1)
    row, t = response_mask(lengths, longest).nonzero(as_tuple=True)  # [K] each
    hidden, target = hidden[row, t], ids[row, t]  # [K, D], [K]: the state before y_t, and y_t
    head, parts = model.get_output_embeddings(), [()]  # (): one part, the whole vocabulary
    chunk = chunk or max(1, 2 ** (27 if ids.is_cuda else 25) // max(1, len(row)))
    if type(head) is torch.nn.Linear and chunk < len(head.weight):  # a LoRA head is used whole
        parts = list(zip(*(x.split(chunk) for x in head.parameters())))  # weight (and bias) of each
    def score(first, *part):
        logits = model_logits(model, hidden, *part)  # [K, chunk]
        logits = logits if temperature == 1 else logits / temperature
        logits = logits if part else logits.log_softmax(-1)  # whole: log-sum-exp 0
        total = logits.logsumexp(-1) if part else logits.new_zeros(len(row))
        found = logits.gather(-1, (target - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        x, z = logits.detach(), total.detach()[:, None]
        expected = (x - z).exp_().mul_(x) if entropy else z  # p · logit; 0 · -inf = NaN, left out
        return found, total, expected.nansum(-1)
    if len(parts) > 1 and torch.is_grad_enabled():
        score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    scored = zip(*[score(i * chunk, *part) for i, part in enumerate(parts)])
    found, total, expected = map(torch.stack, scored)  # [parts, K] each
    log_z = total.logsumexp(0)  # [K]
    entropies = log_z.detach() - ((total - log_z).detach().exp() * expected).sum(0)  # log Z - E[x]
    found = found.gather(0, (target[None] // chunk).clamp(max=len(parts) - 1))[0] - log_z
    logp, entropies = (x.new_zeros(B, T).index_put((row, t), x) for x in (found, entropies))
    return (logp, entropies) if entropy else logp


def position_advantages(rewards, mask, group_size: int, *, scale=True, min_std: float = 0.06):
    """CME, "per-position advantages": rewards [B, T] nats, mask [B, T] bool -> [B, T] float32.
    At each position t of a group, over the responses M_t that are unmasked there:
        A_t = (r_t - mean_{M_t} r_t) / (std_{M_t} r_t + 1e-4)      ddof 1; scale=False: not divided
    and 0 where masked, where |M_t| < 2, and where the std is below `min_std`.  NaN counts as
    masked; an infinite reward makes its column 0.  ValueError: shapes, an incomplete group.
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
    """GRPO: rewards [B] -> [B] float32, A_i = (r_i - mean r) / (std r + 1e-4) in each group.
    NaN = missing: left out, advantage 0.  A group of four, [1, 2, 3, nan] -> [-1, 0, 1, 0]."""
    r, every = rewards[:, None], torch.ones_like(rewards)[:, None]
    return position_advantages(r, every, group_size, scale=scale, min_std=0)[:, 0]


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, *, beta: float, clip_low: float = 0.2,
              clip_high: float = 0.2, responses=None):
    """CME Eq. 2, negated -> loss, stats.  logp, old_logp, mask [B, T]; advantages [B] or [B, T].
        loss = 1/B sum_i 1/|y_i| sum_t -(min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL)
        rho = exp(logp - old_logp)    KL = exp(ref - logp) - (ref - logp) - 1    (k3, Schulman)
    mask: true on every response token, the stop included; |y_i| is its sum.  ref_logp [B, T], or
    None at beta 0.  responses: B of the whole optimiser step, so micro-batch losses add up; so do
    the stats: loss, kl (to the reference), approx_kl (to the policy that sampled), clipfrac.
    On-policy with one centred advantage per response the loss *value* is beta KL, its gradient is
    not 0: responses of two tokens and of one, logp = old, beta 0, advantages (0.5, -0.5) -> loss 0,
    gradient -0.125, -0.125 in the first and 0.25 in the second."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages  # [B, 1] or [B, T]
    if beta and ref_logp is None:
        raise ValueError("grpo_loss needs ref_logp unless beta is 0")
    ref_logp = logp if ref_logp is None else ref_logp
    shapes = [tuple(x.shape) for x in (logp, old_logp, ref_logp, mask, advantages)]
    if len(set(shapes[:4])) > 1 or shapes[4] not in (shapes[0], (len(mask), 1)):
        raise ValueError(f"logp, old_logp, ref_logp, mask, advantages {shapes} do not fit together")
    k3 = lambda x: x.exp() - x - 1  # estimates KL(p || q) from samples of p; x = log q - log p
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


if __name__ == "__main__": from examples import shown; shown.show(__file__)  # on one screen
