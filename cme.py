"""CME, the reward: how likely a frozen model of another family finds each word (arXiv 2605.29009).

The verifier reads the prompt under its own chat template, then the response in its own tokens.  Its
log-probabilities (nats) are the reward: carried to the generator's tokens by character overlap
(Eq. 1: `token_rewards`), or averaged over its own (Eq. 3: `sequence_rewards`).  Notation: grpo.py.

Deliberate departures from the paper:
 1. `credit="word"` is ours: each token gets its whole word's sum, as any piece may have decided the
    word and the verifier may charge for it at the space before.  `score_stop` is ours too.
 2. Too long for the verifier, a prompt loses its oldest tokens (not BOS), a response its reward."""

import re

import numpy as np
import torch

from align import align, spans_from_ids, spans_from_text, visible
from plumbing.models import answer_logprobs, end_of_turn, plain_ids, without_stop


def aligned_rewards(values, source, text, target, credit: str = "token"):
    """Eq. 1, r_t = sum_j w_jt log p_V(v_j | x, v_<j), for one response -> rewards [T], mask [T].
    values [N]: log p_V of the verifier's tokens, nats; source [N, 2]: their spans in characters of
    `text`; target [T, 2]: those of the generator's tokens.  The mask is False, and the reward 0,
    for tokens that show nothing (whitespace, special) or overlap no verifier token.  Before masking
    rewards sum to sum(values) with credit "token" (the paper's); "word": see `word_credit`.
    un|happiness, verifier unhappi|ness with -7 and -2 -> rewards -2 and -7."""
    rewards, mask = align(values, source, target), visible(text, target)
    if credit == "word":
        rewards, mask = word_credit(rewards, text, np.reshape(target, (-1, 2)))
    width = np.diff(np.reshape(source, (-1, 2)))[:, 0]  # of the verifier's tokens
    mask = mask & (align(width, source, target) > 1e-9)  # some verifiers skip U+200B
    return np.where(mask, rewards, 0.0), mask


def word_credit(values, text, spans):
    """Each token gets the sum of its word: values [T] nats, spans [T, 2] in text -> [T], mask [T].
    A word is a run of visible characters and the whitespace before it; a token belongs to the word
    of its first character, so whitespace is not masked, except at the end, where no word follows.
    "no red", tokens no| |re|d, values -1, -2, -3, -4 -> -1, -9, -9, -9."""
    ends = [match.end() for match in re.finditer(r"\s*\S+", text)]  # of the words
    word = np.searchsorted(ends, np.floor(spans[:, 0]), side="right")  # [T], ascending
    total = np.bincount(word, weights=values)  # [words]
    return total[word], (word < len(ends)) & (spans[:, 1] > spans[:, 0])


def token_rewards(verifier, verifier_tokenizer, generator_tokenizer, prompts: list, ids, lengths,
                  *, credit: str = "token", stop_ids=(), score_stop: bool = False):
    """Eq. 1 -> rewards [B, T] nats float32, mask [B, T] bool, for `grpo.position_advantages`.
    prompts: one per row; ids [B, T] as sampled, lengths [B].  credit: "token" or "word".  stop_ids:
    those of sampling; one that ends a row is masked (as in the paper; special tokens always are)
    or, with score_stop, gets log p_V(end of turn | x, v), the verifier's own end of turn."""
    end = [end_of_turn(verifier_tokenizer)] if score_stop else []
    if credit not in ("token", "word") or None in end or end and not list(stop_ids):
        raise ValueError(f"credit {credit!r}: token or word; score_stop needs stop_ids and an EOS")
    rows, stopped = without_stop(ids, lengths, stop_ids)
    generated = [spans_from_ids(generator_tokenizer, y) for y in rows]  # B x (text, [T, 2])
    read = [spans_from_text(verifier_tokenizer, text) for text, _ in generated]  # B x (ids, [N, 2])
    answers = [v_ids + (end if has else []) for (v_ids, _), has in zip(read, stopped)]
    scored = answer_logprobs(verifier, verifier_tokenizer, prompts, answers)
    rewards, mask = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for i, ((text, target), (_, source)) in enumerate(zip(generated, read)):
        N, T = len(source), len(target)
        if np.isnan(scored[i]).any():  # beyond the verifier's context
            continue
        rewards[i, :T], mask[i, :T] = aligned_rewards(scored[i][:N], source, text, target, credit)
        if len(scored[i]) > N:  # the stop, at index T, was scored too
            rewards[i, T], mask[i, T] = scored[i][N], True
    return torch.from_numpy(rewards).to(ids.device), torch.from_numpy(mask).to(ids.device)


def sequence_rewards(verifier, verifier_tokenizer, prompts: list, texts: list) -> torch.Tensor:
    """Eq. 3: R = 1/|y|_V sum_j log p_V(v_j | x, v_<j) -> [B] nats per verifier token, float32.
    prompts and texts: B of each.  An empty text has no mean: NaN, which `grpo.group_advantages`
    leaves out.  Log-probabilities -1, -2, -6 -> -3."""
    answers = plain_ids(verifier_tokenizer, texts)
    scored = answer_logprobs(verifier, verifier_tokenizer, prompts, answers)
    return torch.tensor([v.mean() if len(v) else np.nan for v in scored], dtype=torch.float32)


if __name__ == "__main__": from examples import shown; shown.show(__file__)  # on one screen
