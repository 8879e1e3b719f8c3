"""A run of train.py: what it needs, read and checked before it starts; what it writes."""

import glob
import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from plumbing.files import (
    append_line, checkpoints, read_json, read_lines, save_checkpoint, write_atomically)
from plumbing.models import (
    LocalModel, chat_ids, context_of, find_stop_ids, load, pick_device, text_model, use_threads)
from plumbing.prompts import draw_prompts, read_prompts, with_suffix


JUDGED = ("cat", "cat-match", "rubric-given")  # rewards that need a judge
ONES = "prompts_per_step steps micro_batch max_new_tokens updates_per_rollout save_every".split()
LEAST = {"group_size": 2, "temperature": 1e-3, "top_p": 1e-9} | dict.fromkeys(ONES, 1)  # others: 0


@dataclass
class Run:
    """What a step needs."""

    options: Any  # train.Options
    device: torch.device
    policy: Any  # float32, trained
    tokenizer: Any
    stop_ids: list  # that end a response
    rows: list  # prompts to train on
    eval_rows: list  # held out
    reference: Any = None  # frozen initial policy
    verifier: Any = None  # CME: (model, tokenizer)
    anchor: Any = None  # CaT: text model
    judge: Any = None  # CaT: text model


def newest(pattern: str) -> str:
    """The folder of the newest file of that pattern in runs/."""
    found = sorted(glob.glob(f"runs/{pattern}", recursive=True), key=os.path.getmtime)
    if not found:
        raise ValueError(f"runs/ holds no {pattern}: give --output_dir, or run train.py")
    return os.path.dirname(found[-1])


def train_options(Options):
    """train.py's command line; with --resume what is not given again comes from the run."""
    parser = HfArgumentParser(Options, allow_abbrev=False)
    [o] = parser.parse_args_into_dataclasses()
    if o.resume:
        o.output_dir = o.output_dir or newest("*/config.json")
        saved = read_json(os.path.join(o.output_dir, "config.json"))
        if not saved:
            raise ValueError(f"{o.output_dir} holds no run to resume (no config.json)")
        parser.set_defaults(**saved | {"output_dir": o.output_dir})
        [o] = parser.parse_args_into_dataclasses()
        for name, was in (saved | {"output_dir": o.output_dir, "resume": True}).items():
            if getattr(o, name) != was:
                print(f"--{name} is now {getattr(o, name)}, was {was}: another run than it was")
    for name, value in vars(o).items():
        if isinstance(value, (int, float)) and not LEAST.get(name, 0) <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be at least {LEAST.get(name, 0)}, and finite")
    if o.top_p > 1 or o.seed >= 2**32:
        raise ValueError("--top_p must be at most 1, --seed under 2**32")
    o.output_dir = o.output_dir or f"runs/{o.reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return o


def read_rows(o, policy, tokenizer) -> tuple:
    """Prompts to train on and held-out ones.  ValueError: what is wrong, in which file and line."""
    rows, longest = read_prompts(o.prompts), context_of(policy)
    rows = draw_prompts(rows, tokenizer) if o.prompts == "ultrafeedback" else rows
    rows = with_suffix(rows, o.suffix)
    eval_rows = with_suffix(read_prompts(o.eval_prompts), o.suffix) if o.eval_prompts else []
    for row in rows + eval_rows:
        size = len(chat_ids(tokenizer, row["prompt"])) + o.max_new_tokens
        if size > longest:
            raise ValueError(f"{row['where']}: prompt and --max_new_tokens have {size} tokens, the "
                             f"generator's context {longest}; shorten it or leave it out")
    for row in rows if o.reward == "rubric-given" else ():
        if not any(c["points"] > 0 for c in row["rubrics"]):
            raise ValueError(f"{row['where']}: rubric-given needs `rubrics` with points > 0")
    scores = ("facts", "answer") + ("rubrics",) * (o.reward in JUDGED)
    if o.keep == "best" and not any(row[name] for row in eval_rows for name in scores):
        raise ValueError("--keep best needs --eval_prompts with facts, answer or, for a judge, "
                         "rubrics")
    return rows, eval_rows


def prepare(o) -> Run:
    """Reads, loads and checks all.  ValueError for what a user can mend; nothing is written yet."""
    there = set(os.listdir(o.output_dir)) if os.path.isdir(o.output_dir) else set()
    if there - {"config.json", "config.json.tmp"} and not o.resume:
        raise ValueError(f"--output_dir {o.output_dir} is in use; give another one, or --resume")
    if o.reward == "cme" and (o.length_penalty_after or o.kl_in == "reward"):
        raise ValueError("--length_penalty_after and --kl_in reward need one reward per response, "
                         "and --reward cme has one per token")
    device, saved = pick_device(o.device), checkpoints(o.output_dir)
    policy, tokenizer = load("--generator", saved[-1] if saved else o.generator, device, train=True)
    rows, eval_rows = read_rows(o, policy, tokenizer)
    run = Run(o, device, policy, tokenizer, find_stop_ids(policy, tokenizer), rows, eval_rows)
    catting = o.reward in JUDGED + ("cat-answer", "cat-sft")
    if o.beta or catting and not o.anchor:
        run.reference, _ = load("--generator", o.generator, device)
    if o.reward in ("cme", "cme-sequence", "reverse-kl"):
        run.verifier = load("--verifier", o.verifier, device)
    if catting:
        anchor = load("--anchor", o.anchor, device) if o.anchor else (run.reference, tokenizer)
        run.anchor = LocalModel(*anchor, top_k=o.top_k, top_p=o.top_p, batch_tokens=o.batch_tokens)
    if o.reward in JUDGED:
        key = os.environ.get("JUDGE_API_KEY")
        run.judge = text_model("--judge", o.judge, device, key=key) if o.judge else run.anchor
        if run.judge.complete(["Reply with one word, yes."], max_new_tokens=64) == [[None]]:
            raise ValueError(f"--judge: {run.judge.last_error}")  # now and not after an hour
    local = [m.model for m in (run.anchor, run.judge) if isinstance(m, LocalModel)]
    use_threads([policy, *local, *([run.verifier[0]] if run.verifier else [])])
    if o.gradient_checkpointing:  # the name after and before transformers 5.2x
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    return run


