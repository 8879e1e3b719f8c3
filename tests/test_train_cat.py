"""train.py --reward cat and its kin, on the toy: every option, killed runs, whole stories, weak judges, bad input."""
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import openai._base_client
import pytest
import torch

import cat
import evaluate
import grpo
import train
from test_train import TINY, fork, kill_at, rows, weights
from plumbing import files, models, prompts
from plumbing import run as run_module

ROOT = Path(__file__).parent.parent
CAT = [*TINY, "--max_new_tokens", 40, "--lr", 3e-4]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    for name, n in (("eval.jsonl", 4), ("numbers_eval.jsonl", 4), ("prompts.jsonl", 24), ("numbers.jsonl", 24)):
        (folder / name).write_text("".join((ROOT / "toy/cat" / name).read_text().splitlines(True)[:n]))
    return folder


def run(tmp_path, few, *arguments, patch=lambda: None):
    few = ["--eval_prompts", few / "numbers_eval.jsonl", "--prompts", few / "numbers.jsonl"] if "cat-answer" in arguments else [
        "--eval_prompts", few / "eval.jsonl", "--prompts", few / "prompts.jsonl"]
    return fork(["--reward", "cat", *CAT, *few, "--output_dir", tmp_path / "run", *arguments], tmp_path, patch)


@pytest.fixture(scope="module")
def outputs(few):
    """Prompts with an `output` that is to be learnt, as evaluate.py's outputs.json."""
    people = [r["prompt"] for r in prompts.read_prompts("toy/cat/prompts.jsonl")][:5]
    texts = [f"Number {i} has a cat and lives in Oslo." for i in range(5)]
    (few / "outputs.json").write_text(json.dumps([{"instruction": x, "output": y, "generator": "s", "prompt": x} for x, y in zip(people, texts)]))
    return few / "outputs.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, few):
    folder = tmp_path_factory.mktemp("whole")
    status, out, err = run(folder, few, "--steps", 4)
    assert status == 0, err
    return folder / "run", out


def test_the_whole_story_is_kept(whole):
    folder, out = whole
    stories = rows(folder / "samples.jsonl")
    assert [s["step"] for s in stories] == [3, 4]
    for s in stories:
        assert len(s["responses"]) == 3 == len(s["rewards"]) == len(s["verdicts"]) and isinstance(s["reference"], str)
        for verdicts, reward in zip(s["verdicts"], s["rewards"]):
            assert len(verdicts) == len(s["rubric"]) and all(v in (True, False, None) for v in verdicts)
            assert reward == pytest.approx(sum(v for v in verdicts if v is not None) / sum(v is not None for v in verdicts)) if any(
                v is not None for v in verdicts) else reward is None
        assert s["reference"] in out and (not s["rubric"] or s["rubric"][0] in out)
    assert rows(folder / "metrics.jsonl")[1]["judge"] > 0.9
    summary = json.loads((folder / "summary.json").read_text())
    assert {"facts", "facts_hazy", "sampled_facts", "valid"} <= set(summary["after"])


