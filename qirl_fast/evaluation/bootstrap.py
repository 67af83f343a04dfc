"""The one bootstrap core: counts of drawn units, and the percentile interval of what they give.

A resample draws n of n units with replacement (Efron 1979); it is held as how often each unit was
drawn, so that a statistic which is a function of sums over units costs one product with the counts.
Where several rows belong to one prompt the unit is the prompt: its rows are drawn together.

Shapes: n units, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BLOCK_ELEMENTS = 1 << 22  # drawn indices held at once, 32 MiB

Floats = NDArray[np.float64]


def resamples(n: int, n_boot: int, seed: int) -> Iterator[Floats]:
    """Yield blocks float64 [r, n] of how often each unit was drawn; each row sums to n.

    n_boot rows in all, the same for equal seeds whatever the block. n, n_boot >= 1.
    """
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, n_boot, block):
        rows = min(block, n_boot - start)
        drawn = generator.integers(0, n, (rows, n))
        drawn += n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def percentiles(draws: Floats, level: float) -> tuple[float, float]:
    """Bounds of the percentile interval of draws [R] at a coverage in (0, 1)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
