"""grpo.py against independent oracles: slow loops in Python floats, exact enumeration, the models' own forward, TRL, transformers.

    pytest tests/test_grpo.py

The models are tiny and random (seven architectures: soft-capped, scaled, divided logits; absolute positions; windows shorter than the
sequences), drawn with a large deviation and untied heads so that attention, positions and the cache all show in the logits and greedy text
does not just repeat itself. Notation as in grpo.py.
"""
import collections
import functools
import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models as token_models, pre_tokenizers, processors

import grpo
from plumbing import models

TOY = Path(__file__).resolve().parents[1] / "toy" / "cme"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
WINDOW = 4  # of the sliding layers: shorter than every sequence that matters here


def config_of(arch, vocab):
    c = transformers
    if arch == "gpt2":
        return c.GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
                            tie_word_embeddings=False)
    if arch == "bloom":
        return c.BloomConfig(vocab_size=vocab, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    name, extra = {
        "qwen2": (c.Qwen2Config, {}),
        "llama": (c.LlamaConfig, {}),
        "gemma2": (c.Gemma2Config, dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, final_logit_softcapping=4.0)),
        "gemma3": (c.Gemma3TextConfig, dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, num_hidden_layers=3,
                                            layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
        "cohere": (c.CohereConfig, dict(logit_scale=0.25)),
        "granite": (c.GraniteConfig, dict(logits_scaling=3.0)),
    }[arch]
    return name(**{**SIZES, **extra}, vocab_size=vocab)


ARCHS = ["qwen2", "llama", "gemma2", "gemma3", "cohere", "granite", "gpt2"]


@functools.lru_cache(maxsize=None)
def tiny(arch="qwen2", vocab=50, seed=0):
    """A random float32 model, shared by the tests: gradients are read with torch.autograd.grad, so that nothing is left behind in it."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(arch, vocab), dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=g)
    return model


def random_rows(vocab=50, sizes=((1, 5), (7, 0), (3, 8), (11, 1), (4, 6)), seed=1):
    """-> prompts (lists), responses (lists), ids [B, T] with garbage behind each response, lengths [B]."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(vocab, (p,), generator=g).tolist() for p, _ in sizes]
    ids = torch.randint(vocab, (len(sizes), max(n for _, n in sizes)), generator=g)
    lengths = torch.tensor([n for _, n in sizes])
    return prompts, [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())], ids, lengths


def alone(model, prompt, response, temperature=1.0):
    """The oracle: log-softmax of the model's own logits over one row without padding or cache -> [len(response), V]."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float() / temperature
    return logits[len(prompt) - 1:len(prompt) - 1 + len(response)].log_softmax(-1)


def alone_logp(model, prompt, response, temperature=1.0):
    return [alone(model, prompt, response, temperature)[t, token] for t, token in enumerate(response)]


# ---------------------------------------------------------------- grpo_loss

def slow_loss(logp, old, ref, advantages, mask, beta, low, high, responses=None):
    """Eq. 2 as written, in Python floats -> loss, its gradient with respect to logp, stats. All arguments are nested lists."""
    B, stats = len(mask), dict(kl=0.0, approx_kl=0.0, clipfrac=0.0)
    loss, gradient = 0.0, [[0.0] * len(m) for m in mask]
    for i in range(B):
        size = sum(mask[i])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            w = 1 / size / (B if responses is None else responses)
            a = advantages[i][t] if isinstance(advantages[i], list) else advantages[i]
            rho = math.exp(logp[i][t] - old[i][t])
            clipped = min(max(rho, 1 - low), 1 + high)
            surrogate, slope = (rho * a, rho * a) if rho * a <= clipped * a else (clipped * a, 0.0)  # slope = d surrogate / d logp
            q = math.exp(ref[i][t] - logp[i][t]) if ref is not None else 1.0
            kl = q - math.log(q) - 1
            loss += -w * (surrogate - beta * kl)
            gradient[i][t] = -w * (slope - beta * (1 - q))
            stats["kl"] += w * kl
            stats["approx_kl"] += w * (rho - 1 - math.log(rho))  # E_old[rho] = 1 and E_old[-log rho] = KL(old || new)
            stats["clipfrac"] += w * (clipped * a < rho * a)
    return loss, gradient, stats


def loss_case(seed, B=4, T=6, spread=0.4, token_level=False, full=False):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    old, ref = (logp + spread * torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(*((B, T) if token_level else (B,)), generator=g, dtype=torch.float64)
    if token_level:
        advantages[torch.rand(B, T, generator=g) < 0.2] = 0  # masked rewards: no policy-gradient term, but the KL term stays
    lengths = torch.full((B,), T) if full else torch.randint(1, T + 1, (B,), generator=g)
    return logp, old, ref, advantages, grpo.response_mask(lengths, T)


def with_gradient(logp, *args, **options):
    logp = logp.clone().requires_grad_()
    loss, stats = grpo.grpo_loss(logp, *args, **options)
    return loss.item(), torch.autograd.grad(loss, logp)[0], stats


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 5), T=st.integers(1, 6), token_level=st.booleans(), beta=st.sampled_from([0.0, 0.01, 0.7]),
       low=st.sampled_from([0.1, 0.2]), high=st.sampled_from([0.2, 0.5]), responses=st.sampled_from([None, 1, 8]))
def test_loss_gradient_and_stats_are_eq_2_term_by_term(seed, B, T, token_level, beta, low, high, responses):
    logp, old, ref, advantages, mask = loss_case(seed, B, T, token_level=token_level)
    ref = None if beta == 0 and seed % 2 else ref
    loss, gradient, stats = with_gradient(logp, old, ref, advantages, mask, beta=beta, clip_low=low, clip_high=high, responses=responses)
    want, slope, slow = slow_loss(logp.tolist(), old.tolist(), None if ref is None else ref.tolist(), advantages.tolist(), mask.tolist(),
                                  beta, low, high, responses)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert stats["loss"].item() == loss and not any(s.requires_grad for s in stats.values())
    assert {k: stats[k].item() for k in ("kl", "clipfrac")} == pytest.approx({k: slow[k] for k in ("kl", "clipfrac")}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_approx_kl_is_ratio_minus_one_minus_log_ratio(seed):
    logp, old, ref, advantages, mask = loss_case(seed)
    _, stats = grpo.grpo_loss(logp, old, None, advantages, mask, beta=0.0)
    slow = slow_loss(logp.tolist(), old.tolist(), None, advantages.tolist(), mask.tolist(), 0.0, 0.2, 0.2)[2]
    assert stats["approx_kl"].item() == pytest.approx(slow["approx_kl"], rel=1e-5)


def test_mean_stats_over_every_token_are_the_exact_divergences():
    """With a uniform sampling distribution over V tokens, one row for each token is the exact expectation: no luck involved."""
    V = 6
    g = torch.Generator().manual_seed(0)
    uniform, other = torch.full((V, 1), -math.log(V)), torch.randn(V, generator=g).log_softmax(0)[:, None]
    kl = (uniform.exp() * (uniform - other)).sum().item()  # KL(uniform || other)
    options = dict(advantages=torch.zeros(V), mask=torch.ones(V, 1, dtype=torch.bool), beta=0.0)
    _, stats = grpo.grpo_loss(uniform, uniform, other, **options)
    assert stats["kl"].item() == pytest.approx(kl, abs=1e-6), "KL(policy || reference), samples from the policy"
    _, stats = grpo.grpo_loss(other, uniform, None, **options)
    assert stats["approx_kl"].item() == pytest.approx(kl, abs=1e-6), "KL(old || new), samples from the old policy"


def test_loss_docstring_example():
    loss, gradient, stats = with_gradient(torch.full((1, 2), -1.0), torch.full((1, 2), -1.0), None, torch.tensor([0.5]),
                                          torch.ones(1, 2, dtype=torch.bool), beta=0)
    assert loss == -0.5 and gradient.tolist() == [[-0.25, -0.25]]
    assert {k: v.item() for k, v in stats.items()} == dict(loss=-0.5, kl=0, approx_kl=0, clipfrac=0)


def test_loss_clips_on_the_side_that_the_advantage_pushes_to():
    """Worked: rho 1.5 / 0.5, clip 0.2 / 0.3. A > 0: min(1.5, 1.3) clipped, min(0.5, 0.8) not. A < 0: the other way round."""
    rho, A = torch.tensor([[1.5], [0.5], [1.5], [0.5]]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, gradient, stats = with_gradient(rho.log(), torch.zeros(4, 1), None, A, torch.ones(4, 1), beta=0.0, clip_low=0.2, clip_high=0.3)
    assert loss == pytest.approx(-(1.3 + 0.5 - 1.5 - 0.8) / 4)
    assert gradient[:, 0].tolist() == pytest.approx([0, -0.5 / 4, 1.5 / 4, 0])
    assert stats["clipfrac"].item() == 0.5


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_loss_ignores_garbage_behind_the_responses(garbage):
    logp, old, ref, advantages, mask = loss_case(3, token_level=True)
    assert (~mask).any()
    clean = with_gradient(logp, old, ref, advantages, mask, beta=0.3)
    for dirty in range(1, 16):  # every subset of the four tensors
        args = [x.masked_fill(~mask, garbage) if dirty >> i & 1 else x for i, x in enumerate((logp, old, ref, advantages))]
        loss, gradient, stats = with_gradient(*args, mask, beta=0.3)
        assert loss == clean[0] and torch.equal(gradient, clean[1]) and stats == clean[2]


def test_an_empty_response_counts_in_the_mean_and_adds_nothing():
    logp, old, ref, advantages, mask = loss_case(5, full=True)
    mask[2] = False
    loss, gradient, _ = with_gradient(logp, old, ref, advantages, mask, beta=0.3)
    keep = torch.tensor([0, 1, 3])
    assert loss == pytest.approx(grpo.grpo_loss(logp[keep], old[keep], ref[keep], advantages[keep], mask[keep], beta=0.3, responses=4)[0].item())
    assert gradient[2].eq(0).all()


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_loss_gradient_and_stats_do_not_depend_on_the_micro_batches(split):
    logp, old, ref, advantages, mask = loss_case(6)
    loss, gradient, stats = with_gradient(logp, old, ref, advantages, mask, beta=0.1)
    parts = [with_gradient(*micro, beta=0.1, responses=4) for micro in zip(*(x.split(split) for x in (logp, old, ref, advantages, mask)))]
    assert sum(p[0] for p in parts) == pytest.approx(loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient)
    assert {k: sum(p[2][k].item() for p in parts) for k in stats} == pytest.approx({k: v.item() for k, v in stats.items()})


@pytest.mark.parametrize("split", [[1, 4], [2, 2, 1], [1] * 5])
def test_a_models_gradient_does_not_depend_on_the_micro_batches(split):
    model, (prompts, _, ids, lengths) = tiny(), random_rows()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        old = grpo.token_logprobs(model, prompts, ids, lengths) + 0.2 * torch.randn(ids.shape, generator=g)
    advantages, weights = torch.randn(len(ids), generator=g), list(model.parameters())

    def gradient(rows, **options):
        T = max(1, int(lengths[rows].max()))  # each micro-batch as short as its own rows
        cut = slice(rows.start, rows.stop), slice(T)
        logp = grpo.token_logprobs(model, prompts[rows], ids[cut], lengths[rows])
        return torch.autograd.grad(grpo.grpo_loss(logp, old[cut], old[cut] - 0.1, advantages[rows], grpo.response_mask(lengths[rows], T),
                                                  beta=0.1, **options)[0], weights)

    whole, ends = gradient(slice(0, 5)), list(itertools.accumulate(split))
    parts = [gradient(slice(end - n, end), responses=5) for n, end in zip(split, ends)]
    for i, w in enumerate(whole):
        torch.testing.assert_close(sum(p[i] for p in parts), w, rtol=1e-4, atol=1e-6)
    assert max(w.abs().max() for w in whole) > 1e-2  # not everything is zero


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    """The docstring's example."""
    logp = torch.tensor([[-1.0, -1.0], [-1.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, _ = grpo.grpo_loss(logp, logp, None, torch.tensor([0.5, -0.5]), mask, beta=0.0)                 # old_logp needs no detach()
    loss.backward()
    assert loss.item() == pytest.approx(0) and logp.grad.tolist() == [[-0.125, -0.125], [0.25, 0]]


def test_loss_refuses_what_does_not_fit():
    logp, old, ref, advantages, mask = loss_case(0)
    for args in [(logp[:, :-1], old, ref, advantages, mask), (logp, old[:-1], ref, advantages, mask), (logp, old, ref[:, :1], advantages, mask),
                 (logp, old, ref, advantages[:-1], mask), (logp, old, ref, torch.zeros(6), mask), (logp, old, ref, torch.zeros(4, 5), mask),
                 (logp, old, ref, advantages, mask[:1])]:
        with pytest.raises(ValueError, match="do not fit"):
            grpo.grpo_loss(*args, beta=0.1)
    with pytest.raises(ValueError, match="ref_logp"):
        grpo.grpo_loss(logp, old, None, advantages, mask, beta=0.1)
    grpo.grpo_loss(logp, old, None, advantages, mask, beta=0.0)
    column = grpo.grpo_loss(logp, old, ref, advantages[:, None], mask, beta=0.1)[0]
    assert column == grpo.grpo_loss(logp, old, ref, advantages, mask, beta=0.1)[0]


# ---------------------------------------------------------------- grpo_loss against TRL

def trl_loss(logp, old, ref, advantages, mask, beta, low, high, accumulation=1):
    """TRL's own GRPOTrainer._compute_loss on given log-probabilities -> (loss, its metrics). No model, no data, no accelerator."""
    GRPOTrainer = pytest.importorskip("trl", reason="trl is the peer here").GRPOTrainer
    trainer, metrics = object.__new__(GRPOTrainer), {"train": collections.defaultdict(list)}
    trainer.__dict__.update(
        beta=beta, epsilon_low=low, epsilon_high=high, loss_type="grpo", importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, entropy_coef=0.0, use_adaptive_entropy=False, current_gradient_accumulation_steps=accumulation,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), model=SimpleNamespace(training=True), _metrics=metrics,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None))
    inputs = dict(prompt_ids=torch.zeros(len(mask), 1), prompt_mask=torch.ones(len(mask), 1), completion_ids=torch.zeros(mask.shape),
                  completion_mask=mask.long(), advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref)
    return trainer._compute_loss(None, inputs), metrics["train"]


@pytest.mark.parametrize("token_level", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("low,high", [(0.2, 0.2), (0.1, 0.3)])
@pytest.mark.parametrize("spread", [0.0, 0.4])  # on-policy, off-policy
def test_loss_and_gradient_equal_trl(token_level, beta, low, high, spread):
    logp, old, ref, advantages, mask = loss_case(11, B=6, T=7, spread=spread, token_level=token_level)
    loss, gradient, _ = with_gradient(logp, old, ref, advantages, mask, beta=beta, clip_low=low, clip_high=high)
    logp = logp.requires_grad_()
    theirs, _ = trl_loss(logp, old, ref, advantages, mask, beta, low, high)
    assert loss == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logp)[0], rtol=1e-5, atol=1e-7)
    assert gradient.abs().max() > 1e-3