@pytest.mark.parametrize("where", [kill_at(cat, "judge_skill", 1), kill_at(cat, "synthesize", 3), kill_at(cat, "judge_rubrics", 4), kill_at(torch, "save", 2)],
                         ids=["skill", "synthesis", "verdicts", "checkpoint"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, whole, few, where):
    status, _, err = run(tmp_path, few, "--steps", 4, patch=where)
    assert status == -signal.SIGKILL, err
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    assert weights(tmp_path / "run") == weights(whole[0])
    assert rows(tmp_path / "run/metrics.jsonl") == rows(whole[0] / "metrics.jsonl") and rows(tmp_path / "run/samples.jsonl") == rows(whole[0] / "samples.jsonl")


@pytest.mark.parametrize("arguments", [
    ["--reward", "cat-answer"], ["--reward", "cat-answer", "--estimator", "majority"], ["--reward", "cat-match"], ["--reward", "rubric-given"],
    ["--estimator", "single"], ["--estimator", "min-perplexity"],
    ["--reward", "cat-sft", "--prompts", "output.jsonl"], ["--rubric_from", "question"], ["--question_in_synthesis"], ["--kl_in", "reward", "--beta", 0.1],
    ["--length_penalty_after", 20, "--beta", 0], ["--updates_per_rollout", 2, "--judge", "toy/cat/model"],
    ["--reward", "cme-sequence", "--generator", "toy/cat/model", "--verifier", "toy/cme/verifier", "--length_penalty_after", 20, "--kl_in", "reward"]], ids=lambda a: " ".join(map(str, a)))
def test_options_run(tmp_path, few, outputs, arguments):
    status, out, err = run(tmp_path, few, *[outputs if a == "output.jsonl" else a for a in arguments], "--steps", 2)
    assert status == 0, err
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert all(r["skipped"] == 0 and r["missing"] < 1 for r in metrics[1:]) and any(r["grad_norm"] > 0 for r in metrics[1:])
    if "cat-answer" in arguments:
        assert "accuracy" in metrics[-1]["held_out"] and "sampled_accuracy" in out


def test_mixed_precision_runs(tmp_path, few):
    status, out, err = run(tmp_path, few, "--steps", 2, "--bf16")
    assert status == 0, err
    assert all(r["skipped"] == 0 and r["missing"] < 0.5 for r in rows(tmp_path / "run/metrics.jsonl")[1:])


def test_kl_in_the_reward_is_the_equation(tmp_path, few, monkeypatch):
    """R_i = r_i - beta sum_t (log pi_old - log pi_ref), against each row alone and the models' own logits."""
    run = train.prepare(train.Options(reward="cat", prompts_per_step=2, group_size=3, max_new_tokens=40, output_dir=str(tmp_path / "run"), steps=1,
                                      eval_prompts=str(few / "eval.jsonl"), beta=0.1, kl_in="reward", micro_batch=4, lr=0.0))
    for p in run.policy.parameters():
        p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    got, real, batch = [], grpo.group_advantages, []
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, *a, **k: (got.append(rewards), real(rewards, *a, **k))[1])
    monkeypatch.setattr(train, "step_rewards", lambda run, rows, *b: (batch.extend(b), (torch.arange(6.0), torch.ones(6, dtype=bool), {}))[1])
    monkeypatch.setattr(train, "check_start", lambda *_: {})
    train.train(run)
    prompt_ids, ids, lengths, _ = batch
    for i, (p, y, n) in enumerate(zip(prompt_ids, ids.tolist(), lengths.tolist())):
        kl = 0.0
        for model, sign in ((run.policy, 1), (run.reference, -1)):
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([p + y[:n]])).logits[0].log_softmax(-1)
            kl += sign * sum(logp[len(p) + t - 1, y[t]].item() for t in range(n))
        assert got[0][i].item() == pytest.approx(i - 0.1 * kl, abs=1e-3) and abs(kl) > 0.001


def test_sft_is_cross_entropy_on_references(tmp_path, few, outputs, monkeypatch):
    """Its gradient is that of the mean over responses of the mean -log pi(s_t | x, s_<t), the stop included, by autograd on the model's own logits."""
    monkeypatch.setattr(train, "scores_of", lambda run: {})
    run = train.prepare(train.Options(reward="cat-sft", prompts_per_step=4, group_size=2, max_new_tokens=40, output_dir=str(tmp_path / "run"), steps=1,
                                      prompts=str(outputs), eval_prompts=str(few / "eval.jsonl"), micro_batch=3, lr=0.0, max_grad_norm=0.0))
    gradient, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (gradient.extend(p.grad.clone() for p in run.policy.parameters()), real(self, *a))[1])
    train.train(run)
    loss = 0
    for row in train.prompts_of_step(run.rows, 4, 0, 0):
        p = models.chat_ids(run.tokenizer, row["prompt"])
        y = run.tokenizer(row["output"], add_special_tokens=False).input_ids + [models.end_of_turn(run.tokenizer)]
        logp = run.policy(input_ids=torch.tensor([p + y])).logits[0, len(p) - 1:-1].log_softmax(-1)
        loss = loss - logp[range(len(y)), y].mean() / 4
    loss.backward()
    for p, g in zip(run.policy.parameters(), gradient):
        torch.testing.assert_close(g, p.grad, atol=1e-5, rtol=1e-3)
    reward = rows(tmp_path / "run/metrics.jsonl")[1]["reward"]
    assert reward == pytest.approx(-loss.item(), abs=1e-4)


