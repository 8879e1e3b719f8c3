"""Files that survive a kill: JSON Lines, atomic writes, checkpoints."""

import glob
import json
import os
import shutil

import torch


def write_atomically(path: str, text: str):
    """Writes a file whole or not at all: a temporary file beside it, then a rename."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def finite(data):
    """Data as strict JSON has it: NaN, Infinity and -Infinity become None."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)


def append_line(path: str, row: dict):
    """Appends one line of strict JSON.  `read_lines` forgives the half line of a killed process."""
    with open(path, "a", encoding="utf-8", errors="replace") as f:
        f.write(json.dumps(finite(row), ensure_ascii=False) + "\n")


def read_lines(path: str, mend: bool = False):
    """Yields what `append_line` wrote but for an unfinished last line, which `mend` cuts off."""
    if os.path.exists(path):
        with open(path, "r+b" if mend else "rb") as f:
            for n, line in enumerate(f, 1):
                if line.endswith(b"\n"):
                    yield parse_json(f"{path}:{n}", line.decode(errors="replace"))
                elif mend:
                    f.truncate(f.tell() - len(line))


def parse_json(where: str, text: str):
    """ValueError in one line that says where.  A number of over 4,300 digits is one too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        where = f"{where}:{e.lineno}" if "\n" in text.strip() and hasattr(e, "lineno") else where
        raise ValueError(f"{where}: not valid JSON ({str(e)[:99]}); mend or remove it") from None


def read_json(path: str) -> dict:
    """What a JSON file holds; {} if there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        return parse_json(path, f.read())


def checkpoints(folder: str, name: str = "checkpoint") -> list:
    """The whole checkpoints of a run, oldest first."""
    found = glob.glob(os.path.join(glob.escape(folder), f"{name}-*[0-9]"))
    return sorted(found, key=lambda path: int(path.rpartition("-")[2]))


def save_checkpoint(folder, step: int, model, tokenizer, state: dict, name="checkpoint") -> str:
    """folder/NAME-STEP: model, tokenizer and state.pt, whole or not at all; then older ones go."""
    final = os.path.join(folder, f"{name}-{step:06d}")
    for path in (final, final + ".tmp"):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(final + ".tmp")
    tokenizer.save_pretrained(final + ".tmp")
    torch.save(state, os.path.join(final + ".tmp", "state.pt"))
    os.rename(final + ".tmp", final)
    for other in checkpoints(folder, name):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final
