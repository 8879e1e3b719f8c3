"""What the CaT paper says, asked of the toy: every table and ablation of its Sections 4, 6 and 8 that a tiny model can answer.

    python toy/claims.py cat                 # about an hour on one core; training runs are in runs/claims, and are not done again
    python toy/claims.py cat --seeds 2 --few 1

Inference: 64 held-out prompts of each kind, G = 8, answers drawn `--repeats` times; standard errors over the prompts' means. Training: `train.py`
with its defaults and the options named, one run per seed; standard errors over seeds, differences paired by seed, with 95% t-intervals. RL reports
its last step; SFT the best of its evaluations on the very prompts it is scored by, which favours it.
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cat  # noqa: E402
import grpo  # noqa: E402
from evaluate import fact_right, held_out  # noqa: E402
from plumbing.files import append_line, read_lines, write_lines  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402
from plumbing import TOY, models

MODEL = os.path.join(TOY, "cat", "model")
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # Student's t by degrees of freedom
RUNS = {  # name: options of train.py
    "cat": [], "cat-match": ["--reward", "cat-match"], "cat-answer": ["--reward", "cat-answer"],
    "cat-answer, majority": ["--reward", "cat-answer", "--estimator", "majority"]}
ABLATIONS = {  # with fewer seeds
    "rubric-given": ["--reward", "rubric-given"], "cat, min-perplexity": ["--estimator", "min-perplexity"],
    "cat-answer, min-perplexity": ["--reward", "cat-answer", "--estimator", "min-perplexity"],
    "cat, rubric from the question": ["--rubric_from", "question"], "cat, weak judge": ["--judge", "WEAK"],
    "cat, question in synthesis": ["--question_in_synthesis"]}


# ---------------------------------------------------------------- statistics

def mean_se(values: list) -> tuple:
    """Mean and standard error (ddof 1)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


def t_test(a: list, b: list) -> tuple:
    """Welch's t and its two-sided p (normal approximation: the samples here have hundreds of members)."""
    (ma, sa), (mb, sb) = mean_se(a), mean_se(b)
    t = (ma - mb) / math.hypot(sa, sb) if sa or sb else 0.0
    return t, math.erfc(abs(t) / math.sqrt(2))


def shown(values: list) -> str:
    mean, se = mean_se(values)
    return f"{mean:.3f} ± {se:.3f}"


# ---------------------------------------------------------------- inference

def right_facts(row: dict, text) -> list:
    """1.0 or 0.0 for each fact, or for the final answer."""
    if row["answer"] is not None:
        return [float(cat.answer_key(text) == cat.normal_answer(row["answer"]) != "")]
    return [float(fact_right(text or "", fact)) for fact in row["facts"]]


def draw(model_path: str, file: str, repeats: int, names=None) -> list:
    """For each repeat and prompt: the row, 8 rollouts, and the reference of each estimator."""
    model = models.LocalModel(*models.load("toy", model_path, "cpu"))
    anchor = models.LocalModel(*models.load("toy", MODEL, "cpu"))
    rows, style = read_prompts(os.path.join(TOY, "cat", file)), "stepwise" if "numbers" in file else "freeform"
    prompts, drawn = [r["prompt"] for r in rows], []
    for repeat in range(repeats):
        rollouts = model.complete(prompts, n=8, max_new_tokens=48, temperature=1.0, seed=1000 + repeat)
        known = cat.estimators(anchor, max_new_tokens=48, style=style, seed=repeat)
        known["synthesis from 1"] = lambda prompts, rollouts, all_of=known["synthesis"]: all_of(prompts, [y[:1] for y in rollouts])
        known["synthesis, question in"] = cat.estimators(anchor, max_new_tokens=48, style=style, seed=repeat, question=True)["synthesis"]
        known["greedy"] = lambda prompts, _: [y[0] for y in model.complete(prompts, max_new_tokens=48, temperature=0.0)]
        references = {name: estimate(prompts, rollouts) for name, estimate in known.items() if names is None or name in names}
        drawn += [{"row": row, "rollouts": y, **{name: texts[i] for name, texts in references.items()}} for i, (row, y) in enumerate(zip(rows, rollouts))]
    return drawn