def test_micro_batches_add_up_to_trls_gradient_accumulation():
    case = loss_case(12)
    ours = sum(grpo.grpo_loss(*(x[i:i + 2] for x in case), beta=0.1, responses=4)[0] for i in (0, 2))
    theirs = sum(trl_loss(*(x[i:i + 2] for x in case), 0.1, 0.2, 0.2, accumulation=2)[0] for i in (0, 2))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_kl_and_clipfrac_equal_trls_on_responses_of_one_length():
    case = loss_case(13, full=True)
    _, stats = grpo.grpo_loss(*case, beta=0.1, clip_low=0.1, clip_high=0.3)
    _, metrics = trl_loss(*case, 0.1, 0.1, 0.3)
    assert stats["kl"].item() == pytest.approx(metrics["kl"][0], rel=1e-5)
    assert stats["clipfrac"].item() == pytest.approx(metrics["clip_ratio/region_mean"][0]) and stats["clipfrac"] > 0


# ---------------------------------------------------------------- advantages

def slow_advantages(rewards, mask, G, scale=True, min_std=0.02):
    out = [[0.0] * len(row) for row in rewards]
    for start in range(0, len(rewards), G):
        for t in range(len(rewards[0])):
            members = [i for i in range(start, start + G) if mask[i][t] and not math.isnan(rewards[i][t])]
            if len(members) < 2:
                continue
            values = [rewards[i][t] for i in members]
            mean, std = statistics.mean(values), statistics.stdev(values)
            for i in members:
                if std >= min_std:
                    out[i][t] = (rewards[i][t] - mean) / (std + 1e-4 if scale else 1)
    return out


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data(), P=st.integers(1, 3), G=st.integers(1, 5), T=st.integers(1, 4), scale=st.booleans())
def test_position_advantages_are_the_slow_loop(data, P, G, T, scale):
    value = st.one_of(st.integers(-40, 0).map(lambda k: k / 4), st.just(math.nan))  # quarters: the deviation is 0 or far above min_std
    cells = lambda s: data.draw(st.lists(st.lists(s, min_size=T, max_size=T), min_size=P * G, max_size=P * G))
    rewards, mask = cells(value), cells(st.booleans())
    r, m = torch.tensor(rewards), torch.tensor(mask)
    kept_r, kept_m = r.clone(), m.clone()
    ours = grpo.position_advantages(r, m, G, scale=scale)
    assert ours.dtype == torch.float32 and ours.shape == r.shape
    torch.testing.assert_close(ours, torch.tensor(slow_advantages(rewards, mask, G, scale)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r, kept_r, rtol=0, atol=0, equal_nan=True)  # the inputs are as they were
    assert torch.equal(m, kept_m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_position_advantages_do_not_depend_on_the_memory_layout(dtype):
    r = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    m = r > -1
    want = grpo.position_advantages(r, m, 3)
    for rewards, mask in [(r.T.contiguous().T, m), (r, m.T.contiguous().T), (r.T.contiguous().T, m.T.contiguous().T), (r.repeat(1, 2)[:, :5], m)]:
        assert torch.equal(grpo.position_advantages(rewards, mask, 3), want)


def test_position_advantages_docstring_example():
    got = grpo.position_advantages(torch.tensor([[-1.0, -2], [-3, -2], [-5, 0]]), torch.tensor([[1, 1], [1, 1], [1, 0]]), 3)
    torch.testing.assert_close(got, torch.tensor([[1.0, 0], [0, 0], [-1, 0]]), rtol=0, atol=1e-4)
    assert got[0, 0].item() == pytest.approx(2 / 2.0001, abs=1e-7)


def test_min_std_flattens_rounding_noise_and_nothing_else():
    """Column 0: deviation 0.01 (noise). Column 1: 0.03. Column 2: exact ties."""
    r = torch.tensor([[-1.0, -1, -1], [-1.01, -1.03, -1], [-0.99, -0.97, -1]])
    go = lambda **options: grpo.position_advantages(r, torch.ones_like(r, dtype=torch.bool), 3, **options)
    assert go()[:, 0].eq(0).all() and go(scale=False)[:, 0].eq(0).all()  # whatever the default is, a hundredth of a nat is noise
    for scale in (True, False):
        assert go(min_std=0.02, scale=scale).ne(0).tolist() == [[False, False, False], [False, True, False], [False, True, False]]
        assert go(min_std=0.05, scale=scale).eq(0).all()
    torch.testing.assert_close(go(min_std=0.02)[:, 1], torch.tensor([0, -0.03, 0.03]) / 0.0301, rtol=1e-4, atol=1e-6)
    assert go(min_std=0)[1, 0].item() == pytest.approx(-0.01 / 0.0101, rel=1e-3)


def test_rewards_far_from_zero_keep_their_differences():
    """Around -2000 nats, a tenth apart: sums in float32 would put the advantages off by more than a thousandth."""
    r = -2000 + 0.1 * torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    want = torch.tensor(slow_advantages(r.tolist(), [[True] * 20] * 7, 7, min_std=0))
    torch.testing.assert_close(grpo.position_advantages(r, torch.ones(7, 20), 7, min_std=0), want, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), P=st.integers(1, 3), G=st.integers(1, 6), scale=st.booleans())
def test_group_advantages_are_the_slow_loop(data, P, G, scale):
    value = st.one_of(st.floats(-5, 5, width=32), st.just(math.nan))
    rewards = data.draw(st.lists(value, min_size=P * G, max_size=P * G))
    r = torch.tensor(rewards)
    kept = r.clone()
    want = slow_advantages([[x] for x in rewards], [[True]] * len(rewards), G, scale, min_std=0)
    torch.testing.assert_close(grpo.group_advantages(r, G, scale=scale), torch.tensor(want)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r, kept, rtol=0, atol=0, equal_nan=True)


def test_group_advantages_docstring_example_and_missing_rewards():
    got = grpo.group_advantages(torch.tensor([1.0, 2, 3, torch.nan]), 4)
    torch.testing.assert_close(got, torch.tensor([-1.0, 0, 1, 0]), rtol=0, atol=1e-4 + 1e-7)
    assert grpo.group_advantages(torch.tensor([torch.nan, 2, torch.nan, torch.nan, 7, 7, 7, 7]), 4).tolist() == [0] * 8
    assert grpo.group_advantages(torch.tensor([1, 0, 0, 1]), 4).tolist() == pytest.approx([0.5 / (3**-0.5 + 1e-4) * s for s in (1, -1, -1, 1)])


@pytest.mark.parametrize("changed", range(3))
def test_groups_never_mix(changed):
    g, G, T = torch.Generator().manual_seed(0), 4, 5
    r, m = torch.randn(3 * G, T, generator=g), torch.rand(3 * G, T, generator=g) < 0.8
    rows = slice(changed * G, (changed + 1) * G)
    other_r, other_m = r.clone(), m.clone()
    other_r[rows], other_m[rows] = 100 * torch.randn(G, T, generator=g) - 1000, ~m[rows]
    others = torch.ones(3 * G, dtype=torch.bool)
    others[rows] = False
    a, b = grpo.position_advantages(r, m, G), grpo.position_advantages(other_r, other_m, G)
    assert torch.equal(a[others], b[others]) and not torch.equal(a, b)
    assert torch.equal(grpo.group_advantages(r[:, 0], G)[others], grpo.group_advantages(other_r[:, 0], G)[others])
    apart = grpo.group_advantages(torch.tensor([0.0, 1, 10, 11]), 2)  # the same prompt twice in a batch stays two groups
    assert apart.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2, abs=2e-4)


