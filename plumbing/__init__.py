"""All that the papers do not speak of: models, prompts, files, runs, statistics."""

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
    """Runs main().  What a user can mend ends in one line and status 2, Ctrl-C 130, trouble 1."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our line says it all
    model_logging.set_verbosity_error()
    model_logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # where a terminal has no UTF-8
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
    os._exit(status)  # at once: no thread that waits for a server holds this up


def ask_to_stop() -> list:
    """A list that the first Ctrl-C fills, so that a step ends in a checkpoint; the second stops."""
    asked, at_once = [], signal.default_int_handler
    def once(*_):
        asked.append(signal.signal(signal.SIGINT, at_once))  # whatever that returns: it is asked
        print("this step ends in a checkpoint; again: at once", file=sys.stderr)
    signal.signal(signal.SIGINT, once)
    return asked


def one_line(text) -> str:
    """What a model wrote, for a screen: no line breaks, no escape sequences."""
    return "(nothing)" if text is None else "".join(c if c.isprintable() else " " for c in text)


def progress(items, **how):
    """A progress bar; a line every ten seconds where nobody is watching."""
    return tqdm(items, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10, **how)