def per_prompt(drawn: list, value) -> list:
    """value(item) -> the mean over repeats for each prompt."""
    by = {}
    for item in drawn:
        by.setdefault(item["row"]["prompt"], []).append(value(item))
    return [sum(v) / len(v) for v in by.values()]


def inference(repeats: int):
    drawn = {kind: draw(MODEL, file, repeats) for kind, file in (("facts", "eval.jsonl"), ("numbers", "numbers_eval.jsonl"))}
    print("\nEstimators at inference          facts            all four right   numbers")
    names = [n for n in drawn["facts"][0] if n not in ("row", "rollouts")]
    for item in drawn["facts"] + drawn["numbers"]:                             # the best of the 8 by the truth: what no selection can beat
        item["(oracle: best of 8)"] = max(item["rollouts"], key=lambda y, row=item["row"]: sum(right_facts(row, y)))
    for name in names + ["(oracle: best of 8)"]:
        facts = per_prompt(drawn["facts"], lambda d, k=name: mean_se(right_facts(d["row"], d[k]))[0])
        every = per_prompt(drawn["facts"], lambda d, k=name: float(all(right_facts(d["row"], d[k]))))
        numbers = per_prompt(drawn["numbers"], lambda d, k=name: right_facts(d["row"], d[k])[0])
        none = name == "majority"                                              # biographies have no final answer to vote on
        print(f"{name:<30} {'-' if none else shown(facts):>15}  {'-' if none else shown(every):>15}  {shown(numbers):>15}")

    print("\nDisagreement (Table 1): how often synthesis differs, and is then right | the other is then right")
    for kind, other in (("numbers", "majority"), ("numbers", "best-of-n"), ("facts", "best-of-n")):
        pairs = [(a, b) for d in drawn[kind] for a, b in zip(right_facts(d["row"], d["synthesis"]), right_facts(d["row"], d[other]))] if kind == "facts" else \
            [(right_facts(d["row"], d["synthesis"])[0], right_facts(d["row"], d[other])[0]) for d in drawn[kind]
             if cat.answer_key(d["synthesis"]) != cat.answer_key(d[other])]
        total = sum(len(right_facts(d["row"], "")) for d in drawn[kind])
        differ = [(a, b) for a, b in pairs if a != b or kind == "numbers"]
        print(f"{kind}, {other}: {len(differ)} of {total} ({len(differ) / total:.1%}{', as far as one of them is right' * (kind == 'facts')}); "
              f"right {sum(a for a, _ in differ):.0f} | {sum(b for _, b in differ):.0f}")
    for kind in drawn:
        none = [d for d in drawn[kind] if not any(all(right_facts(d["row"], y)) for y in d["rollouts"])]
        print(f"{kind}: no rollout is wholly right on {len(none)} of {len(drawn[kind])}; there synthesis is on "
              f"{sum(all(right_facts(d['row'], d['synthesis'])) for d in none)}, any selection on 0")

    print("\nStructure of synthesis against rollouts (Table 9)     synthesis   rollouts   t        p")
    tokenizer = models.load_tokenizer(MODEL)
    for kind in drawn:
        for what, size in (("tokens", lambda y: len(tokenizer(y).input_ids)), ("lines", lambda y: y.count("\n") + 1), ("equations", lambda y: y.count("="))):
            a, b = [size(d["synthesis"]) for d in drawn[kind]], [size(y) for d in drawn[kind] for y in d["rollouts"]]
            print(f"{kind + ', ' + what:<50} {mean_se(a)[0]:>12.2f} {mean_se(b)[0]:>10.2f} {t_test(a, b)[0]:>8.2f} {t_test(a, b)[1]:>8.1e}")


# ---------------------------------------------------------------- training

