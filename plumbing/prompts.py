"""Prompt files, and the data sets of the papers by name."""

import json
import random
import re

from huggingface_hub import hf_hub_download

from plumbing.files import one_line_error, parse_json

ULTRA = "evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat"
HUB = {  # name: repository on the hub, its files
    "alpaca_eval": ("tatsu-lab/alpaca_eval", ["alpaca_eval.json"]),
    "math500": ("HuggingFaceH4/MATH-500", ["test.jsonl"]),
    "healthbench": ("openai/healthbench", ["2025-05-07-06-14-12_oss_eval.jsonl"]),  # 4,500 rows
    "ultrafeedback": ("openbmb/UltraFeedback", [name + ".jsonl" for name in ULTRA])}
HUB["healthbench-held-out"] = HUB["healthbench"]  # the other 500


def messages_of(prompt) -> list:
    """A prompt (str, or a list of {"role", "content"}) as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def question_text(prompt) -> str:
    """A prompt as text: the content of a single message, else "role: content" lines."""
    messages = messages_of(prompt)
    lines = [f"{m['role']}: {m['content']}" for m in messages]
    return "\n".join(lines) if len(messages) > 1 else messages[0]["content"]


def read_prompts(path: str) -> list:
    """Prompts from a .jsonl, .json or .txt file (one per line), or a data set of HUB -> dicts with
    `prompt` (str, messages), `where` ("file:line"); to evaluate: `facts` ([{"right", "wrong": [..],
    "kind"}]), `pattern` (regular expression), `answer` and its `kind`, `rubrics` ([{"criterion",
    "points"}]); CaT-SFT's `output`.  ValueError: what, where; a data set's bad rows are skipped."""
    files, rows = [path], []
    if path in HUB:
        repository, names = HUB[path]
        with one_line_error(f"{path}: {repository} cannot be downloaded"):
            files = [hf_hub_download(repository, name, repo_type="dataset") for name in names]
    for where, item in (pair for file in files for pair in items_of(file)):
        try:
            rows.append(check_row(where, item))
        except ValueError as e:
            if path not in HUB:
                raise
            print(f"left out: {e}")
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    for row in rows if path == "math500" else ():
        row["prompt"] += "\n\nPut your final answer in \\boxed{}."
    if path in ("healthbench", "healthbench-held-out"):
        held_out = set(random.Random(0).sample(range(len(rows)), len(rows) // 10))
        rows = [row for i, row in enumerate(rows) if (i in held_out) == path.endswith("held-out")]
    return rows


def items_of(path: str) -> list:
    """(where, item) for each item in a prompt file."""
    if not path.endswith((".jsonl", ".json", ".txt")):
        raise ValueError(f"{path}: prompts are read from .jsonl, .json or .txt files")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:  # see check_row
        text = f.read()
    if path.endswith(".json"):
        items = found if isinstance(found := parse_json(path, text), list) else [found]
        return [(f"{path}: item {n}", item) for n, item in enumerate(items, 1)]
    lines = [(f"{path}:{n}", x.strip()) for n, x in enumerate(text.split("\n"), 1) if x.strip()]
    return lines if path.endswith(".txt") else [(at, parse_json(at, line)) for at, line in lines]


def check_row(where: str, row) -> dict:
    """A prompt, or a row with a prompt, checked and completed.  ValueError: what is wrong where."""
    row = row if isinstance(row, dict) else {"prompt": row}
    prompt = next((row[k] for k in ("prompt", "instruction", "problem") if k in row), None)
    if "instruction" in row and row.get("input"):
        raise ValueError(f"{where}: `input` is not read: append it to the `instruction`")
    facts, rubrics = row.get("facts") or [], row.get("rubrics") or []
    text = {k: None if row.get(k) is None else str(row[k]) for k in ("answer", "output", "kind")}
    try:  # to use each in turn; if that fails, `what` says what is wrong
        what = 'needs a `prompt` (instruction, problem), not empty: string or [{"role", "content"}]'
        if not "".join(m["content"] for m in messages_of(prompt) if "" + m["role"]).strip():
            raise ValueError
        what = 'not UTF-8; or `facts` are not {"right": string, "wrong": [strings]}, none empty, \
`rubrics` not {"criterion": string, "points": number}, or `pattern` is no regular expression'
        json.dumps(row, ensure_ascii=False).encode(), re.compile(row.get("pattern") or "")
        [("" + word)[0] for fact in facts for word in [fact["right"]] + fact["wrong"]]
        criteria, points = [r["criterion"] for r in rubrics], [r["points"] for r in rubrics]
        "".join(criteria), int(sum(points))  # ValueError: NaN
    except (LookupError, TypeError, ValueError, OverflowError, re.error):
        raise ValueError(f"{where}: {what}") from None
    return {"prompt": prompt, "where": where, "facts": facts, "rubrics": rubrics, **text,
            "criteria": criteria, "points": points, "pattern": row.get("pattern")}


def draw_prompts(rows: list, tokenizer, n: int = 5000, most_tokens: int = 512) -> list:
    """CME's draw from UltraFeedback: n prompts of at most `most_tokens`, always the same."""
    rows = random.Random(0).sample(rows, len(rows))
    short = (r for r in rows if len(tokenizer.tokenize(question_text(r["prompt"]))) <= most_tokens)
    return [row for row, _ in zip(short, range(n))]
