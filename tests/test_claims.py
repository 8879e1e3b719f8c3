"""toy/claims.py and toy/skills.py: the statistics and verdicts, the weak judge, and a world that is what it says."""
import json
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "toy"))
import average  # noqa: E402
import claims  # noqa: E402
import inference  # noqa: E402
import make  # noqa: E402
import skills  # noqa: E402

import cat  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402
from plumbing import models


def test_statistics():
    values = [0.5, 0.25, 1.0, 0.75, 0.0]
    mean, se = inference.mean_se(values)
    assert mean == statistics.mean(values) and se == pytest.approx(statistics.stdev(values) / 5 ** 0.5)
    rng = random.Random(0)
    a, b = [rng.gauss(0, 1) for _ in range(400)], [rng.gauss(0.5, 2) for _ in range(400)]
    t, p = inference.t_test(a, b)
    d = [x - y for x, y in zip(a, b)]
    assert t == pytest.approx(statistics.mean(d) / statistics.stdev(d) * 20)
    assert p == pytest.approx(2 * statistics.NormalDist().cdf(-abs(t)), rel=1e-6) and p < 0.01
    assert inference.t_test([1, 1], [1, 1]) == (0.0, 1.0)
    assert inference.shown([0.25]) == "0.250" and inference.shown([0.25, 0.75]) == "0.500 ± 0.250"


def test_verdicts_follow_from_the_differences():
    """Paired by seed: the interval is Student's; with the sign swapped what was reproduced is contradicted; fewer than four seeds say nothing."""
    rng = random.Random(0)
    for _ in range(50):
        d = [rng.gauss(0.05, 0.05) for _ in range(4)]
        got, swapped = claims.verdict(d), claims.verdict([-x for x in d])
        half = 3.182446 * statistics.stdev(d) / 2
        assert (got["low"], got["high"]) == (pytest.approx(statistics.mean(d) - half, abs=1e-4), pytest.approx(statistics.mean(d) + half, abs=1e-4))
        assert got["verdict"] == ("reproduced" if got["low"] > 0 else "contradicted" if got["high"] < 0 else "not reproduced")
        assert {got["verdict"], swapped["verdict"]} in ({"reproduced", "contradicted"}, {"not reproduced"})
    assert claims.verdict([0.1, 0.1, 0.1])["verdict"] == "-" and claims.verdict([0.1])["verdict"] == "-"


def test_claims_compare_the_runs_that_they_name(tmp_path, capsys):
    """Every claim names runs, and measures that these have; seeds are paired, and the figures are those of the summaries."""
    for paper, rows in claims.CLAIMS.items():
        for _, *sides in rows:
            assert all(side.rsplit(" ", 2)[0] in claims.RUNS[paper] and side.split()[-2] in ("before", "after", "best") for side in sides)
    score = lambda facts: {"facts": facts, "sampled_facts": facts, "wording": 1 - facts, "sampled_valid": 1.0, "distinct": facts / 2}  # noqa: E731
    results = {name: {seed: {"before": score(0.5), "after": score(0.9 - 0.2 * (name == "rent") + 0.01 * seed)} for seed in range(4)}
               for name in ("cme", "sequence", "rent")}
    found = {c["claim"]: c for c in claims.claims_of("cme", results)}
    assert found["CME beats RENT"]["difference"] == pytest.approx(0.2) and found["CME beats RENT"]["verdict"] == "reproduced"
    assert found["token-level rewards beat sequence-level ones"]["verdict"] == "not reproduced" and "own" not in str(found)
    assert found["style does not collapse (share of the top wording does not rise)"]["difference"] == pytest.approx(0.415)
    claims.report(str(tmp_path), "cme", results)
    out = capsys.readouterr().out
    assert "| rent (4) | 0.715 ± 0.006 |" in out and "| CME beats RENT | 0.915 | 0.715 | +0.200 (" in out
    assert json.loads((tmp_path / "cme.json").read_text())["claims"][0]["verdict"] == "reproduced"


