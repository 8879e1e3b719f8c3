"""What a run of train.py needs, read, loaded and checked: what a user can get wrong fails here."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from plumbing.files import checkpoints
from plumbing.models import (
    LocalModel, chat_ids, context_of, find_stop_ids, load, pick_device, text_model, use_threads)
from plumbing.prompts import draw_prompts, read_prompts, with_suffix


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
    """Reads, loads and checks everything and writes nothing.  ValueError for what a user can mend."""
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
    use_threads([m for m in models if isinstance(m, torch.nn.Module)], o.threads)
    if o.gradient_checkpointing:  # the name after and before transformers 5.2x
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    stop_ids = find_stop_ids(policy, tokenizer)
    run = Run(o, device, policy, tokenizer, stop_ids, reference, verifier, anchor, judge, rows, eval_rows)
    check_lengths(run)
    return run
