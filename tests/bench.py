"""How fast the parts are: each beside its limit or what one would otherwise use, in the same run, by turns.  Nothing is asserted.

    python tests/bench.py --json bench.json              # about ten minutes on two cores; with a GPU its parts too
    REAL_MODELS=... python tests/bench.py --only real    # a step of SmolLM2-135M and Gemma 3 270M (smollm2/, gemma/ in that folder)

A ratio is the other's time over ours, the median of rounds, with the smallest and the largest; more is better, and `aim` says how much was wanted.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models as token_models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cme  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import train  # noqa: E402
from align import align, spans_from_ids, spans_from_text  # noqa: E402
from plumbing import files, models, prompts, run as runs  # noqa: E402

FOUND = {}  # name: what was measured
G, P, T, V = 8, 8, 64, 4096  # of the small step


# ---------------------------------------------------------------- measuring
def clock(f) -> float:
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def beside(name: str, ours, other: str, theirs, aim: float = 0.0, rounds: int = 5, warm: bool = True):
    """Times both by turns; theirs may be a list of times that were taken elsewhere by turns (and ours too)."""
    if callable(ours):
        if warm:
            ours(), theirs()
        ours, theirs = zip(*[(clock(ours), clock(theirs)) for _ in range(rounds)])
    ratios = [b / a for a, b in zip(ours, theirs)]
    ours, theirs, ratio = (float(np.median(x)) for x in (ours, theirs, ratios))
    FOUND[name] = {"seconds": ours, "other": other, "other_seconds": theirs, "ratio": ratio, "least": min(ratios), "most": max(ratios), "aim": aim}
    print(f"| {name} | {shown(ours)} | {other}: {shown(theirs)} | {ratio:,.2f} ({min(ratios):,.2f} to {max(ratios):,.2f}) | {f'{aim:,}' if aim else ''} |", flush=True)


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def peak_memory(f) -> float:
    """GiB that f needs beyond what is there: of a GPU exactly, else the resident memory, looked at every two milliseconds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(resident())
    thread = threading.Thread(target=watch)
    thread.start()
    f()
    done.set(), thread.join()
    return (max(seen) - before) / 2**30


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- what one would otherwise write
def loop_align(values, source, target):
    """The overlap sum over all pairs."""
    result = [0.0] * len(target)
    for t, (a, b) in enumerate(target):
        for (c, d), value in zip(source, values):
            overlap = min(b, d) - max(a, c)
            if overlap > 0:
                result[t] += value * overlap / (d - c)
    return result


def one_by_one(tokenizer, ids):
    """Text and spans, token by token, with the tokenizers library's own stream."""
    stream, text, spans = decoders.DecodeStream(skip_special_tokens=False), "", []
    for i in ids:
        piece = stream.step(tokenizer.backend_tokenizer, i) or ""
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def full_logprobs(model, prompt_ids, ids, lengths):
    """Log-probabilities of a padded batch by [B, L, V] logits and their log-softmax."""
    tokens = grpo.pad([[*p, *y[:n]] for p, y, n in zip(prompt_ids, ids.tolist(), lengths.tolist())], ids.device)[0]
    logp = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return [logp[i, len(p) - 1:len(p) - 1 + n] for i, (p, n) in enumerate(zip(prompt_ids, lengths.tolist()))]


@torch.no_grad()
def bare_loop(model, prompt_ids, G, new_tokens):
    """The forward passes of a rollout and nothing else: no drawing, no bookkeeping."""
    rows = [p for p in prompt_ids for _ in range(G)]
    L = max(map(len, rows))
    ids = torch.tensor([[0] * (L - len(p)) + p for p in rows], device=model.device)
    mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in rows], device=model.device)
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    for _ in range(new_tokens - 1):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        out = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


def generate(model, prompt_ids, G, new_tokens, stop=None):
    L = max(map(len, prompt_ids))
    ids = torch.tensor([[0] * (L - len(p)) + p for p in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompt_ids], device=model.device)
    return model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=G,
                          max_new_tokens=new_tokens, eos_token_id=stop, pad_token_id=0)


