"""Label-free RL with GRPO.  CME (arXiv 2605.29009): the reward is what a second, frozen model
thinks of each word.  CaT (arXiv 2509.14234): agreement with a reference made of own answers.

    python train.py                            # CME on the toy, on a CPU, in about a minute
    python train.py --reward cat               # CaT on the toy: synthesis, rubric, judge
    python train.py --generator Qwen/Qwen2.5-0.5B --verifier google/gemma-3-1b-it \\
        --prompts ultrafeedback --lr 3e-6 --warmup_steps 20 --beta 0.01 --steps 5000 \\
        --prompts_per_step 1 --micro_batch 1 --max_new_tokens 1024 --save_every 500  # CME's recipe
    python train.py --resume                   # continue the newest run

Deliberate departures from the papers: at the heads of align.py, grpo.py, cme.py, cat.py; defaults
are the toy's; AdamW's weight decay is 0.  Letters as in grpo.py.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Optional

import torch

import cat
import cme
import grpo
from evaluate import held_out, score
from plumbing import one_clear_line, option, progress
from plumbing.files import lock, read_json
from plumbing.models import LocalModel, chat_ids, response_texts, token_budget
from plumbing.records import begin, finish, metrics_of, record, show_samples, table_row
from plumbing.setup import Run, prepare, train_options

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")
TOYS = {  # what is taken where --generator, --prompts, --eval_prompts are empty
    "cme": ("cme/generator", "cme/prompts.jsonl", "cme/eval.jsonl"),
    "cat": ("cat/model", "cat/prompts.jsonl", "cat/eval.jsonl"),
    "cat-answer": ("cat/model", "cat/numbers.jsonl", "cat/numbers_eval.jsonl")}
REWARDS = Literal["cme", "cme-sequence", "cat", "cat-answer", "cat-match", "rubric-given"]
ESTIMATORS = Literal["synthesis", "majority", "best-of-n", "min-perplexity",
                     "mutual-predictability", "single", "cme"]


@dataclass
class Options:
    reward: REWARDS = option(
        "cme", "cme: per token (CME, Eq. 1); cme-sequence: per response (Eq. 3); cat: share of the "
        "criteria of a rubric made from the reference (CaT, Eq. 3-4); cat-answer: same final answer "
        "(Eq. 2); cat-match: judged the same as the reference; rubric-given: the prompts' own rubrics")
    credit: Literal["token", "word"] = option("token", "cme: the paper's, or the whole word's")
    score_stop: bool = option(False, "cme: the stop token too, by the verifier's end of turn")
    generator: str = option("", "model to train, a folder or a hub name; empty: the toy's")
    verifier: str = option(f"{TOY}/cme/verifier", "CME: frozen model that scores")
    estimator: ESTIMATORS = option(
        "synthesis", "CaT: how rollouts become a reference; cme: the one that --verifier prefers")
    anchor: str = option("", "CaT: writes references and rubrics; empty: the initial policy")
    judge: str = option("", "CaT: a model or MODEL@URL (JUDGE_API_KEY); empty: the anchor")
    question_in_synthesis: bool = option(False, "let the anchor read the question too")
    rollouts_in_context: int = option(0, "how many rollouts the anchor reads; 0: all")
    rubric_from: Literal["reference", "question"] = option("reference", "what rubrics are made from")
    length_penalty_after: int = option(0, "reward - 1 beyond this many tokens; 0: never")
    prompts: str = option("", "a .jsonl, .json or .txt file, or ultrafeedback, math500, ...")
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
    kl_in: Literal["loss", "reward"] = option(
        "loss", "k3 at every token, or R = r - beta sum_t log pi_old / pi_ref, one per response")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.2, "and above 1 + clip_high")
    scale: bool = option(True, "divide advantages by the group's deviation, or centre them only")
    updates_per_rollout: int = option(1, "optimiser steps on each batch of rollouts")
    micro_batch: int = option(32, "responses per forward and backward pass; same gradient")
    batch_tokens: int = option(0, "tokens of a batch of rollouts; 0: what suits the device")
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped at this")
    gradient_checkpointing: bool = option(False, "less memory for more compute")
    seed: int = option(0, "of the order of prompts and of sampling")
    output_dir: str = option("", "where all goes; empty: runs/REWARD-DATE-TIME, or the newest")
    resume: bool = option(False, "continue the run in --output_dir, with its options")
    save_every: int = option(20, "steps between checkpoints; only the newest is kept")
    keep: Literal["last", "best"] = option("last", "best: the model with the best held-out score")
    eval_every: int = option(10, "steps between held-out scores; 0: only before and after")
    sample_every: int = option(20, "steps between samples on the screen and in samples.jsonl")
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
    """y ~ pi_old -> the prompts' ids (B lists), ids [B, T], lengths [B].  Seeded by the step: a
    resumed run needs no random state."""
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
        return cat.best_by(partial(cme.sequence_rewards, *run.verifier), prompts, rollouts)
    style = "stepwise" if o.reward == "cat-answer" else "freeform"
    estimators = cat.estimators(
        run.anchor, seed=seed, style=style, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
        question=o.question_in_synthesis, in_context=o.rollouts_in_context)
    return estimators[o.estimator](prompts, rollouts)


def by_rubric(run, rows, rollouts, seed):
    """Eq. 3-4: references -> rubrics -> verdicts -> share of yes."""
    o, prompts, references = run.options, [row["prompt"] for row in rows], [None] * len(rows)
    if o.rubric_from == "reference":
        references = find_references(run, rows, rollouts, seed)
    rubrics = cat.propose_rubrics(prompts, references, run.anchor, seed=seed + 1, max_new_tokens=512,
                                  source=o.rubric_from, temperature=o.temperature)
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
    rubrics = [[c["criterion"] for c in row["rubrics"]] for row in rows]
    points = [[c["points"] for c in row["rubrics"]] for row in rows]
    verdicts = cat.judge_rubrics(rollouts, rubrics, run.judge)
    return cat.rubric_rewards(verdicts, points), {"rubric": rubrics, "verdicts": verdicts}


CAT_REWARDS = {"cat": by_rubric, "cat-answer": by_answer, "cat-match": by_match,
               "rubric-given": by_given}


def step_rewards(run: Run, rows: list, ids, lengths, seed: int):
    """-> rewards [B, T] or, one per response, [B]; which of them count; what CaT has to tell of
    each prompt, {"reference" | "rubric" | "verdicts" | ...: P of them}."""
    o, G, told = run.options, run.options.group_size, {}
    prompts = [row["prompt"] for row in rows for _ in range(G)]
    if o.reward == "cme":
        rewards, counted = cme.token_rewards(
            *run.verifier, run.tokenizer, prompts, ids, lengths, credit=o.credit,
            score_stop=o.score_stop, stop_ids=run.stop_ids)
        return rewards, counted, told
    texts, _ = response_texts(run.tokenizer, ids, lengths, run.stop_ids)
    rollouts = [texts[i : i + G] for i in range(0, len(texts), G)]
    if o.reward == "cme-sequence":
        rewards = cme.sequence_rewards(*run.verifier, prompts, texts).to(ids.device)
    else:
        rewards, told = CAT_REWARDS[o.reward](run, rows, rollouts, seed)
        rewards = rewards.to(ids.device)
        if rewards.isnan().all() and getattr(run.judge, "last_error", ""):
            raise ConnectionError(f"no verdict in a whole step, {run.judge.last_error}")
        told |= {"prompt": prompts[::G], "rollouts": rollouts}
    if o.length_penalty_after:
        rewards = cat.length_penalty(rewards, lengths, o.length_penalty_after)
    if told:
        told["rewards"] = rewards.view(-1, G).tolist()
    return rewards, ~rewards.isnan(), told


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
    """CaT: R_i = r_i - beta sum_t (log pi_old - log pi_ref), [B], [B, T], [B, T] -> [B]."""
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
        ref = None if ref_logp is None else ref_logp[part]
        loss, stats = grpo.grpo_loss(
            logp, old, ref, advantages[part], mask[part], responses=len(ids),
            beta=o.beta if o.kl_in == "loss" else 0.0, clip_low=o.clip_low, clip_high=o.clip_high)
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


# The algorithm


def scores_of(run: Run) -> dict:
    """Held-out scores of the policy as it is."""
    if not run.eval_rows:
        return {}
    policy = LocalModel(run.policy, run.tokenizer, batch_tokens=run.options.batch_tokens)
    with autocast(run.device):
        return held_out(policy, run.eval_rows, max_new_tokens=run.options.max_new_tokens,
                        judge=run.judge)


def anchor_skills(run: Run, most: int = 64) -> dict:
    """What CaT rests on, measured on held-out prompts: scores of single answers and of references,
    rubrics read, the judge on criteria known to be true or false."""
    o, rows, seed = run.options, (run.eval_rows or run.rows)[:most], 8 * run.options.seed + 5
    settings = {"temperature": o.temperature, "seed": seed}
    prompts = [row["prompt"] for row in rows]
    policy = LocalModel(run.policy, run.tokenizer, top_k=o.top_k, top_p=o.top_p)
    rollouts = policy.complete(prompts, n=o.group_size, max_new_tokens=o.max_new_tokens, **settings)
    named = {"single": cat.single(prompts, rollouts)}
    if o.reward != "rubric-given":
        named[o.estimator] = find_references(run, rows, rollouts, seed + 1)
    references, skills = [*named.values()][-1], {}
    if not any(references):
        raise ValueError(f"--estimator {o.estimator} made no reference of the answers to {len(rows)} "
                         "prompts: no final answers in \\boxed{}, or too long for the anchor?")
    for name, texts in named.items():
        scores = score(rows, [text or "" for text in texts], [True] * len(rows))
        skills |= {f"{name}: {k}": scores[k] for k in ("facts", "accuracy") if k in scores}
    if run.judge:
        rubrics = cat.propose_rubrics(prompts, references, run.anchor, max_new_tokens=512,
                                      **settings | {"seed": seed + 2})
        skill = cat.judge_skill(references, rubrics, run.judge)
        skills |= {"rubrics read": sum(map(bool, rubrics)) / len(rows)}
        skills |= {f"judge: {k}": v for k, v in skill.items()}
        if (skill["true"] + skill["false"]) / 2 < 0.85:
            print("the judge is wrong on more than 15% of criteria known to be true or false: a policy "
                  "learns to please such a judge; take a stronger --judge", file=sys.stderr)
        if o.reward == "cat" and not any(rubrics) or skill["unread"] == 1:
            raise ValueError("no rubric of the anchor's could be read, or no verdict of the judge's:"
                             " a stronger --anchor or --judge is needed")
    print("anchor: " + ", ".join(f"{name} {value:.3f}" for name, value in skills.items()))
    return {name: round(value, 4) for name, value in skills.items()}


def train(run: Run) -> dict:
    """The whole run, or what is left of it -> the contents of summary.json."""
    o, G, held = run.options, run.options.group_size, lock(run.options.output_dir)
    optimizer = torch.optim.AdamW(run.policy.parameters(), lr=o.lr, weight_decay=0.0)
    state = begin(run, optimizer, scores_of, anchor_skills)
    done, total = state["step"], o.steps
    bar = progress(range(done, total), initial=done, total=total, desc=o.reward)
    for step in bar:
        clock, rows = time.time(), prompts_of_step(run.rows, o.prompts_per_step, o.seed, step)

        # 1. G responses to each of P prompts
        prompt_ids, ids, lengths = batch = rollout(run, rows, step)

        # 2. their rewards: what the verifier thinks of each token, or agreement with the reference
        seed = 8 * (o.seed * 1_000_003 + step)
        rewards, counted, told = step_rewards(run, rows, ids, lengths, seed)

        # 3. compared within the group
        ref_logp = logprobs(run, run.reference, *batch) if o.beta else None
        again = o.updates_per_rollout > 1 or (o.beta and o.kl_in == "reward")
        old_logp = logprobs(run, run.policy, *batch) if again else None  # else: the policy's own
        if rewards.dim() == 2:
            advantages = grpo.position_advantages(rewards, counted, G, scale=o.scale)
        else:
            in_reward = o.beta and o.kl_in == "reward"
            shifted = with_kl(rewards, old_logp, ref_logp, o.beta) if in_reward else rewards
            advantages = grpo.group_advantages(shifted, G, scale=o.scale)

        # 4. clipped steps towards the better ones, held back by the reference
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        updates = [update(run, optimizer, *batch, old_logp, ref_logp, advantages)
                   for _ in range(o.updates_per_rollout)]

        # 5. how it went
        row = metrics_of(run, ids, lengths, rewards, counted, advantages, told, updates)
        row |= {"lr": learning_rate(o, step), "seconds": time.time() - clock}
        if step % o.sample_every == 0:
            show_samples(run, step + 1, rows, ids, lengths, rewards, counted, told)
        state = record(run, optimizer, step + 1, row, updates, state, scores_of)
        bar.set_postfix_str(f"reward {row['reward']:.2f}, KL {row['kl']:.3f}", refresh=False)
    result = finish(run, state["seconds"], scores_of)
    held.close()
    return result


def main():
    o = train_options(Options, TOY)
    result = read_json(os.path.join(o.output_dir, "summary.json"))
    if result and o.resume and result["steps"] >= o.steps:
        print("this run had finished, nothing was done; more --steps would continue it")
    else:
        run = prepare(o)
        print(json.dumps(asdict(o)))
        result = train(run)
    print(table_row("before", result["before"], True) + table_row("after", result["after"])
          + f"{result['steps']} steps in {result['seconds']:.0f} s, {result['peak_memory_mb']} MB at "
          f"most. The model is in {result['model']}; beside it are config.json, metrics.jsonl, "
          "samples.jsonl and summary.json.")


if __name__ == "__main__":
    one_clear_line(main, "train.py", "--resume continues from the last checkpoint")
