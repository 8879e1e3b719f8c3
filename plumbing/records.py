"""What a run of train.py writes: metrics.jsonl, samples.jsonl, checkpoints, summary.json."""

import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from align import spans_from_ids
from plumbing import one_line
from plumbing.files import (
    append_line, checkpoints, read_lines, save_checkpoint, write_atomically)
from plumbing.prompts import question_text


def table_row(name: str, scores: dict, header: bool = False) -> str:
    shown = ("sampled_facts", "sampled_accuracy", "sampled_valid")
    columns = [k for k in scores if not k.startswith("sampled_") or k in shown]
    head = " " * 9 + "".join(f"{k:>{len(k) + 2}}" for k in columns) + "\n" if header else ""
    values = [math.nan if scores[k] is None else scores[k] for k in columns]
    cells = "".join(f"{v:>{len(k) + 2}.3f}" for k, v in zip(columns, values))
    return f"{head}{name:>9}{cells}\n" if columns else ""


def show_samples(run, step: int, rows: list, ids, lengths, rewards, counted, told: dict):
    """With CaT a prompt's story, else two whole responses, on the screen and in samples.jsonl."""
    names, samples, lines = ("reference", "rubric", "verdicts"), [], []
    if told:
        samples = [dict.fromkeys(names) | {name: values[0] for name, values in told.items()}]
        ranked = sorted((r, y) for r, y in zip(samples[0]["rewards"], samples[0]["rollouts"]) if r == r)
        lines = [("reference", samples[0]["reference"] or ""),
                 ("rubric", " | ".join(samples[0]["rubric"] or []))]
        lines += [(f"reward {r:.2f}", y) for r, y in dict.fromkeys(ranked[-1:] + ranked[:1])]
    for i in (0, len(ids) - 1) if not told else ():
        text, spans = spans_from_ids(run.tokenizer, ids[i, : lengths[i]])
        of_tokens = torch.where(counted[i], rewards[i], math.nan).view(-1)[: lengths[i]]
        sample = {"prompt": rows[i // run.options.group_size]["prompt"], "response": text,
                  "reward": of_tokens.nanmean().item(), "rewards": of_tokens.tolist(),
                  "tokens": [text[int(a) : math.ceil(b)] for a, b in spans]}
        samples.append(sample)
        worst = sorted((r, t) for r, t in zip(sample["rewards"], sample["tokens"]) if r == r)
        worst = ", ".join(f"{t!r} {r:.1f}" for r, t in worst[:3])
        lines += [(f"reward {sample['reward']:.2f}", text), ("unexpected", worst)]
    tqdm.write(f"step {step}: {one_line(question_text(samples[0]['prompt']))}", file=sys.stdout)
    for name, text in lines:
        tqdm.write(f"    {name:<13} {one_line(text)}", file=sys.stdout)
    for sample in samples:
        append_line(os.path.join(run.options.output_dir, "samples.jsonl"), {"step": step} | sample)


def metrics_of(run, ids, lengths, rewards, counted, advantages, told: dict, updates: list) -> dict:
    """A step's line of metrics.jsonl."""
    G, B = run.options.group_size, len(ids)
    groups, seen = advantages.view(B // G, G, -1), counted.view(B // G, G, -1).any(1)
    verdicts = [v for group in told.get("verdicts", ()) for answers in group for v in answers]
    reward = torch.where(counted, rewards, 0).view(B, -1).sum(1) / counted.view(B, -1).sum(1)
    last = ids.gather(1, lengths[:, None] - 1)
    ended = torch.isin(last, torch.tensor(run.stop_ids, device=ids.device))
    return {"reward": reward.nanmean().item(), **updates[-1],
            "skipped": sum(u["skipped"] for u in updates),
            "missing": 1 - counted.view(B, -1).any(1).float().mean().item(),
            "length": lengths.float().mean().item(), "truncated": 1 - ended.float().mean().item(),
            "unread": sum(v is None for v in verdicts) / max(1, len(verdicts)),
            "flat": ((groups == 0).all(1) & seen).sum().item() / max(1, seen.sum().item())}


def validation(row: dict) -> float:
    """Of a line of metrics.jsonl: the greedy held-out score; -1 without one, and at step 0."""
    held = row.get("held_out") or {}
    scores = [held[name] for name in ("facts", "accuracy", "rubric") if held.get(name) is not None]
    return scores[0] if scores and row["step"] else -1


def begin(run, optimizer, scores_of, skills_of) -> dict:
    """A new folder, or the state of its newest checkpoint: what came after it is done again."""
    o, state = run.options, {"step": 0, "seconds": 0.0, "in_a_row": 0}
    saved, metrics = checkpoints(o.output_dir), os.path.join(o.output_dir, "metrics.jsonl")
    if saved:
        path = os.path.join(saved[-1], "state.pt")
        state = torch.load(path, map_location=run.device, weights_only=True)
        optimizer.load_state_dict(state.pop("optimizer"))
    config = json.dumps(asdict(o) | {"resume": False}, indent=1)
    write_atomically(os.path.join(o.output_dir, "config.json"), config)
    for path in (metrics, os.path.join(o.output_dir, "samples.jsonl")):
        kept = [row for row in read_lines(path) if saved and row["step"] <= state["step"]]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    if not saved:
        skills = {"skills": skills_of(run)} if run.anchor else {}
        append_line(metrics, {"step": 0, "held_out": scores_of(run)} | skills)
    print(table_row("step 0", next(read_lines(metrics))["held_out"], True), end="")
    return state | {"began": time.time() - state["seconds"]}


def record(run, optimizer, step: int, row: dict, updates: list, state: dict, scores_of) -> dict:
    """What is due after a step: held-out scores, its line in metrics.jsonl, a checkpoint."""
    o, last, parts = run.options, step == run.options.steps, (run.policy, run.tokenizer)
    metrics, row = os.path.join(o.output_dir, "metrics.jsonl"), {"step": step} | row
    state = state | {"seconds": time.time() - state["began"], "step": step}
    for u in updates:
        state["in_a_row"] = state["in_a_row"] + 1 if u["skipped"] else 0
    if last or (o.eval_every and step % o.eval_every == 0):
        row["held_out"] = scores_of(run)
        tqdm.write(table_row(f"step {step}", row["held_out"]), end="", file=sys.stdout)
        if o.keep == "best" and validation(row) > max(map(validation, read_lines(metrics))):
            save_checkpoint(o.output_dir, step, *parts, {"step": step}, "best")
    append_line(metrics, row)
    if last or step % o.save_every == 0 or state["in_a_row"] >= 10:
        kept = {"optimizer": optimizer.state_dict()} | state
        model = save_checkpoint(o.output_dir, step, *parts, kept)
    if state["in_a_row"] >= 10:
        raise FloatingPointError(f"loss or gradient were not finite in ten updates in a row; the "
                                 f"weights from before them are in {model}: lower --lr")
    return state


def finish(run, seconds: float, scores_of) -> dict:
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
