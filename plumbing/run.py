"""A run of train.py: what it needs, read and checked before it starts; what it writes."""

import glob
import json
import os
import sys
import time
from functools import partial
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from plumbing.files import (append_line, checkpoints, one_line_error, read_json, read_lines,
                            save_checkpoint, write_atomically, write_lines)
from plumbing.models import LocalModel, chat_ids, load, plain_ids, text_model, without_stop
from plumbing.prompts import draw_prompts, read_prompts


def newest(pattern: str) -> str:
    """The folder of the newest file in runs/ that matches a pattern."""
    found = sorted(glob.glob(f"runs/{pattern}"), key=os.path.getmtime)
    if not found:
        raise ValueError(f"runs/ holds no {pattern}: give --output_dir, or run train.py")
    return os.path.dirname(found[-1])


def train_options(Options):
    """train.py's command line; with --resume, options not given again come from the run."""
    parser = HfArgumentParser(Options, allow_abbrev=False)
    [o] = parser.parse_args_into_dataclasses()
    if o.resume:
        folder = o.output_dir or newest("*/config.json")
        saved = read_json(f"{folder}/config.json")
        if "reward" not in saved:
            raise ValueError(f"{folder} holds no run to resume (no config.json)")
        parser.set_defaults(**{**saved, "output_dir": folder})
        [o] = parser.parse_args_into_dataclasses()
    o.output_dir = o.output_dir or f"runs/{o.reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    counts = "steps prompts_per_step max_new_tokens micro_batch save_every updates_per_rollout"
    for name, value in vars(o).items():
        if isinstance(value, (int, float)) and not (name in counts.split()) <= value < 1e9:
            raise ValueError(f"--{name} {value}: {int(name in counts.split())} or more, below 1e9")
    if not (o.temperature and 0 < o.top_p <= 1 < o.group_size):
        raise ValueError("needs --temperature > 0, 0 < --top_p <= 1 < --group_size")
    if o.reward == "cme" and (o.length_penalty_after or o.kl_in == "reward"):
        raise ValueError("--length_penalty_after and --kl_in reward need one reward per response")
    return o


def start_of(o):
    """Policy, tokenizer and state: of the newest readable checkpoint, else of --generator."""
    for path in reversed(checkpoints(o.output_dir)):
        try:
            with one_line_error(f"{path} cannot be read"):  # cut off, overwritten ...
                state = torch.load(f"{path}/state.pt", map_location="cpu", weights_only=True)
                return *load("--resume", path, o.device, train=True), state
        except ValueError as e:
            if path == checkpoints(o.output_dir)[0]:  # no older one
                raise
            print(f"{e}; trying the one before", file=sys.stderr)
    return *load("--generator", o.generator, o.device, train=True), {"step": -1}


def prepare(o):
    """Reads, loads, checks all; writes nothing -> a `run`: options, device; policy (trained),
    tokenizer, actor (both as a text model), autocast (bf16); rows, eval_rows; reference (the frozen
    initial policy); CME's verifier (model, tokenizer), watch ({name: one}); CaT's anchor, judge."""
    there = os.listdir(o.output_dir) if os.path.exists(o.output_dir) else []
    if {*there} - {"config.json", "config.json.tmp"} and not o.resume:
        raise ValueError(f"--output_dir {o.output_dir} is in use; give another one, or --resume")
    policy, tokenizer, state = start_of(o)
    if o.lora_rank and "optimizer" not in state:
        from peft import LoraConfig
        torch.manual_seed(o.seed)
        policy.add_adapter(LoraConfig(r=o.lora_rank, target_modules="all-linear"))
    sampling = {"top_k": o.top_k, "top_p": o.top_p, "batch_tokens": o.batch_tokens}
    actor, rows = LocalModel(policy, tokenizer, **sampling), read_prompts(o.prompts)
    rows = draw_prompts(rows, tokenizer) if o.prompts == "ultrafeedback" else rows
    eval_rows = read_prompts(o.eval_prompts) if o.eval_prompts else []
    for row in rows + eval_rows:
        ids, [y] = chat_ids(tokenizer, row["prompt"]), plain_ids(tokenizer, [row["output"] or ""])
        more = max(o.max_new_tokens, len(y) + 1 if o.reward == "cat-sft" else 0)
        if len(ids) + more > actor.context or max(ids) >= policy.config.vocab_size:
            raise ValueError(f"{row['where']}: leave it out: with --max_new_tokens or `output` it "
                             f"exceeds the context of {actor.context}, or has unknown tokens")
    kind, o.bf16 = policy.device.type, o.bf16 or policy.device.type == "cuda"
    judged = o.reward in ("cat", "cat-match", "rubric-given")
    needed = {"rubric-given": "rubrics", "cat-sft": "output"}.get(o.reward, "prompt")
    if not all(row[needed] for row in rows):
        raise ValueError(f"{o.prompts}: {o.reward} needs `{needed}` in every row (toy/README.md)")
    if o.keep == "best" and not any(row["facts"] or row["answer"] or judged and row["rubrics"]
                                    for row in eval_rows):
        raise ValueError("--keep best needs --eval_prompts with facts, answer or (judged) rubrics")
    run = SimpleNamespace(
        options=o, device=policy.device, policy=policy, tokenizer=tokenizer, actor=actor, rows=rows,
        eval_rows=eval_rows, state=state, reference=None, verifier=None, anchor=None, judge=None,
        watch={}, autocast=partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=o.bf16))
    if o.beta or judged or o.reward == "cat-answer":
        run.reference, _ = load("--generator", o.generator, o.device, train=True)  # policy's dtype
        run.anchor = LocalModel(run.reference, tokenizer, **sampling)
        run.judge = run.anchor if judged else None
    if o.reward in ("cme", "cme-sequence", "reverse-kl"):
        run.verifier = load("--verifier", o.verifier or "(give one)", o.device, bf16=o.bf16)
    if o.watch_verifier:
        watch = load("--watch_verifier", o.watch_verifier, o.device, bf16=o.bf16)
        run.watch = {"watch": watch} | ({"trained": run.verifier} if run.verifier else {})
    if judged and o.judge:
        run.judge = text_model("--judge", o.judge, o.device, batch_tokens=o.batch_tokens,
                               key=os.environ.get("JUDGE_API_KEY"))
        if run.judge.complete(["Reply with one word, yes."], max_new_tokens=64) == [[None]]:
            raise ValueError(f"--judge: {run.judge.last_error}")  # now, not after an hour
    return run


