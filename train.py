"""Label-free RL with GRPO.  CME (arXiv 2605.29009): the reward is how likely a second, frozen model
finds each word.  CaT (arXiv 2509.14234): agreement with a reference made of the policy's answers.

    python train.py                            # CME on the toy, on a CPU, in about a minute
    python train.py --reward cat               # CaT on the toy: synthesis, rubric, judge
    python train.py --resume                   # continue the newest run; recipes: README.md

Deliberate departures from the papers: at the top of align.py, grpo.py, cme.py, cat.py; defaults
are the toy's; AdamW's weight decay is 0; early stopping is --keep best.  Notation as in grpo.py."""

import math
import sys
import time
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
import torch
from tqdm import tqdm

import cat
import cme
import grpo
from evaluate import held_out
from plumbing import TOY, ask_to_stop, one_clear_line, option, progress
from plumbing.files import append_line
from plumbing.models import chat_ids, end_of_turn, plain_ids, two_at_a_time
from plumbing.prompts import question_text
from plumbing.run import begin, finish, metrics_of, numbers, prepare, record, train_options

CAT = f"{TOY}/cat/model", f"{TOY}/cat/prompts.jsonl", f"{TOY}/cat/eval.jsonl", 3e-4, 30
TOYS = {  # defaults, by reward: generator, prompts, eval_prompts, lr, steps
    "cme": (f"{TOY}/cme/generator", f"{TOY}/cme/prompts.jsonl", f"{TOY}/cme/eval.jsonl", 8e-4, 80),
    **dict.fromkeys(("cat", "cat-match", "rubric-given", "cat-sft"), CAT),
    "cat-answer": (CAT[0], f"{TOY}/cat/numbers.jsonl", f"{TOY}/cat/numbers_eval.jsonl", 3e-4, 30)}