def test_group_advantages_equal_trls_normalisation():
    nanstd = pytest.importorskip("trl.trainer.utils", reason="trl is the peer here").nanstd
    r = torch.randn(12, generator=torch.Generator().manual_seed(0))
    r[5] = torch.nan
    grouped = r.view(3, 4)  # grpo_trainer.py, sum_then_normalize with scale_rewards="group"
    theirs = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(grpo.group_advantages(r, 4), theirs.nan_to_num(0).flatten(), rtol=1e-5, atol=1e-6)


def test_advantages_refuse_broken_groups():
    with pytest.raises(ValueError, match="groups of 4"):
        grpo.group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="groups of 2"):
        grpo.position_advantages(torch.zeros(4, 2), torch.ones(4, 3), 2)


# ---------------------------------------------------------------- draw and sample: distributions

def exact_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """By definition, in Python floats: temper; keep the top_k; of what is left keep the smallest nucleus of mass >= top_p."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k or None]
    total, nucleus, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if nucleus and mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


def assert_drawn_from(counts, probabilities):
    """Chi-square; outcomes that are expected fewer than 5 times are one outcome together, impossible ones must not occur."""
    n = sum(counts.values())
    assert all(probabilities.get(outcome, 0) > 0 for outcome in counts), "an impossible outcome"
    pairs = [(counts.get(o, 0), n * p) for o, p in probabilities.items() if n * p >= 5]
    rest = (sum(counts.get(o, 0) for o, p in probabilities.items() if n * p < 5), sum(n * p for p in probabilities.values() if n * p < 5))
    pairs += [rest] if rest[1] > 1 else []
    if len(pairs) > 1:
        chi2 = torch.tensor(sum((seen - want) ** 2 / want for seen, want in pairs))
        assert torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), chi2 / 2) > 1e-3, (chi2, pairs)


def count(items):
    return {x: items.count(x) for x in set(items)}


SETTINGS = [dict(), dict(temperature=0.6), dict(temperature=1.7), dict(top_k=3), dict(temperature=0.8, top_p=0.7), dict(temperature=1.5, top_k=5, top_p=0.8)]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_sampled_continuations_follow_the_exact_probabilities(options):
    """Two prompts of different lengths, vocabulary 8, up to two tokens, 3 stops: all 57 responses of each prompt enumerated."""
    model, prompts, G, stop = tiny("qwen2", vocab=8), [[1, 5], [2, 0, 7, 4, 6]], 6000, 3
    ids, lengths = grpo.sample(model, prompts, G, max_new_tokens=2, stop_ids=[stop], generator=torch.Generator().manual_seed(0), **options)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            step = lambda more: exact_distribution(model(input_ids=torch.tensor([prompt + more])).logits[0, -1].tolist(), **options)
            first, exact = step([]), {}
            for a, p in enumerate(first):
                exact.update({(a,): p} if a == stop else {(a, b): p * q for b, q in enumerate(step([a]))})
        assert sum(exact.values()) == pytest.approx(1)
        rows = slice(i * G, (i + 1) * G)
        drawn = [tuple(y[:n]) for y, n in zip(ids[rows].tolist(), lengths[rows].tolist())]
        assert_drawn_from(count([y[0] for y in drawn]), dict(enumerate(first)))
        assert_drawn_from(count(drawn), exact)


def test_settings_of_the_distribution_test_are_told_apart():
    """The chi-square has teeth: draws under any of the settings are refused as draws under any other."""
    logits = tiny("qwen2", vocab=8)(input_ids=torch.tensor([[1, 5]])).logits[0, -1].detach()
    for a, b in itertools.permutations(SETTINGS, 2):
        tokens = grpo.draw(logits.expand(6000, -1), generator=torch.Generator().manual_seed(0), **a).tolist()
        with pytest.raises(AssertionError):
            assert_drawn_from(count(tokens), dict(enumerate(exact_distribution(logits.tolist(), **b))))


@pytest.mark.parametrize("V, B", [(40, 500), (6000, 100)])
@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(top_k=7), dict(top_p=0.6), dict(temperature=1.3, top_k=20, top_p=0.9), dict(top_p=0.9),
                                     dict(top_p=0.999), dict(top_k=700, top_p=0.99), dict(top_k=1), dict(top_p=1e-9), dict(top_k=10**6, top_p=0.5)], ids=str)
def test_draw_equals_transformers_warpers(options, V, B):
    """Peer: the same uniform numbers through transformers' own temperature, top-k and top-p give the same tokens, also where a nucleus is larger than 512."""
    logits = 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    ours = grpo.draw(logits, generator=torch.Generator().manual_seed(1), **options)
    warped = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        warped = transformers.TopKLogitsWarper(top_k=options["top_k"])(None, warped)
    if "top_p" in options:
        warped = transformers.TopPLogitsWarper(top_p=options["top_p"])(None, warped)
    uniform = torch.rand(B, 1, generator=torch.Generator().manual_seed(1))[:, 0].double().numpy()
    theirs = [int(np.searchsorted(np.cumsum(p), u * p.sum(), side="right")) for p, u in zip(warped.double().softmax(-1).numpy(), uniform)]
    assert ours.tolist() == theirs
    if options in (dict(top_k=1), dict(top_p=1e-9)):
        assert torch.equal(ours, logits.argmax(-1))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_fall_on_tokens_that_can_come(u, monkeypatch):
    """0 is not the first token's if that is forbidden, the largest float32 below 1 not beyond the last one's, however the masses add up."""
    logits = torch.randn(3000, 50, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 48, 49]] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u))
    assert set(grpo.draw(logits).tolist()) == {2 if u == 0 else 47}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_that_checkpoints_activations_is_refused(arch):
    """It drops the cache, and with it the prompt: no log-probabilities rather than wrong ones."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(arch, 50)).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    prompts, _, ids, lengths = random_rows()
    for whole in (True, False) if arch != "gpt2" else (True,):
        model.base_model.training = whole  # False: only the layers checkpoint, and leave an empty cache (GPT-2's do not)
        with pytest.raises(ValueError, match="turn gradient checkpointing off"):
            grpo.token_logprobs(model, prompts, ids, lengths)


def test_entropies_of_a_head_that_forbids_tokens(monkeypatch):
    """0 log 0 is 0."""
    model, (prompts, _, ids, lengths) = tiny(), random_rows()
    plain, ids = grpo.model_logits, ids.clamp(min=4)
    monkeypatch.setattr(grpo, "model_logits", lambda *a: plain(*a).index_fill(-1, torch.tensor([0, 3]), -math.inf))
    logp, entropies = grpo.token_logprobs(model, prompts, ids, lengths, entropy=True)
    assert entropies.isfinite().all() and logp.isfinite().all()
    own = plain(model, model.base_model(torch.tensor([prompts[0]])).last_hidden_state[0, -1])[[1, 2, *range(4, 50)]].log_softmax(-1)
    torch.testing.assert_close(entropies[0, 0], -(own.exp() * own).sum(), rtol=1e-5, atol=1e-5)


def drawn_set(probabilities, n=2000, **options):
    logits = torch.tensor(probabilities).log().expand(n, -1)
    return set(grpo.draw(logits, generator=torch.Generator().manual_seed(0), **options).tolist())


def test_draw_docstring_example_in_every_order():
    for order in itertools.permutations(range(3)):
        p = [(0.5, 0.3, 0.2)[i] for i in order]
        assert drawn_set(p, top_p=0.8) == {order.index(0), order.index(1)}
        assert drawn_set(p, top_p=0.4) == {order.index(0)}
        assert drawn_set(p, top_p=0.81) == drawn_set(p, top_p=1.0) == {0, 1, 2}


def test_draw_on_ties_and_at_the_limits():
    assert len(drawn_set([0.25] * 4, top_p=0.5)) == 2  # the smallest set: ties do not all come in
    assert len(drawn_set([0.25] * 4, top_p=1e-9)) == 1
    assert drawn_set([0.1, 0.4, 0.4, 0.1], top_k=2) == drawn_set([0.1, 0.4, 0.4, 0.1], top_p=0.8) == {1, 2}
    assert drawn_set([0.1, 0.4, 0.4, 0.1], top_k=4) == drawn_set([0.1, 0.4, 0.4, 0.1], top_k=99) == {0, 1, 2, 3}
    assert drawn_set([0.2, 0.5, 0.3], top_k=1) == drawn_set([0.2, 0.5, 0.3], temperature=0) == {1}
    assert drawn_set([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.6) == {0, 1}  # after top_k they are (4/7, 3/7): 4/7 < 0.6
    assert drawn_set([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.5) == {0}
    logits = torch.randn(3, 5)
    kept = logits.clone()
    grpo.draw(logits, temperature=0.5, top_k=2, top_p=0.5)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.5)], ids=str)
def test_draw_refuses_logits_that_are_not_finite(bad, options):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        grpo.draw(logits, **options)


def test_draw_takes_minus_infinity_for_a_forbidden_token_and_refuses_senseless_settings():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(500, -1)
    assert set(grpo.draw(logits, generator=torch.Generator().manual_seed(0)).tolist()) == {0, 2}
    for options in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(top_k=-1)):
        with pytest.raises(ValueError, match="out of range"):
            grpo.draw(logits, **options)


# ---------------------------------------------------------------- sample: against a slow loop without a cache

PROMPTS = [[7], [3, 14, 15], [9, 2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4], [31, 41]]


@functools.lru_cache(maxsize=None)
def slow_greedy(arch, prompt, n, rank=0):
    """n tokens, each from a full forward of the whole text: the `rank`-th most probable token first, then the most probable."""
    out = []
    with torch.no_grad():
        for t in range(n):
            order = tiny(arch)(input_ids=torch.tensor([[*prompt, *out]]), use_cache=False).logits[0, -1].argsort(descending=True)
            out.append(int(order[0 if t else rank]))
    return out


def until_stop(tokens, stop):
    end = next((t + 1 for t, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


def choose_stops(rows):
    """Two ids that make these rows end at as many different times as possible, with one row that never stops."""
    seen = sorted({token for row in rows for token in row})
    lengths = {pair: {len(until_stop(row, pair)) for row in rows} for pair in itertools.combinations(seen, 2)}
    return list(max(lengths, key=lambda pair: (len(rows[0]) in lengths[pair], len(lengths[pair]))))


def unpad(ids, lengths):
    assert ids.shape == (len(lengths), int(lengths.max())) and ids.dtype == lengths.dtype == torch.long
    assert ids[~grpo.response_mask(lengths, ids.shape[1])].eq(0).all()
    return [y[:n] for y, n in zip(ids.tolist(), lengths.tolist())]


@pytest.mark.parametrize("arch", [*ARCHS, "bloom"])  # ALiBi
def test_greedy_padded_batch_equals_each_prompt_alone_and_the_slow_loop(arch):
    want = [slow_greedy(arch, tuple(p), 10) for p in PROMPTS]
    assert sum(len(set(y)) for y in want) >= (9 if arch == "bloom" else 15), "the text should not just repeat itself"
    ids, lengths = grpo.sample(tiny(arch), PROMPTS, 2, max_new_tokens=10, temperature=0, stop_ids=[49_999])
    assert unpad(ids, lengths) == [y for y in want for _ in range(2)]
    for prompt, y in zip(PROMPTS, want):
        assert unpad(*grpo.sample(tiny(arch), [prompt], 1, max_new_tokens=10, temperature=0, stop_ids=[49_999])) == [y]


def plain(model, cache, attend, room):
    return lambda token, attend: grpo.read(model, token, attend, cache)[0]


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_bf16_autocast_draws_what_the_plain_loop_draws(arch, monkeypatch):
    """The cache with room is kept in bf16 then, which attention would make of it anyway."""
    model = tiny(arch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings = dict(max_new_tokens=12, stop_ids=[3, 4], temperature=1.0)
        ours = grpo.sample(model, PROMPTS, 4, generator=torch.Generator().manual_seed(0), **settings)
        monkeypatch.setattr(grpo, "stepper", plain)
        theirs = grpo.sample(model, PROMPTS, 4, generator=torch.Generator().manual_seed(0), **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and ours[1].unique().numel() > 2


def test_one_token_is_one_forward_pass(monkeypatch):
    """A verdict: no room is made, no graph captured."""
    monkeypatch.setattr(grpo, "stepper", lambda *_: pytest.fail("a stepper for nothing"))
    ids, lengths = grpo.sample(tiny(), PROMPTS, 1, max_new_tokens=1, stop_ids=[], temperature=0)
    assert ids.shape == (len(PROMPTS), 1) and lengths.tolist() == [1] * len(PROMPTS)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_that_end_leave_and_the_others_stay_right(arch, monkeypatch):
    """All rows of a group differ here: row g starts with the g-th most probable token, then greedy. Rows leave at different times."""
    G, n, model, sizes = 3, 10, tiny(arch), []
    rows = [slow_greedy(arch, tuple(p), n, rank) for p in PROMPTS for rank in range(G)]
    stop = choose_stops(rows)
    want = [until_stop(y, stop) for y in rows]
    assert len(set(map(len, want))) >= 4, "the rows should end at different times"

    def ranked(logits, **_):
        order = logits.argsort(-1, descending=True)
        return order[:, 0] if len(sizes) > 1 else order[torch.arange(len(order)), torch.arange(len(order)) % G]

    monkeypatch.setattr(grpo, "draw", ranked)
    hook = model.base_model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        ids, lengths = grpo.sample(model, PROMPTS, G, max_new_tokens=n, stop_ids=stop)
    finally:
        hook.remove()
    assert unpad(ids, lengths) == want

    batch, expected = len(rows), [(len(PROMPTS), max(map(len, PROMPTS)))]  # each prompt is prefilled once
    for t in range(n - 1):
        left = sum(len(y) > t + 1 or (len(y) == t + 1 and y[-1] not in stop) for y in want)
        batch = left if 8 * left <= 7 * batch else batch  # "once they are an eighth of it"
        expected += [(batch, 1)] if left else []
    assert sizes == expected
    assert len({size for size, _ in expected[1:]}) > 1, "no row left early: the test shows nothing"


@pytest.mark.parametrize("batch_tokens, sizes", [(10**6, [5]), (2 * 2 * 22, [3, 2]), (1, [1] * 5)])
def test_prompts_are_split_into_batches(batch_tokens, sizes, monkeypatch):
    """5 prompts of 1, 2, 3, 7 and 12 tokens, groups of 2, 10 new tokens: 2 x 3 x 13 and 2 x 2 x 22 are no more than 88."""
    model, batches = tiny(), []
    want = [slow_greedy("qwen2", tuple(p), 10) for p in PROMPTS]
    stop = choose_stops(want)
    want = [until_stop(y, stop) for y in want for _ in range(2)]
    first, *others = map(len, want[::2])
    assert first != max(others), "one batch is shorter than another"
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].shape[0]) if kwargs.get("cache", kwargs.get("past_key_values")) is None else None, with_kwargs=True)
    monkeypatch.setattr(models, "find_stop_ids", lambda *_: stop)
    try:
        ids, lengths = models.LocalModel(model, None, batch_tokens=batch_tokens).sample(PROMPTS, 2, max_new_tokens=10, temperature=0)
    finally:
        hook.remove()
    assert sorted(batches) == sorted(sizes)                                                                # in threads: in any order
    assert ids.shape == (10, 10) and [y[:n] for y, n in zip(ids.tolist(), lengths.tolist())] == want


def test_rows_leave_as_soon_as_they_are_an_eighth(monkeypatch):
    """Nine rows: one stops at the second token (a ninth: it stays), one at the third (both leave), the others at the fourth."""
    model, sizes, STOP = tiny(), [], 9
    script = iter([[1] * 9, [STOP] + [2] * 8, [5, STOP] + [3] * 7, [STOP] * 7])
    monkeypatch.setattr(grpo, "draw", lambda logits, **_: torch.tensor(next(script)))
    hook = model.base_model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        ids, lengths = grpo.sample(model, [[5, 6, 7]], 9, max_new_tokens=5, stop_ids=[STOP])
    finally:
        hook.remove()
    assert unpad(ids, lengths) == [[1, STOP], [1, 2, STOP]] + [[1, 2, 3, STOP]] * 7
    assert sizes == [(1, 3), (9, 1), (9, 1), (7, 1)]


def test_stop_tokens_belong_to_the_response():
    """A stop id of 0 (also the padding) included: lengths say where a response ends, not ids."""
    model, stop = tiny("qwen2", vocab=8), [0, 3]
    ids, lengths = grpo.sample(model, [[1], [2, 5]], 40, max_new_tokens=6, stop_ids=stop, generator=torch.Generator().manual_seed(0))
    rows = unpad(ids, lengths)
    assert all(1 <= len(y) <= 6 and not set(y[:-1]) & set(stop) and (y[-1] in stop or len(y) == 6) for y in rows)
    assert {y[-1] for y in rows if len(y) < 6} == set(stop)
    assert any(len(y) == 6 and y[-1] not in stop for y in rows), "none was truncated: the test shows nothing"
    ids, lengths = grpo.sample(model, [[1]], 3, max_new_tokens=6, stop_ids=list(range(8)))
    assert ids.shape == (3, 1) and lengths.tolist() == [1, 1, 1]
    ids, lengths = grpo.sample(model, [[1]], 3, max_new_tokens=4, stop_ids=[99], temperature=0)
    assert ids.shape == (3, 4) and lengths.tolist() == [4, 4, 4]


def test_nothing_is_taken_from_generation_config(monkeypatch):
    model = tiny()
    go = lambda: grpo.sample(model, PROMPTS, 4, max_new_tokens=8, stop_ids=[11], generator=torch.Generator().manual_seed(5))
    plain = go()
    wild = dict(repetition_penalty=9.0, top_k=1, top_p=0.01, temperature=0.01, do_sample=False, max_new_tokens=1, eos_token_id=list(range(50)),
                suppress_tokens=list(range(25)), no_repeat_ngram_size=1, min_length=7, bad_words_ids=[[1], [2]])
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(**wild))
    assert all(torch.equal(a, b) for a, b in zip(go(), plain))
    assert len(set(map(tuple, plain[0].tolist()))) > 10  # it did sample


def test_sample_is_seeded_and_leaves_its_inputs_alone():
    prompts, go = [list(p) for p in PROMPTS], lambda s: grpo.sample(tiny(), prompts, 3, max_new_tokens=6, stop_ids=[11], generator=torch.Generator().manual_seed(s))
    (a, n), (b, m), (c, _) = go(1), go(1), go(2)
    assert torch.equal(a, b) and torch.equal(n, m) and a.tolist() != c.tolist()
    assert prompts == PROMPTS and not a.requires_grad and all(p.grad is None for p in tiny().parameters())


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_sample_refuses_empty_prompts(prompts):
    with pytest.raises(ValueError, match="sample needs"):
        grpo.sample(tiny(), prompts, 2, max_new_tokens=3, stop_ids=[1])
    with pytest.raises(ValueError, match="sample needs"):
        grpo.sample(tiny(), [[1]], len(prompts[1:]), max_new_tokens=len(prompts[1:]) - 1, stop_ids=[1])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_scoring_agree(arch, temperature, monkeypatch):
    """The log-probability that a token had when it was drawn (left padding, cache) is the one it is scored with (right padding, none)."""
    model, steps, G = tiny(arch), [], 3
    draw = grpo.draw

    def recording(logits, **options):
        token = draw(logits, **options)
        steps.append((logits / options["temperature"]).log_softmax(-1)[torch.arange(len(token)), token])
        return token

    monkeypatch.setattr(grpo, "draw", recording)
    ids, lengths = grpo.sample(model, PROMPTS, G, max_new_tokens=9, temperature=temperature, stop_ids=[49_999], generator=torch.Generator().manual_seed(0))
    scored = grpo.token_logprobs(model, [p for p in PROMPTS for _ in range(G)], ids, lengths, temperature=temperature)
    torch.testing.assert_close(scored, torch.stack(steps, 1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- token_logprobs

def test_response_mask_docstring_example():
    assert grpo.response_mask(torch.tensor([2, 3]), 3).tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_of_a_padded_batch_equal_each_row_alone(arch, temperature):
    model, (prompts, responses, ids, lengths) = tiny(arch), random_rows()
    logp, entropies = grpo.token_logprobs(model, prompts, ids, lengths, temperature=temperature, entropy=True)
    assert logp.shape == entropies.shape == ids.shape and logp.dtype == entropies.dtype == torch.float32
    assert logp.requires_grad and not entropies.requires_grad
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        n, own = len(response), alone(model, prompt, response, temperature).double()  # [n, V]
        want = torch.stack([own[t, token] for t, token in enumerate(response)]) if n else torch.zeros(0)
        torch.testing.assert_close(logp[b, :n], want.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropies[b, :n], -(own.exp() * own).sum(-1).float(), rtol=1e-5, atol=1e-5)
        assert logp[b, n:].eq(0).all() and entropies[b, n:].eq(0).all()
        torch.testing.assert_close(grpo.token_logprobs(model, [prompt], ids[b:b + 1, :n], lengths[b:b + 1], temperature=temperature)[0], logp[b, :n],
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_several_prompts_begin_with_is_read_once(arch):
    """As a judge's are: one response, many criteria. The rows score as each alone does, gradients too, and greedy answers are the same."""
    g, model, read = torch.Generator().manual_seed(0), tiny(arch), []
    draw = lambda n: torch.randint(1, 50, (n,), generator=g).tolist()
    starts = [draw(50) for _ in range(3)]
    prompts = [start + draw(n) for start in starts for n in range(10)] + [[7], starts[0], starts[1][:20] + draw(3)]
    ids, lengths = torch.randint(1, 50, (len(prompts), 4), generator=g), torch.tensor([4, 1, 3] * 11)
    hook = model.base_model.register_forward_pre_hook(lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        logp = grpo.token_logprobs(model, prompts, ids, lengths)
        shared = [(5, 49), (32, 10)] if arch not in ("gemma2", "gemma3") else [(32, 59)]  # their windows want no gaps
        assert read == [*shared, (33, 3)], "nothing, 3 starts, one alone; one prompt is there twice"
    finally:
        hook.remove()
    want = [alone_logp(model, p, y[:n]) for p, y, n in zip(prompts, ids.tolist(), lengths.tolist())]
    for row, n, of in zip(logp, lengths, want):
        torch.testing.assert_close(row[:n], torch.stack(of), rtol=1e-5, atol=2e-5)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (logp.sum(), sum(map(sum, want))))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    drawn, _ = grpo.sample(model, prompts, 1, max_new_tokens=3, stop_ids=[99], temperature=0)
    for p, y in zip(prompts, drawn.tolist()):
        assert y == [int(alone(model, p, y)[t].argmax()) for t in range(3)]


