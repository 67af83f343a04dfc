"""Is the change real? A paired bootstrap of the mean difference.

Both evaluations use the same prompts and the same initial noise, so the unit is the pair:
d_i = after_i - before_i. The mean of d is resampled with replacement over pairs (Efron 1979,
percentile interval). Where a prompt has several images, average them first: images of one prompt
are not independent.

Shapes: n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qirl_fast.evaluation.bootstrap import percentiles, resamples


@dataclass(frozen=True)
class PairedResult:
    """Means before and after, their difference, and its interval.

    low, high: bounds of the percentile interval of diff, 95 % unless asked otherwise. n: pairs.
    """

    before: float
    after: float
    diff: float
    low: float
    high: float
    n: int


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    n_boot: int = 10_000,
    seed: int = 0,
    *,
    level: float = 0.95,
) -> PairedResult:
    """Return the mean change and its bootstrap interval.

    before, after: [n] finite scores, n >= 2, of the same prompts in the same order. n_boot: at
    least 100 resamples. level: coverage in (0, 1). Equal seeds give equal results; float64.
    Raises ValueError naming what is wrong.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if old.shape != new.shape or old.ndim != 1 or len(old) < 2:
        raise ValueError(
            f"got shapes {list(old.shape)} and {list(new.shape)}; wanted two equal [n], n >= 2"
        )
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("scores hold NaN or infinity; drop failed prompts from both sides")
    if n_boot < 100 or not 0 < level < 1:
        raise ValueError(f"got n_boot {n_boot}, level {level}; wanted >= 100 and within (0, 1)")
    diff_n = new - old
    n = len(diff_n)
    # a sum of its own per resample: a matrix product's rounding would depend on the block
    means = np.concatenate([(c * diff_n).sum(axis=1) for c in resamples(n, n_boot, seed)]) / n
    low, high = percentiles(means, level)
    return PairedResult(
        before=float(old.mean()),
        after=float(new.mean()),
        diff=float(diff_n.mean()),
        low=low,
        high=high,
        n=n,
    )
