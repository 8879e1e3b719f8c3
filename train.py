"""Label-free RL with GRPO.  CME (arXiv 2605.29009): the reward is what a second, frozen model thinks
of each word.  CaT (arXiv 2509.14234): agreement with a reference made of the model's own answers.

    python train.py                            # CME on the toy, on a CPU, in about a minute
    python train.py --reward cat               # CaT on the toy: synthesis, rubric, judge
    python train.py --generator Qwen/Qwen2.5-0.5B --verifier google/gemma-3-1b-it \\
        --prompts ultrafeedback --lr 3e-6 --warmup_steps 20 --beta 0.01 --steps 5000 \\
        --prompts_per_step 1 --micro_batch 1 --max_new_tokens 1024 --save_every 500  # CME's recipe
    python train.py --resume                   # continue the newest run

Deliberate departures from the papers: at the heads of align.py, grpo.py, cme.py, cat.py; the defaults
are the toy's.  AdamW's weight decay is 0.  Letters as in grpo.py.
"""

import glob
import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal, Optional

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import cat
import cme
import grpo
from align import spans_from_ids
from evaluate import held_out, score
from plumbing import one_clear_line, option, progress
from plumbing.files import (
    append_line, checkpoints, lock, read_json, read_lines, save_checkpoint, write_atomically)
from plumbing.models import LocalModel, chat_ids, response_texts, token_budget
from plumbing.prompts import question_text
from plumbing.setup import Run, prepare

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")
TOYS = {  # what is taken where --generator, --prompts, --eval_prompts are empty
    "cme": ("cme/generator", "cme/prompts.jsonl", "cme/eval.jsonl"),
    "cat": ("cat/model", "cat/prompts.jsonl", "cat/eval.jsonl"),
    "cat-answer": ("cat/model", "cat/numbers.jsonl", "cat/numbers_eval.jsonl")}
LEAST = {  # the smallest values that make sense
    **dict.fromkeys("prompts_per_step steps micro_batch max_new_tokens updates_per_rollout save_every "
                    "sample_every rubric_tokens".split(), 1), "group_size": 2, "temperature": 1e-3,
    **dict.fromkeys("top_k lr warmup_steps beta clip_low clip_high max_grad_norm seed eval_every "
                    "threads length_penalty_after rollouts_in_context".split(), 0), "top_p": 1e-9}


