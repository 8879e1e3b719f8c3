"""Does a verifier know the facts?  Does it give the right value more probability than nine wrong ones in the same sentence?

    python facts/knows.py google/gemma-3-270m            # every third held-out question, two minutes on a CPU
"""
import os
import random
import sys
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cme  # noqa: E402
from facts.make import HELD_OUT, SHORT, read_table  # noqa: E402
from plumbing import one_clear_line  # noqa: E402
from plumbing.models import load, pick_device  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402

SAY = {"capital": "The capital of {} is {}.", "symbol": "The chemical symbol of {} is {}.", "city": "{} is in {}."}


def main():
    if len(sys.argv) != 2:
        raise ValueError("give one verifier, a folder or a hub name")
    rows = read_prompts(os.path.join(os.path.dirname(os.path.abspath(__file__)), "eval.jsonl"))[::3]
    of = {phrasing.format(r["subject"]) + SHORT: r for r in read_table() for phrasing in HELD_OUT[r["kind"]]}
    rng, prompts, texts, kinds = random.Random(0), [], [], []
    for row in rows:
        [fact], asked = row["facts"], of[row["prompt"]]
        values = [fact["right"], *rng.sample(fact["wrong"], 9)]
        values += [asked["subject"]] * (asked["kind"] == "capital")
        texts += [SAY[asked["kind"]].format(asked["subject"], value) for value in values]
        prompts += [row["prompt"]] * len(values)
        kinds.append((asked["kind"], len(values)))
    verifier, tokenizer = load("verifier", sys.argv[1], pick_device())
    scores, found = iter(cme.sequence_rewards(verifier, tokenizer, prompts, texts).tolist()), defaultdict(list)
    for kind, n in kinds:
        right, *others = [next(scores) for _ in range(n)]
        found[kind].append(right > max(others[:9]))
        if kind == "capital":
            found['"The capital of X is X." is less likely than the right answer'].append(right > others[9])
    for name, values in found.items():
        print(f"{name}: {sum(values)} of {len(values)}")


if __name__ == "__main__":
    one_clear_line(main, "knows.py")
