"""CME's premise, asked of public preferences: is what a verifier finds unsurprising the better one?

    python facts/premise.py ANNOTATIONS.json ... --verifier google/gemma-3-270m

Files: AlpacaEval's annotations.json (results/MODEL/ANNOTATOR/ of github.com/tatsu-lab/alpaca_eval),
lists of instruction, output_1, output_2, generator_1, generator_2, preference (1: the first one, 2:
the second; in between by how much; 0 or null: none, left out).  Each response is scored once by
`cme.sequence_rewards`' log-probabilities, a line each in --scores, so that a killed run goes on.

For the reward of Eq. 3 (per token) and for the sum, printed: how often the response with the higher
one is the preferred one, with a 95% interval (bootstrap over instructions, which the pairs of many
models share); the same for the longer response; and the weights of preference ~ logistic(reward
difference, length difference), both standardised: what the reward says at equal length.
"""

import argparse
import math
import os
import random
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts
from plumbing import one_clear_line, progress  # noqa: E402
from plumbing.files import append_line, read_json, read_lines, write_lines  # noqa: E402
from plumbing.models import answer_logprobs, load, plain_ids  # noqa: E402


def read_pairs(paths: list, instructions: int, seed: int = 0) -> list:
    """(instruction, output_1, output_2, preference for the second in [0, 1]) of a draw of so many
    instructions, 0 for all; equal outputs and missing preferences left out."""
    rows = [row for path in paths for row in read_json(path)]
    if not rows:
        raise ValueError(f"no annotations in {paths[0]}")
    asked = list(dict.fromkeys(row["instruction"] for row in rows))
    drawn = set(random.Random(seed).sample(asked, len(asked))[: instructions or None])
    return [(row["instruction"], row["output_1"], row["output_2"], row["preference"] - 1)
            for row in rows if row["instruction"] in drawn and row["preference"]
            and row["output_1"] != row["output_2"] and row["output_1"] and row["output_2"]]


def score_all(pairs: list, verifier: str, path: str, device, batch_tokens: int) -> dict:
    """{(instruction, response): (verifier's tokens, sum of their log-probabilities in nats)}."""
    scored = read_lines(path)
    write_lines(path, scored)  # without half a line, if it was killed
    done = {(row["instruction"], row["response"]): (row["tokens"], row["logp"])
            for row in scored if row["verifier"] == verifier}
    todo = {(x, y): None for x, a, b, _ in pairs for y in (a, b) if (x, y) not in done}
    by_prompt = {}
    for x, y in todo:
        by_prompt.setdefault(x, []).append(y)
    model, tokenizer = load("--verifier", verifier, device) if todo else (None, None)
    for x, texts in progress(by_prompt.items(), desc="scoring"):
        scored = answer_logprobs(model, tokenizer, [x] * len(texts), plain_ids(tokenizer, texts),
                                 batch_tokens=batch_tokens)
        for y, v in zip(texts, scored):
            done[x, y] = len(v), float(v.sum())
            append_line(path, {"verifier": verifier, "instruction": x, "response": y,
                               "tokens": len(v), "logp": float(v.sum())})
    return done


def logistic(X, y):
    """Weights w [k] of y ~ sigmoid(X w), X [n, k], y [n] in [0, 1]; a ridge of 1e-6/2 |w|^2 keeps
    them finite on separable data.  X [[1], [1], [1], [1]], y [1, 1, 1, 0] -> [ln 3]."""
    w, ridge = np.zeros(X.shape[1]), 1e-6 * len(y)
    for _ in range(10_000):  # Newton's steps, damped: a full one can diverge
        p = (1 + np.tanh(X @ w / 2)) / 2
        hessian = X.T * (p * (1 - p)) @ X + ridge * np.eye(len(w))
        step = np.linalg.solve(hessian, X.T @ (y - p) - ridge * w)
        move = np.abs(X @ step).max()  # largest change of a logit
        if move < 1e-8:
            break
        w = w + step * math.log1p(move) / move
    return w


def share(d, p, groups, samples: int = 2000) -> tuple:
    """How often sign(d) is the preference's p [n] in [0, 1], ties of d one half; 95% interval by a
    bootstrap over groups [n]."""
    hit = np.where(d == 0, 0.5, np.where(d > 0, p, 1 - p))
    n = groups.max() + 1
    sums, counts = np.bincount(groups, hit, n), np.bincount(groups, minlength=n)
    rows = np.random.default_rng(0).integers(n, size=(samples, n))
    low, high = np.quantile(sums[rows].sum(1) / counts[rows].sum(1), [0.025, 0.975])
    return hit.mean(), low, high


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("annotations", nargs="+", help="annotations.json files")
    parser.add_argument("--verifier", required=True, help="a folder or a hub name")
    parser.add_argument("--instructions", type=int, default=0, help="so many of them; 0: all")
    parser.add_argument("--scores", default="runs/premise.jsonl", help="where the scores are kept")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda if there is one")
    o = parser.parse_args()
    pairs = read_pairs(o.annotations, o.instructions)
    os.makedirs(os.path.dirname(o.scores) or ".", exist_ok=True)
    scores = score_all(pairs, o.verifier, o.scores, o.device, o.batch_tokens)
    pairs = [pair for pair in pairs if min(scores[pair[0], y][0] for y in pair[1:3]) > 0]
    number = {x: i for i, x in enumerate(dict.fromkeys(x for x, _, _, _ in pairs))}
    groups, p = np.array([number[x] for x, _, _, _ in pairs]), np.array([r[3] for r in pairs])
    first, second = (np.array([scores[r[0], r[k]] for r in pairs], float) for k in (1, 2))
    length = np.array([len(r[2]) - len(r[1]) for r in pairs], float)
    rewards = {"per token": second[:, 1] / second[:, 0] - first[:, 1] / first[:, 0],
               "summed": second[:, 1] - first[:, 1]}
    print(f"{len(pairs)} pairs on {len(number)} instructions; mean preference for the second "
          f"{p.mean():.3f}\n\n| what is higher | is preferred | weight with length | of length |"
          "\n|---|---|---|---|")
    z = length / length.std()
    for name, d in [*rewards.items(), ("length", length)]:
        X = np.stack([np.ones_like(d), d / d.std()] + [z] * (name != "length"), 1)
        w = logistic(X, p)
        hit, low, high = share(d, p, groups)
        more = f"{w[1]:+.2f} | {w[2]:+.2f}" if name != "length" else f"- | {w[1]:+.2f}"
        print(f"| {name} | {hit:.3f} ({low:.3f} to {high:.3f}) | {more} |")


if __name__ == "__main__":
    one_clear_line(main, "premise.py")
