"""train.py as a user meets it: whole runs on the toy, killed runs, bad input. Children are forked, so that torch is imported once."""
import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import cme
import grpo
import train
from plumbing import one_clear_line
from plumbing import files, models, prompts, run as run_files

ROOT = Path(__file__).parent.parent
TINY = "--steps 6 --prompts_per_step 2 --group_size 3 --max_new_tokens 24 --save_every 2 --eval_every 3 --lr 1e-3".split()


def busy():
    """Whether another thread of this process, Python's or not, is doing something (Linux only); one that ends is, to its very end."""
    others = [path for path in Path("/proc/self/task").glob("*/stat") if path.parent.name != str(threading.get_native_id())]
    states = []
    for path in others:
        with contextlib.suppress(OSError):                                     # it has ended
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return set(states) - {"S"}


def fork(arguments, folder, patch=lambda: None, script=train):
    """`python train.py ARGUMENTS` in a forked child that calls patch() first -> (exit status, -9 if killed; stdout; stderr)."""
    folder.mkdir(exist_ok=True)
    while busy():  # a thread of a model that ends holds a lock of MKL's, which a child would wait for without end
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # in the main thread first: transformers loads in several, and PyTorch's pools do not like that after a fork
        gc.freeze()  # what the parent has collected over the tests is none of the child's business, and slow to look through
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.argv = [script.__name__ + ".py", *map(str, arguments)]
            patch()
            one_clear_line(script.main, script.__name__ + ".py")
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, (folder / "out").read_text(), (folder / "err").read_text()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four evaluation rows and twenty-four prompts: what is tested here does not need 96 and 288, which are read and checked each time."""
    folder = tmp_path_factory.mktemp("few")
    for name, n in (("eval.jsonl", 4), ("prompts.jsonl", 24)):
        (folder / name).write_text("".join((ROOT / "toy/cme" / name).read_text().splitlines(True)[:n]))
    return ["--eval_prompts", folder / "eval.jsonl", "--prompts", folder / "prompts.jsonl"]


def weights(run):
    return (Path(files.checkpoints(str(run))[-1]) / "model.safetensors").read_bytes()


def rows(path):
    untimed = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        untimed.append({k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")})
    return untimed


@pytest.fixture(scope="module")
def whole(tmp_path_factory, few):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, out, err = fork([*TINY, *few, "--output_dir", folder / "run"], folder)
    assert status == 0, err
    return folder / "run", out


def test_a_run_leaves_what_it_promises(whole):
    run, out = whole
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoint-000004", "checkpoint-000006"}
    summary = json.loads((run / "summary.json").read_text())
    assert {"before", "after", "seconds", "steps", "peak_memory_mb", "model", "skipped"} <= set(summary) and summary["steps"] == 6
    for when in ("before", "after"):
        assert {"facts", "sampled_facts", "valid", "tokens", "wording", "reward"} <= set(summary[when])
        assert summary[when]["facts"] > 0.5 and summary[when]["valid"] > 0.7
    metrics = rows(run / "metrics.jsonl")
    assert [r["step"] for r in metrics] == list(range(7)) and [r["step"] for r in metrics if "held_out" in r] == [0, 3, 6]
    assert {"reward", "loss", "kl", "approx_kl", "clipfrac", "entropy", "grad_norm", "length", "truncated", "flat", "lr", "skipped"} <= set(metrics[1])
    assert metrics[1]["kl"] == pytest.approx(0, abs=1e-9) and metrics[6]["kl"] > 0 and metrics[1]["grad_norm"] > 0 and metrics[1]["approx_kl"] == 0
    assert summary["tokens"] == sum(r["tokens"] for r in metrics[1:]) and all(r["tokens"] == pytest.approx(6 * r["length"]) for r in metrics[1:])
    assert [*summary["seconds"]] == ["rollout", "scoring", "update", "other"] and all(s > 0 for s in summary["seconds"].values())
    assert "(rollout " in out and " tokens/s, " in out
    samples = rows(run / "samples.jsonl")
    assert [s["step"] for s in samples] == [3, 6]
    for s in samples:
        assert len(s["responses"]) == len(s["rewards"]) == len(s["tokens"]) == 3
        means = []
        for response, tokens, rewards in zip(s["responses"], s["tokens"], s["rewards"]):
            shown = [t for t in tokens if not t.startswith("<|")]
            assert "".join(shown) == response and len(rewards) >= len(tokens)
            assert [r is None for r in rewards[:len(shown)]] == [not t.strip() for t in shown] and set(rewards[len(shown):]) <= {None}
            counted = [r for r in rewards if r is not None]
            means.append(sum(counted) / len(counted))
        for i in (means.index(max(means)), means.index(min(means))):
            assert f"reward {means[i]:.2f}  {s['responses'][i]}" in out
    assert "before" in out and "after" in out and str(run) in out
    policy = models.load_model(str(run / "checkpoint-000006"), train=True, device="cpu")                    # what transformers loads again
    assert policy.dtype == torch.float32 and models.load_tokenizer(str(run / "checkpoint-000006")).chat_template
    initial = models.load_model("toy/cme/generator", train=False, device="cpu")
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), initial.parameters()))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(module, name, nth, after=False):
    """A patch: the process kills itself with SIGKILL before (or after) the nth call of module.name."""
    def patch():
        real, calls = getattr(module, name), []

        def wrapper(*args, **kwargs):
            calls.append(0)
            if len(calls) == nth and not after:
                kill()
            result = real(*args, **kwargs)
            if len(calls) == nth:
                kill()
            return result
        setattr(module, name, wrapper)
    return patch


def half_a_line():
    """A patch: the fourth line of metrics.jsonl gets half written, and then the process is killed."""
    real, calls = run_files.append_line, []

    def wrapper(path, row):
        calls.append(path.endswith("metrics.jsonl"))
        if sum(calls) == 4:
            with open(path, "a") as f:
                f.write(json.dumps(row)[:50])
            kill()
        real(path, row)
    run_files.append_line = wrapper


@pytest.mark.parametrize("where", [
    kill_at(run_files, "write_atomically", 1),                                 # an empty folder
    kill_at(os, "replace", 1),                                                 # config.json half written
    kill_at(train, "held_out", 1),
    kill_at(train, "rollout", 2),                                              # before the first checkpoint
    half_a_line,
    kill_at(torch, "save", 2),                                                 # a checkpoint without its state
    kill_at(torch, "save", 2, after=True),                                     # a checkpoint not renamed
    kill_at(os, "rename", 2, after=True),                                      # two whole checkpoints
    kill_at(torch.optim.AdamW, "step", 5, after=True),
    kill_at(os, "replace", 2),                                                 # summary.json half written
], ids=["start", "no options", "no scores", "second step", "half a line", "half a checkpoint", "checkpoint not renamed", "old checkpoint left", "after an update", "no summary"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, whole, few, where):
    run = tmp_path / "run"
    status, _, err = fork([*TINY, *few, "--output_dir", run], tmp_path, where)
    assert status == -signal.SIGKILL, err
    assert not (run / "summary.json").exists()
    if (run / "config.json").exists():
        status, _, err = fork(["--resume", "--output_dir", run], tmp_path)
    else:
        status, _, err = fork([*TINY, *few, "--output_dir", run], tmp_path)
    assert status == 0, err
    assert weights(run) == weights(whole[0])
    assert rows(run / "metrics.jsonl") == rows(whole[0] / "metrics.jsonl")
    assert rows(run / "samples.jsonl") == rows(whole[0] / "samples.jsonl")
    mine, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, whole[0]))
    assert mine["before"] == theirs["before"] and mine["after"] == theirs["after"]
    assert [p[-1] for p in files.checkpoints(str(run))] == ["4", "6"] and not list(run.glob("*.tmp"))


def test_killed_from_outside_twice(tmp_path, whole, few):
    """A real process and a real kill -9, whenever it happens to come; what continues it is killed too."""
    run, command = tmp_path / "run", [sys.executable, str(ROOT / "train.py"), *TINY, *map(str, few), "--output_dir", str(tmp_path / "run")]

    def wait(lines, until):
        while time.time() < until and not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= lines):
            time.sleep(0.01)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(3, time.time() + 60)
    process.kill()
    process.wait()

    def watch():  # made in the child: since Python 3.13 a fork counts its parent's threads as started
        threading.Thread(target=lambda: [wait(5, time.time() + 60), kill()], daemon=True).start()
    assert fork(["--resume", "--output_dir", run], tmp_path, watch)[0] == -signal.SIGKILL
    status, out, err = fork(["--resume", "--output_dir", run], tmp_path)
    assert status == 0, err
    assert weights(run) == weights(whole[0]) and rows(run / "metrics.jsonl") == rows(whole[0] / "metrics.jsonl")
    again, out, _ = fork(["--resume", "--output_dir", run], tmp_path)                                     # finished: nothing left to do
    assert again == 0 and "after" in out and weights(run) == weights(whole[0])


def test_it_learns(tmp_path):
    """The paper's claim in miniature, on prompts of one's own: facts that the generator had wrong are repaired."""
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n\n".join(f"Tell me about {name}." for name in ["Ada", "Ben", "Mia", "Noah", "Zoe", "Theo", "Lars", "Vera"]))
    mine = tmp_path / "eval.jsonl"
    mine.write_text("".join(line for line in (ROOT / "toy/cme/eval.jsonl").read_text().splitlines(True)
                            if json.loads(line)["prompt"].split()[2] in ["Ada", "Ben", "Mia", "Noah", "Zoe", "Theo", "Lars", "Vera"]))
    status, out, err = fork(["--prompts", prompts, "--eval_prompts", mine, "--steps", 12, "--prompts_per_step", 8, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["facts"] >= summary["before"]["facts"] + 0.1
    assert summary["after"]["sampled_facts"] >= summary["before"]["sampled_facts"] + 0.1
    assert summary["after"]["reward"] > summary["before"]["reward"]


@pytest.mark.parametrize("arguments", [["--reward", "cme-sequence"], ["--reward", "reverse-kl"], ["--reward", "rent"], ["--credit", "word"], ["--beta", 0, "--no_scale"],
                                       ["--updates_per_rollout", 2, "--micro_batch", 4, "--schedule", "constant"],
                                       ["--temperature", 0.7, "--top_k", 20, "--top_p", 0.8, "--max_grad_norm", 0]])
def test_options_run(tmp_path, few, arguments):
    status, out, err = fork([*TINY, *few, "--steps", 2, *arguments, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert all(r["skipped"] == 0 and r["grad_norm"] > 0 for r in metrics[1:])
    if "--updates_per_rollout" in arguments:
        assert metrics[1]["approx_kl"] > 0


@pytest.fixture(scope="module")
def run_in_process():
    options = train.Options(prompts_per_step=2, group_size=3, max_new_tokens=24, reward="cme", output_dir="unused")
    return train.prepare(options)


def step_of(run, **options):
    """One update of a fresh policy with these options -> (gradient, statistics)."""
    run.options = dataclasses.replace(run.options, **options)
    ids_of_prompts = [models.chat_ids(run.tokenizer, row["prompt"]) for row in run.rows[:2]]
    ids, lengths = grpo.sample(run.policy, ids_of_prompts, 3, max_new_tokens=24, stop_ids=run.actor.stop_ids, generator=torch.Generator().manual_seed(0))
    prompt_ids = [p for p in ids_of_prompts for _ in range(3)]
    rewards, counted, _ = train.step_rewards(run, run.rows[:2], prompt_ids, ids, lengths, 0)
    advantages = grpo.position_advantages(rewards, counted, 3)
    optimizer, gradient = torch.optim.SGD(run.policy.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: gradient.extend(p.grad.clone() for p in run.policy.parameters()))
    ref_logp = train.logprobs(run, run.reference, prompt_ids, ids, lengths)
    stats = train.update(run, optimizer, prompt_ids, ids, lengths, None, ref_logp, advantages)
    assert all(p.grad is None for p in run.policy.parameters()), "no gradient stays alive through the next rollouts"
    return gradient, stats


def test_gradient_does_not_depend_on_micro_batches(run_in_process):
    run = run_in_process
    whole, stats = step_of(run, max_grad_norm=0, micro_batch=6)
    for size in (1, 4, 5):
        parts, stats_of_parts = step_of(run, micro_batch=size, max_grad_norm=0)
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        assert stats_of_parts == pytest.approx(stats, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_two_at_a_time_is_one_after_the_other_to_the_bit(run_in_process, monkeypatch, bf16):
    """Gradient, log-probabilities and draws of a tiny model, whose batches are computed in two threads; autocast's cache of weights is all threads'."""
    run, results, threads = run_in_process, [], []
    monkeypatch.setattr(run, "autocast", functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16))
    for name in ("token_logprobs", "sample"):
        real = getattr(grpo, name)
        monkeypatch.setattr(grpo, name, lambda *args, real=real, **settings: threads.append(threading.current_thread()) or real(*args, **settings))
    actor = models.LocalModel(run.policy, run.tokenizer, batch_tokens=120)
    prompts = [row["prompt"] for row in run.rows[:4]]
    for tiny in (0, 2e6):
        monkeypatch.setattr(models, "TINY", tiny)
        torch.set_autocast_cache_enabled(False)  # in the serial run too: with the cache a gradient is rounded otherwise
        threads.clear()
        gradient, stats = step_of(run, micro_batch=2, max_grad_norm=0)
        scored = models.answer_logprobs(*run.verifier, prompts, [[9, 10, 11], [12], [13, 14], [15, 16]], batch_tokens=40)
        ids, lengths = actor.sample([models.chat_ids(run.tokenizer, p) for p in prompts], 2, max_new_tokens=20, seed=1)
        for _ in range(4 * bf16):
            again, _ = step_of(run, micro_batch=2, max_grad_norm=0)
            assert all(map(torch.equal, gradient, again))
        results.append([*gradient, *map(torch.from_numpy, scored), ids, lengths, torch.tensor(list(stats.values()))])
        others = {thread for thread in threads if thread is not threading.main_thread()}
        assert len(others) >= 3 if tiny else not others  # some of each of the three pools
        assert len(threads) > 8
    torch.set_autocast_cache_enabled(True)
    assert all(map(torch.equal, *results))


def test_two_at_a_time_keeps_the_order_and_says_what_went_wrong():
    model, seen = torch.nn.Linear(2, 2), []
    model.num_parameters, model.device = lambda: 6, torch.device("cpu")

    def slow(part):
        time.sleep(0.05 * (part == 1))
        if part == 3:
            raise FloatingPointError("blown up")
        return part, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    with pytest.raises(FloatingPointError, match="blown up"), torch.no_grad():
        for part, found in models.two_at_a_time(model, slow, [1, 2, 3, 4]):
            seen.append((part, found))
    assert seen == [(1, (1, False, False)), (2, (2, False, False))]
    assert [*models.two_at_a_time(model, slow, [2, 1])] == [(2, (2, True, False)), (1, (1, True, False))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [*models.two_at_a_time(model, slow, [2, 1])] == [(2, (2, True, True)), (1, (1, True, True))]
    assert [*models.two_at_a_time(model, lambda _: threading.current_thread(), [1])] == [(1, threading.main_thread())]  # one part gains nothing


def test_rent_and_reverse_kl_are_their_definitions():
    """Minus the mean entropy of the policy's predictions; mean log p_V less mean log pi: row by row, from the models' own logits."""
    run = train.prepare(train.Options(reward="reverse-kl", group_size=2, max_new_tokens=24, temperature=0.7, micro_batch=3, output_dir="unused"))
    rows = run.rows[:2]
    prompt_ids, ids, lengths = train.rollout(run, rows, 0)
    reverse, counted, told = train.step_rewards(run, rows, prompt_ids, ids, lengths, 0)
    run.options.reward = "rent"
    rent, _, _ = train.step_rewards(run, rows, prompt_ids, ids, lengths, 0)
    texts = run.actor.texts(ids, lengths)[0]
    verifier = cme.sequence_rewards(*run.verifier, [row["prompt"] for row in rows for _ in range(2)], texts)
    assert counted.all() and not told and len({round(r, 4) for r in rent.tolist()}) > 1
    for i, (p, y, n) in enumerate(zip(prompt_ids, ids.tolist(), lengths.tolist())):
        with torch.no_grad():
            logp = (run.policy(input_ids=torch.tensor([p + y[:n]])).logits[0, len(p) - 1:-1] / 0.7).log_softmax(-1)
        assert rent[i].item() == pytest.approx((logp.exp() * logp).sum(-1).mean().item(), abs=1e-4)
        assert reverse[i].item() == pytest.approx(verifier[i].item() - logp[range(n), y[:n]].mean().item(), abs=1e-4)


def test_length_penalty(run_in_process):
    """CaT, Section 13: one less for each response of more tokens than that."""
    run = train.prepare(train.Options(reward="cme-sequence", group_size=3, max_new_tokens=24, output_dir="unused"))
    batch = train.rollout(run, run.rows[:2], 0)
    plain, _, _ = train.step_rewards(run, run.rows[:2], *batch, 0)
    run.options.length_penalty_after = after = int(batch[2].sort().values[2])
    penalised, _, _ = train.step_rewards(run, run.rows[:2], *batch, 0)
    torch.testing.assert_close(plain - penalised, (batch[2] > after).float())
    assert 0 < (batch[2] > after).sum() < 6


def test_training_mode_does_not_switch_dropout_on(tmp_path):
    """A model with dropout, in its layers' own way too (OPT): nothing may become random, in training mode neither."""
    import transformers
    config = transformers.OPTConfig(vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                                    max_position_embeddings=64, dropout=0.5, attention_dropout=0.5)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), train=True, device="cpu")
    model.train()
    a, b = (grpo.token_logprobs(model, [[5, 6]], torch.tensor([[7, 8, 9]]), torch.tensor([3])) for _ in range(2))
    assert torch.equal(a, b)