def weak_judge(folder: str, aim: float = 0.73) -> str:
    """The toy with noise on its weights, as much as makes it right on about `aim` of the statements that it judges rightly without."""
    path = os.path.join(folder, "weak-judge")
    if os.path.exists(os.path.join(path, "noise.json")):
        return path
    model, tokenizer = models.load("toy", MODEL, "cpu")
    rows = read_prompts(os.path.join(TOY, "cat", "eval.jsonl"))
    anchor = models.LocalModel(model, tokenizer)
    texts = [y[0] for y in anchor.complete([r["prompt"] for r in rows], max_new_tokens=48)]
    rubrics, clean = cat.propose_rubrics([r["prompt"] for r in rows], texts, anchor, max_new_tokens=512), [p.clone() for p in model.parameters()]
    low, high = 0.0, 0.3
    for _ in range(12):                                                        # bisection on the noise, relative to each weight matrix's deviation
        noise, rng = (low + high) / 2, torch.Generator().manual_seed(8)
        for p, c in zip(model.parameters(), clean):
            p.data = c + noise * c.std() * torch.randn(c.shape, generator=rng) if c.dim() > 1 else c
        right = cat.judge_skill(texts, rubrics, anchor)
        low, high = (noise, high) if right > aim else (low, noise)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    with open(os.path.join(path, "noise.json"), "w", encoding="utf-8") as f:
        json.dump({"noise": noise, "right": right}, f)
    return path


def train_run(folder: str, name: str, seed: int) -> dict:
    """One run of train.py -> its summary. A run that was stopped continues, one that had finished is read."""
    path = os.path.join(folder, f"{name.replace(', ', '-').replace(' ', '_')}-{seed}")
    summary = os.path.join(path, "summary.json")
    if not os.path.exists(summary):
        options = ["--resume"] if os.path.exists(os.path.join(path, "config.json")) else \
            ["--reward", "cat", *(RUNS | ABLATIONS)[name], "--seed", str(seed)]
        options = [weak_judge(folder) if o == "WEAK" else o for o in options]
        script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
        with open(os.path.join(folder, "log"), "a", encoding="utf-8") as log:
            subprocess.run([sys.executable, script, *options, "--output_dir", path], stdout=log, stderr=log, check=True)
    with open(summary, encoding="utf-8") as f:
        return json.load(f)


class LoRA(torch.nn.Module):
    """W x + B A x with W frozen (Hu et al., 2022): A [rank, in] random, B [out, rank] zero, so that training starts at W."""

    def __init__(self, linear, rank: int):
        super().__init__()
        self.linear = linear
        self.A = torch.nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T


def add_lora(model, rank: int = 32):
    model.requires_grad_(False)
    for module in list(model.base_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, LoRA(child, rank))


def sft(seed: int, lora: bool, steps: int = 180, batch: int = 32, lr: float = 5e-4) -> dict:
    """CaT-SFT: cross-entropy on references that the initial policy made once, stopped early on the held-out facts -> scores before and after."""
    policy, tokenizer = models.load("toy", MODEL, "cpu", train=True)
    anchor = models.LocalModel(*models.load("toy", MODEL, "cpu"))
    prompts = [r["prompt"] for r in read_prompts(os.path.join(TOY, "cat", "prompts.jsonl"))]
    rows = read_prompts(os.path.join(TOY, "cat", "eval.jsonl"))
    references = cat.synthesize(prompts, anchor.complete(prompts, n=8, max_new_tokens=48), anchor, max_new_tokens=48)
    stop, rng = models.end_of_turn(tokenizer), random.Random(seed)
    torch.manual_seed(seed)
    if lora:
        add_lora(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def scores():
        return held_out(models.LocalModel(policy, tokenizer), rows, max_new_tokens=48)
    before = best = scores()
    for step in range(steps):
        chosen = rng.sample(range(len(prompts)), batch)
        y = [tokenizer(references[i], add_special_tokens=False).input_ids + [stop] for i in chosen]
        lengths = torch.tensor([len(row) for row in y])
        ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in y])
        loss = -grpo.token_logprobs(policy, [models.chat_ids(tokenizer, prompts[i]) for i in chosen], ids, lengths).sum() / lengths.sum()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            best = max(best, scores(), key=lambda s: s["facts"])
    return {"before": before, "after": best}