@dataclass
class Options:
    reward: Literal["cme", "cme-sequence", "reverse-kl", "rent", "cat", "cat-answer", "cat-match",
                    "rubric-given", "cat-sft"] = option(
        "cme", "cme: per token (Eq. 1), cme-sequence: per response (Eq. 3), reverse-kl: Eq. 3 - "
        "log pi, rent: minus entropy; cat: rubric (Eq. 3-4), cat-answer: same answer, cat-match: "
        "judged equal, rubric-given: the data's, cat-sft: cross-entropy on `output` (Eq. 12)")
    credit: Literal["token", "word"] = option("token", "cme: the paper's, or the word's sum")
    score_stop: bool = option(False, "cme: the verifier scores the stop too; else it is masked")
    generator: str = option("", "model to train: hub name, folder, checkpoint; empty: the toy's")
    verifier: str = option("", "CME: scorer, or random:MODEL; for the toy empty: its own")
    watch_verifier: str = option("", "a second verifier: scores at evaluations, never trained on")
    estimator: Literal[tuple(cat.estimators(None))] = option("synthesis", "CaT: makes references")
    judge: str = option("", "CaT: a model or MODEL@URL (JUDGE_API_KEY); empty: the initial policy")
    question_in_synthesis: bool = option(False, "let the anchor read the question too")
    rubric_from: Literal["reference", "question"] = option("reference", "CaT: source of rubrics")
    length_penalty_after: int = option(0, "reward - 1 for responses with more tokens; 0: never")
    prompts: str = option("", "a .jsonl, .json or .txt file, ultrafeedback, ...; empty: the toy's")
    eval_prompts: str = option("", "with facts, answer, pattern, rubrics; empty: the toy's or none")
    group_size: int = option(8, "G, responses per prompt")
    prompts_per_step: int = option(16, "P, prompts per step; P * G responses are one update")
    steps: Optional[int] = option(None, "steps in total; not given: what suits the toy")
    max_new_tokens: int = option(48, "longest response, in generator tokens")
    temperature: float = option(1.0, "sampling temperature, also used for log-probabilities")
    top_k: int = option(0, "sample among the k most probable tokens; 0: all")
    top_p: float = option(1.0, "sample among the most probable tokens with this total mass")
    lr: Optional[float] = option(None, "peak AdamW learning rate; not given: what suits the toy")
    warmup_steps: int = option(5, "steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = option("cosine", "lr after warm-up")
    beta: float = option(0.02, "weight of the KL to the initial policy; 0: none")
    kl_in: Literal["loss", "reward"] = option("loss", "k3 per token; or r - beta log(pi / pi_ref)")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + clip_high")
    scale: bool = option(True, "divide advantages by the group's std; --no_scale: do not")
    min_std: float = option(0.06, "cme: positions with a lower std get advantage 0; paper: 0")
    updates_per_rollout: int = option(1, "optimiser steps on each batch of rollouts")
    micro_batch: int = option(32, "responses per forward and backward pass; same gradient")
    batch_tokens: int = option(0, "most tokens per batch in sampling; 0: what suits the device")
    lora_rank: int = option(0, "train only a new adapter of this rank (pip install peft); 0: all")
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped at this; 0: never")
    seed: int = option(0, "seeds sampling and the order of prompts")
    output_dir: str = option("", "for all output; empty: runs/REWARD-DATE-TIME (--resume: newest)")
    resume: bool = option(False, "continue the run in --output_dir, with its options")
    save_every: int = option(20, "steps between checkpoints; the last two are kept")
    keep: Literal["last", "best"] = option("last", "end with the last or the best held-out model")
    eval_every: int = option(10, "steps between held-out scores and samples; 0: first and last")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: cuda if there is one")
    bf16: bool = option(False, "compute in bf16 on a CPU too, as on CUDA: for real models")
    def __post_init__(self):
        self.beta = 0.0 if self.reward == "cat-sft" else self.beta
        own, toy = self.generator and self.prompts, TOYS.get(self.reward, TOYS["cme"])
        if own and not self.resume and None in (self.lr, self.steps):
            raise ValueError("with a model and prompts of your own give --lr and --steps too")
        for name, value in zip(("generator", "prompts", "eval_prompts", "lr", "steps"), toy):
            if not own and getattr(self, name) in ("", None):
                setattr(self, name, value)
        self.verifier = self.verifier or ("" if own else f"{TOY}/cme/verifier")


def prompts_of_step(prompts: list, per_step: int, seed: int, step: int) -> list:
    """The P prompts of a step: epoch after epoch over all prompts, each in a new random order."""
    n, noise = len(prompts), torch.Generator()
    order = lambda epoch: torch.randperm(n, generator=noise.manual_seed(seed * 100_003 + epoch))
    return [prompts[order(i // n)[i % n]] for i in range(step * per_step, (step + 1) * per_step)]


def learning_rate(o: Options, step: int) -> float:
    """Linear warm-up (step 0 has lr / warmup_steps), then constant, or half a cosine down to 0."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    return o.lr * (1.0 if o.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * done)))


def rollout(run, rows: list, step: int):
    """y ~ pi_old -> the prompts' ids (B lists), ids [B, T], lengths [B].  Seeded by the step: a
    resumed run needs no saved random state.  CaT-SFT: the only response is the whole `output`."""
    o, tokenizer = run.options, run.tokenizer
    prompt_ids = [chat_ids(tokenizer, row["prompt"]) for row in rows]
    if o.reward == "cat-sft":
        y = plain_ids(tokenizer, [row["output"] for row in rows])
        return prompt_ids, *grpo.pad([s + [end_of_turn(tokenizer)] for s in y], run.device)
    with run.autocast():
        ids, lengths = run.actor.sample(
            prompt_ids, o.group_size, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
            seed=8 * (o.seed * 1_000_003 + step) + 2)  # + 0: synthesis, + 1: rubrics; see `train`
    return [p for p in prompt_ids for _ in range(o.group_size)], ids, lengths


def cat_rewards(run, rows: list, rollouts: list, seed: int):
    """CaT: rollouts -> references -> rubrics -> verdicts -> rewards [B], NaN where one is missing;
    and, of each prompt, what to show: {"reference" | "rubric" | "verdicts": P of them}."""
    o, prompts, references = run.options, [row["prompt"] for row in rows], [None] * len(rows)
    settings, points = {"temperature": o.temperature}, None
    from_question = o.reward == "cat" and o.rubric_from == "question"
    if o.reward != "rubric-given" and not from_question:
        style = "stepwise" if o.reward == "cat-answer" else "freeform"
        estimators = cat.estimators(run.anchor, seed=seed, max_new_tokens=o.max_new_tokens,
                                    style=style, question=o.question_in_synthesis, **settings)
        references = estimators[o.estimator](prompts, rollouts)  # Eq. 1
    told = {"reference": references}
    if o.reward == "cat-answer":
        return cat.answer_rewards(rollouts, references), told  # Eq. 2
    if o.reward == "cat-match":  # the baseline without rubrics
        verdicts = cat.judge_match(rollouts, references, run.judge)
        return cat.rubric_rewards(verdicts), told | {"verdicts": verdicts}
    if o.reward == "cat":  # Eq. 3
        rubrics = cat.propose_rubrics(prompts, references, run.anchor, source=o.rubric_from,
                                      max_new_tokens=512, seed=seed + 1, **settings)
    else:  # the baseline with rubrics that came with the data
        rubrics, points = [row["criteria"] for row in rows], [row["points"] for row in rows]
    verdicts = cat.judge_rubrics(rollouts, rubrics, run.judge)
    told |= {"rubric": rubrics, "verdicts": verdicts}
    return cat.rubric_rewards(verdicts, points), told  # Eq. 4


def step_rewards(run, rows: list, prompt_ids, ids, lengths, seed: int):
    """-> rewards [B, T] or, one per response, [B]; mask: which count; what `cat_rewards` tells."""
    o, G, batch = run.options, run.options.group_size, (prompt_ids, ids, lengths)
    prompts, told = [row["prompt"] for row in rows for _ in range(G)], {}
    if o.reward == "cme":
        how = {"credit": o.credit, "stop_ids": run.actor.stop_ids, "score_stop": o.score_stop}
        return *cme.token_rewards(*run.verifier, run.tokenizer, prompts, ids, lengths, **how), told
    texts, _ = run.actor.texts(ids, lengths)
    if o.reward in ("cme-sequence", "reverse-kl"):
        rewards = cme.sequence_rewards(*run.verifier, prompts, texts).to(ids.device)
        if o.reward == "reverse-kl":  # mean of log p_V over N - mean of log pi over T
            rewards = rewards - logprobs(run, run.policy, *batch).sum(1) / lengths
    elif o.reward == "cat-sft":  # logged, not trained on
        rewards = logprobs(run, run.policy, *batch).sum(1) / lengths
    elif o.reward == "rent":  # minus the mean entropy of the policy's own predictions
        rewards = -logprobs(run, run.policy, *batch, entropy=True).sum(1) / lengths
    else:
        groups = [texts[i : i + G] for i in range(0, len(texts), G)]
        with run.autocast():
            rewards, told = cat_rewards(run, rows, groups, seed)
    rewards = rewards.to(ids.device)
    if o.length_penalty_after:
        rewards = rewards - (lengths > o.length_penalty_after).to(rewards)  # CaT, Section 13
    return rewards, ~rewards.isnan(), told


def micro_batches(run, model, prompt_ids, ids, lengths, entropy: bool):
    """For each micro-batch, of similar lengths: the indices of its rows, their `token_logprobs`."""
    def read(part):
        with run.autocast():
            batch, o = ([prompt_ids[i] for i in part], ids[part], lengths[part]), run.options
            return grpo.token_logprobs(model, *batch, temperature=o.temperature, entropy=entropy)
    return two_at_a_time(model, read, lengths.argsort(stable=True).split(run.options.micro_batch))


@torch.no_grad()
def logprobs(run, model, prompt_ids, ids, lengths, entropy=False):
    """log pi(y_t | x, y_<t) of a step's responses, or the entropies -> [B, T], 0 after the end."""
    values = torch.zeros(ids.shape, device=ids.device)
    for part, found in micro_batches(run, model, prompt_ids, ids, lengths, entropy):
        values[part] = found[1] if entropy else found
    return values


def update(run, optimizer, prompt_ids, ids, lengths, old_logp, ref_logp, advantages) -> dict:
    """One optimiser step on all B responses, in micro-batches of similar lengths; skipped if
    loss or gradient are not finite -> statistics.  old_logp None: the current policy's."""
    o, mask, totals = run.options, grpo.response_mask(lengths, ids.shape[1]), {}
    for part, (logp, entropy) in micro_batches(run, run.policy, prompt_ids, ids, lengths, True):
        old = logp.detach() if old_logp is None else old_logp[part]
        ref, beta = None if ref_logp is None else ref_logp[part], o.beta if o.kl_in == "loss" else 0
        loss, stats = grpo.grpo_loss(logp, old, ref, advantages[part], mask[part], beta=beta,
                                     responses=len(ids), clip_low=o.clip_low, clip_high=o.clip_high)
        loss.backward()
        for name, value in (stats | {"entropy": entropy.sum() / mask.sum()}).items():
            totals[name] = totals.get(name, 0) + value
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.max_grad_norm or 1e99)
    totals = {name: float(value) for name, value in (totals | {"grad_norm": norm}).items()}
    totals["skipped"] = int(not math.isfinite(totals["loss"] + totals["grad_norm"]))
    if not totals["skipped"]:
        optimizer.step()
    optimizer.zero_grad()  # now, so that no gradient takes memory during the next rollouts
    return totals


def scores_of(run) -> dict:
    """Held-out scores of the current policy."""
    o, rows, others = run.options, run.eval_rows, {"judge": run.judge, "verifiers": run.watch}
    with run.autocast():
        return held_out(run.actor, rows, max_new_tokens=o.max_new_tokens, **others) if rows else {}


def check_start(run, counted, told: dict) -> dict:
    """The first step: how often is the judge right?  ValueError: there is no reward at all."""
    if not counted.any():
        why = getattr(run.judge, "last_error", "")
        raise ValueError(f"no reward in the first step: no text, \\boxed, rubric or verdict {why}")
    if run.options.reward != "cat":
        return {}
    skill = cat.judge_skill(told["reference"], told["rubric"], run.judge)
    if skill < 0.85:
        tqdm.write(f"the judge is right on {skill:.0%} of criteria whose truth should be clear, "
                   "and a policy learns to please it: use a stronger --judge", sys.stderr)
    return {"judge": skill}


def show_samples(run, G, step: int, rows: list, ids, lengths, rewards, counted, told: dict):
    """Prints the first prompt's group; appends it, with tokens and rewards, to samples.jsonl."""
    prompt, story = rows[0]["prompt"], {name: of[0] for name, of in told.items()}
    texts, _ = run.actor.texts(ids[:G], lengths[:G])
    tokens = [[run.tokenizer.decode([i]) for i in y[:n]] for y, n in zip(ids[:G], lengths)]
    rewards = torch.where(counted, rewards, math.nan)[:G]
    sample = {"step": step, "prompt": prompt, "responses": texts, "tokens": tokens, **story}
    append_line(f"{run.options.output_dir}/samples.jsonl", sample | {"rewards": rewards.tolist()})
    means = rewards.view(len(texts), -1).nanmean(1).tolist()
    tqdm.write(cat.show(question_text(prompt), texts, means, **story), file=sys.stdout)


def train(run) -> dict:
    """The whole run, or what is left of it -> the contents of summary.json."""
    o, G = run.options, 1 if run.options.reward == "cat-sft" else run.options.group_size
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=o.lr, weight_decay=0.0)
    done = begin(run, optimizer)
    if not done:
        record(run, optimizer, 0, {"held_out": scores_of(run)})
    stop = ask_to_stop()
    bar = progress(range(done, o.steps), initial=done, total=o.steps, desc=o.reward)
    for step in bar:
        clock, rows = [time.time()], prompts_of_step(run.rows, o.prompts_per_step, o.seed, step)
        # 1. G responses to each of P prompts
        prompt_ids, ids, lengths = batch = rollout(run, rows, step)
        clock.append(time.time())
        # 2. their rewards: what the verifier thinks of each token, or agreement with the reference
        seed = 8 * (o.seed * 1_000_003 + step)  # synthesis; + 1: rubrics, + 2: the rollouts
        rewards, counted, told = step_rewards(run, rows, *batch, seed)
        if not step and not counted.any():
            show_samples(run, G, 0, rows, ids, lengths, rewards, counted, told)
        skill = check_start(run, counted, told) if not step else {}
        clock.append(time.time())
        # 3. compared within the group
        ref_logp = logprobs(run, run.reference, *batch) if o.beta else None
        in_reward = o.beta != 0 and o.kl_in == "reward"
        needs_old = in_reward or o.updates_per_rollout > 1  # else `update` gets them for free
        old_logp = logprobs(run, run.policy, *batch) if needs_old else None
        if o.reward == "cat-sft":  # Eq. 12: 1, unclipped, gives the gradient of log pi(s | x) / |s|
            advantages = torch.ones_like(rewards)
        elif rewards.dim() == 2:
            advantages = grpo.position_advantages(rewards, counted, G, scale=o.scale,
                                                  min_std=o.min_std)
        else:
            kl = (old_logp - ref_logp).sum(1) if in_reward else 0  # [B]
            advantages = grpo.group_advantages(rewards - o.beta * kl, G, scale=o.scale)
        # 4. clipped steps towards the better ones, held back by the reference
        optimizer.param_groups[0]["lr"] = learning_rate(o, step)
        updates = [update(run, optimizer, *batch, old_logp, ref_logp, advantages)
                   for _ in range(o.updates_per_rollout)]
        clock.append(time.time())
        # 5. how it went
        row = metrics_of(run, G, ids, lengths, rewards, counted, advantages, told, updates)
        row |= {"lr": learning_rate(o, step)} | skill
        bar.postfix = numbers({k: row[k] for k in ("reward", "kl", "truncated", "skipped")})
        if step + 1 == o.steps or (o.eval_every and (step + 1) % o.eval_every == 0):
            show_samples(run, G, step + 1, rows, ids, lengths, rewards, counted, told)
            row["held_out"] = scores_of(run)
        parts = "rollout", "scoring", "update", "other"  # evaluation, samples
        row["seconds"] = dict(zip(parts, np.diff(clock + [time.time()])))
        record(run, optimizer, step + 1, row, stop)
        if stop and step + 1 < o.steps:
            raise KeyboardInterrupt
    return finish(run)


def main():
    result = train(prepare(train_options(Options)))
    before, after, seconds = result["before"], result["after"], sum(result["seconds"].values())
    shares = ", ".join(f"{name} {of / seconds:.0%}" for name, of in result["seconds"].items())
    print(f"before: {numbers(before)}\n after: {numbers(after)}\n{result['steps']} steps in "
          f"{seconds:.0f} s ({shares}), {result['tokens'] / seconds:.0f} tokens/s, "
          f"{result['peak_memory_mb']} MB at most: {result['model']}")
    gain = {k: after[k] - v for k, v in before.items() if None not in (v, after.get(k))}
    if gain.get("watch", 0) < 0 < gain.get("trained", 0):
        print("--verifier is exploited: its score rose, --watch_verifier's fell", file=sys.stderr)


if __name__ == "__main__":
    one_clear_line(main, "train.py", "--resume continues from the last checkpoint")