@pytest.mark.parametrize("arch", ARCHS)
def test_token_logprobs_gradient_equals_a_plain_implementation(arch):
    model, (prompts, responses, ids, lengths) = tiny(arch), random_rows()
    weight, parameters = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2)), list(model.parameters())
    plain = sum(weight[b, t] * x for b, row in enumerate(zip(prompts, responses)) for t, x in enumerate(alone_logp(model, *row, 0.7)))
    want = torch.autograd.grad(plain, parameters)
    assert all(w.abs().max() > 0 for w in want)
    values = {}
    for chunk in (1, 3, 7, 1000):
        values[chunk], entropies = grpo.token_logprobs(model, prompts, ids, lengths, temperature=0.7, chunk=chunk, entropy=True)
        for ours, w in zip(torch.autograd.grad((weight * values[chunk]).sum(), parameters), want):
            torch.testing.assert_close(ours, w, rtol=1e-3, atol=1e-4 * max(1, w.abs().max().item()))
        torch.testing.assert_close(values[chunk], values[1], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            quiet = grpo.token_logprobs(model, prompts, ids, lengths, temperature=0.7, chunk=chunk, entropy=True)
        torch.testing.assert_close(quiet, (values[chunk].detach(), entropies))


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_all_the_vocabulary_never_exist_at_once(entropy, monkeypatch):
    """Forward and backward make logits for at most `chunk` tokens of the vocabulary at a time, and autograd keeps none of them in between."""
    V = 211
    model, (prompts, _, ids, lengths) = tiny("qwen2", vocab=V), random_rows(V)
    made, plain = [], grpo.model_logits
    monkeypatch.setattr(grpo, "model_logits", lambda m, hidden, *head: made.append(len(head[0]) if head else V) or plain(m, hidden, *head))
    K = int(lengths.sum())

    def kept_by(chunk):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            out = grpo.token_logprobs(model, prompts, ids, lengths, entropy=entropy, chunk=chunk)
        return out, [shape for shape in kept if shape in ((K, 70), (K, V))]

    out, kept = kept_by(70)
    assert K == 20 and made == [70, 70, 70, 1] and not kept and (K, V) in kept_by(V)[1]
    made.clear()
    (out[0] if entropy else out).sum().backward(inputs=[model.get_input_embeddings().weight])
    model.zero_grad(set_to_none=True)
    assert sorted(made) == [1, 70, 70, 70], "the backward pass makes them again, a part at a time"


@pytest.mark.parametrize("model_type", ["mpt", "gpt_neo"])
def test_beginnings_are_not_shared_where_padding_would_count(model_type):
    """ALiBi, and local attention, count the padding between a shared beginning and what follows."""
    torch.manual_seed(0)
    config = {"mpt": transformers.MptConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4),
              "gpt_neo": transformers.GPTNeoConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])}[model_type]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    start = torch.randint(61, (1100,)).tolist()
    prompts, ids, lengths = [start + [1, 2, 3], start + [*range(30)]], torch.randint(61, (2, 5)), torch.tensor([5, 5])
    with torch.no_grad():
        together = grpo.token_logprobs(model, prompts, ids, lengths)
        alone = [grpo.token_logprobs(model, [p], y[None], lengths[:1]) for p, y in zip(prompts, ids)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_parts_of_a_head_with_a_bias_and_of_one_that_is_wrapped():
    """Phi's head has a bias; one that is not a plain Linear (an adapter's) is used whole, as it is. Some tokens are forbidden, at a part's edge too."""
    peft = pytest.importorskip("peft")
    config = transformers.PhiConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model, (prompts, responses, ids, lengths) = transformers.PhiForCausalLM(config).eval(), random_rows()
    never = sorted({*range(50)} - {y for row in responses for y in row})
    assert {i % 7 for i in never} & {0, 6}
    with torch.no_grad():
        model.lm_head.bias.normal_(0, 2), model.lm_head.weight.normal_(0, 0.3)
        model.lm_head.bias[never[::2]] = -torch.inf
        model.lm_head.bias[never[1::2]] = -1e9
    for adapter in (False, True):
        if adapter:
            model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
            assert type(model.get_output_embeddings()) is not torch.nn.Linear
        parameters = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
        want = [alone(model, *row) for row in zip(prompts, responses)]
        wanted = [of.gather(1, torch.tensor(row)[:, None].long())[:, 0] for of, row in zip(want, responses)]
        gradients = torch.autograd.grad(torch.cat(wanted).sum(), parameters)
        for chunk in (1, 7, 14, 50):  # 1: whole parts are forbidden (of which torch's logsumexp has no gradient)
            found, entropies = grpo.token_logprobs(model, prompts, ids, lengths, chunk=chunk, entropy=True)
            for b, (of, w) in enumerate(zip(want, wanted)):
                torch.testing.assert_close(found[b, :len(of)], w, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(entropies[b, :len(of)], -(of.exp() * of).nansum(1), rtol=1e-4, atol=1e-5)
            for ours, w in zip(torch.autograd.grad(found.sum(), parameters), gradients) if chunk > 1 else ():
                torch.testing.assert_close(ours, w, rtol=1e-4, atol=1e-4)


def test_token_logprobs_ignores_what_stands_behind_a_response():
    model, (prompts, _, ids, lengths) = tiny(), random_rows()
    kept_prompts, kept = [list(p) for p in prompts], ids.clone()
    garbage = torch.where(grpo.response_mask(lengths, ids.shape[1]), ids, -100)
    assert torch.equal(grpo.token_logprobs(model, prompts, garbage, lengths), grpo.token_logprobs(model, prompts, ids, lengths))
    assert torch.equal(ids, kept) and prompts == kept_prompts
    logp, entropies = grpo.token_logprobs(model, prompts, ids, torch.zeros_like(lengths), entropy=True)
    assert logp.shape == entropies.shape == ids.shape and logp.eq(0).all() and entropies.eq(0).all()


def test_token_logprobs_of_a_bf16_model_are_float32():
    """log-softmax in float32 whatever the weights: of the model's own bf16 logits, exactly."""
    model = transformers.AutoModelForCausalLM.from_config(config_of("qwen2", 50), dtype=torch.bfloat16).eval()
    prompts, responses, ids, lengths = random_rows(sizes=((4, 8),))
    logp = grpo.token_logprobs(model, prompts, ids, lengths)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp[0], torch.stack(alone_logp(model, prompts[0], responses[0])), rtol=0, atol=1e-6)


def test_token_logprobs_refuses_what_does_not_fit():
    model, (prompts, _, ids, lengths) = tiny(), random_rows()
    for bad in [(prompts[:-1], ids, lengths), (prompts, ids, lengths[:-1]), (prompts, ids[:-1], lengths), (prompts[:-1] + [[]], ids, lengths),
                (prompts, ids, lengths + 1)]:
        with pytest.raises(ValueError, match="token_logprobs: "):
            grpo.token_logprobs(model, *bad)


# ---------------------------------------------------------------- models and tokenizers

@pytest.mark.parametrize("arch", ARCHS)
def test_load_model_makes_float32_policies_of_bf16_checkpoints(arch, tmp_path):
    saved = transformers.AutoModelForCausalLM.from_config(config_of(arch, 50), dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    for train in (True, False):
        model = models.load_model(str(tmp_path), train=train, device="cpu")
        assert not model.training and model.dtype == torch.float32
        for (name, p), q in zip(model.named_parameters(), saved.parameters()):
            assert p.dtype == torch.float32 and p.requires_grad is train and torch.equal(p, q.float()), name


def test_load_model_refuses_logits_that_it_does_not_know(tmp_path, monkeypatch):
    """Three ways: an unknown factor, an unknown bias, and a config that promises a scale the model does not apply."""
    def save(**extra):
        config = config_of("qwen2", 50)
        config.__dict__.update(extra)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(tiny().state_dict())
        model.save_pretrained(tmp_path)

    save()
    models.load_model(str(tmp_path), train=False, device="cpu")
    forward = transformers.Qwen2ForCausalLM.forward
    for change in (lambda x: 1.01 * x, lambda x: x + torch.arange(x.shape[-1]) * 0.05):
        def changed(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = change(out.logits)
            return out
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="model_logits"):
            patch.setattr(transformers.Qwen2ForCausalLM, "forward", changed)
            models.load_model(str(tmp_path), train=False, device="cpu")
    save(logit_scale=2.0)
    with pytest.raises(ValueError, match="model_logits"):
        models.load_model(str(tmp_path), train=True, device="cpu")


# ---------------------------------------------------------------- multimodal checkpoints

FAMILIES = {"gemma3": ("Gemma3", {"query_pre_attn_scalar": 8, "final_logit_softcapping": None}),
            "gemma3n": ("Gemma3n", {"laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}),
            "gemma4": ("Gemma4", {"global_head_dim": 8}),
            "gemma4_unified": ("Gemma4Unified", {"global_head_dim": 8})}
OLD, NEW = "language_model.model.", "model.language_model."  # how the files on the hub call the text model's weights


def multimodal(family, folder, monkeypatch, prefix=NEW):
    """A tiny random checkpoint of the whole model in `folder` -> the model. Its towers, of which Gemma 3n's needs a package of its own, are dummies."""
    name, extra = FAMILIES[family]
    if family != "gemma3":  # the last two layers have no keys and values of their own
        extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 50, "num_kv_shared_layers": 2, "final_logit_softcapping": 4.0, **extra}
    text = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": WINDOW, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2, **extra}
    real = transformers.AutoModel.from_config
    dummy = lambda config, **settings: real(config, **settings) if "text" in config.model_type else torch.nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModel, "from_config", dummy)
        towers = {f"{kind}_config": getattr(transformers, f"{name}{kind.title()}Config")() for kind in ("vision", "audio") if "gemma4" in family}
        config = getattr(transformers, f"{name}Config")(text_config=text, **towers)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.1) + p * (p.dim() < 2))
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {key.replace(OLD, prefix).replace(NEW, prefix): w for key, w in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    assert sum(key.startswith(prefix) for key in weights) > 40 and any("vision" in key for key in weights)
    return model


@pytest.mark.parametrize("family, prefix", [("gemma3", OLD), ("gemma3", NEW), ("gemma3n", NEW), ("gemma4", NEW), ("gemma4_unified", NEW)])
def test_a_multimodal_checkpoint_is_loaded_as_its_text_model(family, prefix, tmp_path, monkeypatch):
    """Scores, draws, learns and is saved like any other; the oracle is the whole model on a text alone."""
    whole = multimodal(family, tmp_path, monkeypatch, prefix)
    model = models.load_model(str(tmp_path), train=True, device="cpu")
    assert type(model).__name__ == FAMILIES[family][0] + "ForCausalLM" and not any("vision" in name or "audio" in name for name, _ in model.named_parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    whole_names = {name.replace(".language_model", ""): p for name, p in whole.named_parameters()}
    assert all(torch.equal(p, whole_names[name]) for name, p in model.named_parameters())
    prompts, responses, ids, lengths = random_rows()
    with torch.no_grad():
        logp = grpo.token_logprobs(model, prompts, ids, lengths)
        for row, prompt, response in zip(logp, prompts, responses):
            want = torch.tensor(alone_logp(whole, prompt, response))
            torch.testing.assert_close(row[:len(response)], want, rtol=1e-4, atol=1e-4)
        drawn, sizes = grpo.sample(model, prompts, 2, max_new_tokens=9, stop_ids=[7], temperature=0)
        for i, (row, size) in enumerate(zip(drawn.tolist(), sizes.tolist())):
            for t in range(size):  # without a cache
                assert row[t] == alone(whole, prompts[i // 2], row[:t + 1])[t].argmax()
    ours, own = (torch.autograd.grad(f(), list(model.parameters())) for f in (
        lambda: grpo.token_logprobs(model, prompts, ids, lengths).sum(),
        lambda: sum(sum(alone_logp(model, *row)) for row in zip(prompts, responses))))
    for a, b in zip(ours, own):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    with pytest.raises(ValueError, match="gradient checkpointing"):  # it drops the cache, with the prompts in it
        grpo.token_logprobs(model, prompts, ids, lengths)
    model.eval().save_pretrained(tmp_path / "again")
    assert set(safetensors.torch.load_file(tmp_path / "again/model.safetensors")) <= set(model.state_dict())
    again = models.load_model(str(tmp_path / "again"), train=False, device="cpu")
    assert type(again) is type(model) and all(map(torch.equal, again.parameters(), model.parameters()))


def test_weights_that_are_missing_are_an_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="Qwen2ForCausalLM finds no model.norm.weight"):
        models.load_model(str(tmp_path), train=False, device="cpu")


def test_a_folder_with_mistrals_own_tokenizer_beside(tmp_path):
    """Mistral's tekken.json: where mistral-common is installed transformers would take a tokenizer that has neither chat template nor offsets."""
    config = transformers.MistralConfig(vocab_size=8192, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    models.load_tokenizer("toy/cme/generator").save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    _, tokenizer = models.load("model", str(tmp_path), "cpu")
    assert models.chat_ids(tokenizer, "Hi") == models.chat_ids(models.load_tokenizer("toy/cme/generator"), "Hi")


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
         "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA3 = ("{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
          "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
PHI3 = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
           "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
         "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HARMONY = ("{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
           "{{ '<|message|>' + m['content'] }}{{ '<|return|>' if m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}")
TAGS = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '</out></answer>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
PARTS = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
         "{% endfor %}{{ '<|im_end|>' }}{% endfor %}")                                                      # prints no content that is a string
ALPACA = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"

CHATS = {  # template, BOS, EOS, other special tokens, added tokens that are not special, end of the turn
    "chatml": (CHATML, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], [], "<end_of_turn>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], "<|eot_id|>"),
    "phi3": (PHI3, "<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>"], [], "<|end|>"),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], [], "</s>"),
    "qwen3": (QWEN3, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], "<|im_end|>"),
    "harmony": (HARMONY, "<|startoftext|>", "<|endoftext|>", ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"], [], "<|return|>"),
    "tags": (TAGS, None, "</s>", ["<|user|>", "<|assistant|>", "</answer>"], ["</out>"], "</answer>"),
    "parts": (PARTS, "<s>", "</s>", ["<|im_start|>", "<|im_end|>"], [], "</s>"),                            # its first special token ends nothing
    "no special token": (ALPACA, None, "</s>", [], [], "</s>"),
    "no template": (None, "<s>", "</s>", [], [], "</s>"),
    "no template, no BOS": (None, None, "<|endoftext|>", [], [], "<|endoftext|>"),
    "nothing": (None, None, None, [], [], None),
}


@functools.lru_cache(maxsize=None)
def chat_tokenizer(kind):
    """A byte-level tokenizer with one of the templates. Like Gemma's and Llama's it puts a BOS before whatever it encodes."""
    template, bos, eos, special, added, _ = CHATS[kind]
    core = Tokenizer(token_models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(x, special=True) for x in dict.fromkeys([bos, eos, *special]) if x])
    core.add_tokens([AddedToken(x, special=False) for x in added])
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye?"}]