def not_finite(bad):
    """A patch: the loss is NaN at the calls n = 1, 2, ... for which bad(n)."""
    def patch():
        real, calls = grpo.grpo_loss, []

        def wrapper(*args, **kwargs):
            calls.append(0)
            loss, stats = real(*args, **kwargs)
            return (loss * float("nan"), stats | {"loss": loss.detach() * float("nan")}) if bad(len(calls)) else (loss, stats)
        grpo.grpo_loss = wrapper
    return patch


def test_an_update_that_is_not_finite_is_skipped(tmp_path, few):
    status, out, err = fork([*TINY, *few, "--output_dir", tmp_path / "run"], tmp_path, not_finite(lambda n: n in (2, 3)))
    assert status == 0, err
    metrics = rows(tmp_path / "run/metrics.jsonl")[1:]
    assert [r["skipped"] for r in metrics] == [0, 1, 1, 0, 0, 0] and metrics[1]["loss"] is None and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped"] == 2 and "skipped 1.000" in err
    assert all(p.isfinite().all() for p in models.load_model(files.checkpoints(str(tmp_path / "run"))[-1], train=False, device="cpu").parameters())


def test_weights_that_blow_up_are_said_to(tmp_path, few):
    def patch():
        real = torch.optim.AdamW.step
        torch.optim.AdamW.step = lambda self: (real(self), [p.data.mul_(1e30) for p in self.param_groups[0]["params"]])
    status, out, err = fork([*TINY, *few, "--output_dir", tmp_path / "run"], tmp_path, patch)
    assert status == 1 and "finite" in err and "Traceback" not in err


