"""CME, the reward: what a frozen model of another family thinks of each word (arXiv 2605.29009).

The verifier reads the prompt under its own chat template, then the response in its own tokens.  Its
log-probabilities (nats) are the reward: carried to the generator's tokens by character overlap
(Eq. 1: `token_rewards`), or averaged over its own (Eq. 3: `sequence_rewards`).  Letters: grpo.py.

Deliberate departures from the paper:
 1. `credit="word"` is ours: a token gets the reward of the rest of its word.  Proportional credit
    spreads a word's price over its pieces, although the choice was made at the first one.
 2. `score_stop=True` is ours: the paper masks the stop token, as it has no text.
 3. Where prompt and response exceed the verifier's context, the prompt is cut from its left.
"""

import numpy as np
import torch

from align import align, spans_from_ids, spans_from_text, special_ids, visible
from grpo import pad, token_logprobs
from plumbing.models import batches, chat_ids, context_of, end_of_turn, without_stop
from plumbing.prompts import messages_of


def aligned_rewards(values, source, text, target, credit: str = "token"):
    """Eq. 1, r_t = sum_j w_jt log p_V(v_j | x, v_<j), for one response -> rewards [T], mask [T].

    values [N]: log p_V of the verifier's tokens, nats; source [N, 2]: their spans in characters of
    `text`; target [T, 2]: those of the generator's tokens.  The mask is False, and the reward 0,
    for tokens that show nothing (whitespace, special); without it the rewards sum to sum(values).
    credit: "token" (the paper's) or "word" (`word_credit`).

    un|happiness, verifier unhappi|ness with -7 and -2 -> rewards -2 and -7."""
    rewards, mask = align(values, source, target), visible(text, target)
    if credit == "word":
        rewards, mask = word_credit(rewards, text, target)
    mask = mask & (len(values) > 0)  # some verifiers have no token for a U+200B
    return np.where(mask, rewards, 0.0), mask


def word_credit(values, text, spans):
    """Reward-to-go inside each word: values [T] nats, spans [T, 2] in text -> values [T], mask [T].

    A word is a run of visible characters and the whitespace before it.  A token belongs to the
    word of its first visible character, whitespace alone to the next (unmasked: it opened it);
    whitespace at the end stays masked.  The words' first tokens add up to the total.

    "no red", tokens no| |re|d, values -1, -2, -3, -4 -> -1, -9, -7, -4: the space pays for " red"."""
    seen = np.array([not c.isspace() for c in text], bool)  # [L]
    opened = np.cumsum(seen & ~np.append(False, seen[:-1]))  # [L] words opened so far
    words = opened[-1] if len(text) else 0
    word = np.append(opened + ~seen, words + 1)[np.floor(spans[:, 0]).astype(int)]  # [T], ascending
    to_go = np.append(np.cumsum(values[::-1])[::-1], 0.0)  # [T + 1]
    rest = to_go[:-1] - to_go[np.searchsorted(word, word, side="right")]
    return rest, (word <= words) & (spans[:, 1] > spans[:, 0])


def token_rewards(verifier, verifier_tokenizer, generator_tokenizer, prompts: list, ids, lengths,
                  *, credit: str = "token", score_stop: bool = False, stop_ids=None):
    """Eq. 1 -> rewards [B, T] nats float32, mask [B, T] bool, for `grpo.position_advantages`.

    prompts: one per row; ids [B, T] as sampled, lengths [B].  The stop token is masked too, or, with
    score_stop, gets log p_V of the verifier's own end of turn.  credit: "token" or "word".  stop_ids:
    those that sampled; None: the special tokens.  ValueError: a response exceeds the context."""
    if credit not in ("token", "word"):
        raise ValueError(f"credit must be 'token' or 'word', not {credit!r}")
    stop_ids = special_ids(generator_tokenizer) if stop_ids is None else stop_ids
    rows, stopped = without_stop(ids, lengths, stop_ids)
    spelled = [spans_from_ids(generator_tokenizer, y) for y in rows]  # (text, spans) of each
    read = [spans_from_text(verifier_tokenizer, text) for text, _ in spelled]  # (ids, spans)
    end = end_of_turn(verifier_tokenizer)
    if score_stop and end is None:
        raise ValueError("score_stop: the verifier's tokenizer has no end-of-turn token")
    ends = [[end] if score_stop and stop else [] for stop in stopped]
    answers = [v_ids + more for (v_ids, _), more in zip(read, ends)]
    scored = verifier_logprobs(verifier, verifier_tokenizer, prompts, answers)
    rewards, mask = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for i, ((text, target), (v_ids, source)) in enumerate(zip(spelled, read)):
        values, T = scored[i][: len(v_ids)], len(target)
        rewards[i, :T], mask[i, :T] = aligned_rewards(values, source, text, target, credit)
        if ends[i]:
            rewards[i, T], mask[i, T] = scored[i][-1], True
    return torch.from_numpy(rewards).to(ids.device), torch.from_numpy(mask).to(ids.device)


