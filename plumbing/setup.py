"""What train.py needs, read and checked: what a user can get wrong fails here."""

import glob
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import HfArgumentParser

from plumbing.files import checkpoints, read_json
from plumbing.models import (
    LocalModel, chat_ids, context_of, find_stop_ids, load, pick_device, text_model, use_threads)
from plumbing.prompts import draw_prompts, read_prompts, with_suffix

LEAST = {  # the smallest values that make sense
    **dict.fromkeys("prompts_per_step steps micro_batch max_new_tokens updates_per_rollout save_every "
                    "sample_every".split(), 1), "group_size": 2, "temperature": 1e-3, "top_p": 1e-9,
    **dict.fromkeys("top_k lr warmup_steps beta clip_low clip_high max_grad_norm seed eval_every "
                    "length_penalty_after rollouts_in_context".split(), 0)}


def newest(pattern: str) -> str:
    """The folder of the newest file of that pattern in runs/."""
    found = sorted(glob.glob(f"runs/{pattern}", recursive=True), key=os.path.getmtime)
    if not found:
        raise ValueError(f"runs/ holds no {pattern}: give --output_dir, or make a run with train.py")
    return os.path.dirname(found[-1])


def train_options(Options, toy: str):
    """train.py's command line; with --resume what is not given again comes from the run."""
    parser = HfArgumentParser(Options, allow_abbrev=False)
    [o] = parser.parse_args_into_dataclasses()
    if o.resume:
        folder = o.output_dir or newest("*/config.json")
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
        if getattr(o, name).startswith(toy) and not o.generator.startswith(toy):
            print(f"--{name} is empty: the toy's, of nothing but its world", file=sys.stderr)
    o.output_dir = o.output_dir or f"runs/{o.reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return o


@dataclass
class Run:
    """What a step needs."""

    options: Any  # train.Options
    device: torch.device
    policy: Any  # float32, trained
    tokenizer: Any
    stop_ids: list  # that end a response
    reference: Any  # frozen initial policy, or None
    verifier: Any  # (model, tokenizer) of CME, or None
    anchor: Any  # text model of CaT, or None
    judge: Any  # text model, or None
    rows: list  # prompts to train on
    eval_rows: list  # held out


def read_rows(o, tokenizer) -> tuple:
    """Prompts to train on and held-out ones, checked against the options."""
    rows, eval_rows = read_prompts(o.prompts), read_prompts(o.eval_prompts) if o.eval_prompts else []
    rows = draw_prompts(rows, tokenizer) if o.prompts == "ultrafeedback" else rows
    judged = not o.reward.startswith("cme") and o.reward != "cat-answer"
    if o.keep == "best" and not (o.eval_every and any(
            r["facts"] or r["answer"] is not None or judged and r["rubrics"] for r in eval_rows)):
        raise ValueError("--keep best needs --eval_every, and --eval_prompts with facts, answer or, "
                         "for a judge, rubrics")
    for row in rows if o.reward == "rubric-given" else ():
        if not any(c["points"] > 0 for c in row["rubrics"]):
            raise ValueError(f"{row['where']}: --reward rubric-given needs `rubrics` with points > 0")
    return with_suffix(rows, o.suffix), with_suffix(eval_rows, o.suffix)


def find_judge(o, anchor, device):
    """The text model that judges, tried now and not after an hour."""
    key = os.environ.get("JUDGE_API_KEY")
    judge = text_model("--judge", o.judge, device, key=key) if o.judge else anchor
    if isinstance(judge, LocalModel):
        judge.yes_probability([])  # ValueError if it has no words for yes and no
    elif judge.complete(["Reply with one word, yes."], max_new_tokens=512) == [[None]]:
        raise ValueError(f"--judge: {judge.last_error}")
    return judge


def check_lengths(run: Run):
    """ValueError where a prompt and its response do not fit the generator's context."""
    o, longest = run.options, context_of(run.policy)
    for row in run.rows + run.eval_rows:
        try:
            size = len(chat_ids(run.tokenizer, row["prompt"])) + o.max_new_tokens
        except ValueError as e:
            raise ValueError(f"{row['where']}: {e}") from None
        if size > longest:
            raise ValueError(f"{row['where']}: prompt and --max_new_tokens have {size} tokens, the "
                             f"generator's context {longest}; shorten it or leave it out")


def prepare(o) -> Run:
    """Reads, loads and checks everything, then makes the folder.  ValueError for what a user can mend."""
    used = os.path.isdir(o.output_dir) and set(os.listdir(o.output_dir)) - {"lock", "config.json.tmp"}
    if used and not o.resume:
        raise ValueError(f"--output_dir {o.output_dir} is in use; give another one, or --resume")
    if o.reward == "cme" and (o.length_penalty_after or o.kl_in == "reward"):
        raise ValueError("--length_penalty_after and --kl_in reward need one reward per response, and "
                         "--reward cme has one per token")
    device, catting = pick_device(o.device), not o.reward.startswith("cme")
    policy, tokenizer = load("--generator", o.generator, device, train=True)
    rows, eval_rows = read_rows(o, tokenizer)
    shared, saved = catting and not o.anchor, checkpoints(o.output_dir)
    if saved and int(saved[-1].rsplit("-", 1)[1]) > o.steps:
        raise ValueError(f"--steps {o.steps}: the run has come further, to {saved[-1]}")
    reference = load("--generator", o.generator, device)[0] if o.beta or shared else None
    policy = load("--generator", saved[-1], device, train=True)[0] if saved else policy
    verifier = anchor = judge = None
    if not catting or o.estimator == "cme":
        verifier = load("--verifier", o.verifier, device)
    if catting:
        anchor = (reference, tokenizer) if shared else load("--anchor", o.anchor, device)
        anchor = LocalModel(*anchor, top_k=o.top_k, top_p=o.top_p, batch_tokens=o.batch_tokens)
    if catting and o.reward != "cat-answer":
        judge = find_judge(o, anchor, device)
    models = [policy, verifier and verifier[0], *(m.model for m in (anchor, judge) if m)]
    use_threads([m for m in models if isinstance(m, torch.nn.Module)])
    if o.gradient_checkpointing:  # the name after and before transformers 5.2x
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    stop_ids = find_stop_ids(policy, tokenizer)
    run = Run(o, device, policy, tokenizer, stop_ids, reference, verifier, anchor, judge, rows, eval_rows)
    check_lengths(run)
    os.makedirs(o.output_dir, exist_ok=True)
    return run
