"""CaT's tables at inference, asked of the toy: estimators, disagreement, structure, and the trained policy against synthesis; for claims.py."""
import math
import os
import re
import sys
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cat  # noqa: E402
from evaluate import fact_right  # noqa: E402
from plumbing import TOY, models  # noqa: E402
from plumbing.prompts import read_prompts  # noqa: E402
from toy.selection import best_of_n, mutual_predictability  # noqa: E402

MODEL = os.path.join(TOY, "cat", "model")


def mean_se(values: list) -> tuple:
    """Mean and standard error (ddof 1)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


def t_test(a: list, b: list) -> tuple:
    """Paired t and its two-sided p (normal approximation: 32 people)."""
    mean, se = mean_se([x - y for x, y in zip(a, b)])
    t = mean / se if se else 0.0
    return t, math.erfc(abs(t) / math.sqrt(2))


def shown(values: list) -> str:
    """Mean and standard error; of one value there is none."""
    mean, se = mean_se(values)
    return f"{mean:.3f} ± {se:.3f}" if len(values) > 1 else f"{mean:.3f}"


def right_facts(row: dict, text) -> list:
    """1.0 or 0.0 for each fact, or for the final answer."""
    if row["answer"] is not None:
        return [float(cat.answer_key(text) == cat.normal_answer(row["answer"]) != "")]
    return [float(fact_right(text or "", fact)) for fact in row["facts"]]


def draw(model_path: str, file: str, repeats: int, names=None) -> list:
    """For each repeat and prompt: the row, 8 rollouts, and the reference of each estimator."""
    model = models.LocalModel(*models.load("toy", model_path, "cpu"))
    anchor = models.LocalModel(*models.load("toy", MODEL, "cpu"))
    rows, style = read_prompts(os.path.join(TOY, "cat", file)), "stepwise" if "numbers" in file else "freeform"
    prompts, drawn = [r["prompt"] for r in rows], []
    for repeat in range(repeats):
        rollouts = model.complete(prompts, n=8, max_new_tokens=48, temperature=1.0, seed=1000 + repeat)
        known = cat.estimators(anchor, max_new_tokens=48, style=style, seed=repeat)
        known |= {"best-of-n": partial(best_of_n, model=anchor), "mutual-predictability": partial(mutual_predictability, model=anchor, seed=repeat)}
        known["synthesis from 1"] = lambda prompts, rollouts, all_of=known["synthesis"]: all_of(prompts, [y[:1] for y in rollouts])
        known["synthesis, question in"] = cat.estimators(anchor, max_new_tokens=48, style=style, seed=repeat, question=True)["synthesis"]
        known["greedy"] = lambda prompts, _: [y[0] for y in model.complete(prompts, max_new_tokens=48, temperature=0.0)]
        references = {name: estimate(prompts, rollouts) for name, estimate in known.items() if names is None or name in names}
        drawn += [{"row": row, "rollouts": y, **{name: texts[i] for name, texts in references.items()}} for i, (row, y) in enumerate(zip(rows, rollouts))]
    return drawn


def per_person(drawn: list, value) -> list:
    """value(item) -> its mean for each person: both phrasings ask for the same facts, and repeats do."""
    by = {}
    for item in drawn:
        by.setdefault(re.findall(r"\b[A-Z]\w+", item["row"]["prompt"])[-1], []).append(value(item))
    return [sum(v) / len(v) for v in by.values()]


def inference(repeats: int):
    drawn = {kind: draw(MODEL, file, repeats) for kind, file in (("facts", "eval.jsonl"), ("numbers", "numbers_eval.jsonl"))}
    print("\nEstimators at inference          facts            all four right   numbers")
    names = [n for n in drawn["facts"][0] if n not in ("row", "rollouts")]
    for item in drawn["facts"] + drawn["numbers"]:                             # the best of the 8 by the truth: what no selection can beat
        item["(oracle: best of 8)"] = max(item["rollouts"], key=lambda y, row=item["row"]: sum(right_facts(row, y)))
    for name in names + ["(oracle: best of 8)"]:
        facts = per_person(drawn["facts"], lambda d, k=name: mean_se(right_facts(d["row"], d[k]))[0])
        every = per_person(drawn["facts"], lambda d, k=name: float(all(right_facts(d["row"], d[k]))))
        numbers = per_person(drawn["numbers"], lambda d, k=name: right_facts(d["row"], d[k])[0])
        none = name == "majority"                                              # biographies have no final answer to vote on
        print(f"{name:<30} {'-' if none else shown(facts):>15}  {'-' if none else shown(every):>15}  {shown(numbers):>15}")

    print("\nDisagreement (Table 1): how often synthesis differs, and is then right | the other is then right")
    for kind, other in (("numbers", "majority"), ("numbers", "best-of-n"), ("facts", "best-of-n")):
        pairs = [(a, b) for d in drawn[kind] for a, b in zip(right_facts(d["row"], d["synthesis"]), right_facts(d["row"], d[other]))] if kind == "facts" else \
            [(right_facts(d["row"], d["synthesis"])[0], right_facts(d["row"], d[other])[0]) for d in drawn[kind]
             if cat.answer_key(d["synthesis"]) != cat.answer_key(d[other])]
        total = sum(len(right_facts(d["row"], "")) for d in drawn[kind])
        differ = [(a, b) for a, b in pairs if a != b or kind == "numbers"]
        print(f"{kind}, {other}: {len(differ)} of {total} ({len(differ) / total:.1%}{', as far as one of them is right' * (kind == 'facts')}); "
              f"right {sum(a for a, _ in differ):.0f} | {sum(b for _, b in differ):.0f}")
    for kind in drawn:
        none = [d for d in drawn[kind] if not any(all(right_facts(d["row"], y)) for y in d["rollouts"])]
        print(f"{kind}: no rollout is wholly right on {len(none)} of {len(drawn[kind])}; there synthesis is on "
              f"{sum(all(right_facts(d['row'], d['synthesis'])) for d in none)}, any selection on 0")

    print("\nStructure of synthesis against rollouts (Table 9)     synthesis   rollouts   t        p")
    tokenizer = models.load_tokenizer(MODEL)
    for kind in drawn:
        for what, size in (("tokens", lambda y: len(tokenizer(y).input_ids)), ("lines", lambda y: y.count("\n") + 1), ("equations", lambda y: y.count("="))):
            a = per_person(drawn[kind], lambda d, size=size: size(d["synthesis"]))
            b = per_person(drawn[kind], lambda d, size=size: mean_se([*map(size, d["rollouts"])])[0])
            t, p = t_test(a, b)
            print(f"{kind + ', ' + what:<50} {mean_se(a)[0]:>12.2f} {mean_se(b)[0]:>10.2f} {t:>8.2f} {f'{p:.1e}' if p > 1e-9 else '<1e-9':>8}")


def figure_6(results: dict, repeats: int):
    """CaT's Figure 6: the trained policy against synthesis from the initial one."""
    print("\nOne answer of the trained policy against synthesis from the initial one (nine times the compute), and synthesis on top of it (Figure 6)")
    for kind, file, name in (("facts", "eval.jsonl", "cat"), ("numbers", "numbers_eval.jsonl", "cat-answer")):
        for who, paths in {"initial": [MODEL], "trained": [r["model"] for r in results.get(name, {}).values()]}.items():
            for how in ("greedy", "single", "synthesis") + ("majority",) * (kind == "numbers"):
                drawn = [item for path in paths for item in draw(path, file, repeats, [how])]
                if drawn:
                    print(f"{kind:>8}, {who} policy, {how:<10} {shown(per_person(drawn, lambda d, k=how: mean_se(right_facts(d['row'], d[k]))[0]))}")
