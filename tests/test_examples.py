"""examples/trl_cme.py: what TRL is given, and what it makes of it, against our own functions."""
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import cme
import grpo
from plumbing import models
from plumbing.prompts import read_prompts

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("trl_cme", ROOT / "examples/trl_cme.py")
trl_cme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trl_cme)


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
