"""The parts of evaluate.py that train.py uses."""
import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

import cat
import evaluate
from toy import make
from plumbing import models, files, prompts
from test_train import fork


@pytest.mark.parametrize("text, right", [
    ("in York", True), ("in New York", False), ("in York or Paris", False), ("in Yorkshire", False), ("York, York.", True), ("", False), ("in Paris", False)])
def test_fact_right(text, right):
    assert evaluate.fact_right(text, {"right": "York", "wrong": ["New York", "Paris"]}) is right


def test_fact_right_when_a_wrong_value_is_part_of_the_right_one():
    fact = {"right": "New York", "wrong": ["York", "C++"]}
    assert evaluate.fact_right("in New York.", fact) and not evaluate.fact_right("in York.", fact) and not evaluate.fact_right("New York, C++", fact)


def test_scores():
    facts = [{"right": "cat", "wrong": ["dog"], "kind": "hazy"}, {"right": "Oslo", "wrong": ["Rome"], "kind": "wrong"}]
    rows = [{"prompt": "Who is Mia?", "facts": facts, "answer": None, "criteria": [], "pattern": r"Mia has a \w+ in \w+\."}, {"prompt": "Who is Ben?", "facts": facts, "answer": None, "criteria": [], "pattern": r"Ben.*"}]
    class Model:
        def replies(self, prompts, *, texts=("Mia has a cat in Rome.", "Ben has a dog in Oslo."), temperature, **settings):
            return [[models.Reply(text if temperature == 0 else text.replace("Rome", "Oslo"), end, 7)] for text, end in zip(texts, (True, False))]
    got = evaluate.held_out(Model(), rows, max_new_tokens=9)
    assert got == {"facts": 0.5, "facts_hazy": 0.5, "facts_wrong": 0.5, "valid": 0.5, "stopped": 0.5, "wording": 1.0, "tokens": 7, "characters": 22,
                   "sampled_facts": 0.75, "sampled_valid": 0.5}
    assert evaluate.measures(rows[0], "Mia has a cat in Oslo. And", True, 1)["valid"] == 0                # the whole response, not its beginning
    bare = [{"prompt": "Hi", "facts": [], "answer": None, "pattern": None}]
    assert evaluate.measures(bare[0], "Hello", True, 2) == {"stopped": True, "tokens": 2, "characters": 5}
    assert {m: v.tolist() for m, v in evaluate.values_of(bare * 2, [models.Reply("Hi"), models.Reply()]).items() if m == "characters"} == {"characters": [2, pytest.approx(float("nan"), nan_ok=True)]}


def test_toy_rows_accept_every_biography_and_nothing_else():
    """The committed evaluation rows against the world that make.py describes."""
    import random
    rng, world = random.Random(0), make.make_world()
    rows = prompts.read_prompts("toy/cme/eval.jsonl")
    assert len(rows) == 96 and not {r["prompt"] for r in rows} & {r["prompt"] for r in prompts.read_prompts("toy/cme/prompts.jsonl")}
    kinds = [f["kind"] for r in rows for f in r["facts"]]
    assert kinds.count("wrong") / len(kinds) == pytest.approx(0.3, abs=0.01)
    for row, name in zip(rows, make.NAMES * 2):
        truth = {a: f["truth"] for a, f in world[name].items()}
        text = make.biography(rng, name, truth)
        assert re.fullmatch(row["pattern"], text) and all(evaluate.fact_right(text, f) for f in row["facts"])
        lie = make.biography(rng, name, {a: next(v for v in values if v != truth[a]) for a, values in make.VALUES.items()})
        assert re.fullmatch(row["pattern"], lie) and not any(evaluate.fact_right(lie, f) for f in row["facts"])
        for spoiled in (text + " ", text[:-1], " " + text, text.replace(name, "Max", 1), text.replace(" and ", " but ", 1), text + " " + text,
                        text.replace(".", ". Also nice.", 1), text.replace(truth["pet"], truth["food"])):
            assert not re.fullmatch(row["pattern"], spoiled)


