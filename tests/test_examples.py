"""examples/: what TRL is given, and what it makes of it, against our own functions; what the scripts show when run alone."""
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import cme
import grpo
import two_processes
from examples import shown, trl_cme
from plumbing import models
from plumbing.prompts import read_prompts
from test_train import fork

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_the_gradient_of_a_step_of_trl_is_ours(tmp_path, beta):
    """One step of 2 groups of 4: TRL's completions, through token_rewards, position_advantages and grpo_loss, give TRL's gradient."""
    policy, tokenizer = models.load("generator", f"{ROOT}/toy/cme/generator", "cpu", train=True)
    verifier, seen = models.load("verifier", f"{ROOT}/toy/cme/verifier", "cpu"), {}

    class Watched(trl_cme.CMETrainer):
        def _generate_and_score_completions(self, inputs):
            seen.update(super()._generate_and_score_completions(inputs), prompts=[row["prompt"] for row in inputs])
            return seen

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen["gradient"] = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            return loss
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in read_prompts(f"{ROOT}/toy/cme/prompts.jsonl")])
    config = GRPOConfig(output_dir=str(tmp_path), max_steps=1, num_generations=4, per_device_train_batch_size=8, max_completion_length=30, learning_rate=0.0,
                        beta=beta, loss_type="grpo", temperature=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
                        save_strategy="no", disable_tqdm=True, seed=1)
    # each prompt as a message: TRL then applies the chat template, as we do
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    Watched(policy, args=config, processing_class=tokenizer, train_dataset=rows, verifier=verifier).train()

    ids, mask = seen["completion_ids"], seen["completion_mask"].bool()
    lengths, prompts, stop = mask.sum(1), seen["prompts"], models.find_stop_ids(policy, tokenizer)
    rewards, counted = cme.token_rewards(*verifier, tokenizer, prompts, ids, lengths, stop_ids=stop)
    advantages = grpo.position_advantages(rewards, counted, 4)
    assert prompts[0] == prompts[3] != prompts[4] and lengths.unique().numel() > 1 and advantages.abs().max() > 0.5
    torch.testing.assert_close(seen["advantages"], advantages, rtol=1e-4, atol=1e-4)
    prompt_ids = [models.chat_ids(tokenizer, prompt) for prompt in prompts]
    logp = grpo.token_logprobs(policy, prompt_ids, ids, lengths)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), logp.detach() if beta else None, advantages, mask, beta=beta)
    for ours, theirs in zip(torch.autograd.grad(loss, list(policy.parameters())), seen["gradient"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_other_rewards_are_reward_functions():
    verifier = models.load("verifier", f"{ROOT}/toy/cme/verifier", "cpu")
    prompts, texts = ["Tell me about Mia."] * 2, ["Mia has a cat and lives in Oslo.", ""]
    found = trl_cme.sequence_reward(*verifier)(prompts=prompts, completions=[[{"role": "assistant", "content": text}] for text in texts])
    want = cme.sequence_rewards(*verifier, prompts, texts).tolist()
    assert found[0] == want[0] < 0 and math.isnan(found[1]) and math.isnan(want[1])
    anchor = models.LocalModel(*models.load("anchor", f"{ROOT}/toy/cat/model", "cpu"))
    [rollouts] = anchor.complete(prompts[:1], n=4, max_new_tokens=48, seed=1)
    rewards = trl_cme.rubric_reward(anchor, 4, max_new_tokens=48)(prompts=prompts[:1] * 4, completions=rollouts)
    assert len(rewards) == 4 and all(0 <= r <= 1 for r in rewards)
    broken = trl_cme.rubric_reward(anchor, 4, max_new_tokens=1)(prompts=prompts[:1] * 4, completions=rollouts)  # no reference, no rubric
    assert broken == [None] * 4 or all(0 <= r <= 1 for r in broken)


def screen(folder, name, *arguments):
    """What `python NAME.py ARGUMENTS` prints, in a forked child: at most 80 columns, no colours where nobody sees them."""
    main = lambda: runpy.run_path(f"{ROOT}/{name}.py", run_name="__main__")  # noqa: E731
    status, out, err = fork(arguments, folder, script=SimpleNamespace(__name__=name, main=main))
    assert status == 0 and not err.strip() and "\x1b" not in out and max(map(len, out.split("\n"))) <= 80, err
    return out


def test_align_alone(tmp_path):
    out = screen(tmp_path, "align")
    done = subprocess.run([sys.executable, "align.py"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout == out and not done.stderr.strip()
    assert "|un|happi ness|" in out and "|un happi|ness|" in out and "'happiness'       'ness' -2.00" in out
    rewards = [sum(map(float, re.findall(r"(?m)^ *(-\d+\.\d\d)  (?!total)", table))) for table in out.split("reward  generator")[1:]]
    totals = re.findall(r"(\S+)  total: the verifier's is (-\d+\.\d\d)(?:, of which (\S+) are masked)?\n", out)
    assert [float(shown) for shown, *_ in totals] == pytest.approx(rewards, abs=0.02)
    assert [float(verifiers) for _, verifiers, _ in totals] == [float(shown) + float(masked or 0) for shown, _, masked in totals]
    assert [masked for *_, masked in totals] == ["", "", "-1.00"]
    assert out.count("total") == 3 and out.count("0.25 of it") == 2 and "masked  ' '" in out


def test_grpo_alone(tmp_path):
    """The numbers on the screen, by hand: the second of two responses at position 3 has the mean -2.5 and the deviation 2.1213."""
    out = screen(tmp_path, "grpo")
    rows = [line.split() for line in out.split("\n") if line.startswith("y_")]
    assert [row[:2] for row in rows] == [["y_1", "1"], ["y_1", "2"], ["y_1", "3"], ["y_2", "1"], ["y_2", "2"], ["y_3", "1"], ["y_3", "2"], ["y_3", "3"], ["y_4", "1"]]
    assert rows[7][3] == f"{1.5 / (4.5 ** 0.5 + 1e-4):.2f}" and rows[5][3:8] == ["-1.22", "1.30", "1.20", "-1.59", "0.133"] and rows[6][7] == "0.000"
    terms = [float(x) for x in re.search(r"= -1/4 \((.*)\)", out)[1].split(" + ")]
    assert float(re.search(r"\) = (\S+)", out)[1]) == pytest.approx(-sum(terms) / 4, abs=1e-3)
    assert terms[0] == pytest.approx(sum(float(row[6]) for row in rows[:3]) / 3, abs=5e-3)


def test_cme_alone(tmp_path):
    out = screen(tmp_path, "cme", "Describe Rosa.", "Rosa keeps a dog and lives in Prague. Rosa loves the colour golden and likes rice.")
    ours, verifiers = re.search(r"(\S+)  total: the verifier's is (\S+)", out).groups()
    assert ours == verifiers and float(ours) < -20 and "' dog'" in out and "|Ro|s|a| keeps" in out
    script = SimpleNamespace(__name__="cme", main=shown.cme)
    status, word, _ = fork(["Describe Rosa.", "Rosa keeps a dog.", "--credit", "word"], tmp_path, script=script)
    assert status == 0 and "' dog'" in word
    status, _, err = fork(["x", "y", "--verifier", "/no/such"], tmp_path, script=script)
    assert status == 2 and err.startswith("cme.py: --verifier /no/such: ") and err.count("\n") == 1


def test_colours_on_a_terminal(monkeypatch):
    spans = {"generator": [[0, 2], [2, 4]], "verifier": [[0, 1], [1, 4]]}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    first, second, _ = shown.under_each_other("abcd", spans, [196, 0]).split("\n")
    assert first == " generator  |\x1b[48;5;196ma b\x1b[0m|cd|" and second == "  verifier  |a|b cd|"


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Completions that are given, of eight lengths: advantages of whole groups (of 4 on each process, of 8 across them) and, averaged, the same gradient."""
    for name in ("two", "one"):
        status, _, err = fork([tmp_path / name], tmp_path, script=two_processes)
        assert status == 0, err[-3000:]
    for group in (4, 8):
        alone, together = (torch.load(tmp_path / f"{name}{group}", weights_only=True) for name in ("one", "two"))
        assert alone.keys() == together.keys() and max(g.abs().max() for g in alone.values()) > 1e-3
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6)


def test_verl(monkeypatch):
    """examples/verl_cme.py on stand-ins of the shapes of verl 0.9 (its own classes: `python tests/verl_by_hand.py` where verl is installed)."""
    import asyncio
    import types

    import verl_by_hand
    from pydantic import BaseModel

    class AgentLoopOutput(BaseModel):
        response_ids: list[int]
        reward_score: float | None = None
        num_turns: int = 0

        def as_dict(self):
            output = self.model_dump(exclude_unset=True)
            output["responses"] = torch.tensor(output.pop("response_ids"))
            output["response_mask"] = torch.ones_like(output["responses"])
            rm_scores = torch.zeros(len(output["responses"]))
            rm_scores[-1] = output.pop("reward_score")
            return output | {"rm_scores": rm_scores}

    class SingleTurnAgentLoop:
        def __init__(self, tokenizer, ids):
            self.tokenizer, self.ids, self.loop = tokenizer, ids, asyncio.get_running_loop()

        async def run(self, sampling_params, raw_prompt):
            return AgentLoopOutput(response_ids=self.ids, num_turns=2)
    parts = {"verl.experimental.agent_loop.agent_loop": {"AgentLoopOutput": AgentLoopOutput, "register": lambda name: lambda c: c},
             "verl.experimental.agent_loop.single_turn_agent_loop": {"SingleTurnAgentLoop": SingleTurnAgentLoop},
             "verl.trainer.ppo.core_algos": {"register_adv_est": lambda name: lambda f: f}}
    for name in ("verl", "verl.experimental", "verl.experimental.agent_loop", "verl.trainer", "verl.trainer.ppo", *parts):
        module = types.ModuleType(name)
        vars(module).update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "examples.verl_cme", raising=False)
    from examples import verl_cme

    async def once(tokenizer, prompt, ids):
        return (await verl_cme.CMEAgentLoop(tokenizer, ids).run({}, raw_prompt=prompt)).as_dict()
    verl_by_hand.check(lambda *row: asyncio.run(once(*row)), lambda *batch: verl_cme.position_advantages(*batch)[0])
    monkeypatch.delitem(sys.modules, "examples.verl_cme", raising=False)