@pytest.mark.parametrize("kind,text", [
    ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ("gemma", "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
    ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("phi3", "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ("mistral", "<s>[INST] Hi [/INST]"),
    ("no template", "<s>User:\nHi\n\nAssistant:\n"),
    ("no template, no BOS", "User:\nHi\n\nAssistant:\n"),
])
def test_chat_ids_render_a_prompt_with_one_bos_at_most(kind, text):
    tokenizer = chat_tokenizer(kind)
    ids = models.chat_ids(tokenizer, "Hi")
    assert type(ids) is list and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token and kind != "phi3" else 0)
    assert models.chat_ids(tokenizer, TALK[:1]) == ids


@pytest.mark.parametrize("kind,text", [
    ("gemma", "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n"),
    ("no template", "<s>User:\nHi\n\nAssistant:\nHello\n\nUser:\nBye?\n\nAssistant:\n"),
])
def test_chat_ids_render_a_whole_conversation(kind, text):
    kept = [dict(m) for m in TALK]
    assert chat_tokenizer(kind).decode(models.chat_ids(chat_tokenizer(kind), TALK), clean_up_tokenization_spaces=False) == text
    assert TALK == kept


@pytest.mark.parametrize("kind", CHATS)
def test_end_of_turn(kind):
    """The first special token behind the assistant's content: Phi-3's template goes on with an EOS, Harmony's puts some before it."""
    got = models.end_of_turn(chat_tokenizer(kind))
    assert got == (None if CHATS[kind][-1] is None else chat_tokenizer(kind).convert_tokens_to_ids(CHATS[kind][-1]))


def test_find_stop_ids():
    model = lambda eos: SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))
    gemma, bare = chat_tokenizer("gemma"), chat_tokenizer("nothing")
    own = {gemma.convert_tokens_to_ids(x) for x in ("<eos>", "<end_of_turn>")}
    assert models.find_stop_ids(model([5, 3]), gemma) == sorted(own | {3, 5})
    assert models.find_stop_ids(model((3,)), gemma) == sorted(own | {3})
    assert models.find_stop_ids(model(0), gemma) == sorted(own | {0})
    assert models.find_stop_ids(model(None), gemma) == models.find_stop_ids(SimpleNamespace(generation_config=None), gemma) == sorted(own)
    assert models.find_stop_ids(model([7]), bare) == [7]
    with pytest.raises(ValueError, match="eos_token"):
        models.find_stop_ids(model(None), bare)


