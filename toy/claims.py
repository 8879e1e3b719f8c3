"""What both papers claim, asked of the toy: every comparison, table and ablation that a tiny model can answer.

    python toy/claims.py cat                 # runs and worlds are in runs/claims, and are not made again
    python toy/claims.py cme
    python toy/claims.py cme --quick         # one seed, the main rows, no verdicts
    python toy/claims.py --plot              # the pictures of toy/pictures, from the runs that there are (pip install matplotlib)
    python toy/claims.py --plot runs/NAME    # the metrics of one run

Training: `train.py` with its defaults and the options named, one run per seed; the last step counts ("best": the run's best greedy evaluation). A claim
is that one run's score is above another's: the differences, paired by seed, have a mean and a 95% t-interval; above 0 it is reproduced, below
contradicted, otherwise not reproduced. "Before" is one draw, the same in every pair: of a sampled score its own error (see toy/README.md) comes on top.
CaT's inference: 64 held-out prompts of each kind, about 32 people, G = 8, answers drawn `--repeats` times; standard errors over people.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cat  # noqa: E402
from evaluate import values_of  # noqa: E402
from plumbing import TOY, models, one_clear_line  # noqa: E402
from plumbing.files import read_json, read_lines, write_atomically  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402
from toy.inference import MODEL, figure_6, inference, mean_se, shown  # noqa: E402

ROOT = os.path.dirname(TOY)
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t by degrees of freedom
WORLDS = {  # name: options of toy/make.py, which makes them on first use
    "half": ["--parts", "verifier", "--knows", "0.5"], "cut": ["--parts", "generator", "--fragment"],
    "most": ["--parts", "verifier", "--knows", "0.8"], "own": ["--parts", "own"], "watch": ["--parts", "verifier", "--seed", "1"],
    "spaces": ["--parts", "generator", "--spaces"], "ramble": ["--parts", "generator", "--ramble"]}
HALF, RAMBLE = ["--verifier", "WORLD/half/verifier"], ["--generator", "WORLD/ramble/generator"]
CUT, SPACES = (["--generator", f"WORLD/{world}/generator", "--max_new_tokens", "72"] for world in ("cut", "spaces"))
SFT = ["--reward", "cat-sft", "--prompts", "REFERENCES", "--steps", "60"]
RUNS = {  # paper: {run: options of train.py}; AVERAGE: with the average that the method's public code takes
    "cme": {
        "cme": [], "sequence": ["--reward", "cme-sequence"], "rent": ["--reward", "rent"], "random": ["--verifier", f"random:{TOY}/cme/verifier"],
        "itself": ["--verifier", f"{TOY}/cme/generator"], "half": HALF, "most": ["--verifier", "WORLD/most/verifier"],
        "own": ["--verifier", "WORLD/own/own"], "no_scale": ["--no_scale"], "min_std_0": ["--min_std", "0"], "beta_0": ["--beta", "0"],
        "reverse-kl": ["--reward", "reverse-kl"], "average": ["AVERAGE"], "word": ["--credit", "word"],
        "cut": [*CUT, *HALF], "cut_word": [*CUT, *HALF, "--credit", "word"],
        "spaces_full": SPACES, "spaces": [*SPACES, *HALF], "spaces_word": [*SPACES, *HALF, "--credit", "word"],
        "ramble": RAMBLE, "ramble_stop": [*RAMBLE, "--score_stop"], "ramble_sequence": [*RAMBLE, "--reward", "cme-sequence"],
        "some_people": ["--prompts", "SOME"], "watched": ["--steps", "300", "--watch_verifier", "WORLD/watch/verifier"]},
    "cat": {
        "cat": ["--reward", "cat"], "cat-match": ["--reward", "cat-match"], "cat-answer": ["--reward", "cat-answer"],
        "cat-answer, majority": ["--reward", "cat-answer", "--estimator", "majority"], "SFT": [*SFT, "--lr", "5e-4"],
        "SFT, LoRA": [*SFT, "--lr", "3e-3", "--lora_rank", "8"], "rubric-given": ["--reward", "rubric-given"],
        "cat, min-perplexity": ["--reward", "cat", "--estimator", "min-perplexity"],
        "cat-answer, min-perplexity": ["--reward", "cat-answer", "--estimator", "min-perplexity"],
        "cat, rubric from the question": ["--reward", "cat", "--rubric_from", "question"], "cat, weak judge": ["--reward", "cat", "--judge", "WEAK"],
        "cat, question in synthesis": ["--reward", "cat", "--question_in_synthesis"]}}
FEW = [*list(RUNS["cat"])[6:]]  # of these --few seeds do
QUICK = ["cme", "sequence", "rent", "random"]
CLAIMS = {  # paper: (what is claimed, run A, when, measure; run B, when, measure): A is above B
    "cme": [
        ("CME improves the untrained model", "cme after facts", "cme before facts"),
        ("token-level rewards beat sequence-level ones", "cme after facts", "sequence after facts"),
        ("CME beats RENT", "cme after facts", "rent after facts"),
        ("CME beats its own generator as the verifier", "cme after facts", "itself after facts"),
        ("another family beats the generator's own, if both know all", "cme after facts", "own after facts"),
        ("a verifier that knows half beats random weights", "half after facts", "random after facts"),
        ("one that knows 80% beats one that knows half", "most after facts", "half after facts"),
        ("one that knows all beats one that knows 80%", "cme after facts", "most after facts"),
        ("dividing by the deviation helps", "cme after facts", "no_scale after facts"),
        ("the KL to the initial policy helps", "cme after facts", "beta_0 after facts"),
        ("CME beats on-policy reverse KL", "cme after facts", "reverse-kl after facts"),
        ("conserving beats averaging (the public code's)", "cme after facts", "average after facts"),
        ("flattening what rounding made (min_std .06 over 0) helps", "cme after facts", "min_std_0 after facts"),
        ("ours: word credit beats the paper's where words are cut (verifier knows half)", "cut_word after facts", "cut after facts"),
        ("where spaces are tokens, masked, CME improves the model", "spaces_full after facts", "spaces_full before facts"),
        ("and with a verifier that knows half", "spaces after facts", "spaces before facts"),
        ("ours: word credit beats the paper's where spaces are tokens (verifier knows half)", "spaces_word after facts", "spaces after facts"),
        ("masked whitespace is a haven (more answers with needless spaces)", "spaces after needless", "spaces before needless"),
        ("a generator that rambles learns to stop, although stops are masked", "ramble after sampled_valid", "ramble before sampled_valid"),
        ("ours: scoring the stop makes it stop better (--score_stop)", "ramble_stop after sampled_valid", "ramble after sampled_valid"),
        ("token-level rewards beat sequence-level ones where it rambles", "ramble after sampled_valid", "ramble_sequence after sampled_valid"),
        ("people kept out of RL gain too", "some_people after kept_out", "some_people before kept_out"),
        ("facts that the verifier does not know improve too", "half after unknown", "half before unknown"),
        ("style does not collapse (share of the top wording does not rise)", "cme before wording", "cme after wording"),
        ("sampled answers stay as varied (distinct bigrams)", "cme after distinct", "cme before distinct"),
        ("300 steps: a second verifier, never trained on, likes the answers better too", "watched after watch", "watched before watch"),
        ("sampled answers stay well-formed", "cme after sampled_valid", "cme before sampled_valid")],
    "cat": [
        ("CaT improves the untrained model", "cat after sampled_facts", "cat before sampled_facts"),
        ("a rubric beats one overall verdict", "cat after sampled_facts", "cat-match after sampled_facts"),
        ("RL beats SFT on references made once", "cat after sampled_facts", "SFT after sampled_facts"),
        ("RL beats SFT with LoRA", "cat after sampled_facts", "SFT, LoRA after sampled_facts"),
        ("RL beats SFT, of both the best evaluation", "cat best sampled_facts", "SFT best sampled_facts"),
        ("synthesis beats min-perplexity as the estimator", "cat after sampled_facts", "cat, min-perplexity after sampled_facts"),
        ("a rubric from the reference beats one from the question", "cat after sampled_facts", "cat, rubric from the question after sampled_facts"),
        ("CaT's answers improve the untrained model", "cat-answer after sampled_accuracy", "cat-answer before sampled_accuracy"),
        ("synthesis beats majority voting", "cat-answer after sampled_accuracy", "cat-answer, majority after sampled_accuracy")]}


# ---------------------------------------------------------------- training
def weak_judge(folder: str, aim: float = 0.73) -> str:
    """The toy with noise on its weights, as much as makes it right on about `aim` of the statements that it judges rightly without."""
    path = f"{folder}/weak-judge"
    if os.path.exists(f"{path}/noise.json"):
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
    write_atomically(f"{path}/noise.json", json.dumps({"noise": noise, "right": right}))
    return path


def make(folder: str, what: str, seed: int) -> str:
    """The path of what an option names: a world of WORLDS, the weak judge, references for CaT-SFT, prompts about half of the people."""
    if what.startswith("WORLD/"):
        _, world, part = what.split("/")
        if not os.path.exists(f"{folder}/{world}/{part}/config.json"):
            command(folder, "toy/make.py", "--output", f"{folder}/{world}", *WORLDS[world])
        return f"{folder}/{world}/{part}"
    if what == "WEAK":
        return weak_judge(folder)
    if what == "REFERENCES":
        path = f"{folder}/references-{seed}"
        if not os.path.exists(f"{path}/models/s/outputs.json"):
            command(folder, "evaluate.py", "--models", f"s=synthesis:{MODEL}", "--prompts", f"{TOY}/cat/prompts.jsonl", "--temperature", "1",
                    "--max_new_tokens", "48", "--seed", str(seed), "--output_dir", path)
        return f"{path}/models/s/outputs.json"
    if what == "SOME" and not os.path.exists(f"{folder}/some.jsonl"):
        with open(f"{TOY}/cme/prompts.jsonl", encoding="utf-8") as f:
            write_atomically(f"{folder}/some.jsonl", "".join(line for i, line in enumerate(f) if i % 2))  # every phrasing, every second name
    return f"{folder}/some.jsonl" if what == "SOME" else what


def command(folder: str, script: str, *options):
    """Runs a script of this repository on one thread; what it prints goes to FOLDER/log."""
    with open(f"{folder}/log", "a", encoding="utf-8") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        if subprocess.run([sys.executable, f"{ROOT}/{script}", *options], stdout=log, stderr=log, env=env).returncode:
            raise ValueError(f"{script} {' '.join(options)} failed: the end of {folder}/log says why")


def path_of(folder: str, name: str, seed: int) -> str:
    return f"{folder}/{name.replace(', ', '-').replace(' ', '_')}-{seed}"


def train_run(folder: str, paper: str, name: str, seed: int) -> dict:
    """One run of train.py -> its summary. A run that was stopped continues, one that had finished is read."""
    path = path_of(folder, name, seed)
    if not os.path.exists(f"{path}/summary.json"):
        options = ["--resume"] if os.path.exists(f"{path}/config.json") else [*RUNS[paper][name], "--seed", str(seed)]
        options = [make(folder, o, seed) for o in options if o != "AVERAGE"] + ["--output_dir", path]
        command(folder, "toy/average.py" if name == "average" else "train.py", *options)
    return read_json(f"{path}/summary.json")


def training(folder: str, paper: str, names: list, seeds: int, few: int, finished: bool) -> dict:
    """Every run for every seed, two at a time -> {run: {seed: summary}}. Ctrl-C leaves the rest for another time."""
    jobs = [(name, seed) for name in names for seed in range(few if name in FEW else seeds)]
    jobs = [job for job in jobs if not finished or os.path.exists(f"{path_of(folder, *job)}/summary.json")]
    open_jobs = [job for job in jobs if not os.path.exists(f"{path_of(folder, *job)}/summary.json")]
    needed = {(what, seed if what == "REFERENCES" else 0) for name, seed in open_jobs for what in RUNS[paper][name]}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda need: make(folder, *need), sorted(needed, reverse=True)))     # first: two runs must not make the same
        done = list(tqdm(pool.map(lambda job: train_run(folder, paper, *job), jobs), total=len(jobs), desc=paper))
    results = {name: {} for name in names}
    for (name, seed), summary in zip(jobs, done):
        rows = [row["held_out"] for row in read_lines(f"{path_of(folder, name, seed)}/metrics.jsonl")[1:] if "held_out" in row]
        results[name][seed] = summary | {"best": max(rows, key=lambda row: row.get("facts", row.get("accuracy", 0)))}
        if name in ("some_people", "half", "cme", "spaces"):
            base = f"{folder}/spaces/generator" if name == "spaces" else f"{TOY}/cme/generator"
            summary["before"] |= more_scores(folder, name, base)
            summary["after"] |= more_scores(folder, name, summary["model"])
    return results


def more_scores(folder: str, name: str, path: str) -> dict:
    """Greedy facts about people that RL did not ask about, or facts that the verifier does not know; how varied sampled answers are, and how many
    of them have two spaces in a row, or one at the end."""
    from toy.make import NAMES, VALUES, known_facts
    known, rows = known_facts(0.5), read_prompts(f"{TOY}/cme/eval.jsonl")
    model = models.LocalModel(*models.load("claims", path, "cpu"))
    if name in ("cme", "spaces"):
        replies = sum(model.replies([row["prompt"] for row in rows], n=2, max_new_tokens=72 if name == "spaces" else 48), [])
        return {"distinct": distinct([reply.response for reply in replies]), "needless": float(np.mean([*map(needless, replies)]))}
    who = [next(n for n in NAMES if n in row["prompt"]) for row in rows]
    if name == "some_people":
        rows = [row for row, n in zip(rows, who) if NAMES.index(n) % 2 == 0]  # "SOME" asks about the others
    else:
        rows = [row | {"facts": [f for f, a in zip(row["facts"], VALUES) if (n, a) not in known]} for row, n in zip(rows, who)]
    replies = [reply for [reply] in model.replies([row["prompt"] for row in rows], max_new_tokens=48, temperature=0.0)]
    return {"kept_out" if name == "some_people" else "unknown": float(np.nanmean(values_of(rows, replies)["facts"]))}


def needless(reply) -> bool:
    """Has an answer two spaces in a row, or one at its end that it chose: "a  b", "a ", but not "a b", nor "a " where it was cut off."""
    return "  " in reply.response or bool(reply.stopped) and reply.response.endswith(" ")


def distinct(texts: list, n: int = 2) -> float:
    """The share of word n-grams of all texts that are different ones: ["a b c", "a b"] -> 2 of 3 bigrams."""
    words = [text.split() for text in texts]
    grams = [tuple(row[i:i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


# ---------------------------------------------------------------- the report
def verdict(differences: list) -> dict:
    """Differences paired by seed -> mean, 95% t-interval, and what follows: [.1, .2, .1, .2] is above 0 for certain."""
    mean, se = mean_se(differences)
    half = T95[len(differences) - 1] * se if len(differences) > 1 else math.nan
    said = "reproduced" if mean - half > 0 else "contradicted" if mean + half < 0 else "not reproduced"
    return {"seeds": len(differences), "difference": mean, "low": mean - half, "high": mean + half, "verdict": said if len(differences) > 3 else "-"}


def claims_of(paper: str, results: dict) -> list:
    """CLAIMS, each with its measured figures."""
    rows = []
    for claim, *sides in CLAIMS[paper]:
        (a, when_a, m_a), (b, when_b, m_b) = (side.rsplit(" ", 2) for side in sides)
        if results.get(a) and results.get(b):
            values = [(results[a][s][when_a][m_a], results[b][s][when_b][m_b]) for s in results[a] if s in results[b]]
            rows.append({"claim": claim, "A": mean_se([x for x, _ in values])[0], "B": mean_se([y for _, y in values])[0],
                         **verdict([x - y for x, y in values])})
    return rows


def report(folder: str, paper: str, results: dict):
    """The runs' scores, the claims; on the screen as Markdown, and in PAPER.json."""
    for key in ("facts", "accuracy"):
        columns = [key, f"{key}_wrong", f"sampled_{key}", "sampled_valid", "wording", "tokens"]
        runs = {name: [r["after"] for r in of.values()] for name, of in results.items() if any(key in r["after"] for r in of.values())}
        if runs:
            print(f"\n| run (seeds) | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
            for name, of in {"before": [next(iter(results[next(iter(runs))].values()))["before"]], **runs}.items():
                print(f"| {name} ({len(of)}) | {' | '.join(shown([r.get(c, math.nan) for r in of]) for c in columns)} |")
    claims = claims_of(paper, results)
    print("\n| claim | A | B | A - B, paired by seed (95%) | seeds | verdict |\n|---|---|---|---|---|---|")
    for c in claims:
        print(f"| {c['claim']} | {c['A']:.3f} | {c['B']:.3f} | {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f}) | {c['seeds']} | {c['verdict']} |")
    write_atomically(f"{folder}/{paper}.json", json.dumps({"claims": claims, "runs": results}, indent=1))


# ---------------------------------------------------------------- pictures
def pyplot():
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "claims", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot as plt
    return plt


def curve(path: str, measure: str) -> tuple:
    """Steps and held-out scores of one run."""
    rows = [row for row in read_lines(f"{path}/metrics.jsonl") if measure in row.get("held_out", {})]
    return [row["step"] for row in rows], [row["held_out"][measure] for row in rows]


def plot_run(path: str):
    """PATH/metrics.svg: what a run's metrics.jsonl says, step by step."""
    plt, rows = pyplot(), read_lines(f"{path}/metrics.jsonl")[1:]
    names = [name for name in ("reward", "kl", "entropy", "length", "truncated", "missing") if any(row.get(name) for row in rows)]
    held = [name for name in ("facts", "accuracy", "rubric", "sampled_facts", "sampled_accuracy", "wording") if curve(path, name)[0]]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(3 * len(names) + 3, 2.6), layout="constrained")
    for axis, name in zip(axes, names):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1)
        axis.set(title=name, xlabel="step")
    for name in held:
        axes[-1].plot(*curve(path, name), label=name)
    axes[-1].set(title="held out", xlabel="step", ylim=(0, 1.02))
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(f"{path}/metrics.svg", metadata={"Date": None})


