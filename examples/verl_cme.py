"""Token-level CME in verl (0.9): a reward manager, in which a frozen verifier scores, and an advantage estimator.

    CME_VERIFIER=google/gemma-3-1b-it VERL_USE_EXTERNAL_MODULES=examples.verl_cme python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=cme reward.reward_manager.source=importlib reward.reward_manager.name=CMERewardManager \
        reward.reward_manager.module.path=examples/verl_cme.py actor_rollout_ref.actor.use_kl_loss=True ...

Rewards come as verl's `token_level_rewards` [B, T]; a token that does not count (whitespace, special) has exactly 0, so a
counted reward of exactly 0 becomes -1e-30.  KL therefore belongs into the loss, not into the reward.  Rows of a group share
their `index` (verl's uid).  The verifier is loaded by each of verl's reward workers (reward.num_workers=1) and scores row by row; a worker
that sees no GPU scores on its CPU, so a large verifier wants a server of its own.  Tried with verl 0.9.1's own registry, base class and
DataProto on a CPU; a whole training with it was not run.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import register_adv_est

import cme
import grpo
from plumbing import TOY, models


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


class CMERewardManager(RewardManagerBase):
    one_thread = ThreadPoolExecutor(1)  # verl asks for all rows at once, and a tokenizer's settings are shared by threads

    @classmethod
    def init_class(cls, config, tokenizer):
        if not cls._class_initialized:
            cls.verifier = models.load("CME_VERIFIER", os.environ.get("CME_VERIFIER", f"{TOY}/cme/verifier"))
        super().init_class(config, tokenizer)

    async def run_single(self, data) -> dict:
        """One row: responses [1, T], attention_mask [1, prompt + T], raw_prompt (messages) -> a list of rewards."""
        ids, row = data.batch["responses"][-1:], data.non_tensor_batch["raw_prompt"][-1]
        lengths = data.batch["attention_mask"][-1:, -ids.shape[1]:].sum(1)
        return {"reward_score": await self.loop.run_in_executor(self.one_thread, self.score, list(row), ids, lengths)}

    def score(self, prompt, ids, lengths) -> list:
        rewards, counted = cme.token_rewards(*self.verifier, self.tokenizer, [prompt], ids, lengths)
        rewards = torch.where(counted & (rewards == 0), -1e-30, rewards)  # 0 is for what does not count
        return rewards[0, :int(lengths)].tolist()

    @classmethod
    def assemble_rm_scores(cls, data, scores: list):
        """Lists of rewards -> [B, T]."""
        found = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        for row, values in zip(found, scores):
            row[:len(values)] = torch.tensor(values)
        return found