# ---------------------------------------------------------------- the toy models

needs = lambda name: pytest.mark.skipif(not (TOY / name / "model.safetensors").exists(), reason=f"toy/cme/{name} is not there")


@needs("generator")
def test_one_step_raises_what_was_good_and_touches_nothing_else():
    """The whole path once: prompts, sampling, advantages, loss, optimiser. The rewards are noise: any will do."""
    model, frozen, tokenizer = *(models.load_model(str(TOY / "generator"), train=t, device="cpu") for t in (True, False)), models.load_tokenizer(str(TOY / "generator"))
    stop = models.find_stop_ids(model, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop and models.end_of_turn(tokenizer) in stop
    prompts, G = [models.chat_ids(tokenizer, f"Tell me about {name}.") for name in ("Ada", "Emil", "Ben")], 6
    ids, lengths = grpo.sample(model, prompts, G, max_new_tokens=40, stop_ids=stop, generator=torch.Generator().manual_seed(0))
    rows, mask = [p for p in prompts for _ in range(G)], grpo.response_mask(lengths, ids.shape[1])
    advantages = grpo.group_advantages(torch.randn(len(rows), generator=torch.Generator().manual_seed(1)), G)
    with torch.no_grad():
        old = grpo.token_logprobs(model, rows, ids, lengths)
    ref = grpo.token_logprobs(frozen, rows, ids, lengths)
    assert not ref.requires_grad
    torch.testing.assert_close(ref, old)

    before = [p.clone() for p in frozen.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    logp = grpo.token_logprobs(model, rows, ids, lengths, chunk=64)
    loss, stats = grpo.grpo_loss(logp, old, ref, advantages, mask, beta=0.01)
    assert abs(loss.item()) < 1e-4 and stats["clipfrac"] == 0  # on-policy: the value is nearly 0, the gradient is not
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    optimiser.step()
    with torch.no_grad():
        change = ((grpo.token_logprobs(model, rows, ids, lengths) - old) * mask).sum(1) / lengths  # [B], mean per token
    assert change[advantages > 0].mean() > 0 > change[advantages < 0].mean()
    assert (advantages * change).sum() > 0.01
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(frozen.parameters(), before))


@needs("verifier")
def test_the_toy_verifier_scores_a_padded_batch_as_each_row_alone():
    model, tokenizer = models.load_model(str(TOY / "verifier"), train=False, device="cpu"), models.load_tokenizer(str(TOY / "verifier"))
    prompts = [models.chat_ids(tokenizer, x) for x in ("Tell me about Ada.", "Hi")]
    assert all(p.count(tokenizer.bos_token_id) == 1 for p in prompts) and models.end_of_turn(tokenizer) in models.find_stop_ids(model, tokenizer)
    responses = [tokenizer(x, add_special_tokens=False).input_ids for x in ("Ada likes tea.", "Emil is a baker, and he lives in a small house.")]
    T = max(map(len, responses))
    ids, lengths = torch.tensor([y + [0] * (T - len(y)) for y in responses]), torch.tensor([len(y) for y in responses])
    logp = grpo.token_logprobs(model, prompts, ids, lengths)
    for b in range(2):
        torch.testing.assert_close(logp[b, :lengths[b]], torch.stack(alone_logp(model, prompts[b], responses[b])), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- exact, by enumeration: Appendix C and the policy gradient

V_SMALL, T_SMALL, STOP, QUESTION = 4, 3, 0, [2, 1, 3]


def all_responses():
    """Every response over V_SMALL tokens that ends at the first STOP or at T_SMALL tokens: 1 + 3 + 9*4 = 40."""
    return [y for n in range(1, T_SMALL + 1) for y in itertools.product(range(V_SMALL), repeat=n)
            if STOP not in y[:-1] and (y[-1] == STOP or n == T_SMALL)]


def enumerated():
    ys = all_responses()
    assert len(ys) == 40
    return ys, torch.tensor([list(y) + [0] * (T_SMALL - len(y)) for y in ys]), torch.tensor([len(y) for y in ys])


def next_token(model, prefix):
    """[V] float32 log-probabilities, with gradient."""
    return model(input_ids=torch.tensor([QUESTION + list(prefix)]), use_cache=False).logits[0, -1].log_softmax(-1)


def test_appendix_c_reverse_kl_identity():
    """E_{y~pi}[log p_V(y)] = -KL(pi || p_V) - H(pi). KL and H by the chain rule over prefixes, not from the sums that they are compared with."""
    policy, verifier = tiny("qwen2", vocab=V_SMALL, seed=1), tiny("gemma3", vocab=V_SMALL, seed=2)
    ys, ids, lengths = enumerated()
    with torch.no_grad():
        prompts = [QUESTION] * len(ys)
        logp, entropies = grpo.token_logprobs(policy, prompts, ids, lengths, entropy=True)
        probability = logp.sum(1).double().exp()
        reward = grpo.token_logprobs(verifier, prompts, ids, lengths).sum(1).double()
        H = KL = 0.0
        prefixes = {y[:t] for y in ys for t in range(len(y))}
        assert len(prefixes) == 1 + 3 + 9
        for prefix in prefixes:
            weight = math.exp(sum(next_token(policy, prefix[:t])[token].item() for t, token in enumerate(prefix)))
            p, q = next_token(policy, prefix).double(), next_token(verifier, prefix).double()
            H += weight * -(p.exp() * p).sum().item()
            KL += weight * (p.exp() * (p - q)).sum().item()
    assert KL > 0.1 and H > 0.1
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probability * reward).sum().item() == pytest.approx(-KL - H, abs=1e-5)
    assert (probability * -logp.sum(1)).sum().item() == pytest.approx(H, abs=1e-5)
    assert (probability * entropies.sum(1)).sum().item() == pytest.approx(H, abs=1e-5)  # the entropies at the visited positions


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_loss_gradient_over_all_responses_is_the_gradient_of_the_exact_expectation(arch):
    """REINFORCE: grad E_{y~pi}[R(y)] = E[R(y) grad log pi(y)]. Advantages pi(y) |y| R(y) make the sum in Eq. 2 that expectation."""
    policy, verifier = tiny(arch, vocab=V_SMALL, seed=1), tiny("gemma3", vocab=V_SMALL, seed=2)
    ys, ids, lengths = enumerated()
    prompts, parameters = [QUESTION] * len(ys), list(policy.parameters())
    with torch.no_grad():
        reward = grpo.token_logprobs(verifier, prompts, ids, lengths).sum(1)
    step = {prefix: next_token(policy, prefix) for prefix in {y[:t] for y in ys for t in range(len(y))}}
    expectation = sum(r * sum(step[y[:t]][token] for t, token in enumerate(y)).exp() for y, r in zip(ys, reward))
    want = torch.autograd.grad(expectation, parameters)

    logp = grpo.token_logprobs(policy, prompts, ids, lengths, chunk=7)
    advantages = logp.detach().sum(1).exp() * lengths * reward
    loss, _ = grpo.grpo_loss(logp, logp.detach(), None, advantages, grpo.response_mask(lengths, T_SMALL), beta=0.0, responses=1)
    for ours, w in zip(torch.autograd.grad(loss, parameters), want):
        torch.testing.assert_close(-ours, w, rtol=1e-3, atol=1e-5)
    assert max(w.abs().max() for w in want) > 0.1


def test_importance_ratio_corrects_for_another_sampling_distribution_exactly():
    """One-token responses from an old policy, no clipping: value and gradient are those of the expectation under the new one."""
    policy, old_policy = tiny("qwen2", vocab=V_SMALL, seed=1), tiny("llama", vocab=V_SMALL, seed=3)
    ids, lengths, prompts = torch.arange(V_SMALL)[:, None], torch.ones(V_SMALL, dtype=torch.long), [QUESTION] * V_SMALL
    reward, parameters = torch.tensor([0.3, -1.0, 2.0, -0.5]), list(policy.parameters())
    with torch.no_grad():
        old = grpo.token_logprobs(old_policy, prompts, ids, lengths)
    expectation = (next_token(policy, ()).exp() * reward).sum()
    logp = grpo.token_logprobs(policy, prompts, ids, lengths)
    loss, _ = grpo.grpo_loss(logp, old, None, old[:, 0].exp() * reward, torch.ones(V_SMALL, 1), beta=0.0, clip_low=1.0, clip_high=1e9, responses=1)
    assert -loss.item() == pytest.approx(expectation.item(), rel=1e-5)
    for ours, w in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expectation, parameters)):
        torch.testing.assert_close(-ours, w, rtol=1e-3, atol=1e-6)


def test_a_text_model_takes_nothing_from_generation_config():
    model, tokenizer = models.load("toy", str(TOY / "generator"), "cpu")
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.01
    sampling = models.LocalModel(model, tokenizer).sampling
    assert (sampling["top_k"], sampling["top_p"]) == (0, 1.0)


def test_policies_are_float32_whatever_bf16_says():
    assert models.load_model(str(TOY / "generator"), train=True, device="cpu", bf16=True).dtype == torch.float32


def test_a_template_that_refuses_the_prompt_is_a_clear_error():
    tokenizer = models.load_tokenizer(str(TOY / "generator"))
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    models.chat_ids(tokenizer, "Hi")
    with pytest.raises(ValueError, match="System role not supported"):
        models.chat_ids(tokenizer, [{"role": "system", "content": "Be brief."}])
    tokenizer.chat_template = "{{ functions | tojson }}"                       # jinja's own errors too: it wants what we have not (Firefunction)
    for ask in (lambda: models.chat_ids(tokenizer, "Hi"), lambda: models.end_of_turn(tokenizer)):
        with pytest.raises(ValueError, match="chat template refuses .*Undefined"):
            ask()