@dataclass
class Options:
    reward: Literal["cme", "cme-sequence", "cat", "cat-answer", "cat-match", "rubric-given"] = option(
        "cme", "cme: per token (CME, Eq. 1); cme-sequence: per response (Eq. 3); cat: share of the "
        "criteria of a rubric made from the reference (CaT, Eq. 3-4); cat-answer: same final answer "
        "(Eq. 2); cat-match: judged the same as the reference; rubric-given: the prompts' rubrics")
    credit: Literal["token", "word"] = option("token", "cme: the paper's, or the rest of the word's")
    score_stop: bool = option(False, "cme: reward the stop token too, by the verifier's end of turn")
    generator: str = option("", "model to train, a folder or a hub name; empty: the toy's")
    verifier: str = option(f"{TOY}/cme/verifier", "CME: frozen model that scores")
    estimator: Literal["synthesis", "majority", "best-of-n", "min-perplexity",
                       "mutual-predictability", "single", "cme"] = option(
        "synthesis", "CaT: how rollouts become a reference; cme: the one that --verifier prefers")
    anchor: str = option("", "CaT: frozen, makes references and rubrics; empty: the initial policy")
    judge: str = option("", "CaT: a folder, a hub name or MODEL@URL (JUDGE_API_KEY); empty: the anchor")
    question_in_synthesis: bool = option(False, "let the anchor read the question too")
    rollouts_in_context: int = option(0, "how many rollouts the anchor reads; 0: all")
    rubric_from: Literal["reference", "question"] = option("reference", "what a rubric is made from")
    rubric_tokens: int = option(512, "longest rubric, in the anchor's tokens")
    length_penalty_after: int = option(0, "reward - 1 beyond this many tokens; 0: never")
    prompts: str = option("", "a .jsonl, .json or .txt file, or ultrafeedback, math500, healthbench ...")
    eval_prompts: str = option("", "held-out, with facts, answer, pattern or rubrics; or none")
    suffix: str = option("", "a paragraph added to each prompt (for math500: ask for a \\boxed{})")
    group_size: int = option(8, "G, responses per prompt")
    prompts_per_step: int = option(16, "P, prompts per step; the P * G responses make one update")
    steps: Optional[int] = option(None, "steps in all")
    max_new_tokens: int = option(48, "longest response, in generator tokens")
    temperature: float = option(1.0, "of sampling, and of the log-probabilities")
    top_k: int = option(0, "sample among the k most probable tokens; 0: all")
    top_p: float = option(1.0, "sample among the most probable tokens that hold this mass")
    lr: Optional[float] = option(None, "peak learning rate of AdamW")
    warmup_steps: int = option(5, "steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    beta: float = option(0.02, "weight of the KL to the initial policy; at 0 it is not held")
    kl_in: Literal["loss", "reward"] = option("loss", "k3 at every token, or R = r - beta sum_t log "
                                              "pi_old / pi_ref before the group is normalised")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.2, "and above 1 + clip_high")
    scale: bool = option(True, "divide advantages by the group's deviation, or centre them only")
    updates_per_rollout: int = option(1, "optimiser steps on each batch of rollouts")
    micro_batch: int = option(32, "responses per forward and backward pass; the gradient is the same")
    batch_tokens: int = option(0, "tokens of a batch of rollouts; 0: what suits the device")
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped at this")
    gradient_checkpointing: bool = option(False, "less memory for more compute")
    seed: int = option(0, "of the order of prompts and of sampling")
    output_dir: str = option("", "where everything goes; empty: runs/REWARD-DATE-TIME, or the newest")
    resume: bool = option(False, "continue the run in --output_dir, with its options")
    save_every: int = option(20, "steps between checkpoints; only the newest is kept")
    keep: Literal["last", "best"] = option("last", "best: the model with the best held-out score")
    eval_every: int = option(10, "steps between held-out scores; 0: only before and after")
    sample_every: int = option(20, "steps between samples on the screen and in samples.jsonl")
    threads: int = option(0, "CPU threads; 0: one for tiny models, else PyTorch's choice")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: cuda if there is one")

    def __post_init__(self):
        family = "cme" if self.reward.startswith("cme") else "cat"
        toy = [os.path.join(TOY, file) for file in TOYS.get(self.reward, TOYS[family])]
        if not (self.generator and self.prompts):
            self.eval_prompts = self.eval_prompts or toy[2]
        self.generator, self.prompts = self.generator or toy[0], self.prompts or toy[1]
        lr, steps = {"cme": (8e-4, 80), "cat": (3e-4, 30)}[family]
        self.lr, self.steps = (own if own is not None else default for own, default in
                               ((self.lr, lr), (self.steps, steps)))


