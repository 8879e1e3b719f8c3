"""What the scripts compute, on one screen of 80 columns, for real.

    python align.py                      # Appendix B; an emoji cut in three; two tokenizers
    python grpo.py                       # a group of four by hand, from rewards to loss
    python cme.py "Describe Rosa." "Rosa keeps a dog and lives in Prague."
    python cat.py "Tell me about Mia."   # answers, reference, rubric, verdicts, rewards
"""
import argparse
import math
import os
import sys
import textwrap

import numpy as np
import torch

from plumbing import TOY, one_clear_line, one_line

WIDTH = 80


def under_each_other(text: str, spans: dict, colours=()) -> str:
    """{name: spans [n, 2]} of one text -> a line of each, a bar where a token begins, so that
    the same characters stand under each other.  colours: of the first one's tokens."""
    edges = {name: {math.floor(x + 1e-6) for x in np.ravel(of)} for name, of in spans.items()}
    cuts = sorted({0, len(text)}.union(*edges.values()))
    first, lines, blocks = next(iter(spans)), {name: "" for name in spans}, []
    for a, b in [*zip(cuts, cuts[1:]), (len(text), len(text))]:
        if len(lines[first]) + 1 + b - a > WIDTH - 12:
            blocks.append(lines)
            lines = {name: "" for name in spans}
        for name in spans:
            lines[name] += ("|" if a in edges[name] else " ") + one_line(text[a:b])
    shown = []
    for lines in [*blocks, lines]:
        shown += [f"{name:>10}  {painted(line, colours) if name == first else line}" for name, line in lines.items()] + [""]
        colours = colours[lines[first].count("|"):]
    return "\n".join(shown)


def painted(line: str, colours) -> str:
    """The pieces between bars on a red ground, the deeper the lower the reward; on a terminal."""
    if not sys.stdout.isatty():
        return line
    head, *pieces = line.split("|")
    return head + "".join(f"|\x1b[48;5;{c}m{p}\x1b[0m" if c else f"|{p}" for p, c in zip(pieces, [*colours, *[0] * len(pieces)]))


def rewards_table(text: str, target, rewards, mask, source, values) -> str:
    """A line per generator token: its reward, and the verifier's tokens that begin in it."""
    names = [f"{text[math.floor(a + 1e-6):math.ceil(b - 1e-6)]!r}" + (f" {b - a:.2f} of it" if b % 1 or a % 1 else "") for a, b in target]
    lines, done = [f"{'reward':>8}  {'generator':<18}verifier's tokens that begin in it, log p"], 0
    for name, (a, b), reward, counted in zip(names, target, rewards, mask):
        has = [j for j in range(done, len(source)) if source[j][0] < b - 1e-6]
        done += len(has)
        said = ", ".join(f"{text[math.floor(source[j][0] + 1e-6):math.ceil(source[j][1] - 1e-6)]!r} {values[j]:.2f}" for j in has)
        lines.append(f"{f'{reward:.2f}' if counted else 'masked':>8}  {name:<18}{said}"[:WIDTH])
    kept = sum(reward for reward, counted in zip(rewards, mask) if counted)
    lost = "" if kept < sum(values) + 0.005 else f", of which {sum(values) - kept:.2f} are masked"
    return "\n".join([*lines, f"{kept:8.2f}  total: the verifier's is {sum(values):.2f}{lost}\n"])


def align():
    """Eq. 1 on three texts; the values are made up."""
    from align import align, spans_from_ids, spans_from_text, visible
    from plumbing.models import load_tokenizer, plain_ids
    print("Appendix B. The verifier's -7 and -2 nats, by shares of characters:\n")
    text, source, target = "unhappiness", [[0, 7], [7, 11]], [[0, 2], [2, 11]]
    print(under_each_other(text, {"generator": target, "verifier": source}))
    print(rewards_table(text, target, align([-7, -2], source, target), [1, 1], source, [-7, -2]))
    print("An emoji of four bytes, cut in three by the generator, -4 nats to the verifier.\n"
          "The library's offsets give each piece all of it: an overlap sum would make -12.\n")
    text, source, target = "a\U0001f642", [[0, 1], [1, 2]], [[0, 1], [1, 1.5], [1.5, 1.75], [1.75, 2]]
    print(rewards_table(text, target, align([-1, -4], source, target), [1] * 4, source, [-1, -4]))
    print("The toy's two tokenizers, -1 nat for each of the verifier's tokens:\n")
    text = "Rosa keeps a ferret,  lives in Paris and likes rice."
    generator, verifier = (load_tokenizer(f"{TOY}/cme/{name}") for name in ("generator", "verifier"))
    text, target = spans_from_ids(generator, plain_ids(generator, [text])[0])
    v_ids, source = spans_from_text(verifier, text)
    values = -np.ones(len(v_ids))
    print(under_each_other(text, {"generator": target, "verifier": source}))
    print(rewards_table(text, target, align(values, source, target), visible(text, target), source, values))