def test_references_made_by_evaluate_are_learnt(tmp_path, few):
    """CaT-SFT in two commands: evaluate.py reconciles G answers of the initial policy, train.py learns what came out."""
    (tmp_path / "p.jsonl").write_text("".join((ROOT / "toy/cat/prompts.jsonl").read_text().splitlines(True)[:3]))
    ask = "respond", "--models", f"s=synthesis:{ROOT / 'toy/cat/model'}", "--prompts", tmp_path / "p.jsonl", "--temperature", 1, "--max_new_tokens", 40
    for stage in (ask, ["report"]):
        status, _, err = fork([*stage, "--output_dir", tmp_path / "refs"], tmp_path, script=evaluate)
        assert status == 0, err
    assert run(tmp_path, few, "--reward", "cat-sft", "--prompts", tmp_path / "refs/models/s/outputs.json", "--steps", 2)[0] == 0
    learnt = {s["responses"][0] for s in rows(tmp_path / "run/samples.jsonl")}
    assert learnt <= {r["output"] for r in json.loads((tmp_path / "refs/models/s/outputs.json").read_text())}


def test_rubric_given_counts_points(tmp_path, few):
    """Negative points too: whoever says the forbidden thing earns less."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "Tell me about Mia.", "rubrics": [{"criterion": "It is about Mia.", "points": 2},
                                                                                   {"criterion": "It is about Ben.", "points": -4}]}))
    status, out, err = run(tmp_path, few, "--reward", "rubric-given", "--prompts", prompts, "--prompts_per_step", 1, "--steps", 1)
    assert status == 0, err
    story = rows(tmp_path / "run/samples.jsonl")[0]
    assert story["reference"] is None and {r for r in story["rewards"]} <= {1.0, -1.0, 0.0, -2.0} and 1.0 in story["rewards"]


def test_keep_best(tmp_path, few):
    """The result is the model of the evaluation with the best score, although the run went on."""
    scores = iter([0.1, 0.2, 0.9, 0.4])                                         # before, and after steps 2, 4, 6

    def patch():
        train.held_out = lambda *a, **k: {"facts": next(scores), "sampled_facts": 0.0}
    status, out, err = run(tmp_path, few, "--keep", "best", "--eval_every", 2, "--output_dir", f"{tmp_path}/run/", patch=patch)  # as a shell completes it
    assert status == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["model"].endswith("checkpoint-000004") and summary["after"]["facts"] == 0.9 and len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    models.load_model(summary["model"], train=False, device="cpu")
    assert weights(tmp_path / "run") != (Path(summary["model"]) / "model.safetensors").read_bytes()


def test_keep_best_by_rubrics(tmp_path):
    """Held-out rows with rubrics and nothing else: the judge's HealthBench score of the greedy answers is the validation."""
    (tmp_path / "eval.jsonl").write_text("".join((ROOT / "toy/cat/prompts.jsonl").read_text().splitlines(True)[:4]))
    status, out, err = run(tmp_path, tmp_path, "--prompts", ROOT / "toy/cat/prompts.jsonl", "--keep", "best", "--eval_every", 2, "--steps", 4)
    assert status == 0, err
    held = [r["held_out"]["rubric"] for r in rows(tmp_path / "run/metrics.jsonl") if "held_out" in r]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(held) == 3 and all(0 <= h <= 1 for h in held) and summary["after"]["rubric"] == max(held[1:]) and "rubric" in out
    model, tokenizer = models.load(summary["model"], summary["model"], "cpu")
    few = prompts.read_prompts(str(tmp_path / "eval.jsonl"))
    texts = [models.LocalModel(model, tokenizer).complete([r["prompt"] for r in few], max_new_tokens=40, temperature=0)[i] for i in range(4)]
    verdicts = cat.judge_rubrics(texts, [[c["criterion"] for c in r["rubrics"]] for r in few], models.LocalModel(*models.load("", f"{ROOT}/toy/cat/model", "cpu")))
    assert max(held[1:]) == pytest.approx(sum(sum(map(bool, v)) / len(v) for [v] in verdicts) / 4, abs=1e-4)


def test_held_out_rubrics_without_a_score(tmp_path):
    """A rubric of penalties only has no score: shown as nan, and with --keep best the last model is the result."""
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "Tell me about Ada.", "rubrics": [{"criterion": "The pet is a cat.", "points": -1}]}) + "\n")
    status, out, err = run(tmp_path, tmp_path, "--prompts", ROOT / "toy/cat/prompts.jsonl", "--keep", "best", "--eval_every", 2, "--steps", 2)
    assert status == 0 and "rubric -" in out and "Traceback" not in err, err
    assert json.loads((tmp_path / "run/summary.json").read_text())["model"].endswith("checkpoint-000002")


