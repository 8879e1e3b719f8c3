"""examples/verl_cme.py: rewards of two groups, rows in any order, against token_rewards and position_advantages. `check` is given verl's classes, or what
test_examples.py puts in their place; `python tests/verl_by_hand.py`, where verl is installed, adds verl's own worker, configuration and compute_advantage."""
import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
TEXTS = ["Mia keeps a dog.", "Rosa likes rice and lives in Prague.", "Mia has a cat and lives in Oslo.", "Rosa"]
ASKED = ["Tell me about Mia.", "Describe Rosa."] * 2


def check(run_loop, compute_advantage):
    """run_loop(tokenizer, prompt, ids) -> what the agent loop's output is as a dict, if a server samples these ids; compute_advantage(rewards, mask, uid)."""
    import cme
    import grpo
    from examples import verl_cme
    from plumbing import models
    tokenizer = models.load_tokenizer(f"{ROOT}/toy/cme/generator")
    rows = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * (i % 2) for i, text in enumerate(TEXTS)]
    ids, lengths = grpo.pad(rows)
    mask = grpo.response_mask(lengths, ids.shape[1])
    rewards, counted = cme.token_rewards(*verl_cme.verifier(), tokenizer, ASKED, ids, lengths)
    scored = torch.zeros_like(rewards)
    for i, (prompt, row) in enumerate(zip(ASKED, rows)):
        output = run_loop(tokenizer, [{"role": "user", "content": prompt}], row)
        assert output["responses"].tolist() == row and output["rm_scores"].shape == output["response_mask"].shape == (len(row),)
        scored[i, :len(row)] = output["rm_scores"]
    torch.testing.assert_close(scored, rewards, atol=1e-5, rtol=1e-5)
    assert torch.equal(scored != 0, counted)
    order, uid = torch.tensor([1, 3, 0, 2]), np.array(["b", "a", "b", "a"], dtype=object)
    want = torch.empty_like(rewards)
    want[order] = grpo.position_advantages(rewards[order], counted[order], 2)
    found = compute_advantage(scored, mask.long(), uid)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert found.abs().max() > 0.5
    found = verl_cme.position_advantages(torch.tensor([[-1.0, -2], [-3, -5]]), torch.tensor([[1, 1], [1, 0]]), np.array(["a", "a"]),
                                         SimpleNamespace(norm_adv_by_std_in_grpo=False))[0]
    assert found.tolist() == [[1, 0], [-1, 0]]                                 # the last reward is behind its row's end
    real = cme.token_rewards
    try:
        cme.token_rewards = lambda *_: (torch.tensor([[0.0, 0, -2]]), torch.tensor([[True, False, True]]))
        first, *others = verl_cme.score(tokenizer, "x", [5, 6, 7])
    finally:
        cme.token_rewards = real
    assert -1e-20 < first < 0 and others == [0, -2]                            # a counted 0 counts
    try:
        compute_advantage(scored, mask.long(), np.array(["a", "a", "a", "b"], dtype=object))
    except ValueError as e:
        assert "unequal" in str(e)
    else:
        raise AssertionError("groups of three and one were taken")


def main():
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "examples.verl_cme"}           # as the docstring's command has it
    import verl
    import verl.trainer.ppo.v1.agent_loop_tq as loop_tq
    from hydra import compose, initialize_config_dir
    from tensordict import NonTensorStack
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.workers.rollout.replica import TokenOutput
    folder = str(Path(verl.__file__).parent / "trainer/config")
    with initialize_config_dir(folder, version_base=None):
        config = compose("ppo_trainer", overrides=[
            "algorithm.adv_estimator=cme", "actor_rollout_ref.rollout.agent.default_agent_loop=cme", "actor_rollout_ref.rollout.name=vllm",
            f"actor_rollout_ref.model.path={ROOT}/toy/cme/generator", "actor_rollout_ref.rollout.n=1"])

    def run_loop(tokenizer, prompt, ids):
        """verl's worker from a prompt to what it puts into the queue; only the server and the queue are ours."""
        put = []

        async def generate(**_):
            return TokenOutput(token_ids=list(ids))

        async def kept(**kwargs):
            put.append(kwargs.get("fields"))
        loop_tq.tq = SimpleNamespace(init=lambda *_: None, async_kv_put=kept, async_kv_batch_put=kept)

        async def step():
            worker = loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class(config, SimpleNamespace(generate=generate))
            row = dict(uid="u", session_id=0, global_steps=0, index=0, raw_prompt=prompt, agent_name=config.actor_rollout_ref.rollout.agent.default_agent_loop)
            await worker._run_agent_loop({}, {"step": 0, "sample_index": 0, "rollout_n": 0, "validate": False}, trace=False, **row)
        asyncio.run(step())
        [fields] = put
        return {name: fields[name][0] for name in ("responses", "response_mask", "rm_scores")}

    def advantages(rewards, mask, uid):
        data = verl.DataProto.from_dict(tensors={"token_level_rewards": rewards, "response_mask": mask}, non_tensors={"uid": uid})
        return compute_advantage(data, config.algorithm.adv_estimator, config=config.algorithm).batch["advantages"]
    check(run_loop, advantages)
    print(f"verl {verl.__version__}: fine")


if __name__ == "__main__":
    main()
