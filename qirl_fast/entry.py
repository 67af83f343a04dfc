"""What `python -m qirl_fast.NAME` does around its work: help, errors in one line, exit status."""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from qirl_fast.interruption import Interrupted

Errors = type[Exception] | tuple[type[Exception], ...]


def run(
    argv: Sequence[str] | None,
    usage: str,
    work: Callable[[list[str]], int | None],
    *,
    wrong: Errors,
    stopped: Errors = (),
    again: str = "run the same command again",
) -> int:
    """Do the work on a command line's words, and return the exit status.

    0, or what the work returns; 1 for an error of `stopped`, 2 for one of `wrong`, 128 + n for
    signal n. Of these one line is said on stderr, in red on a terminal; again: how to go on after a
    stop. Under torchrun all processes stop for the same reason, and process 0 says it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        print(usage)
        return 0
    _quiet()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.quiet = int(os.environ.get("RANK", "0")) > 0
    try:
        return work(args) or 0
    except wrong as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except stopped as error:
        mend = f"after mending the cause {again}"
        console.print(f"stopped: {error}; {mend}", style="red", markup=False)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        number, done = signal.SIGINT, ""
        if isinstance(error, Interrupted):
            number, done = error.signal, ", all steps that were finished saved"
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        console.print(f"stopped by {name}{done}; to go on {again}", style="red", markup=False)
        return 128 + number


def _quiet() -> None:
    """No progress bars of libraries; of all loggers warnings alone, unless the caller has set up
    another way.
    """
    for library in ("diffusers", "transformers"):
        if library in sys.modules:  # each takes seconds to import
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)  # a run's log.txt takes more
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