def test_options_can_be_changed_on_resume(whole, tmp_path, few):
    """What is given again counts; all else comes from the run."""
    run = tmp_path / "run"
    assert fork([*TINY, *few, "--output_dir", run], tmp_path, kill_at(train, "rollout", 4))[0] == -signal.SIGKILL
    status, out, err = fork(["--resume", "--output_dir", run, "--lr", 5e-4], tmp_path)
    assert status == 0, err
    metrics = rows(run / "metrics.jsonl")
    assert metrics[3]["lr"] == pytest.approx(rows(whole[0] / "metrics.jsonl")[3]["lr"] / 2) and len(metrics) == 7
    assert json.loads((run / "config.json").read_text())["lr"] == 5e-4 and weights(run) != weights(whole[0])
    again = ["--resume", "--output_dir", run, "--generator", ROOT / "toy/cme/generator", "--prompts", ROOT / "toy/cme/prompts.jsonl", "--steps", 7]
    status, out, err = fork(again, tmp_path)                                  # a model and prompts of one's own: lr comes from the run
    assert status == 0 and json.loads((run / "config.json").read_text())["lr"] == 5e-4 and len(rows(run / "metrics.jsonl")) == 8, err


def test_the_newest_run_is_resumed(tmp_path, few, monkeypatch):
    status, out, err = fork([*TINY, *few, "--steps", 2], tmp_path, lambda: os.chdir(tmp_path))
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("cme-2") and fork(["--resume"], tmp_path, lambda: os.chdir(tmp_path))[0] == 0