def grpo():
    """Per-position advantages and the loss of four responses, all numbers shown."""
    import grpo
    lengths = torch.tensor([3, 2, 3, 1])
    mask = grpo.response_mask(lengths, 3)
    rewards = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -1.0, 0.0], [-5.0, -3.0, -1.0], [-3.0, 0.0, 0.0]])
    ratio = torch.tensor([[1.0, 1.3, 0.9], [1.1, 0.7, 1.0], [1.3, 0.7, 1.0], [1.0, 1.0, 1.0]])
    advantages = grpo.position_advantages(rewards, mask, 4)
    logp = ratio.log().requires_grad_()  # log rho, with old_logp 0
    loss, stats = grpo.grpo_loss(logp, torch.zeros(4, 3), None, advantages, mask, beta=0.0)
    loss.backward()
    clipped = ratio.clamp(0.8, 1.2)
    terms = torch.min(ratio * advantages, clipped * advantages)
    print("Four responses, of 3, 2, 3 and 1 tokens. At each position a reward is compared\n"
          "with the others' there: A = (r - mean) / (std + 1e-4), ddof 1.\n\n"
          "     t  reward       A     rho clipped  min(rho A, clipped A)  d loss / d log pi")
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            cells = [float(x[i, t]) for x in (rewards, advantages, ratio, clipped)]
            print(f"y_{i + 1}{t + 1:>3}{''.join(f'{x:8.2f}' for x in cells)}{float(terms[i, t]):18.2f}{float(logp.grad[i, t]) + 0.0:20.3f}")
    each = (torch.where(mask, terms, 0).sum(1) / lengths).tolist()
    print(f"\nloss = -1/4 sum_i 1/|y_i| sum_t min(rho A, clipped A)\n     = -1/4 ({' + '.join(f'{x:.3f}' for x in each)}) = {loss:.4f}\n"
          "Where the minimum took the clipped term the gradient is 0; at t = 3 there are\n"
          f"only y_1 and y_3. Weight of the clipped tokens: {stats['clipfrac']:.0%}.\n")


def cme():
    """A response, token by token, as a verifier reads it."""
    from align import spans_from_ids, spans_from_text
    from cme import aligned_rewards
    from plumbing.models import answer_logprobs, load, load_tokenizer, plain_ids
    parser = argparse.ArgumentParser(prog="cme.py", description="Eq. 1 for one response.")
    parser.add_argument("prompt")
    parser.add_argument("response")
    parser.add_argument("--generator", default=f"{TOY}/cme/generator", help="whose tokens are rewarded: a folder or a hub name")
    parser.add_argument("--verifier", default=f"{TOY}/cme/verifier", help="who scores: a folder or a hub name")
    parser.add_argument("--credit", default="token", choices=["token", "word"])
    o = parser.parse_args()
    verifier, generator = load("--verifier", o.verifier), load_tokenizer(o.generator)
    text, target = spans_from_ids(generator, plain_ids(generator, [o.response])[0])
    ids, source = spans_from_text(verifier[1], text)
    [values] = answer_logprobs(*verifier, [o.prompt], [ids])
    rewards, mask = aligned_rewards(values, source, text, target, o.credit)
    colours = [0 if not m else (0, 224, 217, 210, 203, 196)[min(5, int(-r))] for r, m in zip(rewards, mask)]
    print(f"{under_each_other(text, {'generator': target, 'verifier': source}, colours)}\n{rewards_table(text, target, rewards, mask, source, values)}")
    if o.credit == "word":
        print("Each token has its whole word's sum: a word of three tokens counts three times.")


def cat():
    """The paper for one prompt: G answers -> reference -> rubric -> verdicts -> rewards."""
    import cat
    from plumbing.models import text_model
    parser = argparse.ArgumentParser(prog="cat.py", description=cat.__doc__.split("\n")[0])
    add = parser.add_argument
    add("prompt")
    add("--model", default=f"{TOY}/cat/model", help="a folder, a hub name or MODEL@URL")
    add("--estimator", default="synthesis", choices=cat.estimators(None), help="of the reference")
    add("--style", default="freeform", choices=cat.SYNTHESIS, help="stepwise: with a final answer")
    add("--group_size", type=int, default=8, help="G, how many answers")
    add("--max_new_tokens", type=int, default=48, help="longest answer")
    add("--seed", type=int, default=0)
    o = parser.parse_args()
    model = text_model("--model", o.model, key=os.environ.get("JUDGE_API_KEY"))
    settings = {"max_new_tokens": o.max_new_tokens, "seed": o.seed}
    if o.estimator == "min-perplexity" and not hasattr(model, "logprob"):
        raise ValueError(f"--estimator {o.estimator} needs a local model's log-probabilities")
    rollouts = model.complete([o.prompt], n=o.group_size, **settings)
    if None in rollouts[0]:
        raise ValueError(f"no answer from {o.model}: {model.last_error or 'too long'}")
    references = cat.estimators(model, style=o.style, **settings)[o.estimator]([o.prompt], rollouts)
    if o.style == "stepwise":
        rewards, rubrics, verdicts = cat.answer_rewards(rollouts, references), [()], [()]
    else:
        rubrics = cat.propose_rubrics([o.prompt], references, model, max_new_tokens=512, seed=o.seed)
        verdicts = cat.judge_rubrics(rollouts, rubrics, model)
        rewards = cat.rubric_rewards(verdicts)
    told = cat.show(o.prompt, rollouts[0], rewards.tolist(), reference=references[0], rubric=rubrics[0], verdicts=verdicts[0])
    if rewards.isnan().all():
        lacks = "the reference has no \\boxed answer" if o.style == "stepwise" else f"no {'verdict' if rubrics[0] else 'rubric'} can be read"
        told += f"\nno reward: {lacks}"
    print("\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * 8) for line in told.split("\n")))


def show(script: str):
    """Of a script's path: what it does."""
    name = os.path.basename(script)
    one_clear_line(globals()[name.removesuffix(".py")], name, "the same command starts again")
