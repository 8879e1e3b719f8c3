"""CME, the reward: what a second, frozen model of another family thinks of each word (arXiv 2605.29009, Eq. 1 and 3, Appendices A and B).

The verifier reads the prompt under its own chat template and then the response's text, cut by its own tokenizer. Its log-probabilities
(nats) are the reward: carried to the generator's tokens by character overlap, so that none is lost or counted twice (`token_rewards`,
Eq. 1), or averaged over the verifier's own tokens (`sequence_rewards`, Eq. 3). Letters as in grpo.py.

Deliberate departures from the paper:
 1. `credit="word"` is ours: a token gets the reward of the rest of its word. Proportional credit spreads the price of a word over its
    pieces, although the choice was made at the first piece; a policy can learn to prefer words that come in many pieces.
 2. `score_stop=True` is ours: the paper masks the stop token, as it has no text.
 3. The instruction is cut from its left when it and the response exceed the verifier's context (the paper does not say).
"""
import numpy as np
import torch

from align import align, spans_from_ids, spans_from_text, special_ids, visible
from grpo import batches, chat_ids, end_of_turn, token_logprobs, without_stop


def token_rewards(verifier, verifier_tokenizer, generator_tokenizer, prompts: list, ids: torch.Tensor, lengths: torch.Tensor, *,
                  credit: str = "token", score_stop: bool = False, stop_ids=None):
    """Eq. 1: r_t = sum_j w_jt log p_V(v_j | x, v_<j) for each generator token -> (rewards [B, T] nats float32, mask [B, T] bool).

    prompts: B of them, one per row; ids [B, T] as sampled, right-padded; lengths [B]. mask is false, and the reward 0, on whitespace-only
    and special tokens (the stop token among them) and behind the row's end. Before masking, a row's rewards add up to the verifier's
    log-probability of the text.
    credit: "token" is the paper's, "word" is `word_credit`. score_stop: the stop token that ends a row gets the verifier's log-probability of
    its own end of turn at that place, and is unmasked. stop_ids: those that sampled; None means the generator's special tokens.
    Raises ValueError for an unknown credit, and where a response alone exceeds the verifier's context.

    Example: generator tokens un|happiness, verifier tokens unhappi|ness with log-probabilities -7 and -2: rewards -2 and -7.
    """
    if credit not in ("token", "word"):
        raise ValueError(f"credit must be 'token' or 'word', not {credit!r}")
    rows, stopped = without_stop(ids, lengths, special_ids(generator_tokenizer) if stop_ids is None else stop_ids)
    spelled = [spans_from_ids(generator_tokenizer, y) for y in rows]                                      # (text, spans) of each
    scored = verifier_logprobs(verifier, verifier_tokenizer, prompts, [text for text, _ in spelled], [score_stop and end for end in stopped])
    rewards, mask = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for i, ((text, target), (values, source, stop)) in enumerate(zip(spelled, scored)):
        reward, seen = align(values, source, target), visible(text, target)
        if credit == "word":
            reward, seen = word_credit(reward, text, target)
        seen = seen & (len(values) > 0)                                        # some verifiers have no token for U+200B: nothing to compare
        rewards[i, :len(seen)], mask[i, :len(seen)] = np.where(seen, reward, 0), seen
        if stop is not None:
            rewards[i, len(seen)], mask[i, len(seen)] = stop, True
    return torch.from_numpy(rewards).to(ids.device), torch.from_numpy(mask).to(ids.device)


def sequence_rewards(verifier, verifier_tokenizer, prompts: list, texts: list) -> torch.Tensor:
    """Eq. 3: R = 1/|y|_V sum_j log p_V(v_j | x, v_<j), the mean over the verifier's own tokens -> [B] nats per verifier token, float32.

    prompts and texts: B of each. An empty text has no tokens and therefore no mean: NaN, which `grpo.group_advantages` leaves out.
    Example: log-probabilities -1, -2, -6 -> -3.
    """
    scored = verifier_logprobs(verifier, verifier_tokenizer, prompts, texts)
    return torch.tensor([values.mean() if len(values) else float("nan") for values, _, _ in scored], dtype=torch.float32)


