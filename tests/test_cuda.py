"""What a GPU does otherwise: captured graphs, bf16, its own draws. Skipped without one."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

import grpo
from plumbing import models
from test_grpo import plain

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0)
PROMPTS = [[5, 6, 7], [8] * 9, [9, 10]]


def small(kind=Qwen2ForCausalLM, config=Qwen2Config, **more):
    torch.manual_seed(0)
    return kind(config(**SHAPE | more, initializer_range=0.3)).eval()


def drawn(model, device, temperature=1.0, stop_ids=(0,), new=100):
    noise = torch.Generator(device).manual_seed(1)
    ids, lengths = grpo.sample(model.to(device), PROMPTS, 4, max_new_tokens=new, stop_ids=list(stop_ids), temperature=temperature, generator=noise)
    return ids.cpu(), lengths.cpu()


def test_graphs_draw_what_the_plain_loop_draws(monkeypatch):
    """Greedy, float32: the same ids as on the CPU; with draws, rows leaving at half and a quarter of the batch: the same as without a graph."""
    model = small()
    on_cpu, on_gpu = drawn(model, "cpu", 0.0), drawn(model, "cuda", 0.0)
    assert all(torch.equal(a, b) for a, b in zip(on_cpu, on_gpu))
    captured = drawn(model, "cuda", stop_ids=range(40))
    monkeypatch.setattr(grpo, "stepper", plain)
    without = drawn(model, "cuda", stop_ids=range(40))
    assert all(torch.equal(a, b) for a, b in zip(captured, without)) and len(set(captured[1].tolist())) > 3


def test_graphs_follow_the_weights():
    model = small()
    before = drawn(model, "cuda", 0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = drawn(model, "cuda", 0.0)
    assert not torch.equal(before[0], after[0]) and torch.equal(after[0], drawn(model, "cpu", 0.0)[0])


def test_under_autocast_the_weights_of_now_are_used():
    """The bf16 copies of autocast belong to one rollout."""
    model = small()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        first = drawn(model, "cuda", 0.0)
    with torch.no_grad():
        model.get_input_embeddings().weight.neg_()
        model.model.layers[0].mlp.down_proj.weight.neg_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        second = drawn(model, "cuda", 0.0)
    assert not torch.equal(first[0], second[0])


def test_windows_and_what_cannot_be_captured_take_the_plain_loop():
    gemma = small(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=16, sliding_window=8)
    assert torch.equal(drawn(gemma, "cpu", 0.0)[0], drawn(gemma, "cuda", 0.0)[0])
    model = small()
    model.model.layers[0].register_forward_hook(lambda *_: float(torch.ones(1, device=model.device).item()) and None)
    assert torch.equal(drawn(model, "cpu", 0.0)[0], drawn(model, "cuda", 0.0)[0])
    assert drawn(model, "cuda")[1].min() >= 1  # with a generator of its own: the default one does not draw any more after a capture that failed


def test_log_probabilities_are_the_cpus():
    model = small()
    ids, lengths = drawn(model, "cpu")
    rows = [p for p in PROMPTS for _ in range(4)]
    on_cpu, entropy = grpo.token_logprobs(copy.deepcopy(model), rows, ids, lengths, entropy=True)
    on_gpu, entropy_gpu = grpo.token_logprobs(model.cuda(), rows, ids.cuda(), lengths.cuda(), entropy=True, chunk=7)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy_gpu.cpu(), entropy, rtol=1e-4, atol=1e-4)


def test_a_verifier_scores_alike_in_any_batch():
    model, tokenizer = models.load("toy", str(ROOT / "toy/cme/verifier"), "cuda")
    prompts, answers = ["Tell me about Mia."] * 6, [[5, 6, 7] * (i + 1) for i in range(6)]
    together = models.answer_logprobs(model, tokenizer, prompts, answers)
    alone = [models.answer_logprobs(model, tokenizer, [p], [a])[0] for p, a in zip(prompts, answers)]
    assert max(abs(a - b).max() for a, b in zip(together, alone)) < 0.25  # bf16


@pytest.mark.parametrize("options", [[], ["--reward", "cat", "--prompts_per_step", "4"]])
def test_train_runs_learns_and_resumes(tmp_path, options):
    command = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(tmp_path / "run"), "--save_every", "2", "--eval_every", "0", *options]
    subprocess.run([*command, "--steps", "2"], check=True)
    subprocess.run([*command, "--steps", "4", "--resume"], check=True)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 4 and summary["skipped"] == 0 and summary["peak_memory_mb"] > 0
