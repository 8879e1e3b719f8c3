"""examples/verl_cme.py: rewards of two groups, rows shuffled as verl may, against token_rewards and position_advantages. Needs verl: `python tests/verl_by_hand.py`,
or what test_examples.py puts in its place."""
import asyncio
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]


def check(DataProto):
    import cme
    import grpo
    from examples import verl_cme
    from plumbing import models
    tokenizer = models.load_tokenizer(f"{ROOT}/toy/cme/generator")
    manager = verl_cme.CMERewardManager(None, tokenizer, None)
    texts = ["Mia keeps a dog.", "Rosa likes rice and lives in Prague.", "Mia has a cat and lives in Oslo.", "Rosa"]
    asked = ["Tell me about Mia.", "Describe Rosa."] * 2
    ids, lengths = grpo.pad([tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * (i % 2) for i, text in enumerate(texts)])
    mask = grpo.response_mask(lengths, ids.shape[1])
    prompts = torch.zeros(4, 3, dtype=torch.long)
    data = DataProto.from_dict(
        tensors={"prompts": prompts, "responses": ids, "response_mask": mask.long(), "attention_mask": torch.cat([torch.ones(4, 3, dtype=torch.long), mask.long()], 1)},
        non_tensors={"raw_prompt": np.array([[{"role": "user", "content": p}] for p in asked] + [None], dtype=object)[:4], "uid": np.array(["b", "a", "b", "a"], dtype=object)})
    async def together():
        return await asyncio.gather(*[manager.run_single(data[i:i + 1]) for i in range(4)])
    scores = [found["reward_score"] for found in manager.loop.run_until_complete(together())]
    scored = manager.assemble_rm_scores(data, scores)
    rewards, counted = cme.token_rewards(*verl_cme.CMERewardManager.verifier, tokenizer, asked, ids, lengths)
    torch.testing.assert_close(scored, rewards, atol=1e-5, rtol=1e-5)
    assert torch.equal(scored != 0, counted)
    order = torch.tensor([1, 3, 0, 2])
    want = torch.empty_like(rewards)
    want[order] = grpo.position_advantages(rewards[order], counted[order], 2)
    found, _ = verl_cme.position_advantages(scored, mask.long(), data.non_tensor_batch["uid"])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert found.abs().max() > 0.5
    try:
        verl_cme.position_advantages(scored, mask.long(), np.array(["a", "a", "a", "b"]))
    except ValueError as e:
        assert "unequal" in str(e)
    else:
        raise AssertionError("groups of three and one were taken")


if __name__ == "__main__":
    asyncio.set_event_loop(asyncio.new_event_loop())
    import verl
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    check(verl.DataProto)
    from examples import verl_cme
    assert get_adv_estimator_fn("cme") is verl_cme.position_advantages
    print(f"verl {verl.__version__}: fine")