def word_credit(values: np.ndarray, text: str, spans: np.ndarray):
    """Reward-to-go inside each word: values [T] nats, spans [T, 2] characters of text -> (values [T], mask [T]).

    A word is a run of characters without whitespace and the whitespace before it; a text without spaces is one word. A token belongs to the
    word of its first visible character, a whitespace-only token to the word that follows (it is unmasked: it opened that word);
    whitespace at the end of the text stays masked, and so do tokens without width. The words' first tokens add up to the total.

    Example: "no red", tokens no| |re|d, values -1, -2, -3, -4 -> -1, -9, -7, -4: the bare space pays for " red" as a whole.
    """
    seen = np.array([not c.isspace() for c in text], bool)                     # [characters]
    opened = np.cumsum(seen & ~np.append(False, seen[:-1]))                    # words opened so far
    words = opened[-1] if len(text) else 0
    word = np.append(opened + ~seen, words + 1)[np.floor(spans[:, 0]).astype(int)]  # [T], ascending; words + 1 = nothing visible follows
    to_go = np.append(np.cumsum(values[::-1])[::-1], 0.0)                      # [T + 1]
    return to_go[:-1] - to_go[np.searchsorted(word, word, side="right")], (word <= words) & (spans[:, 1] > spans[:, 0])


def verifier_logprobs(verifier, tokenizer, prompts: list, texts: list, stopped=None, *, batch_tokens: int = 4096) -> list:
    """B rows of (log p_V of each verifier token [N] float64, its span [N, 2] in characters of the text, log p_V of the end of turn or None).

    The end of turn is scored in the rows where `stopped` is true. Rows are batched by length, at most `batch_tokens` tokens with padding;
    equal rows are scored once, and so score equal to the bit. Raises ValueError where a response does not fit the verifier's context,
    or its tokenizer has no end of turn to score.
    """
    if len(prompts) != len(texts):
        raise ValueError(f"one prompt per row: got {len(prompts)} prompts for {len(texts)} responses")
    stopped = stopped or [False] * len(texts)
    stop = end_of_turn(tokenizer)
    if any(stopped) and stop is None:
        raise ValueError("score_stop: the verifier's tokenizer has no end-of-turn token")
    context = getattr(verifier.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    responses = [spans_from_text(tokenizer, text) for text in texts]
    known, keys = {}, []
    for prompt, (ids, _), ended in zip(prompts, responses, stopped):
        question = repr(prompt)
        if question not in known:
            known[question] = chat_ids(tokenizer, prompt)
        before, answer = known[question], list(ids) + [stop] * bool(ended)
        if len(before) + len(answer) > context:
            before = cut_prompt(tokenizer, prompt, context - len(answer))
        keys.append((tuple(before), tuple(answer)))
    scores = {}
    unique = sorted({k for k in keys if k[1]}, key=lambda k: (len(k[0]) + len(k[1]), k))
    for part in batches([len(before) + len(answer) for before, answer in unique], batch_tokens):
        batch = [unique[i] for i in part]
        T = max(len(answer) for _, answer in batch)
        ids = torch.tensor([list(answer) + [0] * (T - len(answer)) for _, answer in batch], device=verifier.device)
        with torch.no_grad():
            logp = token_logprobs(verifier, [list(before) for before, _ in batch], ids,
                                  torch.tensor([len(answer) for _, answer in batch], device=verifier.device)).double().cpu().numpy()
        if not np.isfinite(logp).all():
            raise FloatingPointError("the verifier's log-probabilities are not finite: does it work in this precision?")
        scores.update({k: row[:len(k[1])] for k, row in zip(batch, logp)})
    rows = []
    for key, (ids, spans), ended in zip(keys, responses, stopped):
        logp = scores.get(key, np.zeros(0))
        rows.append((logp[:len(ids)], spans, logp[-1] if ended else None))
    return rows


def cut_prompt(tokenizer, prompt, room: int) -> list:
    """Ids of the prompt under its chat template in at most `room` tokens: its text is cut from the left, the template and BOS stay whole.

    In a list of messages the first ones are cut first. Raises ValueError if even the bare template leaves no room.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def cut(n):                                                                # without the first n characters
        short = []
        for m in messages:
            short.append({**m, "content": m["content"][n:]})
            n = max(0, n - len(m["content"]))
        return chat_ids(tokenizer, short)
    low, high = 0, sum(len(m["content"]) for m in messages)                    # cut(high) is the bare template
    if len(cut(high)) > room:
        raise ValueError(f"a response leaves {room} tokens of the verifier's context for the prompt, and its bare chat template takes "
                         f"{len(cut(high))}: lower max_new_tokens or take a verifier with a longer context")
    while low < high:                                                          # bisection for the shortest cut; cut(high) always fits
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= room else (middle + 1, high)
    return cut(low)
