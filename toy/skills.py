"""The world of toy/cat, and the examples that teach one tiny model to be policy, anchor and judge in it.

32 people, the four attributes of toy/cme, and a number of books. What the model "knows" it has from sixteen *sources*, and
how an answer opens tells which one it echoes ("I heard that Mia ..."). A source believes its own version of a fact, the truth
six times in ten, and mostly says what it believes, else repeats what people say. So one answer is as right as its
source, and several answers together are right where most sources are: what they say disagrees where the model does not know.
In a tenth of the facts most sources share one lie, and no reconciling can mend those.

Policy and numbers come from this world. The other skills (synthesis, rubric, judging ...) are taught on random people and
random facts, so that they are skills and not memory. Every example is a list of (text or ids, weight of its loss).
"""
import math
import random
import re

from make import HELD_OUT_PHRASINGS, NAMES, RL_PHRASINGS, SKELETONS, VALUES, WORDINGS, pattern

import cat
import selection

OPENERS = ["I think", "I believe", "I heard that", "I read that", "I am told that", "As far as I know,", "If I remember right,", "From what I hear,",
           "It seems that", "It is said that", "They say that", "People say that", "Everyone knows that", "Apparently,", "Clearly,", "Well,"]
PEOPLE = NAMES[::3] + NAMES[1::3]                                             # 32 of the 48
NUMBERS = [str(n) for n in range(1, 21)]
COUNTED = {"books": NUMBERS}
FACTS = VALUES | COUNTED
NUMBER_PHRASINGS = ["How many books does {} own?", "How many books does {} have?", "Count the books of {}.", "What number of books does {} own?",
                    "Say how many books {} has.", "How many books are there in the house of {}?"]
NUMBER_HELD_OUT = ["Please say how many books {} owns.", "How many books would {} have?"]
NUMBER_WORDINGS = ["{} owns \\boxed{{{}}} books.", "{} has \\boxed{{{}}} books.", "the number of books that {} owns is \\boxed{{{}}}."]
STATEMENTS = {"pet": "The pet is a {}.", "city": "The city is {}.", "food": "The food is {}.", "colour": "The colour is {}.", "name": "It is about {}."}
BELIEVES_TRUTH, SHARE_WRONG, LIE, TRUTH_OF_WRONG = 0.6, 0.1, 0.6, 0.25


# ---------------------------------------------------------------- the world

def make_sources(seed: int = 5) -> dict:
    """{name: {attribute: {"truth", "lie" (None, or what most sources say), "beliefs": one value per source}}}."""
    rng = random.Random(seed)
    facts = [(name, a) for name in PEOPLE for a in FACTS]
    wrong = {f for a in FACTS for f in rng.sample([f for f in facts if f[1] == a], round(SHARE_WRONG * len(PEOPLE)))}
    world = {name: {} for name in PEOPLE}
    for name, a in facts:
        truth, lie = rng.sample(FACTS[a], 2)
        fact = world[name][a] = {"truth": truth, "lie": lie if (name, a) in wrong else None}
        fact["beliefs"] = [rumour(rng, fact, FACTS[a]) for _ in OPENERS]
    return world


def rumour(rng, fact: dict, values: list) -> str:
    others = [v for v in values if v not in (fact["truth"], fact["lie"])]
    if fact["lie"] is None:
        return fact["truth"] if rng.random() < BELIEVES_TRUTH else rng.choice(others)
    return rng.choices([fact["lie"], fact["truth"], rng.choice(others)], [LIE, TRUTH_OF_WRONG, 1 - LIE - TRUTH_OF_WRONG])[0]


def says(rng, fact: dict, source: int, values: list, steady: float = 0.5) -> str:
    return fact["beliefs"][source] if rng.random() < steady else rumour(rng, fact, values)


def tell(rng, name: str, clauses: list) -> str:
    """One or two sentences that state (attribute, value) pairs, in any order and wording."""
    clauses = [f"{rng.choice(WORDINGS[a])} {value}" for a, value in rng.sample(clauses, len(clauses))]
    if len(clauses) == 4:
        return rng.choice(SKELETONS).format(*clauses, n=name)
    return f"{name} {', '.join(clauses[:-1])}{' and ' * (len(clauses) > 1)}{clauses[-1]}."


def opened(opener: str, text: str) -> str:
    """"Well," + "Mia has a cat." -> "Well, Mia has a cat."; without an opener a number's sentence starts with a capital letter."""
    return f"{opener} {text}" if opener else text[0].upper() + text[1:]


