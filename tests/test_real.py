"""Two real pretrained models, where REAL_MODELS names a folder with smollm2/ and gemma/ (SmolLM2-135M-Instruct, Gemma 3 270M):

    REAL_MODELS=... python -m pytest -m real -n 1 tests/test_real.py
"""
import os
import signal
from pathlib import Path

import pytest
import torch

import grpo
import train
from plumbing import models
from test_train import fork, kill_at, rows, weights

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("REAL_MODELS", "none"))
pytestmark = [pytest.mark.real, pytest.mark.skipif(not REAL.is_dir(), reason="REAL_MODELS names no folder of models")]
TINY = ("--prompts facts/prompts.jsonl --eval_prompts EVAL --steps 2 --prompts_per_step 1 --group_size 2 --max_new_tokens 8 "
        "--micro_batch 2 --save_every 1 --eval_every 0 --lr 1e-5").split()


def run(tmp_path, *arguments, patch=lambda: None):
    """train.py with SmolLM2 as the generator on two questions."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "eval.jsonl").write_text("".join((ROOT / "facts/eval.jsonl").read_text().splitlines(True)[:2]))
    tiny = [tmp_path / "eval.jsonl" if word == "EVAL" else word for word in TINY]
    return fork([*tiny, "--generator", REAL / "smollm2", "--output_dir", tmp_path / "run", *arguments], tmp_path, patch)


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_log_probabilities_are_transformers_own(name):
    """Of a padded batch, against each row alone under the model's own forward; and sampled greedily, the model's own generate."""
    model, tokenizer = models.load("model", str(REAL / name), "cpu")
    prompts = [models.chat_ids(tokenizer, p) for p in ("What is the capital of France?", "Which element has the symbol Fe? Answer in one sentence.")]
    ids, lengths = grpo.sample(model, prompts, 1, max_new_tokens=12, stop_ids=models.find_stop_ids(model, tokenizer), temperature=0)
    with torch.no_grad():
        logp = grpo.token_logprobs(model, prompts, ids, lengths)
        for p, y, n, ours in zip(prompts, ids.tolist(), lengths.tolist(), logp):
            theirs = model(input_ids=torch.tensor([p + y[:n]])).logits[0, len(p) - 1:-1].log_softmax(-1)
            torch.testing.assert_close(ours[:n], theirs[range(n), y[:n]], atol=1e-3, rtol=1e-3)
            own = model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, repetition_penalty=1.0)[0, len(p):].tolist()
            assert own[:n] == y[:n]


def test_two_steps_of_cme_and_a_resume_to_the_bit(tmp_path):
    arguments = "--verifier", REAL / "gemma"
    status, out, err = run(tmp_path / "a", *arguments)
    assert status == 0, err
    metrics = rows(tmp_path / "a/run/metrics.jsonl")
    assert all(r["skipped"] == 0 and r["grad_norm"] > 0 and r["reward"] < 0 for r in metrics[1:])
    assert run(tmp_path / "b", *arguments, patch=kill_at(train, "rollout", 2))[0] == -signal.SIGKILL
    status, out, err = fork(["--resume", "--output_dir", tmp_path / "b/run"], tmp_path / "b")
    assert status == 0 and weights(tmp_path / "a/run") == weights(tmp_path / "b/run"), err
    assert rows(tmp_path / "b/run/metrics.jsonl") == metrics


def test_two_steps_of_cat(tmp_path):
    """The generator is its own anchor and judge: whatever the anchor can do, the run ends in a line that says so, or in two steps."""
    status, out, err = run(tmp_path, "--reward", "cat")
    assert "Traceback" not in err and (status == 0 or status == 2 and "no reward in the first step" in err.splitlines()[-1]), err
