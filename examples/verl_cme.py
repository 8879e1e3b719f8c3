"""Token-level CME in verl (0.9): an agent loop, in which a frozen verifier scores what was just sampled, and an advantage estimator.

    CME_VERIFIER=google/gemma-3-1b-it PYTHONPATH=. VERL_USE_EXTERNAL_MODULES=examples.verl_cme python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=cme actor_rollout_ref.rollout.agent.default_agent_loop=cme actor_rollout_ref.rollout.agent.num_workers=1 \
        actor_rollout_ref.rollout.n=8 actor_rollout_ref.actor.use_kl_loss=True ...

verl's reward managers know one number per response, but what an agent loop returns says itself what its `rm_scores` are: here one per
token, which arrive as `token_level_rewards` [B, T] (with `trainer.use_v1`, the default: the older trainer takes their sum).  A token that
does not count (whitespace, special) has exactly 0, so a counted reward of exactly 0 becomes -1e-30; KL therefore belongs into the loss,
not into the reward.  Rows of a group share their `index` (verl's uid).  The verifier is loaded by each agent worker and scores row by
row; a worker that sees no GPU scores on its CPU, so a large verifier wants a server of its own.  Tried with verl 0.9.1's own agent loop,
worker and compute_advantage on a CPU; a whole training was not run.
"""
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.core_algos import register_adv_est

import cme
import grpo
from plumbing import TOY, models

one_thread = ThreadPoolExecutor(1)  # verl asks for all rows at once, and a tokenizer's settings are shared by threads


@register_adv_est("cme")
def position_advantages(token_level_rewards, response_mask, index, config=None, **_):
    """[B, T] nats, [B, T], [B] -> advantages [B, T], twice (verl's second is for a critic).  ValueError: groups of unequal size."""
    names, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    if len(set(sizes.tolist())) > 1:
        raise ValueError(f"groups of unequal size: {dict(zip(names, sizes))}")
    order = torch.from_numpy(np.argsort(group, kind="stable")).to(token_level_rewards.device)  # groups next to each other
    rewards, scale = token_level_rewards[order], getattr(config, "norm_adv_by_std_in_grpo", True)
    found = torch.empty_like(rewards)
    found[order] = grpo.position_advantages(rewards, (rewards != 0) & response_mask[order].bool(), int(sizes[0]), scale=scale)
    return found, found


@functools.cache
def verifier():
    return models.load("CME_VERIFIER", os.environ.get("CME_VERIFIER", f"{TOY}/cme/verifier"))


def score(tokenizer, prompt, ids: list) -> list:
    """One response -> its tokens' rewards, 0 where one does not count."""
    rewards, counted = cme.token_rewards(*verifier(), tokenizer, [prompt], torch.tensor([ids]), torch.tensor([len(ids)]))
    return torch.where(counted & (rewards == 0), -1e-30, rewards)[0].tolist()


class Scored(AgentLoopOutput):
    """verl's output with a reward for each token; `reward_score`, their sum, tells verl that it has been scored."""
    token_rewards: list[float]

    def as_dict(self):
        output = super().as_dict()
        return output | {"rm_scores": torch.tensor(output.pop("token_rewards"))}


@register("cme")
class CMEAgentLoop(SingleTurnAgentLoop):
    async def run(self, sampling_params, **kwargs):
        output = await super().run(sampling_params, **kwargs)
        rewards = await self.loop.run_in_executor(one_thread, score, self.tokenizer, list(kwargs["raw_prompt"]), output.response_ids)
        fields = {name: getattr(output, name) for name in output.model_fields_set - {"reward_score"}}
        return Scored(**fields, reward_score=sum(rewards), token_rewards=rewards)