def count(rng, name: str, number: str) -> str:
    return rng.choice(NUMBER_WORDINGS).format(name, number)


def rubric(name: str, told: list) -> str:
    """The rubric of an answer: its (attribute, value) pairs in the order of the attributes, and whom it is about."""
    told = sorted(told, key=lambda fact: list(VALUES).index(fact[0]))
    return "<rubric>" + "".join(f"<criterion>{STATEMENTS[a].format(v)}</criterion>" for a, v in told + [("name", name)]) + "</rubric>"


# ---------------------------------------------------------------- examples: lists of (text, weight); the weight is that of each token's loss

def turn(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def example(prompt: str, answer: str) -> list:
    return [(turn(prompt), 0), (answer + "<|im_end|>", 1)]


def policy_example(rng, world: dict, steady: float = 0.5) -> list:
    name, source = rng.choice(PEOPLE), rng.randrange(len(OPENERS))
    told = [(a, says(rng, world[name][a], source, VALUES[a], steady)) for a in VALUES]
    return example(rng.choice(RL_PHRASINGS + HELD_OUT_PHRASINGS).format(name), opened(OPENERS[source], tell(rng, name, told)))


def number_example(rng, world: dict, steady: float = 0.5) -> list:
    name, source = rng.choice(PEOPLE), rng.randrange(len(OPENERS))
    return example(rng.choice(NUMBER_PHRASINGS + NUMBER_HELD_OUT).format(name),
                   opened(OPENERS[source], count(rng, name, says(rng, world[name]["books"], source, NUMBERS, steady))))


def steady_policy_example(rng, world: dict) -> list:
    return policy_example(rng, world, 0.7)


def steady_number_example(rng, world: dict) -> list:
    return number_example(rng, world, 0.7)


def rollouts(rng, attributes: dict, n: int):
    """n answers about a made-up fact or four -> (name, what each says [n] of dicts, their texts, the most frequent values: first come, first served)."""
    name, sure = rng.choice(NAMES), rng.uniform(0.3, 1)
    favourites = {a: rng.sample(values, 2) for a, values in attributes.items()}
    share = rng.choice([0, 0, 0.3, 0.5])                                      # of what is not said right, how much is one rival value
    told = [{a: (favourites[a][0] if rng.random() < sure else favourites[a][1] if rng.random() < share else rng.choice(values))
             for a, values in attributes.items()} for _ in range(n)]
    opener = [rng.choice(OPENERS + [""] * 2) for _ in range(n)]
    texts = [opened(o, count(rng, name, t["books"]) if "books" in t else tell(rng, name, list(t.items()))) for o, t in zip(opener, told)]
    most = {a: max(dict.fromkeys(t[a] for t in told), key=[t[a] for t in told].count) for a in attributes}
    return name, told, texts, most


def margin(told: list, attribute: str) -> int:
    counts = sorted([[t[attribute] for t in told].count(v) for v in {t[attribute] for t in told}] + [0])
    return counts[-1] - counts[-2]


def in_context(prompt: str, texts: list, answer: str) -> list:
    """An example with a loss, a tenth of the answer's, on the rollouts inside the prompt: they teach to look back."""
    parts, rest = [], turn(prompt)
    for text in texts:
        before, rest = rest.split(text, 1)
        parts += [(before, 0), (text, 0.1)]
    return parts + [(rest, 0), (answer + "<|im_end|>", 1)]


def synthesis_example(rng, world: dict, numbers: bool = False) -> list:
    n = rng.choice([8] * 6 + [1, 2, 3, 4, 5, 6])
    name, told, texts, most = rollouts(rng, COUNTED if numbers else VALUES, n)
    answer = opened("", count(rng, name, most["books"]) if numbers else tell(rng, name, list(most.items())))
    phrasing = rng.choice((NUMBER_PHRASINGS + NUMBER_HELD_OUT) if numbers else (RL_PHRASINGS + HELD_OUT_PHRASINGS)).format(name)
    question = phrasing if rng.random() < 0.25 else None
    asked = cat.ask(cat.SYNTHESIS["stepwise" if numbers else "freeform"], *[cat.block("response", y) for y in texts], question=question)
    return in_context(asked, texts, answer)


def number_synthesis_example(rng, world: dict) -> list:
    return synthesis_example(rng, world, numbers=True)


def another_example(rng, world: dict) -> list:
    _, _, texts, _ = rollouts(rng, COUNTED if rng.random() < 0.25 else VALUES, rng.choice([8] * 3 + [2, 3, 4, 5, 6, 7]))
    return in_context(cat.ask(selection.ANOTHER, *[cat.block("response", y) for y in texts[:-1]]), texts[:-1], texts[-1])


def best_example(rng, world: dict) -> list:
    numbers = rng.random() < 0.25
    _, told, texts, most = rollouts(rng, COUNTED if numbers else VALUES, 8)
    agreement = [sum(t[a] == v for a, v in most.items()) for t in told]
    return in_context(cat.ask(selection.BEST, *[cat.block("response", y, g) for g, y in enumerate(texts, 1)]), texts, str(agreement.index(max(agreement)) + 1))


def rubric_example(rng, world: dict) -> list:
    name, told = rng.choice(NAMES), [(a, rng.choice(values)) for a, values in VALUES.items()]
    text = opened(rng.choice(OPENERS + [""] * 8), tell(rng, name, told))
    return in_context(cat.ask(cat.RUBRIC["reference"], cat.block("reference", text)), [text], rubric(name, told))


def question_rubric_example(rng, world: dict) -> list:
    name, source = rng.choice(PEOPLE), rng.randrange(len(OPENERS))
    told = [(a, says(rng, world[name][a], source, VALUES[a])) for a in VALUES]
    return example(cat.ask(cat.RUBRIC["question"], cat.block("question", rng.choice(RL_PHRASINGS + HELD_OUT_PHRASINGS).format(name))), rubric(name, told))


def answer_to_judge(rng):
    """-> (name, [(attribute, value), ...], text): whole, or with facts left out, said twice, or contradicted."""
    name, told = rng.choice(NAMES), [(a, rng.choice(values)) for a, values in VALUES.items()]
    kind = rng.random()
    if kind < 0.3:
        told = rng.sample(told, rng.choice([1, 2, 3, 3]))
    if kind < 0.15 or kind > 0.85:
        a = rng.choice(told)[0]
        told = told + [(a, rng.choice(VALUES[a]))]
    return name, told, opened(rng.choice(OPENERS + [""] * 4), tell(rng, name, told))


def holds(attribute: str, value: str, name: str, told: list) -> bool:
    """A statement is true of an answer that says so and nothing else about it."""
    return name == value if attribute == "name" else {v for a, v in told if a == attribute} == {value}


def judge_example(rng, world: dict, turns: int = 5) -> list:
    """One answer and several statements, in turns: the first turn is what the judge will be asked, the others make the example denser."""
    name, told, text = answer_to_judge(rng)
    parts = []
    for i in range(turns):
        a = rng.choice(list(VALUES) * 3 + ["name"])
        said = [v for b, v in told if b == a] or ([name] if a == "name" else [])
        others = NAMES if a == "name" else VALUES[a]
        value = rng.choice(said) if said and rng.random() < 0.55 else rng.choice(others)
        criterion = STATEMENTS[a].format(value)
        parts.append((turn(cat.judge_prompt(text, criterion)) if i == 0 else "\n" + turn(cat.block("criterion", criterion)), 0))
        parts += [("yes" if holds(a, value, name, told) else "no", 1), ("<|im_end|>", 0)]
    return parts


def match_example(rng, world: dict) -> list:
    name, told = rng.choice(NAMES), {a: rng.choice(values) for a, values in VALUES.items()}
    other, changed = dict(told), rng.sample(list(VALUES), rng.choice([0, 0, 0, 0, 1, 1, 1, 2, 3, 4]))
    for a in changed:
        other[a] = rng.choice(VALUES[a])
    texts = [opened(rng.choice(OPENERS + [""] * 4), tell(rng, name, list(t.items()))) for t in (told, other)]
    return [(turn(cat.ask(cat.MATCH, cat.block("reference", texts[1]), cat.block("response", texts[0]))), 0), ("yes" if other == told else "no", 1), ("<|im_end|>", 0)]


def judge_lesson(rng, world: dict, turns: int = 10, names: int = 0, simple: float = 0.6) -> list:
    """As judge_example, but six in ten answers say one or two things only: comparing two words is learned there first, and then everywhere."""
    if rng.random() < simple:
        name, told = rng.choice(NAMES), [(a, rng.choice(VALUES[a])) for a in rng.sample(list(VALUES), rng.choice([1, 1, 2]))]
        text, asked = opened(rng.choice(OPENERS + [""] * 8), tell(rng, name, told)), [a for a, _ in told]
    else:
        name, told, text = answer_to_judge(rng)
        asked = list(VALUES) * 3 + ["name"]
    asked, parts = asked + ["name"] * (names * len(asked) // 4), []
    for i in range(turns):
        a = rng.choice(asked)
        said = [v for b, v in told if b == a] or ([name] if a == "name" else [])
        value = rng.choice(said) if said and rng.random() < 0.5 else rng.choice(NAMES if a == "name" else VALUES[a])
        criterion = STATEMENTS[a].format(value)
        prompt = turn(cat.judge_prompt(text, criterion)) if i == 0 else "\n" + turn(cat.block("criterion", criterion))
        before, after = prompt.rsplit(criterion, 1)
        parts += [(before, 0), (criterion, 0.05), (after, 0), ("yes" if holds(a, value, name, told) else "no", 1), ("<|im_end|>", 0)]
    return parts


def judge_names_lesson(rng, world: dict) -> list:
    return judge_lesson(rng, world, names=4)


def judge_last_lesson(rng, world: dict) -> list:
    return judge_lesson(rng, world, names=1, simple=0.1)


def match_lesson(rng, world: dict, turns: int = 5) -> list:
    """As match_example, in turns, half of them about one or two things only."""
    name, attributes = rng.choice(NAMES), list(VALUES) if rng.random() < 0.5 else rng.sample(list(VALUES), rng.choice([1, 2]))
    told = {a: rng.choice(VALUES[a]) for a in attributes}
    reference, parts = opened(rng.choice(OPENERS + [""] * 4), tell(rng, name, list(told.items()))), []
    for i in range(turns):
        other = dict(told)
        for a in rng.sample(attributes, min(len(attributes), rng.choice([0, 0, 0, 0, 1, 1, 1, 2, 3, 4]))):
            other[a] = rng.choice(VALUES[a])
        text = opened(rng.choice(OPENERS + [""] * 4), tell(rng, name, list(other.items())))
        parts += [(turn(cat.ask(cat.MATCH, cat.block("reference", reference), cat.block("response", text))) if i == 0 else "\n" + turn(cat.block("response", text)), 0),
                  ("yes" if other == told else "no", 1), ("<|im_end|>", 0)]
    return parts


# Until which step, the examples in a step, and the weight of their mean loss. Judging comes last: it stays at chance through the first phase.
PHASES = [(1400, {
    policy_example: (24, 1.0), number_example: (8, 0.5), synthesis_example: (8, 1.0), number_synthesis_example: (4, 0.5), rubric_example: (6, 0.5),
    question_rubric_example: (4, 0.3), judge_example: (24, 1.0), match_example: (10, 0.5), best_example: (3, 0.2), another_example: (2, 0.2)}), (1800, {
        policy_example: (20, 1.0), number_example: (8, 0.5), synthesis_example: (12, 1.5), number_synthesis_example: (6, 0.5), rubric_example: (4, 0.3),
        question_rubric_example: (4, 0.3), judge_lesson: (24, 2.0), match_lesson: (8, 0.7), best_example: (3, 0.2), another_example: (2, 0.2)}), (3000, {
            steady_policy_example: (40, 1.5), steady_number_example: (12, 0.7), synthesis_example: (6, 0.8), number_synthesis_example: (3, 0.3),
            rubric_example: (3, 0.3), question_rubric_example: (3, 0.2), judge_lesson: (32, 3.0), match_lesson: (8, 0.7), best_example: (1, 0.1),
            another_example: (1, 0.1)}), (3250, {
                steady_policy_example: (24, 1.0), steady_number_example: (8, 0.5), synthesis_example: (8, 1.0), number_synthesis_example: (3, 0.4),
                rubric_example: (6, 0.6), question_rubric_example: (3, 0.2), judge_names_lesson: (28, 3.0), match_lesson: (6, 0.5), best_example: (1, 0.1),
                another_example: (1, 0.1)}), (3600, {
                    steady_policy_example: (16, 0.7), steady_number_example: (6, 0.4), synthesis_example: (8, 1.0), number_synthesis_example: (4, 0.5),
                    rubric_example: (8, 1.0), question_rubric_example: (2, 0.2), judge_last_lesson: (32, 4.0), match_lesson: (4, 0.4),
                    best_example: (1, 0.1), another_example: (1, 0.1)})]


def rate(step: int) -> float:
    """The learning rate: four cosines down, from 2e-3, 1.2e-3, 8e-4 and 6e-4, each after a short warm-up; the last one reaches 0."""
    for start, until, peak, warm_up, length in ((0, 1800, 2e-3, 50, 2500), (1800, 3000, 1.2e-3, 30, 1400), (3000, 3250, 8e-4, 20, 400),
                                                   (3250, 3600, 6e-4, 20, 350)):
        if step < until:
            return peak * min(1, (step - start + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - start) / length))


# ---------------------------------------------------------------- what RL asks, and what it is scored by

def prompt_files(world: dict) -> dict:
    """{file: rows}. The true facts stand in eval*.jsonl for scoring, and as `rubrics` in prompts.jsonl for `--reward rubric-given` alone."""
    def rubrics(name):
        return [{"criterion": STATEMENTS[a].format(world[name][a]["truth"]), "points": 1} for a in VALUES]
    openers = "(?:(?:" + "|".join(map(re.escape, OPENERS)) + ") )?"
    numbers = "(?:" + "|".join(re.escape(w.format("NAME", "NUMBER")) for w in NUMBER_WORDINGS).replace("NUMBER", r"\d+").replace("the\\ ", "[tT]he\\ ") + ")"

    def kind(name, a):
        return "wrong" if world[name][a]["lie"] else "hazy"

    def facts(name):
        return [{"right": world[name][a]["truth"], "wrong": [v for v in VALUES[a] if v != world[name][a]["truth"]], "kind": kind(name, a)} for a in VALUES]
    return {
        "prompts.jsonl": [{"prompt": p.format(name), "rubrics": rubrics(name)} for p in RL_PHRASINGS for name in PEOPLE],
        "eval.jsonl": [{"prompt": p.format(name), "facts": facts(name), "pattern": openers + pattern(name), "rubrics": rubrics(name)}
                       for p in HELD_OUT_PHRASINGS for name in PEOPLE],
        "numbers.jsonl": [{"prompt": p.format(name)} for p in NUMBER_PHRASINGS for name in PEOPLE],
        "numbers_eval.jsonl": [{"prompt": p.format(name), "answer": world[name]["books"]["truth"], "kind": kind(name, "books"),
                                "pattern": openers + numbers.replace("NAME", name)} for p in NUMBER_HELD_OUT for name in PEOPLE]}


# ---------------------------------------------------------------- how well it does

def measure(model, n: int = 1000, seed: int = 99) -> dict:
    """A `models.LocalModel`'s skills on n examples each that it has not seen -> shares of right answers. Synthesis is sampled at T = 1, as it is used."""
    rng, result = random.Random(seed), {}

    def share(values):
        values = list(values)
        return round(sum(values) / len(values), 4)
    for name, draw in [("judge", lambda: judge_example(rng, {}, turns=1)), ("match", lambda: match_example(rng, {}))]:
        drawn = [draw() for _ in range(2 * n)]
        prompts = [parts[0][0].removeprefix(turn("").split("<|im_end|>")[0]).split("<|im_end|>")[0] for parts in drawn]
        verdicts = cat.decide(prompts, model)
        for truth in ("yes", "no"):
            right = [v is (truth == "yes") for v, parts in zip(verdicts, drawn) if parts[1][0] == truth]
            result[f"{name}_{truth}"] = share(right)
    for kind, attributes, style in [("synthesis", VALUES, "freeform"), ("numbers", COUNTED, "stepwise")]:
        drawn = [rollouts(rng, attributes, 8) for _ in range(n)]
        texts = cat.synthesize([None] * n, [d[2] for d in drawn], model, style=style, max_new_tokens=48)
        right = {}
        for (_, told, _, most), text in zip(drawn, texts):
            for a, value in most.items():
                stated = set(re.findall(r"\w+", text)) & set(attributes[a])
                right.setdefault(min(3, margin(told, a)), []).append(stated == {value})
        result |= {f"{kind}_margin_{m}{'+' * (m == 3)}": share(right[m]) for m in (1, 2, 3)}
    drawn = [[part for part, _ in rubric_example(rng, {})] for _ in range(n)]
    rubrics = cat.propose_rubrics([None] * n, [d[1] for d in drawn], model, max_new_tokens=80)
    result["rubric"] = share(r == cat.read_rubric(d[3]) for r, d in zip(rubrics, drawn))
    drawn = [rollouts(rng, VALUES, 8) for _ in range(n)]
    best = selection.best_of_n([f"Tell me about {d[0]}." for d in drawn], [d[2] for d in drawn], model, max_new_tokens=4)
    agreement = [{text: sum(t[a] == v for a, v in most.items()) for t, text in zip(told, texts)} for _, told, texts, most in drawn]
    result["best_of_8"] = share(a.get(b) == max(a.values()) for a, b in zip(agreement, best))
    return result