# ---------------------------------------------------------------- a small model with tokenizers of its own
def tokenizer_of(kind: str):
    """A byte-level or a Metaspace BPE of V tokens, learnt from this repository."""
    byte = kind == "bytes"
    tokenizer = Tokenizer(token_models.BPE(unk_token=None if byte else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.ByteLevel() if byte else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte else [chr(i) for i in range(32, 127)]
    tokenizer.train([str(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.py")]],
                    trainers.BpeTrainer(vocab_size=V, special_tokens=["<eos>", "<unk>"], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def small_model(vocabulary=V, mixed=False, kind=Qwen2ForCausalLM):
    """4.2 M parameters; <eos> (0) comes at one token in 32, or never."""
    torch.manual_seed(0)
    shape = dict(vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                 tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    config = Qwen2Config(**shape) if kind is Qwen2ForCausalLM else Gemma3TextConfig(**shape, head_dim=64)
    model = kind(config).eval()
    with torch.no_grad():  # one direction that every state has, and by which <eos> differs from the others
        embedding = model.get_input_embeddings().weight
        embedding[:, 0], embedding[0, 0] = 10.0, 10 + math.log(vocabulary / 32) / 15.6 if mixed else 0.0
    return model


def prepared(folder, mixed: bool, device="cpu", policy=None):
    """A `run` of train.py on the small model, or on `policy`, its prompts' rows; the prompts as TRL takes them."""
    folder = Path(folder, device, "mixed" if mixed else "full")
    tokenizer, verifier_tokenizer = tokenizer_of("bytes"), tokenizer_of("words")
    for name, model, of in (("generator", policy or small_model(mixed=mixed), tokenizer), ("verifier", small_model(kind=Gemma3ForCausalLM), verifier_tokenizer)):
        model.save_pretrained(folder / name)
        of.save_pretrained(folder / name)
    words = random.Random(0).choices((ROOT / "README.md").read_text().split(), k=400)
    texts = [" ".join(words[i * 20:i * 20 + 5 + i % 6]) for i in range(P)]
    files.write_lines(str(folder / "prompts.jsonl"), [{"prompt": text} for text in texts])
    o = train.Options(generator=str(folder / "generator"), verifier=str(folder / "verifier"), prompts=str(folder / "prompts.jsonl"), lr=1e-6, steps=10**6,
                      prompts_per_step=P, max_new_tokens=T, beta=0.01, device=device, output_dir=str(folder / "run"))
    run = runs.prepare(o)
    torch.set_num_threads(os.cpu_count())
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=1e-6, weight_decay=0.0)
    return run, [f"User:\n{text}\n\nAssistant:\n" for text in texts]


def our_step(run, step: int, verifier: bool):
    """A step of train.py; the reward is the length, or CME."""
    rows = run.rows
    prompt_ids, ids, lengths = batch = train.rollout(run, rows, step)
    if verifier:
        rewards, counted = cme.token_rewards(*run.verifier, run.tokenizer, [row["prompt"] for row in rows for _ in range(G)], ids, lengths)
        advantages = grpo.position_advantages(rewards, counted, G)
    else:
        advantages = grpo.group_advantages(lengths.float(), G)
    ref_logp = train.logprobs(run, run.reference, *batch)
    train.update(run, run.optimizer, *batch, None, ref_logp, advantages)
    return lengths


def trl_steps(run, texts, verifier: bool, folder: str, n: int):
    """n steps of TRL's trainer and of ours by turns, after one each to warm up -> their times, our times."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    times, ours = [], []

    def length(completion_ids, **_):
        return [float(len(y)) for y in completion_ids]

    @torch.no_grad()
    def likelihood(prompts, completions, **_):
        """What one would write: the verifier's mean log-probability of each completion, all in one padded batch."""
        model, tokenizer = run.verifier
        before = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        after = [tokenizer(y, add_special_tokens=False).input_ids or [1] for y in completions]
        ids, lengths = grpo.pad(after, model.device)
        return [row.mean().item() for row in full_logprobs(model, before, ids, lengths)]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)
            ours.append(clock(lambda: our_step(run, len(ours), verifier)))

    config = GRPOConfig(
        output_dir=folder, use_cpu=run.device.type == "cpu", per_device_train_batch_size=run.options.micro_batch,
        gradient_accumulation_steps=P * G // run.options.micro_batch, num_generations=G, max_completion_length=run.options.max_new_tokens,
        beta=0.01, learning_rate=1e-6, bf16=run.options.bf16, gradient_checkpointing=False, max_steps=n + 1, report_to=[], save_strategy="no", disable_tqdm=True,
        temperature=1.0, loss_type="grpo", logging_steps=10**6, top_p=1.0)
    trainer = GRPOTrainer(model=run.options.generator, processing_class=copy.deepcopy(run.tokenizer), args=config, callbacks=[Turns()],
                          reward_funcs=likelihood if verifier else length, train_dataset=Dataset.from_list([{"prompt": text} for text in texts] * (n + 1)))
    trainer.model.float()
    with contextlib.redirect_stdout(None):
        trainer.train()
    return times[1:], ours[1:]


# ---------------------------------------------------------------- the parts
def alignment():
    rng = np.random.default_rng(0)
    edges = [np.append(0, np.sort(rng.choice(np.arange(1, 8000), 2047, replace=False))) for _ in range(2)]
    source, target = (np.stack([e, np.append(e[1:], 8000)], 1).astype(float) for e in edges)
    values = rng.normal(size=2048)
    lists = values.tolist(), source.tolist(), target.tolist()
    beside("align, 2,048 tokens", lambda: align(values, source, target), "loop over pairs", lambda: loop_align(*lists), 1000, rounds=3)
    tokenizer = tokenizer_of("bytes")
    text = (ROOT / "README.md").read_text()
    ids = tokenizer(text).input_ids
    rows = [ids[i * 50:i * 50 + 512] for i in range(64)]
    beside("spans_from_ids, 64 x 512", lambda: [spans_from_ids(tokenizer, row) for row in rows], "DecodeStream", lambda: [one_by_one(tokenizer, row) for row in rows], 5)
    beside("spans_from_text, 64 responses", lambda: [spans_from_text(tokenizer, text[i * 100:i * 100 + 2000]) for i in range(64)], "encode alone",
           lambda: [tokenizer(text[i * 100:i * 100 + 2000]).input_ids for i in range(64)])


def scoring(device="cpu", model=None):
    """64 responses of 8 to 128 tokens to 8 prompts of 184."""
    tokenizer, model = tokenizer_of("words"), model or small_model(kind=Gemma3ForCausalLM).to(device)
    g = torch.Generator().manual_seed(0)
    asked = [f"{i} " + "please say what it is " * 25 for i in range(8) for _ in range(8)]
    answers = [torch.randint(2, V, (n,), generator=g).tolist() for n in torch.randint(8, 129, (64,), generator=g).tolist()]
    scored(f"scoring by a verifier, 64 responses, {device}", model, tokenizer, asked, answers, 4 if device == "cpu" else 8)


def scored(name, model, tokenizer, asked, answers, aim):
    befores = [models.chat_ids(tokenizer, prompt) for prompt in asked]

    def alone():
        with torch.no_grad():
            for before, answer in zip(befores, answers):
                full_logprobs(model, [before], torch.tensor([answer], device=model.device), torch.tensor([len(answer)]))
    beside(name, lambda: models.answer_logprobs(model, tokenizer, asked, answers), "one at a time", alone, aim)


def large_vocabulary(device="cpu"):
    """1,024 tokens (4,096 on a GPU) at V = 262,144 and width 640, one layer: what the head costs."""
    n = 128 if device == "cpu" else 512
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=262_144, hidden_size=640, intermediate_size=640, num_hidden_layers=1, num_attention_heads=4,
                                         num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=None)).to(device).eval()
    prompt_ids, ids, lengths = [[1, 2, 3]] * 8, torch.randint(262_144, (8, n), device=device), torch.full((8,), n, device=device)

    def ours():
        return grpo.token_logprobs(model, prompt_ids, ids, lengths)

    def plain():
        return torch.stack(full_logprobs(model, prompt_ids, ids, lengths))

    def forward(f):
        with torch.no_grad():
            f()

    def both(f):
        f().sum().backward()
        model.zero_grad()
    name = f"token_logprobs, V = 262,144, {device}"
    beside(f"{name}: forward", lambda: forward(ours), "full log-softmax", lambda: forward(plain), round(1 / 1.1, 2), rounds=2)
    beside(f"{name}: forward and backward", lambda: both(ours), "full log-softmax", lambda: both(plain), round(1 / 1.5, 2), rounds=2)
    if fused := getattr(torch.nn.functional, "linear_cross_entropy", None):
        def library():
            hidden = model.base_model(input_ids=torch.cat([torch.tensor([[1, 2, 3]] * 8, device=device), ids], 1)).last_hidden_state[:, 2:-1]
            return -fused(hidden.reshape(-1, 640), model.get_output_embeddings().weight, ids.reshape(-1))
        beside(f"{name}: forward and backward", lambda: both(ours), "linear_cross_entropy", lambda: both(library), rounds=2)
    ids, lengths = torch.randint(262_144, (8, 2 * n), device=device), torch.full((8,), 2 * n, device=device)
    memory = {what: peak_memory(lambda f=f: both(f)) for what, f in (("ours", ours), ("plain", plain))}
    weights = model.num_parameters() * 4 / 2**30  # the gradient, which both need
    ratio = (memory["plain"] - weights) / (memory["ours"] - weights)
    FOUND[f"{name}: memory"] = memory | {"gradient": weights, "ratio": ratio, "aim": 4}
    print(f"| {name}: memory beyond weights and gradient, {16 * n:,} tokens | {memory['ours'] - weights:.2f} GiB | {memory['plain'] - weights:.2f} GiB | {ratio:.1f} | 4 |", flush=True)


def drawing(device="cpu"):
    """A token for each of 16 rows (256 on a GPU) at Qwen's V, as CaT samples: T = .7, top-k 20, top-p .8; and with top-p alone."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 3 * torch.randn(16 if device == "cpu" else 256, 151_936, generator=torch.Generator().manual_seed(0)).to(device)
    for name, top_k in (("top-k 20, top-p .8", 20), ("top-p .8", 0)):
        warp = LogitsProcessorList([TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(20)] if top_k else []), TopPLogitsWarper(0.8)])
        beside(f"a draw, V = 151,936, {name}, {device}", lambda: grpo.draw(logits, temperature=0.7, top_k=top_k, top_p=0.8), "as `generate` draws",
               lambda: torch.multinomial(warp(None, logits).softmax(-1), 1))


def small_step(folder):
    """Rollout, update, whole steps of 8 x 8 responses of 64 tokens, or of 28 on average."""
    for mixed in (False, True):
        lengths_are = "mixed lengths" if mixed else "full lengths"
        run, texts = prepared(folder, mixed)
        prompt_ids = [models.chat_ids(run.tokenizer, row["prompt"]) for row in run.rows]
        batch = rows, ids, lengths = train.rollout(run, run.rows, 0)
        if not mixed:
            beside("rollout", lambda: train.rollout(run, run.rows, 0), "bare forward passes", lambda: bare_loop(run.policy, prompt_ids, G, T), 0.8)
        advantages = torch.randn(P * G)

        def ours():
            train.update(run, run.optimizer, *batch, None, None, advantages)

        def plain():
            for part in range(0, P * G, 32):
                tokens = grpo.pad([[*p, *y[:n]] for p, y, n in zip(rows[part:part + 32], ids[part:part + 32].tolist(), lengths[part:part + 32].tolist())])[0]
                logits = run.policy(input_ids=tokens).logits
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            run.optimizer.step(), run.optimizer.zero_grad()
        run.options.beta = 0.0
        beside(f"update, {lengths_are}", ours, "plain forward and backward", plain, 0.85)
        run.options.beta = 0.01
        share = clock(lambda: [spans_from_ids(run.tokenizer, y[:n]) for y, n in zip(ids.tolist(), lengths.tolist())]) / clock(lambda: our_step(run, 0, True))
        print(f"(mean length {lengths.float().mean():.0f}; spans_from_ids takes {share:.1%} of a step)", flush=True)
        with contextlib.suppress(ImportError):
            for verifier in (False, True):
                theirs, mine = trl_steps(run, texts, verifier, folder, 4)
                beside(f"step, {lengths_are}, {'with' if verifier else 'without'} verifier", mine, "TRL's GRPOTrainer", theirs, 2.0 if mixed else 1.5)


def scaling():
    """Rollout, reference and update of the small model as one thing grows: fitted exponents of time."""
    def step(model, optimizer, prompts, group, new):
        ids, lengths = grpo.sample(model, prompts, group, max_new_tokens=new, stop_ids=[])
        rows = [p for p in prompts for _ in range(group)]
        with torch.no_grad():
            grpo.token_logprobs(model, rows, ids, lengths)
        for part in range(0, len(rows), 16):
            grpo.token_logprobs(model, rows[part:part + 16], ids[part:part + 16], lengths[part:part + 16]).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    prompts = [[1 + i] * 16 for i in range(4)]
    for what, values in (("G", (4, 8, 16, 32)), ("T", (64, 128, 256, 512, 1024)), ("V", (4096, 16_384, 65_536))):
        times = []
        for value in values:
            model = small_model(vocabulary=value if what == "V" else V)
            model.requires_grad_(True)
            settings = prompts[:1] if what == "T" else prompts, value if what == "G" else 8, value if what == "T" else 64
            one = lambda: step(model, torch.optim.AdamW(model.parameters(), lr=0.0), *settings)  # noqa: E731
            times.append(min(clock(one) for _ in range(2)))
        exponent = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        FOUND[f"scaling in {what}"] = {"values": values, "seconds": times, "exponent": exponent}
        print(f"| step against {what} = {', '.join(f'{v:,}' for v in values)} | {', '.join(map(shown, times))} | | exponent {exponent:.2f} | |", flush=True)


def toy():
    """The toy's models, one thread: what train.py does by default."""
    torch.set_num_threads(1)
    policy, tokenizer = models.load("toy", f"{ROOT}/toy/cme/generator", "cpu", train=True)
    verifier = models.load("toy", f"{ROOT}/toy/cme/verifier", "cpu")
    rows = prompts.read_prompts(f"{ROOT}/toy/cme/prompts.jsonl")
    asked = [row["prompt"] for row in rows[::len(rows) // 16][:16]]
    prompt_ids, stop = [models.chat_ids(tokenizer, p) for p in asked], models.find_stop_ids(policy, tokenizer)
    ids, lengths = grpo.sample(policy, prompt_ids, 8, max_new_tokens=48, stop_ids=stop, generator=torch.Generator().manual_seed(0))
    of, asked_of = [p for p in prompt_ids for _ in range(8)], [p for p in asked for _ in range(8)]
    beside("toy: rollout, 16 x 8", lambda: grpo.sample(policy, prompt_ids, 8, max_new_tokens=48, stop_ids=stop), "generate",
           lambda: generate(policy, prompt_ids, 8, 48, stop))
    beside("toy: forward and backward", lambda: grpo.token_logprobs(policy, of, ids, lengths).sum().backward(), "full log-softmax",
           lambda: sum(row.sum() for row in full_logprobs(policy, of, ids, lengths)).backward())
    texts, _ = models.LocalModel(policy, tokenizer).texts(ids, lengths)
    scored("toy: scoring by the verifier, 128 responses", *verifier, asked_of, models.plain_ids(verifier[1], texts), 4)
    print(f"toy: token_rewards of 128 responses: {shown(np.median([clock(lambda: cme.token_rewards(*verifier, tokenizer, asked_of, ids, lengths)) for _ in range(5)]))}")
    rewards, mask = torch.randn(256, 1024), torch.rand(256, 1024) > 0.1
    print(f"position_advantages, 256 x 1,024: {shown(np.median([clock(lambda: grpo.position_advantages(rewards, mask, 8)) for _ in range(5)]))}")
    rounding(*verifier)
    torch.set_num_threads(os.cpu_count())


def rounding(verifier, tokenizer):
    """What position_advantages' min_std has to swallow: the deviation, per position, of one response's log-probabilities under the toy's verifier in
    bf16 when the same text is scored in batches of twelve different shapes."""
    model, spread = copy.deepcopy(verifier).to(torch.bfloat16), []
    for row in prompts.read_prompts(f"{ROOT}/toy/cme/eval.jsonl")[:24]:
        prompt = models.chat_ids(tokenizer, row["prompt"])
        answer = spans_from_text(tokenizer, f"{row['prompt'].split()[2]} has a dog, lives in Oslo, likes soup and wears red.")[0]
        scored = []
        for B, more in [(B, more) for B in (1, 6) for more in (0, 1, 3, 7, 20, 40)]:
            ids = torch.tensor([answer + [7] * more] * B)
            with torch.no_grad():
                scored.append(grpo.token_logprobs(model, [prompt] * B, ids, torch.full((B,), ids.shape[1]))[0, :len(answer)])
        spread.append(torch.stack(scored).double().std(0))
    spread = torch.cat(spread)
    FOUND["bf16 rounding"] = {"most": spread.max().item(), "99%": spread.quantile(0.99).item()}
    print(f"bf16 rounding of the toy's verifier on equal text: deviation at most {spread.max():.3f} nats, 99% of positions under "
          f"{spread.quantile(0.99):.3f} nats (grpo.position_advantages: min_std)")


def half_billion(layers=24, vocabulary=151_936):
    """The shape of Qwen2.5-0.5B, random weights."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
                                        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768, eos_token_id=0))


def gpu(folder, device="cuda", new=512, step_tokens=256, small=None):
    """Shapes of Qwen2.5-0.5B as the policy and of Gemma 3 1B as the verifier, random weights, bf16 autocast; `small` for a trial on a CPU."""
    shape = small or {}
    policy = half_billion(**shape).to(device).eval()
    prompt_ids = [torch.randint(1000, policy.config.vocab_size, (n,)).tolist() for n in (64, 70, 80, 90, 100, 110, 120, 128)]
    bf16 = torch.autocast(device, dtype=torch.bfloat16)
    with bf16:
        grpo.sample(policy, prompt_ids, 8, max_new_tokens=8, stop_ids=[]), generate(policy, prompt_ids, 8, 8)
        beside(f"0.5 B: rollout, 64 x {new}, {device}", lambda: grpo.sample(policy, prompt_ids, 8, max_new_tokens=new, stop_ids=[]), "generate",
               lambda: generate(policy, prompt_ids, 8, new), 4, rounds=2, warm=False)
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    rate = 2 * 8 * 2**30 / min(clock(lambda: [x.clone() for _ in range(8)]) for _ in range(3))  # bytes read and written
    cache = 64 * (128 + new / 2) * 24 * 2 * 128 * 2  # keys and values, bf16, of all rows, half of the new tokens on average
    bound = (policy.num_parameters() * 2 + cache) * new / rate
    FOUND["0.5 B: rollout, share of the bandwidth bound"] = {"bound": bound, "bandwidth": rate, "share": bound / FOUND[f"0.5 B: rollout, 64 x {new}, {device}"]["seconds"]}
    print(f"(bf16 weights and cache read once for each of {new} tokens at the {rate / 1e12:.1f} TB/s of a copy: {shown(bound)})", flush=True)
    del x
    verifier = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=2 if small else 26,
                                                  num_attention_heads=4, num_key_value_heads=1, head_dim=256)).to(device, torch.bfloat16).eval()
    scoring(device, verifier)
    large_vocabulary(device)
    drawing(device)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)

    def recipe():
        """A step like the paper's: 8 responses to one prompt, in micro-batches of 2."""
        with bf16:
            ids, lengths = grpo.sample(policy, prompt_ids[-1:], 8, max_new_tokens=2 * new, stop_ids=[])
        for part in range(0, 8, 2):
            batch = prompt_ids[-1:] * 2, ids[part:part + 2], lengths[part:part + 2]
            with torch.no_grad():
                grpo.token_logprobs(verifier, *batch)
                with bf16:
                    grpo.token_logprobs(reference, *batch)
            with bf16:
                logp = grpo.token_logprobs(policy, *batch, entropy=True)[0]
            logp.mean().backward()
        optimizer.step(), optimizer.zero_grad()
    recipe()
    seconds = clock(recipe)
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    FOUND["recipe"] = {"GiB": base / 2**30 + peak_memory(recipe), "seconds": seconds}
    print(f"the paper's recipe, 0.5 B and a verifier of 1 B, 8 responses of {2 * new} tokens, all full: {shown(seconds)}, peak {FOUND['recipe']['GiB']:.1f} GiB", flush=True)
    del policy, verifier, reference, optimizer
    run, texts = prepared(folder, False, device, half_billion(**shape))
    run.options.max_new_tokens = step_tokens
    with contextlib.suppress(ImportError):
        for scored in (False, True):
            theirs, mine = trl_steps(run, texts, scored, folder, 2)
            beside(f"0.5 B: step, 64 x {step_tokens}, {'with a small' if scored else 'without'} verifier, {device}", mine, "TRL's GRPOTrainer", theirs, 3)


JUDGE = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        n = len(self.rfile.read(int(self.headers["content-length"])))
        verdict = json.dumps({"verdict": ("A", "B", "tie")[n % 3], "reason": "It says more."})
        body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": verdict}, "finish_reason": "stop"}]}).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body)
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
print(server.server_port, flush=True)
server.serve_forever()
"""


def judging():
    """What 805 prompts x 6 pairs x 2 judges cost beyond the judges: a scripted server, responses of about 1,750 characters."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    rng, names, real_append, seen = random.Random(0), ["reference", "base", "instruct", "trained"], files.append_line, []
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    with subprocess.Popen([sys.executable, "-c", JUDGE], stdout=subprocess.PIPE, text=True) as server, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        o = evaluate.Options(models=dict.fromkeys(names, "none"), prompts="made up", output_dir=folder,
                             judge={j: f"m@{url}" for j in ("one", "two")})
        rows = [prompts.check_row("", {"prompt": " ".join(rng.choices(words, k=40))}) for _ in range(805)]
        os.makedirs(os.path.join(folder, "judges"))
        for name in names:
            os.makedirs(os.path.join(folder, "models", name))
            files.write_lines(os.path.join(folder, "models", name, "responses.jsonl"),
                              [{"response": " ".join(rng.choices(words, k=300)), "stopped": True, "tokens": 400} for _ in range(805)])

        def append(path, row):                                                 # memory: now and then, what is resident, in MB
            real_append(path, row)
            seen.append(resident() / 2**20)
        evaluate.append_line, times = append, []
        responses = {name: [models.Reply(**r) for r in files.read_lines(f"{folder}/models/{name}/responses.jsonl")] for name in names}
        tasks = evaluate.tasks_of(rows, {name: [r.response for r in answers] for name, answers in responses.items()})
        for stage in (lambda: [evaluate.judge(o, name, tasks) for name in o.judge], lambda: [evaluate.judge(o, name, tasks) for name in o.judge],
                      lambda: evaluate.report(o, rows, responses, tasks)):
            start = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                stage()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        evaluate.append_line = real_append
        server.kill()
    FOUND["judging"] = {"judgements": len(seen), "seconds": times[0][0], "own": times[0][1], "again": times[1][0], "report": times[2][0]}
    print(f"\n{len(seen):,} judgements by a scripted server: {times[0][0]:.0f} s, of which {times[0][1]:.0f} s were this process's; resident memory "
          f"{seen[len(seen) // 10]:.0f} MB after a tenth of them, {seen[-1]:.0f} MB after all. "
          f"Started again: {times[1][0]:.1f} s. The report: {times[2][0]:.1f} s.")


def real():
    """REAL_MODELS: one step of train.py, 2 questions x 8 answers of 64 tokens, generator smollm2, verifier gemma; in float32 and with --bf16."""
    folder = os.environ["REAL_MODELS"]
    with tempfile.TemporaryDirectory() as output:
        for settings in ([], ["--bf16"]):
            command = [sys.executable, f"{ROOT}/train.py", "--generator", f"{folder}/smollm2", "--verifier", f"{folder}/gemma", "--lr", "1e-5", "--beta", "0.01",
                       "--prompts", f"{ROOT}/facts/prompts.jsonl", "--max_new_tokens", "64", "--prompts_per_step", "2", "--micro_batch", "8", "--steps", "3",
                       "--eval_every", "0", "--output_dir", f"{output}/run{len(settings)}", *settings]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            summary = files.read_json(f"{output}/run{len(settings)}/summary.json")
            seconds, tokens = sum(summary["seconds"].values()), summary["tokens"]
            FOUND[f"real pair {' '.join(settings)}"] = {"tokens": tokens, "seconds": seconds, "parts": summary["seconds"], "MB": summary["peak_memory_mb"]}
            parts = ", ".join(f"{name} {tokens / of:.0f}" for name, of in summary["seconds"].items() if name != "other")
            print(f"SmolLM2-135M, Gemma 3 270M{' --bf16' * bool(settings)}: {tokens / seconds:.0f} tokens/s ({parts}), {summary['peak_memory_mb'] / 1024:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="a file for all figures")
    parser.add_argument("--only", nargs="*", default=[], help="names of parts: judging alignment scoring large_vocabulary drawing small_step scaling toy gpu real")
    o = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(where + (f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    with tempfile.TemporaryDirectory() as folder:
        parts = {"real": real} if "REAL_MODELS" in os.environ else {}  # first, and judging: a child's peak memory starts with its parent's
        parts |= {"judging": judging, "alignment": alignment, "scoring": scoring, "large_vocabulary": large_vocabulary, "drawing": drawing,
                  "small_step": lambda: small_step(folder), "scaling": scaling, "toy": toy} | ({"gpu": lambda: gpu(folder)} if torch.cuda.is_available() else {})
        for name, part in parts.items():
            if name == "alignment":
                print("\n| what | here | otherwise | ratio (range) | aim |\n|---|---|---|---|---|")
            if not o.only or name in o.only:
                part()
    if o.json:
        files.write_atomically(o.json, json.dumps({"where": where, **FOUND}, indent=1))


if __name__ == "__main__":
    main()
