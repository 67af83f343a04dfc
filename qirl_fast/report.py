"""`python -m qirl_fast.report RUN ...`: write report.html into the folder of each run.

A run may be finished, stopped half way or still running. Only files of its folder are read.
"""

import sys
from pathlib import Path

from rich.console import Console

from qirl_fast.reporting.page import write_page
from qirl_fast.reporting.run import RunError


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 a folder is no run's."""
    args = sys.argv[1:] if argv is None else list(argv)
    if not args or any(arg.startswith("-") for arg in args):
        print(__doc__)
        return 0 if "-h" in args or "--help" in args else 2
    try:
        for arg in args:
            print(write_page(Path(arg)))
    except (RunError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {error}", style="red", markup=False
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
