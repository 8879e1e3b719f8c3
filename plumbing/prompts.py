"""Prompt files, and the data sets of the papers by name."""

import json
import random
import re
import sys
from itertools import islice

from huggingface_hub import hf_hub_download

from plumbing.files import parse_json

ULTRA = "evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat"
HEALTH = "openai/healthbench", ["2025-05-07-06-14-12_oss_eval.jsonl"]  # 5,000 conversations
HUB = {  # name: repository on the hub, its files
    "alpaca_eval": ("tatsu-lab/alpaca_eval", ["alpaca_eval.json"]),
    "math500": ("HuggingFaceH4/MATH-500", ["test.jsonl"]),
    "healthbench": HEALTH,  # 4,500 of them, to train on
    "healthbench-held-out": HEALTH,  # the other 500
    "ultrafeedback": ("openbmb/UltraFeedback", [name + ".jsonl" for name in ULTRA]),
}
FIELDS = "prompt", "instruction", "problem"  # under which names a prompt may stand in a row


def messages_of(prompt) -> list:
    """A prompt (str, or a list of {"role", "content"}) as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def question_text(prompt) -> str:
    """A prompt as text: the content of a single message, else "role: content" lines."""
    messages = messages_of(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def read_prompts(path: str) -> list:
    """Prompts from a .jsonl, .json or .txt file (a prompt per line), or by a name in HUB -> dicts
    with `prompt` (str or messages, under one of FIELDS), `where` ("file:line") and, for evaluation,
    `facts` (list of {"right", "wrong": [...], "kind"}), `pattern` (regular expression), `answer`
    (what belongs in \\boxed{}), `kind` (its), `rubrics` (list of {"criterion", "points"}).
    ValueError with file and line; rows of HUB that are no prompts are left out, and it is said."""
    repository, files = HUB.get(path, ("", [path]))
    files = [download(path, repository, file) for file in files] if repository else files
    rows, refused = [], []
    for where, item in (pair for file in files for pair in items_of(file)):
        try:
            rows.append(check_row(where, item))
        except ValueError as e:
            if not repository:
                raise
            refused.append(str(e))
    if refused:
        print(f"{len(refused)} prompts are left out; {refused[0]}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    held_out = set(random.Random(0).sample(range(len(rows)), len(rows) // 10))
    if path in HUB and "healthbench" in path:
        rows = [row for i, row in enumerate(rows) if (i in held_out) == ("held-out" in path)]
    return rows


def items_of(path: str) -> list:
    """(where, item) of all that a prompt file holds."""
    kind = path.rpartition(".")[2]
    if kind not in ("jsonl", "json", "txt"):
        raise ValueError(f"{path}: prompts are read from .jsonl, .json or .txt files")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:  # see check_row
        text = f.read()
    if kind == "json":
        items = parse_json(path, text)
        if not isinstance(items, list):
            raise ValueError(f"{path}: a .json file of prompts must hold a list")
        return [(f"{path}: item {n}", item) for n, item in enumerate(items, 1)]
    lines = [(f"{path}:{n}", x.strip()) for n, x in enumerate(text.split("\n"), 1) if x.strip()]
    return lines if kind == "txt" else [(at, parse_json(at, line)) for at, line in lines]


def check_row(where: str, row) -> dict:
    """One prompt, or row with a prompt, checked and completed.  ValueError: what is wrong where."""

    def need(good, what):
        if not good:
            raise ValueError(f"{where}: {what}")

    def lists(rows, **kinds):  # a list of objects with these fields of these types
        return isinstance(rows, list) and all(
            isinstance(r, dict) and isinstance(r.get(name), kind)
            for r in rows for name, kind in kinds.items())

    row = row if isinstance(row, dict) else {"prompt": row}
    halves = re.search("[\\ud800-\\udfff]", json.dumps(row, ensure_ascii=False))
    need(not halves, "half a surrogate pair is no character (or this is not UTF-8)")
    prompt = next((row[name] for name in FIELDS if name in row), None)
    messages, pattern, answer = messages_of(prompt), row.get("pattern"), row.get("answer")
    facts, rubrics = row.get("facts") or [], row.get("rubrics") or []
    need(messages and lists(messages, role=str, content=str), "needs a `prompt` (or instruction, "
         "problem): a string, or a list of messages with `role` and `content`")
    need(any(m["content"].strip() for m in messages), "the prompt is empty")
    need(lists(facts, right=str, wrong=list) and all(isinstance(value, str) for fact in facts
         for value in fact["wrong"]), '`facts` are {"right": string, "wrong": [strings]}')
    need(lists(rubrics, criterion=str, points=(int, float)),
         '`rubrics` are {"criterion": string, "points": number}')
    try:
        re.compile(pattern or "")
    except (re.error, TypeError, OverflowError, RecursionError) as e:
        need(False, f"`pattern` is not a regular expression ({e})")
    answer = str(answer) if type(answer) in (str, int, float) else None  # other people's may be any
    return {"prompt": prompt, "where": where, "facts": facts, "pattern": pattern, "answer": answer,
            "kind": row.get("kind"), "rubrics": rubrics}


def download(what: str, repository: str, file: str) -> str:
    """The local path of a file of a data set on the hub.  ValueError in one line."""
    try:
        return hf_hub_download(repository, file, repo_type="dataset")
    except Exception as e:  # no network, no access, no such file ...
        why = " ".join(f"{e} {e.__cause__ or ''}".split())[:400] or type(e).__name__
        raise ValueError(f"{what}: {file} of {repository} cannot be downloaded, {why}") from None


def with_suffix(rows: list, suffix: str) -> list:
    """The rows with a paragraph added to the last message of their prompts."""
    longer = []
    for row in rows if suffix else ():
        *before, last = messages_of(row["prompt"])
        last = last | {"content": f"{last['content']}\n\n{suffix}"}
        longer.append(row | {"prompt": [*before, last]})
    return longer if suffix else rows


def draw_prompts(rows, tokenizer=None, *, n: int = 5000, most_tokens: int = 512, seed: int = 0):
    """n of the rows, drawn with a fixed seed, in their own order; with a tokenizer only prompts of
    at most `most_tokens` (CME's draw from UltraFeedback)."""

    def fits(row):
        text = question_text(row["prompt"])
        return len(tokenizer(text, add_special_tokens=False).input_ids) <= most_tokens

    order = random.Random(seed).sample(range(len(rows)), len(rows))
    chosen = islice((i for i in order if tokenizer is None or fits(rows[i])), n)
    return [rows[i] for i in sorted(chosen)]
