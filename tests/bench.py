"""How fast the parts are, against what one would otherwise use. Not a test: nothing here is asserted.

    python tests/bench.py            # the toy's models on a CPU; with a GPU also a random model of Qwen2.5-0.5B's shape
    REAL_MODELS=... python tests/bench.py    # also SmolLM2-135M and Gemma 3 270M, in smollm2/ and gemma/ of that folder
"""
import contextlib
import io
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import cme  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
from align import align, spans_from_ids, spans_from_text  # noqa: E402
from plumbing import files, models, prompts  # noqa: E402


def seconds(f, least: float = 0.5, times: int = 3) -> float:
    """Median time of one call: at least `times` of them after a warm-up, and at least `least` seconds in all."""
    f(), synchronize()
    taken = []
    while len(taken) < times or sum(taken) < least:
        start = time.perf_counter()
        f(), synchronize()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(what: str, ours: float, other: str = "", theirs: float = 0.0, unit: float = 1e3):
    print(f"| {what} | {ours * unit:.3g} {'ms' if unit == 1e3 else 'µs'} | " + (f"{other} {theirs * unit:.3g} {'ms' if unit == 1e3 else 'µs'} | "
          f"{theirs / ours:.1f} |" if other else "| |"), flush=True)


def matrix_align(values, source, target):
    """The overlap sum as one would first write it: all weights, [N, T]."""
    overlap = np.minimum(source[:, None, 1], target[None, :, 1]) - np.maximum(source[:, None, 0], target[None, :, 0])
    return values @ (overlap.clip(min=0) / (source[:, 1] - source[:, 0])[:, None])


def full_logprobs(model, prompt_ids, ids, lengths):
    """Log-probabilities of a padded batch as one would first write them: [B, L, V] logits and their log-softmax."""
    L = max(len(p) for p in prompt_ids) + ids.shape[1]
    tokens = torch.zeros(len(ids), L, dtype=torch.long, device=ids.device)
    for i, p in enumerate(prompt_ids):
        tokens[i, :len(p)] = torch.tensor(p)
        tokens[i, len(p):len(p) + ids.shape[1]] = ids[i]
    logp = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.stack([logp[i, len(p) - 1:len(p) - 1 + ids.shape[1]] for i, p in enumerate(prompt_ids)])


def generate(model, prompt_ids, group_size, new_tokens, stop):
    L = max(map(len, prompt_ids))
    tokens = torch.tensor([[0] * (L - len(p)) + p for p in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompt_ids], device=model.device)
    return model.generate(tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=group_size,
                          max_new_tokens=new_tokens, eos_token_id=stop, pad_token_id=0)


def texts_and_alignment(run):
    rng = np.random.default_rng(0)
    edges = [np.append(0, np.sort(rng.choice(np.arange(1, 8000), 2047, replace=False))) for _ in range(2)]
    source, target = (np.stack([e, np.append(e[1:], 8000)], 1).astype(float) for e in edges)
    values = rng.normal(size=2048)
    show("align, 2,048 tokens to 2,048", seconds(lambda: align(values, source, target)), "matrix of weights", seconds(lambda: matrix_align(values, source, target)))
    text = "Mia has a cat, lives in Oslo, likes soup and wears red. " * 60
    ids = run.tokenizer(text).input_ids[:1000]
    show("spans_from_ids, 1,000 ids", seconds(lambda: spans_from_ids(run.tokenizer, ids)))
    text = spans_from_ids(run.tokenizer, ids)[0]
    show(f"spans_from_text, {len(text):,} characters", seconds(lambda: spans_from_text(run.verifier_tokenizer, text)))


