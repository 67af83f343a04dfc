"""`python -m qirl_fast.compare RUN RUN ... [--output FILE]`: several runs on one page.

Settings that differ, curves over each other by update and by seconds, held-out scores against the
first run with paired intervals, and what each draws of the same prompts. Runs are compared on what
they have in common, and the page says what that leaves out. FILE: compare.html beside the first
run's folder, if not given.
"""

import sys
from pathlib import Path

from rich.console import Console

from qirl_fast.reporting.run import RunError, read_run
from qirl_fast.reporting.several import compared
from qirl_fast.whole import write_text

NAME = "compare.html"


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 it could not be."""
    args = sys.argv[1:] if argv is None else list(argv)
    output = None
    if "--output" in args[:-1]:
        i = args.index("--output")
        output = Path(args[i + 1])
        del args[i : i + 2]
    if not args or any(arg.startswith("-") for arg in args):
        print(__doc__)
        return 0 if "-h" in args or "--help" in args else 2
    try:
        page = compared([read_run(Path(arg)) for arg in args])
        output = output or Path(args[0]).resolve().parent / NAME
        write_text(output, page)
    except (RunError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {error}", style="red", markup=False
        )
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