def begin(run, optimizer) -> int:
    """Steps done: 0, or the checkpoint's; loads its optimizer, deletes log lines of later steps."""
    o, folder, state, run.state = run.options, run.options.output_dir, run.state, None
    if not o.resume and os.path.exists(f"{folder}/metrics.jsonl"):
        raise ValueError(f"--output_dir {folder} was taken by another run")
    metrics, samples = ([row for row in read_lines(f"{folder}/{name}.jsonl")
                         if row["step"] <= state["step"]] for name in ("metrics", "samples"))
    if [row["step"] for row in metrics] != [*range(state["step"] + 1)]:
        raise ValueError(f"{folder}/metrics.jsonl lacks steps up to {state['step']}: restore it")
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    write_atomically(f"{folder}/config.json", json.dumps(vars(o) | {"resume": False}, indent=1))
    write_lines(f"{folder}/metrics.jsonl", metrics)
    write_lines(f"{folder}/samples.jsonl", samples)
    return max(0, state["step"])


def metrics_of(run, G, ids, lengths, rewards, counted, advantages, told: dict, updates):
    """A step's line of metrics.jsonl."""
    B, ended = len(ids), without_stop(ids, lengths, run.actor.stop_ids)[1]
    groups, seen = advantages.view(B // G, G, -1), counted.view(B // G, G, -1).any(1)
    verdicts = [v for group in told.get("verdicts", ()) for answers in group for v in answers]
    reward = torch.where(counted, rewards, 0).view(B, -1).sum(1) / counted.view(B, -1).sum(1)
    return {"reward": reward.nanmean().item(), **updates[-1], "tokens": int(lengths.sum()),
            "skipped": sum(u["skipped"] for u in updates), "length": lengths.float().mean().item(),
            "missing": reward.isnan().float().mean().item(), "truncated": 1 - sum(ended) / B,
            "unread": sum(v is None for v in verdicts) / max(1, len(verdicts)),
            "flat": ((groups == 0).all(1) & seen).sum().item() / max(1, seen.sum().item())}


def best_step(o, rows: list) -> int:
    """--keep best: the first step after 0 with the best held-out scores, facts first; else 0."""
    scores = {row["step"]: [row["held_out"].get(m) or 0 for m in ("facts", "accuracy", "rubric")]
              for row in rows[1:] if "held_out" in row and o.keep == "best"}
    return max(scores, key=scores.get, default=0)


def record(run, optimizer, step: int, row: dict, now=()):
    """What is due after a step: its line in metrics.jsonl, and on the screen; a checkpoint."""
    o, metrics = run.options, f"{run.options.output_dir}/metrics.jsonl"
    append_line(metrics, {"step": step} | row)
    if row.get("held_out"):
        tqdm.write(f"step {step}: {numbers(row['held_out'])}", file=sys.stdout)
    best = best_step(o, read_lines(metrics)) if o.keep == "best" else 0
    if step and (now or step % o.save_every == 0 or step in (best, o.steps)):
        state = {"step": step, "optimizer": optimizer.state_dict()}
        save_checkpoint(o.output_dir, step, run.policy, run.tokenizer, state, best)


def finish(run) -> dict:
    """summary.json: scores before and after, the model, time and memory."""
    folder, rows = run.options.output_dir, read_lines(f"{run.options.output_dir}/metrics.jsonl")
    best = best_step(run.options, rows)  # its checkpoint may be gone, if --keep best was given late
    made = rows[best if best in [int(path[-6:]) for path in checkpoints(folder)] else -1]
    peak = getrusage(RUSAGE_SELF).ru_maxrss >> (10 if sys.platform == "darwin" else 0)  # KiB
    peak = torch.cuda.max_memory_allocated(run.device) >> 10 if run.device.type == "cuda" else peak
    result = {"before": rows[0]["held_out"] | {"reward": rows[1]["reward"]},
              "after": made.get("held_out", {}) | {"reward": made["reward"]},
              "seconds": {part: round(sum(row["seconds"][part] for row in rows[1:]), 3)
                          for part in rows[1]["seconds"]}, "steps": rows[-1]["step"],
              **{name: sum(row[name] for row in rows[1:]) for name in ("tokens", "skipped")},
              "peak_memory_mb": peak >> 10, "model": f"{folder}/checkpoint-{made['step']:06d}"}
    write_atomically(f"{folder}/summary.json", json.dumps(result, indent=1))
    return result


def numbers(values: dict) -> str:
    """For display: {"facts": 0.5, "valid": None} -> "facts 0.500, valid -"."""
    return ", ".join(f"{k} -" if v is None else f"{k} {v:.3f}" for k, v in values.items())
