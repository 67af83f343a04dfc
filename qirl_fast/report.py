"""`python -m qirl_fast.report RUN ...`: write report.html into the folder of each run.

A run may be finished, stopped half way or still running. Only files of its folder are read.
"""

import sys
from pathlib import Path

from qirl_fast.entry import run
from qirl_fast.reporting.page import write_page
from qirl_fast.reporting.run import RunError


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 a folder is no run's."""

    def work(args: list[str]) -> int:
        if not args or any(arg.startswith("-") for arg in args):
            print(__doc__)
            return 2
        for arg in args:
            print(write_page(Path(arg)))
        return 0

    return run(argv, __doc__, work, wrong=(RunError, OSError))


if __name__ == "__main__":
    sys.exit(main())