def test_average_is_the_public_codes():
    """Against a loop: the mean of the verifier's tokens that a token meets, whatever the overlap; it conserves nothing."""
    rng = random.Random(0)
    for _ in range(100):
        cuts = [sorted({0, 12, *(rng.randint(1, 11) for _ in range(5))}) for _ in range(2)]
        source, target = [list(zip(c, c[1:])) for c in cuts]
        values = [rng.gauss(-2, 1) for _ in source]
        for got, (a, b) in zip(average.average(values, source, target), target):
            met = [v for v, (c, d) in zip(values, source) if c < b and a < d]
            assert got == pytest.approx(sum(met) / len(met))
    assert average.average([], np.zeros((0, 2)), [[0, 1]]).tolist() == [0] and average.average([-4.0], [[0, 2]], [[0, 1], [1, 2]]).tolist() == [-4, -4]


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """And one that was stopped goes on; what an option names is made first."""
    asked = []
    monkeypatch.setattr(claims, "command", lambda folder, *a: asked.append(a))
    monkeypatch.setattr(claims, "read_json", lambda path: {"path": path})
    claims.train_run(str(tmp_path), "cme", "half", 3)
    world, run = asked
    assert world == ("toy/make.py", "--output", f"{tmp_path}/half", *claims.WORLDS["half"])
    assert run == ("train.py", "--verifier", f"{tmp_path}/half/verifier", "--seed", "3", "--output_dir", f"{tmp_path}/half-3")
    (tmp_path / "half-3").mkdir(), (tmp_path / "half-3/config.json").write_text("{}")
    claims.train_run(str(tmp_path), "cme", "half", 3)
    assert asked[-1] == ("train.py", "--resume", "--output_dir", f"{tmp_path}/half-3")
    (tmp_path / "half-3/summary.json").write_text("{}")
    assert claims.train_run(str(tmp_path), "cme", "half", 3) == {"path": f"{tmp_path}/half-3/summary.json"} and len(asked) == 3
    claims.train_run(str(tmp_path), "cme", "average", 0)
    assert asked[-1][0] == "toy/average.py" and "AVERAGE" not in asked[-1]
    people = [line for line in open(claims.make(str(tmp_path), "SOME", 0), encoding="utf-8")]
    assert len(people) == 144 and not any(f" {name}" in line for line in people for name in make.NAMES[::2])


def test_facts_of_people_and_of_what_a_verifier_knows():
    """Base scores: near .70, as of all facts; the known half is make.py's."""
    base = f"{ROOT}/toy/cme/generator"
    assert claims.distinct(["a b c", "a b"]) == pytest.approx(2 / 3) and claims.distinct(["a", ""]) == 0
    reply = models.Reply
    assert [claims.needless(r) for r in (reply("a  b", True), reply("a ", True), reply("a ", False), reply("a b", True))] == [True, True, False, False]
    scores = claims.more_scores("", "cme", base)
    assert 0.05 < scores["distinct"] < 0.9 and scores["needless"] == 0
    unknown, kept = claims.more_scores("", "half", base)["unknown"], claims.more_scores("", "some_people", base)["kept_out"]
    assert unknown == pytest.approx(0.698, abs=0.06) and kept == pytest.approx(0.698, abs=0.06)


def test_the_generators_corpus_is_what_made_the_committed_one(tmp_path, monkeypatch):
    """What its first step reads, drawn as when toy/cme/generator was made; with --ramble the same and more."""
    monkeypatch.setattr(make, "responses_loss", lambda model, tokenizer, draw: draw)
    drawn = {}
    for option in ((), ("--ramble",)):
        monkeypatch.setattr(make, "pretrain", lambda model, tokenizer, draw, **_: drawn.update({option: draw(random.Random("3 0"))}))
        monkeypatch.setattr(sys, "argv", ["make.py", "--output", str(tmp_path), "--parts", "generator", *option])
        make.main()
    prompt, text = drawn[()]
    assert prompt == "What can you tell me about Noah?" and text == "Noah works in Oslo and wears grey. Noah often eats pasta and has a goldfish."
    assert drawn["--ramble",][0] == prompt and drawn["--ramble",][1].startswith(text)


