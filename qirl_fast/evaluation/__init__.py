"""Before against after: paired statistics and pictures."""

from qirl_fast.evaluation.grid import before_after_grid
from qirl_fast.evaluation.paired import PairedResult, paired_bootstrap

__all__ = ["PairedResult", "before_after_grid", "paired_bootstrap"]
