"""Does a verifier know the facts?  And does a policy copy its question instead of answering it?

    python facts/knows.py google/gemma-3-270m              # a model: two minutes on a CPU
    python facts/knows.py results/models/*/responses.jsonl # what evaluate.py wrote of facts/eval.jsonl

Of a model, on every third held-out question: is the right value likelier (per token, CME Eq. 3) than each of nine wrong ones in
the same sentence, and than the country's own name?  Of responses: how many about capitals say "is X" of the country X itself.
"""
import os
import random
import re
import sys
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cme  # noqa: E402
from facts.make import FOLDER, HELD_OUT, SHORT, read_table  # noqa: E402
from plumbing import one_clear_line  # noqa: E402
from plumbing.files import read_lines  # noqa: E402
from plumbing.models import load  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402

SAY = {"capital": "The capital of {} is {}.", "symbol": "The chemical symbol of {} is {}.", "city": "{} is in {}."}


def questions() -> list:
    """(row of eval.jsonl, row of facts.tsv that it asks about)."""
    asks = {ask.format(r["subject"]) + SHORT: r for r in read_table() for ask in HELD_OUT[r["kind"]]}
    return [(row, asks[row["prompt"]]) for row in read_prompts(os.path.join(FOLDER, "eval.jsonl"))]


def knows(model: str):
    rng, prompts, texts, kinds = random.Random(0), [], [], []
    for row, asked in questions()[::3]:
        [fact] = row["facts"]
        values = [fact["right"], *rng.sample(fact["wrong"], 9)] + [asked["subject"]] * (asked["kind"] == "capital")
        texts += [SAY[asked["kind"]].format(asked["subject"], value) for value in values]
        prompts += [row["prompt"]] * len(values)
        kinds.append((asked["kind"], len(values)))
    verifier, tokenizer = load("verifier", model)
    scores, found = iter(cme.sequence_rewards(verifier, tokenizer, prompts, texts).tolist()), defaultdict(list)
    for kind, n in kinds:
        right, *others = [next(scores) for _ in range(n)]
        found[kind].append(right > max(others[:9]))
        if kind == "capital":
            found['"The capital of X is X." is less likely than the right answer'].append(right > others[9])
    for name, values in found.items():
        print(f"{name}: {sum(values)} of {len(values)}")


def copies(path: str):
    pairs = [(r["response"] or "", asked) for r, (_, asked) in zip(read_lines(path), questions()) if asked["kind"] == "capital"]
    copied = [re.search(rf"\bis (?:the city of )?(?:the )?{re.escape(asked['subject'])}\b", text) for text, asked in pairs]
    print(f"{path}: {sum(map(bool, copied))} of {len(pairs)} answers about a capital name the country")


def main():
    if len(sys.argv) < 2:
        raise ValueError("give a model (a folder or a hub name), or files of responses")
    for what in sys.argv[1:]:
        copies(what) if what.endswith(".jsonl") else knows(what)


if __name__ == "__main__":
    one_clear_line(main, "knows.py")