def pictures(folder: str, output: str):
    """toy/pictures: learning curves by reward, scores by verifier; over the seeds that there are."""
    plt = pyplot()
    os.makedirs(output, exist_ok=True)

    def runs(name):
        return [path for path in (path_of(folder, name, s) for s in range(8)) if os.path.exists(f"{path}/summary.json")]
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, label in {"cme": "CME, per token", "sequence": "CME, per response", "itself": "the generator as its own verifier",
                        "reverse-kl": "reverse KL", "random": "verifier with random weights", "rent": "RENT (own entropy)"}.items():
        curves = [curve(path, "facts") for path in runs(name)]
        if curves:
            steps, values = curves[0][0], np.array([scores for _, scores in curves])
            axis.plot(steps, values.mean(0), label=f"{label} ({len(curves)} seeds)")
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.2, linewidth=0)
    axis.set(xlabel="step", ylabel="facts right, greedy, held-out phrasings", ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.12))
    figure.savefig(f"{output}/rewards.svg", metadata={"Date": None})
    figure, axis = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    labels = {"random": "random\nweights", "half": "knows\n50%", "most": "knows\n80%", "cme": "knows\n100%", "own": "knows 100%,\ngenerator's family",
              "itself": "the generator\nitself"}
    labels = {name: label for name, label in labels.items() if runs(name)}
    for x, name in enumerate(labels):
        scores = [read_json(f"{path}/summary.json") for path in runs(name)]
        axis.bar(x, np.mean([s["after"]["facts"] for s in scores]), color="C0", alpha=0.5, width=0.6)
        axis.plot([x] * len(scores), [s["after"]["facts"] for s in scores], "k.", markersize=4)
    axis.axhline(read_json(f"{runs('cme')[0]}/summary.json")["before"]["facts"], color="grey", linestyle=":", label="before")
    axis.set(xticks=range(len(labels)), ylabel="facts right, greedy", ylim=(0, 1.02))
    axis.set_xticklabels(labels.values(), fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(f"{output}/verifiers.svg", metadata={"Date": None})
    if runs("watched"):
        figure, axis = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
        for path in runs("watched"):
            for name, style in (("trained", "C0-"), ("watch", "C1--"), ("facts", "C7-")):
                axis.plot(*curve(path, name), style, linewidth=1, label=name if path == runs("watched")[0] else None)
        axis.set(xlabel="step", ylabel="nats per token; facts right")
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(f"{output}/watch.svg", metadata={"Date": None})
    print(f"{output}: {', '.join(sorted(os.listdir(output)))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paper", nargs="?", default="cme", choices=["cat", "cme"], help="whose claims")
    for name, default, what in (("--seeds", 4, "runs of each kind of training"), ("--few", 2, "the same, of CaT's ablations"),
                                ("--repeats", 5, "draws of 8 answers to each held-out prompt")):
        parser.add_argument(name, type=int, default=default, help=what)
    parser.add_argument("--quick", action="store_true", help="one seed of CME's main rows, without verdicts")
    parser.add_argument("--finished", action="store_true", help="nothing is trained: what the finished runs say")
    parser.add_argument("--plot", nargs="?", const="", help="pictures of the runs in --output, or of the run named")
    parser.add_argument("--output", default="runs/claims", help="folder for runs and results")
    args = parser.parse_args()
    if args.seeds > 10 or args.quick and args.paper == "cat":
        raise ValueError("at most 10 --seeds; --quick is for cme")
    torch.set_num_threads(1)
    os.makedirs(args.output, exist_ok=True)
    if args.plot is not None:
        return plot_run(args.plot) if args.plot else pictures(args.output, os.path.join(TOY, "pictures"))
    if args.paper == "cat" and not args.finished:
        inference(args.repeats)
    names = QUICK if args.quick else list(RUNS[args.paper])
    results = training(args.output, args.paper, names, 1 if args.quick else args.seeds, args.few, args.finished)
    report(args.output, args.paper, results)
    if args.paper == "cat" and not args.finished:
        figure_6(results, args.repeats)


if __name__ == "__main__":
    one_clear_line(main, "toy/claims.py")