def sequence_rewards(verifier, verifier_tokenizer, prompts: list, texts: list) -> torch.Tensor:
    """Eq. 3: R = 1/|y|_V sum_j log p_V(v_j | x, v_<j) -> [B] nats per verifier token, float32.

    prompts and texts: B of each.  An empty text has no mean: NaN, which `grpo.group_advantages`
    leaves out.  Log-probabilities -1, -2, -6 -> -3."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    answers = [verifier_tokenizer(text, **plain).input_ids for text in texts]
    scored = verifier_logprobs(verifier, verifier_tokenizer, prompts, answers)
    return torch.tensor([v.mean() if len(v) else np.nan for v in scored], dtype=torch.float32)


@torch.no_grad()
def verifier_logprobs(verifier, tokenizer, prompts: list, answers: list, *, batch_tokens=4096):
    """log p_V(v_j | x, v_<j) of B answers (lists of ids) to B prompts -> B arrays [N], nats.

    Batches of like length hold at most `batch_tokens`; equal rows are scored once, and so equal to
    the bit.  ValueError: one prompt per answer; an answer that does not fit the context."""
    if len(prompts) != len(answers):
        raise ValueError(f"one prompt per row: {len(prompts)} prompts, {len(answers)} responses")
    context, rows = context_of(verifier), []
    rendered = {repr(prompt): prompt for prompt in prompts}
    rendered = {key: chat_ids(tokenizer, prompt) for key, prompt in rendered.items()}
    for prompt, answer in zip(prompts, answers):
        before = rendered[repr(prompt)]
        if len(before) + len(answer) > context:
            before = cut_prompt(tokenizer, prompt, context - len(answer))
        rows.append((tuple(before), tuple(answer)))
    scores = {row: np.zeros(0) for row in rows}
    unique = sorted({row for row in rows if row[1]}, key=lambda row: (len(row[0] + row[1]), row))
    for part in batches([len(before + answer) for before, answer in unique], batch_tokens):
        befores, answers = zip(*(unique[i] for i in part))
        ids, lengths = pad(answers, verifier.device)
        logp = token_logprobs(verifier, befores, ids, lengths).double().cpu().numpy()
        if not np.isfinite(logp).all():
            raise FloatingPointError("the verifier's log-probabilities are not finite (precision?)")
        scores.update((unique[i], values[:n]) for i, values, n in zip(part, logp, lengths))
    return [scores[row] for row in rows]


def cut_prompt(tokenizer, prompt, room: int) -> list:
    """Ids of the prompt under its chat template in at most `room` tokens: its text is cut from the
    left, first messages first; the template and BOS stay.  ValueError: they do not fit."""

    def cut(n):  # without the first n characters
        short = []
        for m in messages_of(prompt):
            short.append(m | {"content": m["content"][n:]})
            n = max(0, n - len(m["content"]))
        return chat_ids(tokenizer, short)

    low, high = 0, sum(len(m["content"]) for m in messages_of(prompt))  # cut(high): the template
    if len(cut(high)) > room:
        raise ValueError(f"a response leaves {room} tokens of the verifier's context to its prompt: "
                         "lower max_new_tokens or take a verifier with a longer context")
    while low < high:  # bisection for the shortest cut
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= room else (middle + 1, high)
    return cut(low)
