"""`python -m qirl_fast.compare RUN RUN ... [--output FILE]`: several runs on one page.

Settings that differ, curves over each other by update and by seconds, held-out scores against the
first run with paired intervals, and what each draws of the same prompts. Runs are compared on what
they have in common, and the page says what that leaves out. FILE: compare.html beside the first
run's folder, if not given.
"""

import sys
from pathlib import Path

from qirl_fast.entry import run
from qirl_fast.reporting.run import RunError, read_run
from qirl_fast.reporting.several import compared
from qirl_fast.whole import write_text

NAME = "compare.html"


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 it could not be."""

    def work(args: list[str]) -> int:
        output = None
        if "--output" in args[:-1]:
            i = args.index("--output")
            output = Path(args[i + 1])
            del args[i : i + 2]
        if not args or any(arg.startswith("-") for arg in args):
            print(__doc__)
            return 2
        page = compared([read_run(Path(arg)) for arg in args])
        output = output or Path(args[0]).resolve().parent / NAME
        write_text(output, page)
        print(output)
        return 0

    return run(argv, __doc__, work, wrong=(RunError, OSError))


if __name__ == "__main__":
    sys.exit(main())
