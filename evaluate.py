"""What train.py needs to know how well it does: prompts, scores, and files that are written whole or not at all.

    facts   share of facts whose right value is stated and none of whose wrong ones is (never seen by training)
    accuracy  share of final answers that are the right one
    valid   share of responses that match their row's `pattern` in full and ended by their stop token
"""
import fcntl
import glob
import json
import os
import re
import shutil
from collections import Counter

import torch

from align import spans_from_ids
from cat import boxed_answer, same_answer
from grpo import chat_ids, sample, without_stop

FIELDS = ("prompt", "instruction", "problem")  # under which names a prompt may stand in a row


# ---------------------------------------------------------------- files

def write_atomically(path: str, text: str):
    """Writes a file whole or not at all: a temporary file beside it, then a rename."""
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def append_line(path: str, row: dict):
    """Appends one line of strict JSON: numbers that are not finite become null. `read_lines` forgives the half line of a killed process."""
    row = json.loads(json.dumps(row), parse_constant=lambda _: None)           # NaN, Infinity, -Infinity
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(path: str) -> list:
    """The rows of a file that `append_line` wrote; [] if there is none; an unfinished last line is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def lock(folder: str):
    """An open file whose lock ends with this process, however that ends: no two processes work in one folder. ValueError if another does."""
    held = open(os.path.join(folder, "lock"), "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another process") from None
    except OSError:                                                            # a file system without locks
        pass
    return held


def checkpoints(folder: str, name: str = "checkpoint") -> list:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in glob.glob(os.path.join(glob.escape(folder), f"{name}-*")) if p.rsplit("-", 1)[1].isdigit())


def save_checkpoint(folder: str, step: int, model, tokenizer, state: dict, name: str = "checkpoint") -> str:
    """folder/NAME-STEP: model and tokenizer in Hugging Face format, and state.pt. Whole or not at all; then others of that name go."""
    final = os.path.join(folder, f"{name}-{step:06d}")
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(final + ".tmp", ignore_errors=True)
    model.save_pretrained(final + ".tmp")
    tokenizer.save_pretrained(final + ".tmp")
    torch.save(state, os.path.join(final + ".tmp", "state.pt"))
    os.rename(final + ".tmp", final)
    for other in checkpoints(folder, name):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def read_prompts(path: str) -> list:
    """Prompts from a local .jsonl (one object or string per line), .json (a list of them) or .txt (one prompt per line, empty lines left out).

    -> list of dicts with `prompt` (str, or a list of {"role", "content"} messages) and `where` ("file:line"), and, for evaluation,
    `facts` (a list of {"right": str, "wrong": [str, ...], "kind": str, optional}), `pattern` (a regular expression), `answer` (str, the final
    answer that belongs in \\boxed{}), `kind` (of the answer; str) and `rubrics` (a list of {"criterion": str, "points": number}).
    The prompt may also stand under `instruction` or `problem`. Raises ValueError naming file and line.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({getattr(e, 'strerror', None) or e})") from None
    kind = os.path.splitext(path)[1]
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == ".txt":
        items = [(where, line.strip()) for where, line in lines]
    elif kind == ".jsonl":
        items = [(where, parse_json(where, line)) for where, line in lines]
    elif kind == ".json":
        items = parse_json(path, text)
        if not isinstance(items, list):
            raise ValueError(f"{path}: a .json file of prompts must hold a list")
        items = [(f"{path}: item {n}", item) for n, item in enumerate(items, 1)]
    else:
        raise ValueError(f"{path}: prompts are read from .jsonl, .json or .txt files")
    if not items:
        raise ValueError(f"{path}: no prompts in it")
    return [check_row(where, {"prompt": item} if isinstance(item, (str, list)) else item) for where, item in items]


def parse_json(where: str, text: str):
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        line = f"{where}:{e.lineno}" if "\n" in text.strip() and hasattr(e, "lineno") else where
        raise ValueError(f"{line}: not valid JSON ({getattr(e, 'msg', 'nested too deeply')}); mend or remove it") from None