def test_bf16_is_what_is_told():
    for bf16 in (False, True):
        run, kind = train.prepare(train.Options(bf16=bf16, output_dir="unused")), torch.bfloat16 if bf16 else torch.float32
        with run.autocast():
            assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == kind
        assert run.policy.dtype == run.reference.dtype == torch.float32 and run.verifier[0].dtype == kind


def test_without_a_signal_nothing_moves_in_bf16(tmp_path, few):
    """Policy and reference round alike: the KL is exactly 0 and so is its gradient, which Adam would blow up to full steps."""
    status, out, err = fork([*TINY, *few, "--steps", 2, "--bf16", "--min_std", 1e8, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    assert [(r["kl"], r["grad_norm"], r["flat"]) for r in rows(tmp_path / "run/metrics.jsonl")[1:]] == [(0, 0, 1)] * 2


@pytest.mark.parametrize("arguments", [[], ["--reward", "cme-sequence"]])
def test_mixed_precision_runs(tmp_path, few, arguments):
    """--bf16, and so what happens on CUDA as far as a CPU can show it: a bf16 verifier, autocast around a float32 policy and its reference: these round alike."""
    status, out, err = fork([*TINY, *few, *arguments, "--steps", 2, "--bf16", "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert all(r["skipped"] == 0 and r["grad_norm"] > 0 for r in metrics[1:]) and metrics[1]["kl"] == 0 < metrics[2]["kl"] < 0.01
    saved = models.load_model(files.checkpoints(str(tmp_path / "run"))[-1], train=True, device="cpu")
    assert any((p != p.bfloat16().float()).any() for p in saved.parameters()), "the policy's weights were kept in bf16"


def test_prompts_of_step():
    """Every prompt once in each pass, in another order each time; steps can be asked for in any order."""
    prompts = [f"p{i}" for i in range(5)]
    steps = [train.prompts_of_step(prompts, 2, 7, s) for s in range(10)]
    flat = sum(steps, [])
    passes = [flat[i:i + 5] for i in range(0, 20, 5)]
    assert all(sorted(p) == prompts for p in passes) and len({tuple(p) for p in passes}) > 1
    assert train.prompts_of_step(prompts, 2, 7, 6) == steps[6] and sum((train.prompts_of_step(prompts, 2, 8, s) for s in range(10)), []) != flat
    assert len(train.prompts_of_step(prompts, 12, 7, 0)) == 12


def test_learning_rate():
    o = train.Options(lr=1.0, warmup_steps=4, steps=14)
    assert [train.learning_rate(o, s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert train.learning_rate(o, 9) == pytest.approx(0.5) and 0 < train.learning_rate(o, 13) < 0.05
    assert train.learning_rate(train.Options(lr=1.0, warmup_steps=0, schedule="constant"), 59) == 1.0


def test_help_documents_every_option(tmp_path):
    status, out, _ = fork(["--help"], tmp_path)
    assert status == 0
    for f in dataclasses.fields(train.Options):
        assert f"--{f.name}" in out
    assert prompts.read_prompts(str(ROOT / "toy/cme/prompts.jsonl"))[0]["where"].endswith("prompts.jsonl:1")


def test_options_reach_their_functions(tmp_path, few, monkeypatch):
    calls = {}

    def spy(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.setdefault(name, []).append((args, kwargs)), real(*args, **kwargs))[1])
    for module, name in [(grpo, "sample"), (grpo, "token_logprobs"), (grpo, "grpo_loss"), (grpo, "position_advantages"), (cme, "token_rewards"),
                         (torch.nn.utils, "clip_grad_norm_")]:
        spy(module, name)
    run = train.prepare(train.Options(steps=2, prompts_per_step=2, group_size=2, max_new_tokens=24, temperature=0.7, top_k=20, top_p=0.8, beta=0.5,
                                      clip_low=0.1, clip_high=0.3, scale=False, credit="word", score_stop=True, max_grad_norm=0.5, seed=7,
                                      micro_batch=3, eval_prompts=str(few[1]), output_dir=str(tmp_path / "run")))
    calls.clear()                                                               # those of loading
    train.train(run)
    sub = lambda name, **expected: [{k: kw.get(k) for k in expected} == expected for _, kw in calls[name]]   # noqa: E731
    calls["sample"] = [call for call in calls["sample"] if call[0][2] == 2]     # the others are the held-out ones, one response to each
    assert all(sub("sample", temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=24, stop_ids=run.actor.stop_ids))
    assert len({kw["generator"].initial_seed() for _, kw in calls["sample"]} - {0, 1}) == 2    # another for each step and seed
    calls["token_logprobs"] = [call for call in calls["token_logprobs"] if call[0][0] is not run.verifier[0]]
    assert all(sub("token_logprobs", temperature=0.7)) and len(calls["token_logprobs"]) == 8                 # 2 steps x 2 parts x (reference, policy)
    assert all(sub("grpo_loss", beta=0.5, clip_low=0.1, clip_high=0.3, responses=4))
    assert all(sub("token_rewards", credit="word", score_stop=True, stop_ids=run.actor.stop_ids)) and all(sub("position_advantages", scale=False))
    assert all(args[1] == 0.5 for args, _ in calls["clip_grad_norm_"])
    asked = [row["prompt"] for row in train.prompts_of_step(run.rows, 2, 7, 0)]
    assert calls["token_rewards"][0][0][3] == [asked[0], asked[0], asked[1], asked[1]]                       # rows of a group adjacent, as sample makes them


def test_old_logp_stays_that_of_the_rollout(tmp_path, few, monkeypatch):
    """The second and third update on a batch compare with the policy that sampled, not with the one before."""
    old, real = [], grpo.grpo_loss
    monkeypatch.setattr(grpo, "grpo_loss", lambda logp, old_logp, *a, **k: (old.append(old_logp.clone()), real(logp, old_logp, *a, **k))[1])
    train.train(train.prepare(train.Options(steps=1, prompts_per_step=2, group_size=2, max_new_tokens=24, updates_per_rollout=3, warmup_steps=0,
                                            eval_prompts=str(few[1]), output_dir=str(tmp_path / "run"))))
    assert len(old) == 3 and torch.equal(old[0], old[1]) and torch.equal(old[0], old[2]) and not old[0].requires_grad


def test_a_finished_run_stays_as_it_is_or_goes_on(tmp_path, few):
    assert fork([*TINY, *few, "--steps", 2, "--output_dir", tmp_path / "run"], tmp_path)[0] == 0
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0 and "after: facts" in out and rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2
    assert fork(["--resume", "--output_dir", tmp_path / "run", "--steps", 4], tmp_path)[0] == 0
    assert rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == 4 and json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4


def test_no_reference_at_beta_0(tmp_path):
    assert train.prepare(train.Options(beta=0.0, output_dir=str(tmp_path / "unused"))).reference is None


def test_truncated_and_flat(tmp_path, few, monkeypatch):
    """Equal rewards everywhere: all columns are flat, those without a reward do not count; and who ended says so."""
    monkeypatch.setattr(cme, "token_rewards", lambda v, vt, gt, prompts, ids, n, **k: (torch.ones(ids.shape), torch.arange(ids.shape[1]).expand(ids.shape) < 2))
    got = {}
    for longest in (3, 48):
        train.train(train.prepare(train.Options(steps=1, prompts_per_step=2, group_size=2, max_new_tokens=longest,
                                                eval_prompts=str(few[1]), output_dir=str(tmp_path / f"{longest}"))))
        got[longest] = rows(tmp_path / f"{longest}/metrics.jsonl")[1]
    assert (got[3]["truncated"], got[48]["truncated"]) == (1, 0) and got[3]["flat"] == got[48]["flat"] == 1


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path, few):
    def patch():
        real, calls = grpo.grpo_loss, []

        def wrapper(*args, **kwargs):
            calls.append(0)
            loss, stats = real(*args, **kwargs)
            if len(calls) == 2:
                loss.register_hook(lambda g: g * float("inf"))
            return loss, stats
        grpo.grpo_loss = wrapper
    status, _, err = fork([*TINY, *few, "--output_dir", tmp_path / "run"], tmp_path, patch)
    assert status == 0 and [r["skipped"] for r in rows(tmp_path / "run/metrics.jsonl")[1:]] == [0, 1, 0, 0, 0, 0], err


def test_watch_verifier(tmp_path, few):
    """Scored at every evaluation, beside the trained one, on the same greedy answers; where they part, it is said once."""
    status, out, err = fork([*TINY, *few, "--watch_verifier", ROOT / "toy/cme/generator", "--steps", 4, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 0, err
    run = tmp_path / "run"
    held = [r["held_out"] for r in rows(run / "metrics.jsonl") if "held_out" in r]
    assert all(h["watch"] < 0 and h["trained"] < 0 for h in held) and len(held) > 1
    policy, asked = models.LocalModel(*models.load("", json.loads((run / "summary.json").read_text())["model"], "cpu")), prompts.read_prompts(str(few[1]))
    texts = [text for [text] in policy.complete([r["prompt"] for r in asked], max_new_tokens=json.loads((run / "config.json").read_text())["max_new_tokens"], temperature=0)]
    for name, path in (("watch", "toy/cme/generator"), ("trained", "toy/cme/verifier")):
        alone = cme.sequence_rewards(*models.load("", path, "cpu"), [r["prompt"] for r in asked], texts).mean().item()
        assert held[-1][name] == pytest.approx(alone, abs=2e-4)
    parted = held[-1]["trained"] > held[0]["trained"] and held[-1]["watch"] < held[0]["watch"]
    assert ("exploited" in err) == parted


def test_an_exploited_verifier_is_named(monkeypatch, capsys):
    """One line if the trained verifier's view rose while the watched one's fell; none otherwise."""
    monkeypatch.setattr(train, "train_options", lambda _: None), monkeypatch.setattr(train, "prepare", lambda _: None)
    for trained, watch, said in ((-1.0, -3.0, 1), (-1.0, -1.5, 0), (-3.0, -3.0, 0)):
        scores = {"before": {"trained": -2.0, "watch": -2.0}, "after": {"trained": trained, "watch": watch}}
        monkeypatch.setattr(train, "train", lambda _, s=scores: s | {"steps": 1, "seconds": {"rollout": 1.0}, "tokens": 1, "peak_memory_mb": 1, "model": "m"})
        train.main()
        assert capsys.readouterr().err.count("exploited") == said
