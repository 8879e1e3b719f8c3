"""Files that survive a kill: JSON Lines, atomic writes, checkpoints."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

# data that strict JSON can hold: NaN, Infinity and -Infinity become None
finite = lambda data: json.loads(json.dumps(data), parse_constant=lambda _: None)


def write_atomically(path: str, text: str):
    """Writes a file (makes its folder) whole or not at all: a temporary file, then a rename."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path + ".tmp").write_text(text, encoding="utf-8")
    os.replace(path + ".tmp", path)


def append_line(path: str, row: dict):
    """Appends one line of strict JSON.  `read_lines` ignores a killed process's half line."""
    with open(path, "a", encoding="utf-8", errors="replace") as f:
        f.write(json.dumps(finite(row), ensure_ascii=False) + "\n")


def write_lines(path: str, rows):
    """Writes a whole file of such lines."""
    write_atomically(path, "".join(json.dumps(finite(row)) + "\n" for row in rows))


def read_lines(path: str) -> list:
    """The rows these two wrote, without an unfinished last line."""
    text = Path(path).read_text("utf-8", errors="replace") if os.path.exists(path) else ""
    return [parse_json(f"{path}:{n}", line) for n, line in enumerate(text.split("\n")[:-1], 1)]


@contextmanager
def one_line_error(what: str):
    """Turns any error inside into a ValueError of one line, which begins with `what`."""
    try:
        yield
    except Exception as e:  # each library has errors of its own
        why = " ".join(f"{str(e) or type(e).__name__} {e.__cause__ or ''}".split())
        raise ValueError(f"{what}: {why[:400]}") from None


def parse_json(where: str, text: str):
    """The parsed text.  ValueError in one line that says where it is not JSON."""
    with one_line_error(f"{where}: not valid JSON, fix or remove it"):
        return json.loads(text)


def read_json(path: str) -> dict:
    """What a JSON file holds; {} if there is no file."""
    return parse_json(path, Path(path).read_text("utf8", "replace")) if os.path.exists(path) else {}


def checkpoints(folder: str) -> list:
    """The complete checkpoints of a run, oldest first."""
    return sorted(map(str, Path(folder).glob("checkpoint-" + "[0-9]" * 6)))


def save_checkpoint(folder, step: int, model, tokenizer, state: dict, best: int = 0):
    """Writes folder/checkpoint-STEP whole or not at all; of older ones, last and best stay."""
    final = os.path.join(folder, f"checkpoint-{step:06d}")
    with one_line_error(f"{final}.tmp cannot be written"):
        model.save_pretrained(final + ".tmp")
        tokenizer.save_pretrained(final + ".tmp")
        torch.save(state, os.path.join(final + ".tmp", "state.pt"))
    shutil.rmtree(final, ignore_errors=True)  # an unreadable one of this step
    os.rename(final + ".tmp", final)
    for other in [path for path in checkpoints(folder)[:-2] if int(path[-6:]) != best]:
        shutil.rmtree(other, ignore_errors=True)