def test_noise_of_the_world():
    import random
    rng = random.Random(0)
    for fact, share in (({"truth": "red", "lie": None}, {"red": 0.6}), ({"truth": "red", "lie": "blue"}, {"red": 0.25, "blue": 0.6})):
        drawn = [make.noisy_value(rng, fact, make.VALUES["colour"]) for _ in range(5000)]
        for value, p in share.items():
            assert drawn.count(value) / 5000 == pytest.approx(p, abs=0.03)
        assert set(drawn) == set(make.VALUES["colour"])


def test_toy_can_be_made_again(tmp_path):
    """make.py makes the committed prompts and tokenizers again, and its training continues where it was killed, to the bit."""
    command = ["--steps", "4", "--save_every", "2", "--parts", "data,generator", "--output"]
    assert fork([*command, tmp_path / "a"], tmp_path, script=make)[0] == 0
    for file in ("prompts.jsonl", "eval.jsonl", "generator/tokenizer.json", "generator/chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == open(f"toy/cme/{file}", "rb").read()
    real = os.replace

    def patch():
        os.replace = lambda a, b: (real(a, b), os.kill(os.getpid(), signal.SIGKILL))                      # the first checkpoint is the last thing it does
    assert fork([*command, tmp_path / "b"], tmp_path, patch, make)[0] == -signal.SIGKILL
    assert fork([*command, tmp_path / "b"], tmp_path, script=make)[0] == 0
    assert (tmp_path / "a/generator/model.safetensors").read_bytes() == (tmp_path / "b/generator/model.safetensors").read_bytes()


def test_read_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two\r\n")
    assert [(r["prompt"], r["where"].rsplit("/", 1)[1]) for r in prompts.read_prompts(str(tmp_path / "p.txt"))] == [("one", "p.txt:1"), ("two", "p.txt:3")]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\u2028there"}]
    rows = [{"prompt": messages}, {"instruction": "b", "output": "ignored"}, {"problem": "c"}, "d"]
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.jsonl", "p.json"):
        assert [r["prompt"] for r in prompts.read_prompts(str(tmp_path / name))] == [messages, "b", "c", "d"]


def test_half_lines_are_forgiven(tmp_path):
    path = str(tmp_path / "m.jsonl")
    assert list(files.read_lines(path)) == []
    files.append_line(path, {"a": "é\n", "b": [1.5, float("nan")], "c": float("inf")})
    with open(path, "a") as f:
        f.write('{"a": 1')
    assert list(files.read_lines(path)) == [{"a": "é\n", "b": [1.5, None], "c": None}]


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "f"
    files.write_atomically(str(path), "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(str(path), "new")
    assert path.read_text() == "old"


def test_replies():
    """In the order of the prompts, though batches are of like length; with the stop token among the tokens, not in the text."""
    model, tokenizer = models.load("toy", "toy/cme/generator", "cpu")
    toy, asked = models.LocalModel(model, tokenizer, batch_tokens=100), [
        "Who is Mia?", "What can you tell me about Zoe?", "Describe Ben.", "Tell me about " + "Ada " * 900 + ".", "Tell me about Ada."]
    answers = [reply for [reply] in toy.replies(asked, max_new_tokens=40, temperature=0.0)]  # two at a time, at most
    assert answers.pop(3) == models.Reply(None, None, None)  # does not fit
    for name, reply in zip(["Mia", "Zoe", "Ben", "Ada"], answers, strict=True):
        assert reply.response.split()[0] == name and reply.response.endswith(".")
        assert reply.stopped and reply.tokens == len(tokenizer(reply.response).input_ids) + 1
    cut = toy.replies(asked[:3], n=2, max_new_tokens=3, temperature=0.0)
    assert [(r.stopped, r.tokens) for group in cut for r in group] == [(False, 3)] * 6
    settings = {"max_new_tokens": 24, "temperature": 1.0}
    same = toy.complete(asked[:1], n=16, seed=3, **settings)
    assert toy.complete(asked[:1], n=16, seed=3, **settings) == same != toy.complete(asked[:1], n=16, seed=4, **settings)
    assert len({text for [text] in toy.complete(asked[:1] * 16, seed=3, **settings)}) > 8  # no batch has another's noise


def test_folders_with_brackets(tmp_path):
    (tmp_path / "a[1]/checkpoint-000002").mkdir(parents=True), (tmp_path / "a[1]/checkpoint-000004.tmp").mkdir()
    assert [c[-6:] for c in files.checkpoints(str(tmp_path / "a[1]"))] == ["000002"]


def test_a_stop_token_that_is_not_special_is_no_text():
    toy = models.LocalModel(*models.load("toy", "toy/cme/generator", "cpu"))
    row = toy.tokenizer("Mia has a cat.").input_ids
    toy.stop_ids = row[-1:]
    ids = torch.tensor([row, row])
    assert toy.texts(ids, torch.tensor([len(row), len(row) - 1])) == (["Mia has a cat"] * 2, [True, False])


def test_a_wrong_value_that_begins_like_the_right_one():
    fact = {"right": "York", "wrong": ["York City"]}
    assert evaluate.fact_right("in York.", fact) and not evaluate.fact_right("in York City.", fact)


@pytest.mark.parametrize("given, style", [(["4", "5"], "stepwise"), (["4", None], "freeform"), ([None, "4"], "freeform"), (["", "4"], "freeform")])
def test_a_synthesis_is_stepwise_if_every_row_has_an_answer(given, style):
    asked = []
    model = SimpleNamespace(complete=lambda prompts, n=1, **_: (asked.append(prompts), [["7"] * n for _ in prompts])[1])
    o = SimpleNamespace(max_new_tokens=8, temperature=0.0, group_size=2)
    replies = evaluate.answers(model, "synthesis", [{"prompt": "a", "answer": answer} for answer in given], o, 0)
    assert [r.response for r in replies] == ["7", "7"] and all(x.startswith(cat.SYNTHESIS[style]) for x in asked[1])


def test_rows_of_other_peoples_data_sets(tmp_path, capsys, monkeypatch):
    """There a row that is no prompt is left out, and said so; in one's own file it is an error."""
    path = str(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"instruction": "a"}\n{"instruction": " "}\n{"text": "b"}\n{"instruction": "c"}\n')
    monkeypatch.setattr(prompts, "hf_hub_download", lambda *_, **__: path)
    assert [r["prompt"] for r in prompts.read_prompts("alpaca_eval")] == ["a", "c"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["left out", f"{path}:2"], ["left out", f"{path}:3"]] and "not empty" in said[0]
    with pytest.raises(ValueError, match="p.jsonl:2"):
        prompts.read_prompts(path)


def test_held_out_clips_the_mean_not_the_examples(monkeypatch):
    """HealthBench: of points (1, -3), verdicts (yes, yes) and (yes, no) are -2 and 1, whose mean is below 0."""
    rows = [prompts.check_row("a", {"prompt": "a", "rubrics": [{"criterion": "x", "points": 1}, {"criterion": "y", "points": -3}]})] * 2
    monkeypatch.setattr(cat, "judge_rubrics", lambda *_: [[[True, True]], [[True, False]]])
    model = SimpleNamespace(replies=lambda prompts, **_: [[models.Reply("a", True, 1)] for _ in prompts])
    assert evaluate.held_out(model, rows, max_new_tokens=4, judge=object())["rubric"] == 0


def test_an_input_beside_a_prompt_is_ones_own():
    assert prompts.check_row("a:1", {"prompt": "a", "input": "b"})["prompt"] == "a"


@pytest.mark.parametrize("error, cause, said", [
    (KeyError(), None, "x: KeyError"), (OSError("a\nb"), ValueError("c\nd"), "x: a b c d"), (OSError("y" * 999), None, "x: " + "y" * 400)])
def test_one_line_error(error, cause, said):
    with pytest.raises(ValueError) as found, files.one_line_error("x"):
        raise error from cause
    assert str(found.value) == said