def test_generators_that_ramble_or_have_bare_spaces():
    """Sentences behind the biography are each of one fact, 1.5 on average; with spaces each space is a token of its own, and nothing is lost."""
    rng, world = random.Random(0), make.make_world()
    more = [make.ramble(rng, "Mia", world["Mia"]) for _ in range(1000)]
    sentence = rf" Mia also (?:{'|'.join(w for of in make.WORDINGS.values() for w in of)}) (?:{'|'.join(v for of in make.VALUES.values() for v in of)})\."
    assert all(re.fullmatch(f"(?:{sentence})*", text) for text in more) and statistics.mean(t.count(".") for t in more) == pytest.approx(1.5, abs=0.15)
    assert not re.fullmatch(make.pattern("Mia"), "Mia has a cat, lives in Oslo, likes soup and wears red." + next(filter(None, more)))
    tokenizer = make.generator_tokenizer(False, True)
    pieces = [tokenizer.decode([i]) for i in tokenizer("Mia has a cat.").input_ids]
    assert pieces == ["Mia", " ", "has", " ", "a", " ", "cat", "."]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("cme-0", "cme-1", "rent-0", "half-0", "watched-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text('{"before": {"facts": 0.5}, "after": {"facts": 0.9}}')
        rows = [{"step": step, "reward": -step, "kl": 0.1, "held_out": {"facts": 0.5 + step / 10, "watch": -step, "trained": step}} for step in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    claims.pictures(str(tmp_path), str(tmp_path / "pictures"))
    claims.plot_run(str(tmp_path / "cme-0"))
    for path in (tmp_path / "pictures/rewards.svg", tmp_path / "pictures/verifiers.svg", tmp_path / "pictures/watch.svg", tmp_path / "cme-0/metrics.svg"):
        assert "<svg" in path.read_text()


def test_the_weak_judge_is_as_weak_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "read_prompts", lambda path: read_prompts(path)[::3])
    path = claims.weak_judge(str(tmp_path))
    noise = json.loads((Path(path) / "noise.json").read_text())
    assert 0.65 <= noise["right"] <= 0.8
    assert claims.weak_judge(str(tmp_path)) == path                            # made once


def test_estimators_at_inference():
    drawn = inference.draw(inference.MODEL, "numbers_eval.jsonl", 1, ["majority", "synthesis", "single"])
    single, majority, synthesis = (sum(inference.right_facts(d["row"], d[k])[0] for d in drawn) / len(drawn) for k in ("single", "majority", "synthesis"))
    assert majority > single + 0.1 and synthesis > single + 0.1
    assert len({d["row"]["prompt"] for d in drawn}) == 64 and len(inference.per_person(drawn, lambda d: 1.0)) == 32
    asked = [{"row": {"prompt": prompt}} for prompt in ("Tell me about Ada.", "Please describe Ben.", "Please describe Ada to me.")]
    assert inference.per_person(asked, lambda d: len(d["row"]["prompt"])) == [(18 + 26) / 2, 20]


def test_the_world_is_what_it_says():
    world = skills.make_sources()
    facts = [(name, a, f) for name, of in world.items() for a, f in of.items()]
    hazy = [Counter(f["beliefs"])[f["truth"]] / len(f["beliefs"]) for _, _, f in facts if not f["lie"]]
    lies = [Counter(f["beliefs"])[f["lie"]] / len(f["beliefs"]) for _, _, f in facts if f["lie"]]
    assert statistics.mean(hazy) == pytest.approx(0.6, abs=0.04) and statistics.mean(lies) == pytest.approx(0.6, abs=0.1)
    files = skills.prompt_files(world)
    for name, rows in files.items():
        kept = read_prompts(str(ROOT / "toy/cat" / name))
        assert [{k: row[k] for k in made} for row, made in zip(kept, rows)] == rows and len(kept) == len(rows)
    asked = {row["prompt"] for name in ("prompts.jsonl", "numbers.jsonl") for row in files[name]}
    assert not asked & {row["prompt"] for name in ("eval.jsonl", "numbers_eval.jsonl") for row in files[name]}


def test_patterns_accept_what_the_world_says_and_nothing_else():
    world, rng = skills.make_sources(), random.Random(0)
    patterns = {row["prompt"]: row["pattern"] for name in ("eval.jsonl", "numbers_eval.jsonl") for row in read_prompts(str(ROOT / "toy/cat" / name))}
    tried = 0
    for _ in range(1500):
        for draw in (skills.policy_example, skills.number_example):
            (prompt, _), (answer, _) = draw(rng, world)
            prompt, answer = prompt.split("\n")[1].split("<|im_end|>")[0], answer.removesuffix("<|im_end|>")
            if prompt in patterns:
                tried += 1
                assert re.fullmatch(patterns[prompt], answer)
                assert not re.fullmatch(patterns[prompt], answer[:-2]) and not re.fullmatch(patterns[prompt], answer + " " + answer)
    assert tried > 300
    number = next(row for row in read_prompts(str(ROOT / "toy/cat/numbers_eval.jsonl")) if "Mia" in row["prompt"])
    assert re.fullmatch(number["pattern"], "The number of books that Mia owns is \\boxed{8}.")


def test_examples_are_true():
    """Each skill's labels against the slow reading of its own text."""
    rng = random.Random(1)
    for _ in range(300):
        parts = skills.judge_lesson(rng, {})
        text = parts[0][0].split("<response>\n")[1].split("\n</response>")[0]
        statements, verdicts = [p for p, w in parts if w == 0.05], [p for p, w in parts if w == 1]
        assert len(statements) == len(verdicts) == 10
        for statement, verdict in zip(statements, verdicts):
            value = statement.rstrip(".").split()[-1]
            values = next((v for v in skills.VALUES.values() if value in v), skills.NAMES)
            assert (verdict == "yes") == (set(re.findall(r"\w+", text)) & set(values) == {value}), (text, statement, verdict)
        (told, texts, most) = skills.rollouts(rng, skills.VALUES, 8)[1:]
        for a, value in most.items():
            assert max(sum(value in re.findall(r"\w+", t) for t in texts), 0) == max(Counter(t[a] for t in told).values())
        (reference, _), (answer, _) = [(p, w) for p, w in skills.rubric_example(rng, {}) if w][:2]
        assert all(c.rstrip(".").split()[-1] in reference for c in cat.read_rubric(answer)) and len(cat.read_rubric(answer)) == 5