def training(folder: str, seeds: int, few: int) -> dict:
    """Every run for every seed, one line in results.jsonl each -> {name: {seed: result}}. Ctrl-C leaves the rest for another time."""
    path = os.path.join(folder, "results.jsonl")
    done = {(r["name"], r["seed"]): r for r in read_lines(path)}
    write_lines(path, done.values())  # without half a line, if it was killed
    jobs = {name: lambda s, n=name: train_run(folder, n, s) for name in RUNS}
    jobs |= {"SFT": lambda s: sft(s, lora=False), "SFT, LoRA": lambda s: sft(s, lora=True)}
    jobs |= {name: lambda s, n=name: train_run(folder, n, s) for name in ABLATIONS}
    try:
        for name, seed in [(name, seed) for name in jobs for seed in range(few if name in ABLATIONS else seeds)]:
            if (name, seed) not in done:
                print(f"... {name}, seed {seed}", file=sys.stderr, flush=True)
                result = jobs[name](seed)
                done[name, seed] = {"name": name, "seed": seed, **{k: result[k] for k in ("before", "after", "model", "seconds") if k in result}}
                append_line(path, done[name, seed])
    except KeyboardInterrupt:
        print("stopped: what was done so far; the same command continues", file=sys.stderr)
    return {name: {seed: done[name, seed] for seed in range(seeds) if (name, seed) in done} for name in jobs if (name, 0) in done}


def report(results: dict, repeats: int):
    for key, first in (("facts", "cat"), ("accuracy", "cat-answer")):
        columns = [f"sampled_{key}", key, f"{key}_hazy", f"{key}_wrong"]
        names = [n for n, runs in results.items() if key in runs[0]["after"]]
        if first not in names:
            continue
        print(f"\n{'Training (seeds)':<34}" + "  ".join(f"{c:>16}" for c in columns) + f"   {first} minus this, sampled: mean, 95%")
        print(f"{'before':<34}" + "  ".join(f"{results[first][0]['before'][c]:>16.3f}" for c in columns))
        for name in sorted(names, key=lambda n: n != first):
            both = [seed for seed in results[name] if seed in results[first]]
            mean, se = mean_se([results[first][s]["after"][columns[0]] - results[name][s]["after"][columns[0]] for s in both])
            half = T95.get(len(both) - 1, 1.96) * se
            print(f"{name + f' ({len(results[name])})':<34}" + "  ".join(f"{shown([r['after'][c] for r in results[name].values()]):>16}" for c in columns)
                  + (f"   {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]" if name != first and len(both) > 1 else ""))
    print("\nOne answer of the trained policy against synthesis from the initial one (nine times the compute), and synthesis on top of it (Figure 6)")
    for kind, file, name in (("facts", "eval.jsonl", "cat"), ("numbers", "numbers_eval.jsonl", "cat-answer")):
        for who, paths in {"initial": [MODEL], "trained": [r["model"] for r in results.get(name, {}).values()]}.items():
            for how in ("greedy", "single", "synthesis") + ("majority",) * (kind == "numbers"):
                drawn = [item for path in paths for item in draw(path, file, repeats, [how])]
                if drawn:
                    print(f"{kind:>8}, {who} policy, {how:<10} {shown(per_prompt(drawn, lambda d, k=how: mean_se(right_facts(d['row'], d[k]))[0]))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paper", choices=["cat"], help="whose claims")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each kind of training")
    parser.add_argument("--few", type=int, default=2, help="the same, of each ablation")
    parser.add_argument("--repeats", type=int, default=5, help="draws of 8 answers to each held-out prompt")
    parser.add_argument("--output", default="runs/claims", help="folder for runs and results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.output, exist_ok=True)
    inference(args.repeats)
    report(training(args.output, args.seeds, args.few), args.repeats)


if __name__ == "__main__":
    main()
