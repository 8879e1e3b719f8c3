"""toy/claims.py and toy/skills.py: the statistics, the LoRA, the weak judge, and a world that is what it says."""
import json
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "toy"))
import claims  # noqa: E402
import skills  # noqa: E402

import cat  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402
from plumbing import models


def test_statistics():
    values = [0.5, 0.25, 1.0, 0.75, 0.0]
    mean, se = claims.mean_se(values)
    assert mean == statistics.mean(values) and se == pytest.approx(statistics.stdev(values) / 5 ** 0.5)
    rng = random.Random(0)
    a, b = [rng.gauss(0, 1) for _ in range(400)], [rng.gauss(0.5, 2) for _ in range(500)]
    t, p = claims.t_test(a, b)
    assert t == pytest.approx((statistics.mean(a) - statistics.mean(b)) / (statistics.variance(a) / 400 + statistics.variance(b) / 500) ** 0.5)
    assert p == pytest.approx(2 * statistics.NormalDist().cdf(-abs(t)), rel=1e-6) and p < 0.01
    assert claims.t_test([1, 1], [1, 1]) == (0.0, 1.0)


def test_lora_starts_at_the_model_and_leaves_it_alone():
    model, tokenizer = models.load("toy", claims.MODEL, "cpu", train=True)
    ids = torch.tensor([tokenizer("Tell me about Mia.").input_ids])
    before = model(input_ids=ids).logits
    claims.add_lora(model, rank=4)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2 and all(name.endswith((".A", ".B")) for name in trained)      # 4 layers of 7 linear maps
    model(input_ids=ids).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith(".B"))


def test_the_weak_judge_is_as_weak_as_asked(tmp_path):
    path = claims.weak_judge(str(tmp_path))
    noise = json.loads((Path(path) / "noise.json").read_text())
    assert 0.65 <= noise["right"] <= 0.8
    assert claims.weak_judge(str(tmp_path)) == path                            # made once


def test_estimators_at_inference():
    drawn = claims.draw(claims.MODEL, "numbers_eval.jsonl", 1, ["majority", "synthesis", "single"])
    single, majority, synthesis = (sum(claims.right_facts(d["row"], d[k])[0] for d in drawn) / len(drawn) for k in ("single", "majority", "synthesis"))
    assert majority > single + 0.1 and synthesis > single + 0.1
    assert len(claims.per_prompt(drawn, lambda d: 1.0)) == len({d["row"]["prompt"] for d in drawn}) == 64


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
