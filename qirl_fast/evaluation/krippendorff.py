"""Krippendorff's alpha of nominal labels: how far raters agree beyond chance; some may be missing.

Unit u has m_u labels, n_uc of them c; units with fewer than two are left out; N = sum m_u and
n_c = sum n_uc over the others (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011):

    alpha = 1 - (N - 1) sum_u (m_u^2 - sum_c n_uc^2) / (m_u - 1)  /  (N^2 - sum_c n_c^2)

1: all agree; 0: as labels drawn from the same pot would; below: raters contradict each other. It is
undefined where only one label was ever given. The interval resamples prompts (bootstrap.py), as
units of one prompt are not independent; resamples on which it is undefined are left out, and with
more than a twentieth of them there is no interval.

Shapes: U units, C labels, n prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qirl_fast.evaluation.bootstrap import Floats, percentiles, resamples

UNDEFINED = 0.05


@dataclass(frozen=True)
class Alpha:
    """value, low, high: NaN where there is none. units, labels: of units with two labels or more.
    reason: why there is no value, or no interval; empty otherwise.
    """

    value: float
    low: float
    high: float
    units: int
    labels: int
    reason: str = ""


def alpha(
    counts_UC: Floats,
    prompts: Sequence[str],
    *,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Alpha:
    """Alpha of counts [U, C]: how many raters gave unit u the label c. prompts: of the units."""
    if counts_UC.ndim != 2 or len(prompts) != len(counts_UC) or (counts_UC < 0).any():
        raise ValueError(
            f"got counts {list(counts_UC.shape)} and {len(prompts)} prompts; wanted [units, labels]"
            ", none below 0, and a prompt for each unit"
        )
    kept = counts_UC.sum(1) >= 2
    if not kept.any():
        return Alpha(np.nan, np.nan, np.nan, 0, 0, "no pair was judged by two raters")
    counts = counts_UC[kept]
    _, cluster = np.unique(np.array(prompts)[kept], return_inverse=True)
    m = counts.sum(1)
    differing = (m**2 - (counts**2).sum(1)) / (m - 1)
    sums = np.zeros((cluster.max() + 1, 1 + counts.shape[1]))
    np.add.at(sums, cluster, np.column_stack([differing, counts]))
    value = float(_of_sums(sums.sum(0)[None])[0])
    size = (len(counts), int(m.sum()))
    if np.isnan(value):
        return Alpha(np.nan, np.nan, np.nan, *size, "only one label was ever given")
    blocks = resamples(len(sums), n_boot, seed)
    draws = np.concatenate([_of_sums(block @ sums) for block in blocks])
    defined = draws[~np.isnan(draws)]
    if len(sums) < 2 or len(defined) < (1 - UNDEFINED) * n_boot:
        return Alpha(value, np.nan, np.nan, *size, "too few prompts for an interval")
    return Alpha(value, *percentiles(defined, level), *size)


def _of_sums(sums: Floats) -> Floats:
    """Alpha of sums [R, 1 + C]: what differs within units, and the labels' numbers."""
    n = sums[:, 1:].sum(1)
    by_chance = n**2 - (sums[:, 1:] ** 2).sum(1)
    ratio = np.full(len(sums), np.nan)
    np.divide((n - 1) * sums[:, 0], by_chance, out=ratio, where=by_chance > 0)
    found: Floats = 1 - ratio
    return found