# What a run writes: config.json, metrics.jsonl, samples.jsonl, checkpoints, summary.json


def begin(run: Run, optimizer) -> int:
    """How many steps are done: 0, or those of the newest checkpoint, whose optimizer is loaded.
    What came after it is done again."""
    o, step = run.options, -1
    os.makedirs(o.output_dir, exist_ok=True)
    if saved := checkpoints(o.output_dir):
        path = os.path.join(saved[-1], "state.pt")
        state = torch.load(path, map_location=run.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    config = json.dumps(asdict(o) | {"resume": False}, indent=1)
    write_atomically(os.path.join(o.output_dir, "config.json"), config)
    for path in (os.path.join(o.output_dir, name) for name in ("metrics.jsonl", "samples.jsonl")):
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_lines(path)
                if row["step"] <= step]
        write_atomically(path, "".join(kept))
    return max(0, step)


def metrics_of(run: Run, G, ids, lengths, rewards, counted, advantages, told: dict, updates):
    """A step's line of metrics.jsonl."""
    B = len(ids)
    groups, seen = advantages.view(B // G, G, -1), counted.view(B // G, G, -1).any(1)
    verdicts = [v for group in told.get("verdicts", ()) for answers in group for v in answers]
    reward = torch.where(counted, rewards, 0).view(B, -1).sum(1) / counted.view(B, -1).sum(1)
    ended = torch.isin(ids.gather(1, lengths[:, None] - 1), torch.tensor(run.stop_ids).to(ids))
    return {"reward": reward.nanmean().item(), **updates[-1],
            "skipped": sum(u["skipped"] for u in updates),
            "missing": reward.isnan().float().mean().item(),
            "length": lengths.float().mean().item(), "truncated": 1 - ended.float().mean().item(),
            "unread": sum(v is None for v in verdicts) / max(1, len(verdicts)),
            "flat": ((groups == 0).all(1) & seen).sum().item() / max(1, seen.sum().item())}


def validation(row: dict) -> float:
    """Of a line of metrics.jsonl: the greedy held-out score; -1 without one, and at step 0."""
    held = row.get("held_out") or {}
    scores = [held[name] for name in ("facts", "accuracy", "rubric") if held.get(name) is not None]
    return scores[0] if scores and row["step"] else -1


def record(run: Run, optimizer, step: int, row: dict):
    """What is due after a step: its line in metrics.jsonl, and on the screen; a checkpoint."""
    o, parts, row = run.options, (run.policy, run.tokenizer), {"step": step} | row
    metrics = os.path.join(o.output_dir, "metrics.jsonl")
    if "held_out" in row:
        tqdm.write(f"step {step}: {numbers(row['held_out'])}", file=sys.stdout)
        before = max(map(validation, read_lines(metrics)), default=-1)
        if o.keep == "best" and validation(row) > before:
            save_checkpoint(o.output_dir, step, *parts, {"step": step}, "best")
    append_line(metrics, row)
    if step and (step % o.save_every == 0 or step == o.steps):
        state = {"step": step, "optimizer": optimizer.state_dict()}
        save_checkpoint(o.output_dir, step, *parts, state)


def finish(run: Run) -> dict:
    """summary.json: scores and mean rewards (of a tenth of the steps) before and after, ..."""
    o, rows = run.options, list(read_lines(os.path.join(run.options.output_dir, "metrics.jsonl")))
    best = checkpoints(o.output_dir, "best") if o.keep == "best" else []
    model, tenth = (best or checkpoints(o.output_dir))[-1], max(1, o.steps // 10)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device) / 2**20
    result = {"steps": o.steps, "seed": o.seed, "model": model, "peak_memory_mb": round(memory),
              "seconds": round(sum(row["seconds"] for row in rows[1:]), 1),
              "skipped": sum(row["skipped"] for row in rows[1:])}
    kept = rows[int(model.rpartition("-")[2])]
    for name, row, part in (("before", rows[0], rows[1:][:tenth]), ("after", kept, rows[-tenth:])):
        reward = torch.tensor([r["reward"] or math.nan for r in part]).nanmean().item()
        result[name] = row["held_out"] | {"reward": reward}
    write_atomically(os.path.join(o.output_dir, "summary.json"), json.dumps(result, indent=1))
    return result


def numbers(values: dict) -> str:
    """For the eye: {"facts": 0.5, "valid": None} -> "facts 0.500, valid -"."""
    return ", ".join(f"{k} -" if v is None else f"{k} {v:.3f}" for k, v in values.items())