def toy_step(run):
    asked = [row["prompt"] for row in run.rows[::len(run.rows) // 16][:16]]
    prompt_ids = [models.chat_ids(run.tokenizer, p) for p in asked]
    ids, lengths = grpo.sample(run.policy, prompt_ids, 8, max_new_tokens=48, stop_ids=run.actor.stop_ids, generator=torch.Generator().manual_seed(0))
    rows, asked_of = [p for p in prompt_ids for _ in range(8)], [p for p in asked for _ in range(8)]
    show("toy: sample 16 x 8 responses", seconds(lambda: grpo.sample(run.policy, prompt_ids, 8, max_new_tokens=48, stop_ids=run.actor.stop_ids)),
         "model.generate", seconds(lambda: generate(run.policy, prompt_ids, 8, 48, run.actor.stop_ids)))
    show("toy: token_rewards of 128 responses", seconds(lambda: cme.token_rewards(run.verifier, run.verifier_tokenizer, run.tokenizer, asked_of, ids, lengths)))
    show("toy: token_logprobs, forward and backward", seconds(lambda: grpo.token_logprobs(run.policy, rows, ids, lengths).sum().backward()),
         "full log-softmax", seconds(lambda: full_logprobs(run.policy, rows, ids, lengths).sum().backward()))
    B, T = 256, 1024
    rewards, mask = torch.randn(B, T), torch.rand(B, T) > 0.1
    show("position_advantages, 256 x 1,024", seconds(lambda: grpo.position_advantages(rewards, mask, 8)))


def rounding(run):
    """What position_advantages' min_std has to swallow: the deviation, per position, of one response's log-probabilities under the toy's verifier in
    bf16 when the same text is scored in batches of twelve different shapes."""
    import copy
    model, spread = copy.deepcopy(run.verifier).to(torch.bfloat16), []
    for row in run.eval_rows[:24]:
        prompt = models.chat_ids(run.verifier_tokenizer, row["prompt"])
        answer = spans_from_text(run.verifier_tokenizer, f"{row['prompt'].split()[2]} has a dog, lives in Oslo, likes soup and wears red.")[0]
        scored = []
        for B, more in [(B, more) for B in (1, 6) for more in (0, 1, 3, 7, 20, 40)]:
            ids = torch.tensor([answer + [7] * more] * B)
            with torch.no_grad():
                scored.append(grpo.token_logprobs(model, [prompt] * B, ids, torch.full((B,), ids.shape[1]))[0, :len(answer)])
        spread.append(torch.stack(scored).double().std(0))
    spread = torch.cat(spread)
    print(f"\nbf16 rounding of the toy's verifier on equal text: deviation at most {spread.max():.3f} nats, 99% of positions under "
          f"{spread.quantile(0.99):.3f} nats (grpo.position_advantages: min_std)")


def on_gpu():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                                         num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768, eos_token_id=None)).cuda().eval()
    prompt_ids = [torch.randint(1000, 100_000, (n,)).tolist() for n in (64, 90, 128, 200)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        show("0.5B: sample 4 x 8 responses of 128 tokens", seconds(lambda: grpo.sample(model, prompt_ids, 8, max_new_tokens=128, stop_ids=[7])),
             "model.generate", seconds(lambda: generate(model, prompt_ids, 8, 128, [7])))
        for T in (256, 1024):
            ids = torch.randint(1000, 100_000, (8, T), device="cuda")
            lengths, rows, peak = torch.full((8,), T, device="cuda"), prompt_ids * 2, []
            times = []
            for f in (grpo.token_logprobs, full_logprobs):
                torch.cuda.reset_peak_memory_stats()
                times.append(seconds(lambda: f(model, rows, ids, lengths).sum().backward()))
                peak.append(torch.cuda.max_memory_allocated() / 2**30)
                model.zero_grad()
            show(f"0.5B: token_logprobs, 8 x {T:,} tokens, forward and backward ({peak[0]:.1f} GiB)", times[0], f"full log-softmax ({peak[1]:.1f} GiB)", times[1])


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
    rng, names, real, resident = random.Random(0), ["reference", "base", "instruct", "trained"], files.append_line, []
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        words = f.read().split()
    with subprocess.Popen([sys.executable, "-c", JUDGE], stdout=subprocess.PIPE, text=True) as server, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        o = evaluate.Options(models=dict.fromkeys(names, "none"), prompts="made up", output_dir=folder,
                             judge={j: f"m@{url}" for j in ("one", "two")})
        rows = [prompts.check_row("", {"prompt": " ".join(rng.choices(words, k=40))}) for _ in range(805)]
        os.makedirs(os.path.join(folder, "judges"))
        for name in names:
            os.makedirs(os.path.join(folder, "models", name))
            for i in range(805):
                real(os.path.join(folder, "models", name, "responses.jsonl"),
                     {"index": i, "response": " ".join(rng.choices(words, k=300)), "stopped": True, "tokens": 400})

        def append(path, row):                                                 # memory: now and then, what is resident, in MB
            real(path, row)
            with open("/proc/self/statm") as f:
                resident.append(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        evaluate.append_line, times = append, []
        responses = {name: files.read_lines(f"{folder}/models/{name}/responses.jsonl") for name in names}
        tasks = evaluate.tasks_of(rows, {name: [r["response"] for r in answers] for name, answers in responses.items()})
        for stage in (lambda: [evaluate.judge(o, name, tasks) for name in o.judge], lambda: [evaluate.judge(o, name, tasks) for name in o.judge],
                      lambda: evaluate.report(o, rows, responses, tasks)):
            start = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                stage()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        evaluate.append_line = real
        server.kill()
    print(f"\n{len(resident):,} judgements by a scripted server: {times[0][0]:.0f} s, of which {times[0][1]:.0f} s were this process's; resident memory "
          f"{resident[len(resident) // 10]:.0f} MB after a tenth of them, {resident[-1]:.0f} MB after all. "
          f"Started again: {times[1][0]:.1f} s. The report: {times[2][0]:.1f} s.")


def real(folder):
    """REAL_MODELS: tokens per second of the parts of a step, 2 questions x 8 answers of 32 tokens, generator smollm2, verifier gemma."""
    import resource
    torch.set_num_threads(os.cpu_count())
    policy, tokenizer = models.load("generator", f"{folder}/smollm2", "cpu", train=True)
    verifier = models.load("verifier", f"{folder}/gemma", "cpu")
    asked = [row["prompt"] for row in prompts.read_prompts(f"{ROOT}/facts/prompts.jsonl")[::500][:2]]
    prompt_ids, noise = [models.chat_ids(tokenizer, p) for p in asked], torch.Generator().manual_seed(0)
    ids, lengths = grpo.sample(policy, prompt_ids, 8, max_new_tokens=32, stop_ids=[], generator=noise)
    rows, asked_of, n = [p for p in prompt_ids for _ in range(8)], [p for p in asked for _ in range(8)], ids.numel()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)

    def update():
        for part in range(0, 16, 8):
            grpo.token_logprobs(policy, rows[part:part + 8], ids[part:part + 8], lengths[part:part + 8]).mean().backward()
        optimizer.step(), optimizer.zero_grad()

    def reference():
        with torch.no_grad():
            grpo.token_logprobs(policy, rows, ids, lengths)
    print(f"\nSmolLM2-135M (policy), Gemma 3 270M (verifier), {os.cpu_count()} cores, {n} tokens:\n\n| part | tokens/s |\n|---|---|")
    for what, f in (("rollout", lambda: grpo.sample(policy, prompt_ids, 8, max_new_tokens=32, stop_ids=[], generator=noise)),
                    ("scoring by the verifier", lambda: cme.token_rewards(*verifier, tokenizer, asked_of, ids, lengths)),
                    ("log-probabilities of the reference", reference), ("update", update)):
        print(f"| {what} | {n / seconds(f, times=2):.0f} |", flush=True)
    print(f"\nPeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.")


def main():
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}" + (f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    judging()                                                                  # first, while this process is small
    print("\n| what | this repository | otherwise | ratio |\n|---|---|---|---|")
    run = SimpleNamespace(rows=prompts.read_prompts(f"{ROOT}/toy/cme/prompts.jsonl"), eval_rows=prompts.read_prompts(f"{ROOT}/toy/cme/eval.jsonl"))
    run.policy, run.tokenizer = models.load("toy", f"{ROOT}/toy/cme/generator", "cpu", train=True)
    run.verifier, run.verifier_tokenizer = models.load("toy", f"{ROOT}/toy/cme/verifier", "cpu")
    run.actor = models.LocalModel(run.policy, run.tokenizer)
    texts_and_alignment(run)
    toy_step(run)
    if torch.cuda.is_available():
        on_gpu()
    rounding(run)
    if "REAL_MODELS" in os.environ:
        real(os.environ["REAL_MODELS"])


if __name__ == "__main__":
    main()