def check_row(where: str, row) -> dict:
    """One prompt row, checked -> dict(prompt, where, facts, pattern, answer, kind, rubrics). Raises ValueError saying what is wrong where."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object or a string, found {json.dumps(row)[:40]}")
    prompt = next((row[f] for f in FIELDS if f in row), None)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError(f"{where}: needs a `prompt` (or {', '.join(FIELDS[1:])}): a string, or a list of messages with `role` and `content`")
    try:
        "".join(m["role"] + m["content"] for m in messages).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: the prompt has half a surrogate pair ({e.object[e.start]!r}), which is no character") from None
    if not any(m["content"].strip() for m in messages):
        raise ValueError(f"{where}: the prompt is empty")
    facts, pattern = row.get("facts") or [], row.get("pattern")
    if not isinstance(facts, list) or not all(isinstance(f, dict) and isinstance(f.get("right"), str) and isinstance(f.get("wrong"), list)
                                              and all(isinstance(w, str) for w in f["wrong"] + [f.get("kind", "")]) for f in facts):
        raise ValueError(f"{where}: `facts` must be a list of {{\"right\": string, \"wrong\": [strings]}}, and \"kind\" a string if there is one")
    try:
        re.compile(pattern or "")
    except (re.error, TypeError) as e:
        raise ValueError(f"{where}: `pattern` is not a regular expression ({e})") from None
    answer, kind, rubrics = row.get("answer"), row.get("kind"), row.get("rubrics") or []
    answer = str(answer) if isinstance(answer, str) or type(answer) in (int, float) else None                # other people's fields may be anything
    kind = kind if isinstance(kind, str) else None
    if not isinstance(rubrics, list) or not all(isinstance(r, dict) and isinstance(r.get("criterion"), str) and type(r.get("points")) in (int, float)
                                                and abs(r["points"]) < 1e9 and r["criterion"].encode(errors="replace").decode() == r["criterion"]
                                                and r["criterion"].strip() for r in rubrics):
        raise ValueError(f"{where}: `rubrics` must be a list of {{\"criterion\": string, \"points\": number}}")
    return {"prompt": prompt, "where": where, "facts": facts, "pattern": pattern, "answer": answer, "kind": kind, "rubrics": rubrics}


# ---------------------------------------------------------------- scores

def fact_right(text: str, fact: dict) -> bool:
    """True if the text states the right value and none of the wrong ones, as whole words, the longest value first.

    Example: right "York", wrong ["New York", "Paris"]: "in York" counts; "in New York", "in York or Paris" and "in Yorkshire" do not.
    """
    values = sorted({fact["right"], *fact["wrong"]}, key=len, reverse=True)
    return set(re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, values))})(?!\w)", text)) == {fact["right"]}


def wording(text: str, row: dict) -> str:
    """The response without what it says: values of facts and capitalised words of the prompt become "_". For watching style collapse."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else " ".join(m["content"] for m in row["prompt"])
    words = {v for f in row["facts"] for v in (f["right"], *f["wrong"])} | set(re.findall(r"\b[A-Z]\w+", prompt))
    return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})(?!\w)", "_", text) if words else text


def score(rows: list, texts: list, stopped: list) -> dict:
    """Scores of one response per row -> dict of means: facts, facts_<kind>, accuracy,
    accuracy_<kind> (of final answers), valid (each only if the rows carry them), stopped, wording.

    wording = share of the most frequent wording. stopped: one bool per row, whether the response ended by its stop token.
    """
    right = [(f.get("kind"), fact_right(text, f)) for row, text in zip(rows, texts) for f in row["facts"]]
    valid = [bool(end and re.fullmatch(row["pattern"], text)) for row, text, end in zip(rows, texts, stopped) if row["pattern"]]
    scores = {"facts": [r for _, r in right]}
    for kind in sorted({k for k, _ in right if k}):
        scores[f"facts_{kind}"] = [r for k, r in right if k == kind]
    solved = [(row.get("kind"), same_answer(boxed_answer(text), row["answer"])) for row, text in zip(rows, texts) if row.get("answer") is not None]
    scores["accuracy"] = [right for _, right in solved]
    for kind in sorted({k for k, _ in solved if k}):
        scores[f"accuracy_{kind}"] = [right for k, right in solved if k == kind]
    scores |= {"valid": valid, "stopped": list(stopped)}
    top = Counter(wording(text, row) for row, text in zip(rows, texts)).most_common(1)[0][1]
    return {name: sum(values) / len(values) for name, values in scores.items() if values} | {"wording": top / len(texts)}


def response_texts(tokenizer, ids: torch.Tensor, lengths: torch.Tensor, stop_ids: list):
    """ids [B, T], lengths [B] -> (texts, stopped): the decoded responses without their stop tokens, and whether each had one."""
    rows, stopped = without_stop(ids, lengths, stop_ids)
    return [spans_from_ids(tokenizer, y)[0] for y in rows], stopped


def respond(model, tokenizer, prompts: list, *, batch: int = 128, **sampling):
    """One response to each prompt -> (texts, lengths in tokens, stopped). `sampling` goes to grpo.sample; batches are sorted by length."""
    prompt_ids = [chat_ids(tokenizer, p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    results = [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        ids, lengths = sample(model, [prompt_ids[i] for i in part], 1, **sampling)
        texts, stopped = response_texts(tokenizer, ids, lengths, sampling["stop_ids"])
        for i, *result in zip(part, texts, lengths.tolist(), stopped):
            results[i] = result
    return tuple(map(list, zip(*results)))


def held_out(model, tokenizer, rows: list, *, max_new_tokens: int, stop_ids: list, seed: int = 0) -> dict:
    """Greedy scores by their names, the same at T = 1 with `sampled_` before them, and the mean length in tokens."""
    result = {}
    for prefix, temperature in [("", 0.0), ("sampled_", 1.0)]:
        texts, lengths, stopped = respond(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens=max_new_tokens, temperature=temperature,
                                          stop_ids=stop_ids, generator=torch.Generator(model.device).manual_seed(seed))
        scores = score(rows, texts, stopped) | {"length": sum(lengths) / len(lengths)}
        result |= {prefix + name: round(value, 4) for name, value in scores.items()}
    return result