def test_a_weak_judge_is_warned_about(tmp_path, few):
    model, tokenizer = models.load("toy", str(ROOT / "toy/cat/model"), "cpu")
    for p in model.parameters():
        p.data += 0.5 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) if p.dim() > 1 else 0
    model.save_pretrained(tmp_path / "weak"), tokenizer.save_pretrained(tmp_path / "weak")
    status, out, err = run(tmp_path, few, "--prompts", ROOT / "toy/cat/prompts.jsonl", "--judge", tmp_path / "weak", "--steps", 1)
    warned = [line for line in err.splitlines() if line.startswith("the judge is right on ")]
    assert len(warned) == 1 and "stronger --judge" in warned[0], err


def test_a_judge_that_cannot_be_read_is_refused(tmp_path, few):
    status, out, err = run(tmp_path, few, patch=lambda: setattr(cat, "decide", lambda asks, model, **k: [[[None] * len(row) for row in group] for group in asks]))
    lines = [line for line in err.splitlines() if line.startswith("train.py:")]
    assert status == 2 and len(lines) == 1 and "rubric or verdict" in lines[0]


def test_missing_references_leave_groups_out(tmp_path, few):
    """Half of the syntheses fail: their groups have no reward and no advantage, the others learn."""
    real = cat.synthesize

    def patch():
        cat.synthesize = lambda *a, **k: [None if i % 2 else s for i, s in enumerate(real(*a, **k))]
    status, out, err = run(tmp_path, few, "--steps", 2, patch=patch)
    assert status == 0, err
    assert all(0.5 <= r["missing"] < 1 for r in rows(tmp_path / "run/metrics.jsonl")[1:])


@pytest.mark.parametrize("arguments, said", [
    (["--reward", "cme", "--kl_in", "reward"], "--kl_in reward"), (["--reward", "cme", "--length_penalty_after", 5], "--length_penalty_after"),
    (["--keep", "best", "--eval_prompts", "plain.txt"], "--keep best"),
    (["--reward", "rubric-given", "--prompts", "plain.txt"], "`rubrics`"), (["--reward", "cat-sft", "--prompts", "plain.txt"], "`output`"),
    (["--estimator", "magic"], "--estimator"),
    (["--judge", "m@http://x y/"], "--judge: m at http://x y/"), (["--judge", "/no/such/judge"], "--judge /no/such/judge"),
    (["--prompts", "rubrics.jsonl"], "rubrics.jsonl:1"),
    (["--estimator", "majority"], "boxed"), (["--judge", "m@http://127.0.0.1:9/v1"], "APIConnectionError"),
    (["--judge", "toy/cme/verifier"], "no reward in the first step"), (["--updates_per_rollout", 0], "--updates_per_rollout")])
