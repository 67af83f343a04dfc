"""Before against after, a judge against people: statistics with intervals, and pictures."""

from qirl_fast.evaluation.agreement import Judged, write_validation
from qirl_fast.evaluation.grid import before_after_grid
from qirl_fast.evaluation.paired import PairedResult, paired_bootstrap

__all__ = [
    "Judged",
    "PairedResult",
    "before_after_grid",
    "paired_bootstrap",
    "write_validation",
]
