"""facts/: the files are what make.py writes, nothing held out is trained on, answers are judged as they should be."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from facts import make
from plumbing.prompts import read_prompts

ROOT = Path(__file__).parent.parent
TABLE = make.read_table()
TRAINED = [row["prompt"] for row in read_prompts(str(ROOT / "facts/prompts.jsonl"))]
EVAL = read_prompts(str(ROOT / "facts/eval.jsonl"))


def says(text, value):
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)


def subject_of(row):
    """The row of the table that an eval row asks about."""
    kind = row["facts"][0]["kind"].partition("_")[0]
    found = [r for r in TABLE if r["kind"] == kind for p in make.HELD_OUT[kind]
             if row["prompt"] == p.format(r["subject"]) + make.SHORT]
    assert len(found) == 1
    return found[0]


def test_files_are_what_make_writes(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "facts/make.py"), "--output", str(tmp_path)], check=True)
    for name in ("prompts.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "facts" / name).read_bytes()
        assert (tmp_path / name).stat().st_size < 400_000


def test_the_table():
    assert all(row["kind"] in ("capital", "symbol", "city") and row["subject"] and row["right"] for row in TABLE)
    keys = [(row["kind"], row["subject"]) for row in TABLE]
    assert len(set(keys)) == len(keys)
    of = {kind: [row for row in TABLE if row["kind"] == kind] for kind in ("capital", "symbol", "city")}
    assert len(of["capital"]) >= 150 and len(of["symbol"]) >= 60 and len(of["city"]) >= 100
    for kind in ("capital", "symbol"):
        assert len({row["right"] for row in of[kind]}) == len(of[kind])
    countries = {row["subject"].removeprefix("the ") for row in of["capital"]}
    assert {row["right"] for row in of["city"]} <= countries
    assert not {row["subject"] for row in of["city"]} & {row["right"] for row in of["capital"]}
    assert all(re.fullmatch("[A-Z][a-z]?", row["right"]) for row in of["symbol"])
    # symbols that are English words, or pass for one, could not be told from them
    assert not {row["right"] for row in of["symbol"]} & {"He", "Be", "As", "In", "I", "At", "Am", "No"}


def test_training_prompts_carry_no_answers():
    with open(ROOT / "facts/prompts.jsonl", encoding="utf-8") as f:
        assert all(set(json.loads(line)) == {"prompt"} for line in f)
    assert len(TRAINED) == len(set(TRAINED)) > 1000


def test_nothing_held_out_is_trained_on():
    assert not set(TRAINED) & {row["prompt"] for row in EVAL}
    for kind, phrasings in make.HELD_OUT.items():
        for phrasing in phrasings:
            assert phrasing not in make.TRAINED[kind]
            before, after = (re.escape(half) for half in phrasing.split("{}"))
            assert not any(re.match(before + ".+" + after, prompt) for prompt in TRAINED)
    for row in EVAL:
        subject = subject_of(row)["subject"]
        named = [prompt for prompt in TRAINED if says(prompt, subject)]
        expected = 0 if row["facts"][0]["kind"].endswith("_new") else 4
        assert len(named) == expected, (subject, named)


def test_a_held_out_country_is_held_out_with_its_cities():
    part = make.parts(TABLE)
    new = {name for name, where in part.items() if where == "new"}
    assert len(new) == 74                                            # a third of 148 + 74 that have one spelling
    for row in TABLE:
        if row["kind"] == "city" and row["right"] in new:
            assert not any(says(prompt, row["subject"]) for prompt in TRAINED)


def test_judging():
    for row in EVAL:
        [fact], item = row["facts"], subject_of(row)
        assert fact["right"] == item["right"] and not item["also"]
        for wrapped in ("{}", "The answer is {}.", "It is {}, of course."):
            assert evaluate.fact_right(wrapped.format(fact["right"]), fact)
            for wrong in fact["wrong"][::9]:
                assert not evaluate.fact_right(wrapped.format(wrong), fact)
        assert not evaluate.fact_right(f"{fact['right']} or {fact['wrong'][0]}", fact)
        # the question gives nothing away, and may be repeated in the answer
        assert not evaluate.fact_right(row["prompt"], fact)
        assert evaluate.fact_right(f"{row['prompt']} {fact['right']}.", fact)


@pytest.mark.parametrize("kind, text, right", [
    ("capital", "Canberra.", True), ("capital", "The capital of Australia is Sydney.", False),
    ("capital", "Canberra, not Sydney.", False), ("capital", "canberra", False)])
def test_one_judgement(kind, text, right):
    [row] = [r for r in TABLE if r["subject"] == "Australia"]
    fact = {"right": row["right"], "wrong": make.wrong_values(row, TABLE)}
    assert evaluate.fact_right(text, fact) is right


def test_knows(capsys, monkeypatch, tmp_path):
    """A toy verifier knows none of these facts, but the counts are of every third question; a copied question is seen, an answer is none."""
    from facts import knows
    say = {True: "The capital of {} is {}.", False: "It is Atlantis."}
    rows = [{"response": say[i % 2 == 0].format(asked["subject"], asked["subject"])} for i, (_, asked) in enumerate(knows.questions())]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capitals = [i for i, (_, asked) in enumerate(knows.questions()) if asked["kind"] == "capital"]
    monkeypatch.setattr(sys, "argv", ["knows.py", "toy/cme/verifier", str(tmp_path / "r.jsonl")])
    knows.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and sum(int(line.split()[-1]) for line in lines if not line.startswith('"')) == 53
    assert f": {sum(i % 2 == 0 for i in capitals)} of {len(capitals)} answers" in last