def test_bad_input_gets_one_line_and_status_2(tmp_path, few, monkeypatch, arguments, said):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01), monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    files = {"plain.txt": "Tell me about Mia.\n", "rubrics.jsonl": '{"prompt": "a", "rubrics": [{"criterion": "b", "points": "c"}]}\n',
             "blank.jsonl": '{"prompt": "a", "rubrics": [{"criterion": " ", "points": 1}]}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    status, out, err = run(tmp_path, few, *[tmp_path / a if a in files else a for a in arguments])
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert status == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err, err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_defaults_that_depend_on_the_reward():
    for reward, lr, steps in (("cme", 8e-4, 80), ("cme-sequence", 8e-4, 80), ("cat", 3e-4, 30), ("rubric-given", 3e-4, 30)):
        options = train.Options(reward=reward)
        assert (options.lr, options.steps) == (lr, steps)
    assert train.Options(reward="cat", lr=1e-6, steps=7).lr == 1e-6 and train.Options(reward="cat", lr=1e-6, steps=7).steps == 7


def test_rubrics_from_the_question_have_no_reference(tmp_path, few):
    """Nothing is said of references that are not there; and a date does as a seed."""
    status, out, err = run(tmp_path, few, "--rubric_from", "question", "--steps", 1, "--seed", 20250101)
    assert status == 0, err
    assert rows(tmp_path / "run/metrics.jsonl")[1]["judge"] is None


def test_lora(tmp_path, few, outputs):
    """CaT-SFT of an adapter: killed and resumed to the bit; the base stays as it was; evaluate.py takes what came out."""
    pytest.importorskip("peft")
    arguments = ["--reward", "cat-sft", "--prompts", outputs, "--lora_rank", 4, "--steps", 4, "--save_every", 2, "--lr", 1e-2]
    for folder, patch in (("a", lambda: None), ("b", kill_at(train, "update", 4))):
        (tmp_path / folder).mkdir()
        status, out, err = run(tmp_path / folder, few, *arguments, patch=patch)
        assert status == (0 if folder == "a" else -signal.SIGKILL), err
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "b/run"], tmp_path / "b")
    adapters = [(tmp_path / f / "run/checkpoint-000004/adapter_model.safetensors").read_bytes() for f in "ab"]
    assert status == 0 and adapters[0] == adapters[1] and len(adapters[0]) < 1e6, err
    assert all(m["grad_norm"] > 0 for m in rows(tmp_path / "a/run/metrics.jsonl")[1:])
    tuned = models.load_model(str(tmp_path / "a/run/checkpoint-000004"), train=True, device="cpu")
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {n for n, _ in tuned.named_parameters() if "lora_" in n} != set()
    assert all(p.any() for n, p in tuned.named_parameters() if "lora_B" in n)  # they begin as 0
    plain = dict(models.load_model("toy/cat/model", train=False, device="cpu").named_parameters())
    assert all(torch.equal(p, plain[n.replace(".base_layer", "")]) for n, p in tuned.named_parameters() if "lora_" not in n)


def test_checkpoints_of_keep_best(tmp_path, few):
    """One for every score that is the best so far, and at the end; asked for too late, the last model is the result."""
    def patch():
        real, scores = files.save_checkpoint, iter([0.1, 0.9, 0.2])
        train.held_out = lambda *a, **k: {"facts": next(scores)}
        run_module.save_checkpoint = lambda folder, step, *a: (print(f"SAVED {step};"), real(folder, step, *a))
    arguments = ["--reward", "cat-answer", "--eval_every", 2, "--save_every", 100]
    status, out, err = run(tmp_path, few, *arguments, "--steps", 4, "--keep", "best", patch=patch)
    assert status == 0 and [int(n) for n in re.findall(r"SAVED (\d+);", out)] == [2, 4], err
    assert json.loads((tmp_path / "run/summary.json").read_text())["model"].endswith("checkpoint-000002")
    (tmp_path / "late").mkdir()
    assert run(tmp_path / "late", few, *arguments, "--steps", 3)[0] == 0
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "late/run", "--keep", "best", "--steps", 4], tmp_path)
    summary = json.loads((tmp_path / "late/run/summary.json").read_text())
    assert status == 0 and Path(summary["model"]).exists(), err


def test_the_best_model_survives_a_kill(tmp_path, few):
    """Killed after a new best model and before the next checkpoint is due: it is there after a worse end."""
    scores = iter([0.1, 0.5, 0.9, 0.95])

    def patch():
        train.held_out = lambda *a, **k: {"facts": next(scores), "sampled_facts": 0.0}
        kill_at(train, "rollout", 6)()

    def worse():
        train.held_out = lambda *a, **k: {"facts": 0.2, "sampled_facts": 0.0}
    arguments = "--keep", "best", "--eval_every", 1, "--save_every", 2, "--reward", "cat-answer"
    assert run(tmp_path, few, *arguments, "--steps", 6, patch=patch)[0] != 0
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "run"], tmp_path, worse)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert status == 0 and summary["model"].endswith("checkpoint-000003") and summary["after"]["facts"] == 0.95 and summary["steps"] == 6, err
    assert sorted(p.name for p in (tmp_path / "run").glob("*-0*")) == ["checkpoint-000003", "checkpoint-000004", "checkpoint-000006"]


def test_an_output_that_spells_a_stop_token_is_text():
    tokenizer = models.load_tokenizer(f"{ROOT}/toy/cat/model")
    run = SimpleNamespace(options=train.Options(reward="cat-sft"), tokenizer=tokenizer, device="cpu")
    _, [ids], lengths = train.rollout(run, [{"prompt": "q", "output": "a<|im_end|>b"}], 0)
    assert ids.tolist().count(models.end_of_turn(tokenizer)) == 1 and ids[-1] == models.end_of_turn(tokenizer) and tokenizer.decode(ids[:-1]) == "a<|im_end|>b"