def parse_options() -> Options:
    """The command line -> options; with --resume what is not given again comes from the run."""
    parser = HfArgumentParser(Options, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    [o] = parser.parse_args_into_dataclasses()
    if o.resume:
        runs = sorted(glob.glob("runs/*/config.json"), key=os.path.getmtime)
        folder = o.output_dir or (os.path.dirname(runs[-1]) if runs else "runs")
        saved = read_json(os.path.join(folder, "config.json"))
        if not saved:
            raise ValueError(f"{folder} holds no run to resume (no config.json)")
        parser.set_defaults(**saved | {"output_dir": folder})
        [o] = parser.parse_args_into_dataclasses()
        for name, value in saved.items():
            if getattr(o, name) != value and name not in ("resume", "output_dir"):
                if name in ("generator", "keep"):
                    raise ValueError(f"--{name}: a run cannot change it; start a new one")
                print(f"--{name} is now {getattr(o, name)}, was {value}: another run than it was")
    for name, least in LEAST.items():
        if not least <= getattr(o, name) < math.inf:
            raise ValueError(f"--{name} {getattr(o, name)}: must be at least {least}, and finite")
    if o.top_p > 1 or o.seed >= 2**32:
        raise ValueError("--top_p must be at most 1, --seed under 2**32")
    for name in ("prompts",) + ("verifier",) * o.reward.startswith("cme"):
        if getattr(o, name).startswith(TOY) and not o.generator.startswith(TOY):
            print(f"--{name} is empty: the toy's, of nothing but its world", file=sys.stderr)
    o.output_dir = o.output_dir or f"runs/{o.reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return o


# The parts of a step


def prompts_of_step(prompts: list, per_step: int, seed: int, step: int) -> list:
    """The P prompts of a step: all are gone through again and again, each time in another order."""
    n, chosen = len(prompts), []
    for i in range(step * per_step, (step + 1) * per_step):
        generator = torch.Generator().manual_seed(seed * 100_003 + i // n)
        chosen.append(prompts[torch.randperm(n, generator=generator)[i % n]])
    return chosen


def learning_rate(o: Options, step: int) -> float:
    """Linear warm-up (step 0 has lr / warmup_steps), then constant, or half a cosine down to 0."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    return o.lr * (1.0 if o.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress)))


def autocast(device):
    """bf16 on CUDA, where the policy's weights are float32; nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def rollout(run: Run, rows: list, step: int):
    """y ~ pi_old -> the prompts' ids (B lists), ids [B, T], lengths [B].  Seeded by the step, so that
    a resumed run needs no random state."""
    o = run.options
    prompt_ids = [chat_ids(run.tokenizer, row["prompt"]) for row in rows]
    noise = torch.Generator(run.device).manual_seed(o.seed * 1_000_003 + step)
    with autocast(run.device):
        ids, lengths = grpo.sample(
            run.policy, prompt_ids, o.group_size, max_new_tokens=o.max_new_tokens,
            stop_ids=run.stop_ids, batch_tokens=o.batch_tokens or token_budget(run.device),
            temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, generator=noise)
    return [p for p in prompt_ids for _ in range(o.group_size)], ids, lengths


def find_references(run: Run, rows: list, rollouts: list, seed: int) -> list:
    """CaT, Eq. 1, or another estimator -> P texts."""
    o, prompts = run.options, [row["prompt"] for row in rows]
    if o.estimator == "cme":
        return cat.best_by(lambda x, y: cme.sequence_rewards(*run.verifier, x, y), prompts, rollouts)
    style = "stepwise" if o.reward == "cat-answer" else "freeform"
    estimators = cat.estimators(run.anchor, seed=seed, style=style, max_new_tokens=o.max_new_tokens,
                                question=o.question_in_synthesis, in_context=o.rollouts_in_context,
                                temperature=o.temperature)
    return estimators[o.estimator](prompts, rollouts)


def by_rubric(run, rows, rollouts, seed):
    """Eq. 3-4: references -> rubrics -> verdicts -> share of yes."""
    o, prompts, references = run.options, [row["prompt"] for row in rows], [None] * len(rows)
    if o.rubric_from == "reference":
        references = find_references(run, rows, rollouts, seed)
    rubrics = cat.propose_rubrics(prompts, references, run.anchor, max_new_tokens=o.rubric_tokens,
                                  source=o.rubric_from, temperature=o.temperature, seed=seed + 1)
    verdicts = cat.judge_rubrics(rollouts, rubrics, run.judge)
    told = {"reference": references, "rubric": rubrics, "verdicts": verdicts}
    return cat.rubric_rewards(verdicts), told


def by_answer(run, rows, rollouts, seed):
    """Eq. 2: the final answer is the reference's."""
    references = find_references(run, rows, rollouts, seed)
    return cat.answer_rewards(rollouts, references), {"reference": references}


def by_match(run, rows, rollouts, seed):
    """The baseline without rubrics: judged the same as the reference."""
    references = find_references(run, rows, rollouts, seed)
    verdicts = cat.judge_match(rollouts, references, run.judge)
    return cat.rubric_rewards(verdicts), {"reference": references, "verdicts": verdicts}


def by_given(run, rows, rollouts, seed):
    """The baseline with rubrics that came with the data."""
    rubrics, points = ([[c[k] for c in r["rubrics"]] for r in rows] for k in ("criterion", "points"))
    verdicts = cat.judge_rubrics(rollouts, rubrics, run.judge)
    return cat.rubric_rewards(verdicts, points), {"rubric": rubrics, "verdicts": verdicts}


CAT_REWARDS = {"cat": by_rubric, "cat-answer": by_answer, "cat-match": by_match,
               "rubric-given": by_given}


def step_rewards(run: Run, rows: list, ids, lengths, seed: int):
    """-> rewards [B, T] or, one per response, [B]; which of them count; CaT's story of each prompt."""
    o, G = run.options, run.options.group_size
    prompts, told = [row["prompt"] for row in rows for _ in range(G)], {}
    if o.reward == "cme":
        rewards, counted = cme.token_rewards(
            *run.verifier, run.tokenizer, prompts, ids, lengths, credit=o.credit,
            score_stop=o.score_stop, stop_ids=run.stop_ids)
        return rewards, counted, []
    texts, _ = response_texts(run.tokenizer, ids, lengths, run.stop_ids)
    rollouts = [texts[i : i + G] for i in range(0, len(texts), G)]
    if o.reward == "cme-sequence":
        rewards = cme.sequence_rewards(*run.verifier, prompts, texts)
    else:
        rewards, told = CAT_REWARDS[o.reward](run, rows, rollouts, seed)
        if rewards.isnan().all() and getattr(run.judge, "last_error", ""):
            raise OSError(f"no verdict in a whole step, {run.judge.last_error}; --resume later")
    rewards = rewards.to(ids.device)
    if o.length_penalty_after:
        rewards = cat.length_penalty(rewards, lengths, o.length_penalty_after)
    if not told:
        return rewards, ~rewards.isnan(), []
    told = dict.fromkeys(("reference", "rubric", "verdicts"), [None] * len(rows)) | told
    told |= {"prompt": prompts[::G], "rollouts": rollouts, "rewards": rewards.view(-1, G).tolist()}
    stories = [dict(zip(told, parts)) for parts in zip(*told.values())]
    return rewards, ~rewards.isnan(), stories


def micro_batches(lengths, size: int) -> list:
    """Row numbers of each micro-batch, rows of like length together: less padding."""
    return [part.tolist() for part in lengths.argsort(stable=True).split(size)]


@torch.no_grad()
def logprobs(run: Run, model, prompt_ids, ids, lengths):
    """log pi(y_t | x, y_<t) of a step's responses -> [B, T], 0 behind a row's end."""
    logp = torch.zeros(ids.shape, device=ids.device)
    for part in micro_batches(lengths, run.options.micro_batch):
        with autocast(run.device):
            logp[part] = grpo.token_logprobs(model, [prompt_ids[i] for i in part], ids[part],
                                             lengths[part], temperature=run.options.temperature)
    return logp


def with_kl(rewards, old_logp, ref_logp, beta: float):
    """CaT, "Training": R_i = r_i - beta sum_t (log pi_old - log pi_ref), [B], [B, T], [B, T] -> [B]."""
    return rewards - beta * (old_logp - ref_logp).sum(1)


def update(run: Run, optimizer, prompt_ids, ids, lengths, old_logp, ref_logp, advantages) -> dict:
    """One optimiser step on all B responses, in micro-batches; skipped if loss or gradient are not
    finite -> statistics.  old_logp None: of the policy as it is."""
    o, mask, totals = run.options, grpo.response_mask(lengths, ids.shape[1]), {}
    for module in run.policy.modules():  # what recomputes activations wants to be "training"
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for part in micro_batches(lengths, o.micro_batch):
        with autocast(run.device):
            logp, entropy = grpo.token_logprobs(
                run.policy, [prompt_ids[i] for i in part], ids[part], lengths[part],
                temperature=o.temperature, entropy=True)
        old = logp.detach() if old_logp is None else old_logp[part]
        loss, stats = grpo.grpo_loss(
            logp, old, None if ref_logp is None else ref_logp[part], advantages[part], mask[part],
            beta=o.beta if o.kl_in == "loss" else 0.0, clip_low=o.clip_low, clip_high=o.clip_high,
            responses=len(ids))
        loss.backward()
        for name, value in (stats | {"entropy": entropy.sum() / mask.sum()}).items():
            totals[name] = totals.get(name, 0) + value
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.max_grad_norm or math.inf)
    totals = {name: float(value) for name, value in (totals | {"grad_norm": norm}).items()}
    totals["skipped"] = int(not math.isfinite(totals["loss"] + totals["grad_norm"]))
    if not totals["skipped"]:
        optimizer.step()
    optimizer.zero_grad()  # now: no gradient stays alive through the next rollouts
    run.policy.eval()
    return totals


# Showing what was done


def table_row(name: str, scores: dict, header: bool = False) -> str:
    shown = ("sampled_facts", "sampled_accuracy", "sampled_valid")
    columns = [k for k in scores if not k.startswith("sampled_") or k in shown]
    head = " " * 9 + "".join(f"{k:>{len(k) + 2}}" for k in columns) + "\n" if header else ""
    values = [math.nan if scores[k] is None else scores[k] for k in columns]
    cells = "".join(f"{v:>{len(k) + 2}.3f}" for k, v in zip(columns, values))
    return f"{head}{name:>9}{cells}\n" if columns else ""


def show_samples(run: Run, step: int, rows: list, ids, lengths, rewards, counted, stories: list):
    """With CaT a prompt's story, else two whole responses, on the screen and in samples.jsonl."""
    samples, lines = stories[:1], []
    for story in samples:
        ranked = sorted((r, y) for r, y in zip(story["rewards"], story["rollouts"]) if r == r)
        lines = [("reference   ", story["reference"]),
                 ("rubric      ", " | ".join(story["rubric"] or []))]
        lines += [(f"reward {r:5.2f}", y) for r, y in dict.fromkeys(ranked[-1:] + ranked[:1])]
    for i in (0, len(ids) - 1) if not stories else ():
        text, spans = spans_from_ids(run.tokenizer, ids[i, : lengths[i]])
        tokens = [text[int(a) : math.ceil(b)] for a, b in spans]
        of_tokens = torch.where(counted[i], rewards[i], math.nan).view(-1)[: lengths[i]]
        samples.append({"prompt": rows[i // run.options.group_size]["prompt"], "response": text,
                        "reward": of_tokens.nanmean().item(), "tokens": tokens,
                        "rewards": [round(r, 4) for r in of_tokens.tolist()]})
        worst = [(r, t) for r, t in zip(of_tokens.tolist(), tokens) if r == r and rewards.dim() > 1]
        worst = ", ".join(f"{t!r} {r:.1f}" for r, t in sorted(worst)[:3])
        lines += [(f"reward {samples[-1]['reward']:5.2f}", text), ("unexpected  ", worst)]
    tqdm.write(f"step {step}: {cat.one_line(question_text(samples[0]['prompt']))}", file=sys.stdout)
    for name, text in lines:
        tqdm.write(f"    {name} {cat.one_line(text)}" if text else "", file=sys.stdout, end="\n" * bool(text))
    for sample in samples:
        append_line(os.path.join(run.options.output_dir, "samples.jsonl"), {"step": step} | sample)


def anchor_skills(run: Run, most: int = 64) -> dict:
    """What CaT rests on, measured before the first step on held-out prompts: scores of a single
    answer and of its reference, rubrics read, the judge on criteria known to be true or false."""
    o, rows, skills = run.options, (run.eval_rows or run.rows)[:most], {}
    prompts, seed = [row["prompt"] for row in rows], 8 * o.seed + 5
    policy = LocalModel(run.policy, run.tokenizer, top_k=o.top_k, top_p=o.top_p)
    settings = {"max_new_tokens": o.max_new_tokens, "temperature": o.temperature, "seed": seed}
    rollouts = policy.complete(prompts, n=o.group_size, **settings)
    named = {"single": cat.single(prompts, rollouts)}
    if o.reward != "rubric-given":
        named[o.estimator] = find_references(run, rows, rollouts, seed + 1)
    references = [*named.values()][-1]
    if not any(references):
        raise ValueError(f"--estimator {o.estimator} made no reference from the answers to {len(rows)} "
                         "prompts: no final answers in \\boxed{}, or too long for the anchor?")
    for name, texts in named.items():
        scores = score(rows, [text or "" for text in texts], [True] * len(rows))
        skills |= {f"{name}: {k}": scores[k] for k in ("facts", "accuracy") if k in scores}
    if o.reward != "cat-answer":
        rubrics = cat.propose_rubrics(prompts, references, run.anchor, max_new_tokens=o.rubric_tokens,
                                      temperature=o.temperature, seed=seed + 2)
        skills["rubrics read"] = sum(map(bool, rubrics)) / len(rows)
        skill = cat.judge_skill(references, rubrics, run.judge)
        skills |= {f"judge: {k}": v for k, v in skill.items()}
        if o.reward == "cat" and not any(rubrics) or skill["unread"] == 1:
            raise ValueError("no rubric of the anchor's could be read, or no verdict of the judge's: "
                             "a stronger --anchor or --judge is needed")
        if (right := (skill["true"] + skill["false"]) / 2) < 0.85:
            print(f"the judge is right on {right:.0%} of criteria known to be true or false: a policy "
                  "learns to please such a judge; take a stronger --judge", file=sys.stderr)
    print("anchor: " + ", ".join(f"{name} {value:.3f}" for name, value in skills.items()))
    return {name: round(value, 4) for name, value in skills.items()}


def metrics_of(run: Run, ids, lengths, rewards, counted, advantages, stories, updates) -> dict:
    """A step's line of metrics.jsonl."""
    G, B = run.options.group_size, len(ids)
    groups, seen = advantages.view(B // G, G, -1), counted.view(B // G, G, -1).any(1)
    verdicts = [v for story in stories for answers in story["verdicts"] or [] for v in answers]
    reward = torch.where(counted, rewards, 0).view(B, -1).sum(1) / counted.view(B, -1).sum(1)
    last = ids.gather(1, lengths[:, None] - 1)
    ended = torch.isin(last, torch.tensor(run.stop_ids, device=ids.device))
    return {"reward": reward.nanmean().item(), **updates[-1],
            "skipped": sum(u["skipped"] for u in updates),
            "missing": 1 - counted.view(B, -1).any(1).float().mean().item(),
            "length": lengths.float().mean().item(), "truncated": 1 - ended.float().mean().item(),
            "unread": sum(v is None for v in verdicts) / len(verdicts) if verdicts else 0.0,
            "flat": ((groups == 0).all(1) & seen).sum().item() / max(1, seen.sum().item())}


def validation(row: dict) -> float:
    """Of a line of metrics.jsonl: the greedy held-out score; -1 without one, and at step 0."""
    held = row.get("held_out") or {}
    scores = [held[name] for name in ("facts", "accuracy", "rubric") if held.get(name) is not None]
    return scores[0] if scores and row["step"] else -1


# The algorithm


def scores_of(run: Run) -> dict:
    """Held-out scores of the policy as it is."""
    if not run.eval_rows:
        return {}
    policy = LocalModel(run.policy, run.tokenizer, batch_tokens=run.options.batch_tokens)
    with autocast(run.device):
        return held_out(policy, run.eval_rows, max_new_tokens=run.options.max_new_tokens,
                        judge=run.judge)


def begin(run: Run, optimizer) -> dict:
    """A new folder, or the state of its newest checkpoint: what came after it is done again."""
    o, state = run.options, {"step": 0, "seconds": 0.0, "in_a_row": 0}
    saved = checkpoints(o.output_dir)
    if saved:
        path = os.path.join(saved[-1], "state.pt")
        state = torch.load(path, map_location=run.device, weights_only=True)
        optimizer.load_state_dict(state.pop("optimizer"))
    config = os.path.join(o.output_dir, "config.json")
    write_atomically(config, json.dumps(asdict(o) | {"resume": False}, indent=1))
    for path in (os.path.join(o.output_dir, f"{name}.jsonl") for name in ("metrics", "samples")):
        kept = [row for row in read_lines(path) if saved and row["step"] <= state["step"]]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    if not saved:
        skills = {"skills": anchor_skills(run)} if run.anchor else {}
        held = scores_of(run)
        append_line(os.path.join(o.output_dir, "metrics.jsonl"), {"step": 0, "held_out": held} | skills)
    return state


def finish(run: Run, seconds: float) -> dict:
    """summary.json: scores before and after, rewards of the first and last tenth, the model."""
    o, metrics = run.options, os.path.join(run.options.output_dir, "metrics.jsonl")
    rows, tenth = list(read_lines(metrics)), max(1, o.steps // 10)
    first, last = ([r["reward"] for r in part if r["reward"] is not None] or [math.nan]
                   for part in (rows[1 : 1 + tenth], rows[-tenth:]))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device) / 2**20
    best = checkpoints(o.output_dir, "best") if o.keep == "best" else []
    model = (best or checkpoints(o.output_dir))[-1]
    after = rows[int(model.rsplit("-", 1)[1])].get("held_out") or scores_of(run)
    result = {"before": rows[0]["held_out"] | {"reward": sum(first) / len(first)},
              "after": after | {"reward": sum(last) / len(last)}, "seconds": round(seconds, 1),
              "steps": o.steps, "skipped": sum(r["skipped"] for r in rows[1:]), "seed": o.seed,
              "peak_memory_mb": round(memory), "model": model}
    write_atomically(os.path.join(o.output_dir, "summary.json"), json.dumps(result, indent=1))
    return result


def record(run, optimizer, step: int, row: dict, state: dict):
    """What is due after a step: held-out scores, its line in metrics.jsonl, a checkpoint."""
    o, last = run.options, step + 1 == run.options.steps
    metrics, parts = os.path.join(o.output_dir, "metrics.jsonl"), (run.policy, run.tokenizer)
    if last or (o.eval_every and (step + 1) % o.eval_every == 0):
        row["held_out"] = scores_of(run)
        tqdm.write(table_row(f"step {step + 1}", row["held_out"]), end="", file=sys.stdout)
        if o.keep == "best" and validation(row) > max(map(validation, read_lines(metrics))):
            save_checkpoint(o.output_dir, step + 1, *parts, {"step": step + 1}, "best")
    append_line(metrics, row)
    if last or (step + 1) % o.save_every == 0 or state["in_a_row"] >= 10:
        state = state | {"optimizer": optimizer.state_dict(), "step": step + 1}
        model = save_checkpoint(o.output_dir, step + 1, *parts, state)
    if state["in_a_row"] >= 10:
        raise FloatingPointError(f"loss or gradient were not finite in ten updates in a row; the "
                                 f"weights from before them are in {model}: lower --lr")


def train(run: Run) -> dict:
    """The whole run, or what is left of it -> the contents of summary.json."""
    o, G = run.options, run.options.group_size
    os.makedirs(o.output_dir, exist_ok=True)
    held = lock(o.output_dir)
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=o.lr, weight_decay=0.0)
    state = begin(run, optimizer)
    began = time.time() - state["seconds"]
    print(table_row("step 0", next(read_lines(f"{o.output_dir}/metrics.jsonl"))["held_out"], True), end="")
    bar = progress(range(state["step"], o.steps), initial=state["step"], total=o.steps, desc=o.reward)
    for step in bar:
        clock, rows = time.time(), prompts_of_step(run.rows, o.prompts_per_step, o.seed, step)

        # 1. G responses to each of P prompts
        prompt_ids, ids, lengths = rollout(run, rows, step)
        batch = prompt_ids, ids, lengths

        # 2. what the verifier thinks of each, or the reference, within its group
        rewards, counted, stories = step_rewards(run, rows, ids, lengths, 8 * (o.seed * 1_000_003 + step))
        ref_logp = logprobs(run, run.reference, *batch) if o.beta else None
        again = o.updates_per_rollout > 1 or (o.beta and o.kl_in == "reward")
        old_logp = logprobs(run, run.policy, *batch) if again else None  # else: the policy's own
        if rewards.dim() == 2:
            advantages = grpo.position_advantages(rewards, counted, G, scale=o.scale)
        else:
            in_reward = o.beta and o.kl_in == "reward"
            shifted = with_kl(rewards, old_logp, ref_logp, o.beta) if in_reward else rewards
            advantages = grpo.group_advantages(shifted, G, scale=o.scale)

        # 3. clipped steps towards the better ones, held back by the reference
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        updates = [update(run, optimizer, *batch, old_logp, ref_logp, advantages)
                   for _ in range(o.updates_per_rollout)]

        # 4. how it went
        for u in updates:
            state["in_a_row"] = state["in_a_row"] + 1 if u["skipped"] else 0
        row = {"step": step + 1, **metrics_of(run, ids, lengths, rewards, counted, advantages, stories,
                                              updates)}
        taken = time.time() - clock
        row |= {"lr": learning_rate(o, step), "seconds": taken,
                "tokens_per_second": lengths.sum().item() / taken}
        bar.set_postfix_str(f"reward {row['reward']:.2f}, KL {row['kl']:.3f}, length "
                            f"{row['length']:.0f}" + f", {state['in_a_row']} SKIPPED" * row["skipped"], refresh=False)
        if step % o.sample_every == 0:
            show_samples(run, step + 1, rows, ids, lengths, rewards, counted, stories)
        record(run, optimizer, step, row, state | {"seconds": time.time() - began})
    result = finish(run, time.time() - began)
    held.close()
    return result


def main():
    o = parse_options()
    result = read_json(os.path.join(o.output_dir, "summary.json"))
    if result and o.resume and result["steps"] >= o.steps:
        print("this run had finished, nothing was done; more --steps would continue it")
    else:
        run = prepare(o)
        print(json.dumps(asdict(o)))
        result = train(run)
    print(table_row("before", result["before"], True) + table_row("after", result["after"])
          + f"{result['steps']} steps in {result['seconds']:.0f} s, at most {result['peak_memory_mb']} "
          f"MB. The model is in {result['model']}; beside it are config.json, metrics.jsonl, "
          "samples.jsonl and summary.json.")


if __name__ == "__main__":
    one_clear_line(main, "train.py", "--resume continues from the last checkpoint")
