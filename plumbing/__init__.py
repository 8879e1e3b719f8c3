"""What the papers do not discuss: models, prompts, files, runs, statistics."""

import logging
import os
import signal
import sys
from dataclasses import field

from torch import OutOfMemoryError
from tqdm import tqdm
from transformers.utils import logging as model_logging

TOY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "toy")


def option(default, help):
    """A field of an options class, with its line for --help."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": help})


def one_clear_line(main, script: str, again: str = "the same command continues"):
    """Runs main().  Errors end in one line; status 2: for the user to fix, 130: Ctrl-C, else 1."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our line says it all
    model_logging.set_verbosity_error()
    model_logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # for terminals without UTF-8
    try:
        return main()
    except (FloatingPointError, ConnectionError, OutOfMemoryError) as e:
        tip = "; lower --batch_tokens (or --micro_batch)" if isinstance(e, OutOfMemoryError) else ""
        status, line = 1, f"{str(e).splitlines()[0][:400]}{tip} ({again})"
    except (ValueError, OSError, ImportError) as e:
        status, line = 2, f"{e}: pip install {e.name}" if isinstance(e, ImportError) else str(e)
    except KeyboardInterrupt:
        status, line = 130, f"stopped; {again}"
    print(f"{script}: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)  # at once: threads waiting for a server must not hold this up


def ask_to_stop() -> list:
    """A list that the first Ctrl-C fills (this step ends in a checkpoint); the second stops now."""
    asked, at_once = [], signal.default_int_handler
    def once(*_):
        asked.append(signal.signal(signal.SIGINT, at_once))  # any entry means: asked
        print("this step ends in a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
    signal.signal(signal.SIGINT, once)
    return asked


def one_line(text) -> str:
    """A model's text made safe for a screen: no line breaks, no escape sequences."""
    return "(nothing)" if text is None else "".join(c if c.isprintable() else " " for c in text)


def progress(items, **how):
    """A progress bar; a line every ten seconds where stderr is not a terminal."""
    return tqdm(items, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10, **how)