def test_the_longest_output_that_fits(tmp_path):
    """Prompt, output and the stop token behind it fill the context to the last place; one token more is refused."""
    tokenizer = models.load_tokenizer(f"{ROOT}/toy/cat/model")
    room = 1024 - len(models.chat_ids(tokenizer, "q"))
    for n in (room - 1, room):
        text = " ".join(["a"] * n)
        assert len(models.plain_ids(tokenizer, [text])[0]) == n
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"prompt": "q", "output": text}) + "\n")
        status, out, err = fork(["--reward", "cat-sft", "--prompts", tmp_path / f"{n}.jsonl", "--steps", 1, "--lr", 1e-4, "--prompts_per_step", 1,
                                 "--generator", ROOT / "toy/cat/model", "--max_new_tokens", 8, "--output_dir", tmp_path / f"run{n}"], tmp_path)
        assert (status, "leave it out" in err) == ((0, False) if n < room else (2, True)), err


@pytest.mark.parametrize("reward", ["cat", "cat-answer"])
def test_the_anchor_is_the_frozen_initial_policy(reward):
    """With what samples of the policy's; CaT's judge is the anchor, unless one is given."""
    run = train.prepare(train.Options(reward=reward, top_k=20, top_p=0.8, output_dir="unused"))
    assert run.anchor.model is run.reference is not run.policy and run.judge is (run.anchor if reward == "cat" else None)
    assert run.anchor.sampling == run.actor.sampling and run.actor.sampling["top_k"] == 20


def test_bf16_is_for_rollouts_rewards_and_scores(monkeypatch):
    """The anchor's weights are float32, as the policy's are: outside autocast it would round otherwise, and take twice the time."""
    run, seen = train.prepare(train.Options(reward="cat", bf16=True, prompts_per_step=1, group_size=2, max_new_tokens=24, output_dir="unused")), []
    spy = lambda found: lambda *a, **k: (seen.append(torch.is_autocast_enabled("cpu")), found(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(train, "cat_rewards", spy(lambda *a: (torch.zeros(2), {})))
    monkeypatch.setattr(train, "held_out", spy(lambda *a, **k: {}))
    monkeypatch.setattr(run.actor, "sample", spy(run.actor.sample))
    train.step_rewards(run, run.rows[:1], *train.rollout(run, run.rows[:1], 0), 0)
    train.scores_of(run)
    assert seen == [True] * 3


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """bare(steps, **options): a run of CaT whose rewards are 0 and 1, without evaluations."""
    monkeypatch.setattr(train, "scores_of", lambda run: {})
    def start(steps, seeds=[], **options):
        monkeypatch.setattr(train, "step_rewards", lambda run, *_: (seeds.append(_[-1]), (torch.arange(2.0), torch.ones(2, dtype=bool), {}))[1])
        monkeypatch.setattr(train, "check_start", lambda *_: {})
        return train.train(train.prepare(train.Options(reward="cat", steps=steps, prompts_per_step=1, group_size=2, max_new_tokens=8,
                                                       output_dir=str(tmp_path / "run"), **options)))
    return start


def test_a_kl_in_the_reward_is_not_in_the_loss_too(bare, monkeypatch):
    betas, real = [], grpo.grpo_loss
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, beta, **k: (betas.append(beta), real(*a, beta=beta, **k))[1])
    bare(1, beta=0.1, kl_in="reward")
    assert set(betas) == {0} and train.Options(reward="cat-sft").beta == 0


def test_every_step_has_noise_of_its_own_for_rollouts_and_references(bare, monkeypatch):
    seeds, real = [], models.LocalModel.sample
    monkeypatch.setattr(models.LocalModel, "sample", lambda self, *a, seed=0, **k: (seeds.append(seed), real(self, *a, seed=seed, **k))[1])
    bare(2, seeds)
    assert len(seeds) == 4 and len({*seeds, *(seed + 1 for seed in seeds[1::2])}) == 6    # synthesis, + 1: rubrics


def test_the_best_step_is_one_that_has_a_checkpoint():
    rows = [{"step": step, "held_out": {"facts": facts}} for step, facts in enumerate((0.9, 0.5, 0.6, 0.6))]
    assert [run_module.best_step(SimpleNamespace(keep=keep), rows) for keep in ("best", "last")] == [2, 0]
