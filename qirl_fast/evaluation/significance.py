"""Is a paired difference more than chance, and how large is it: tests, correction, effect sizes.

d_i = model_i - base_i over n prompts, which both drew from the same initial noise.

- sign test: of the m differences that are not 0, k are positive; exact two-sided binomial p at 1/2.
  It asks nothing of the scores but their order (Conover 1999, 3.4).
- Holm: of M p-values in ascending order, adjusted p_(j) = max_{i <= j} min(1, (M - i + 1) p_(i)).
  Reject where it is below alpha: the chance of any false rejection is at most alpha, however the
  tests depend on each other (Holm 1979).
- d_z = mean(d) / sd(d), sd with n - 1 (Cohen 1988, 2.3.5): the difference in its own deviations.
- rank-biserial r = (W+ - W-) / (W+ + W-), W the sums of the ranks of |d| of either sign, zeros left
  out, ties at their mean rank (Kerby 2014): +1 where every difference is positive.

Shapes: n prompts, M tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, rankdata


@dataclass(frozen=True)
class SignTest:
    """better, worse, same: prompts by the sign of their difference; p in (0, 1], two-sided."""

    better: int
    worse: int
    same: int
    p: float


def sign_test(diff_n: ArrayLike) -> SignTest:
    """The exact two-sided sign test of differences [n]; p = 1 where all are 0.

    ValueError for another shape, no difference, NaN or infinity.
    """
    d = _checked(diff_n)
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    p = float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0
    return SignTest(better, worse, len(d) - better - worse, p)


def holm(p_M: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of the given ones; each in [p, 1].

    ValueError for a p outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_M):  # also true of NaN
        raise ValueError(f"got p-values {list(p_M)}; wanted numbers from 0 to 1")
    adjusted, least = [0.0] * len(p_M), 0.0
    for place, i in enumerate(sorted(range(len(p_M)), key=lambda i: p_M[i])):
        least = max(least, min(1.0, (len(p_M) - place) * p_M[i]))
        adjusted[i] = least
    return adjusted


def cohen_dz(diff_n: ArrayLike) -> float | None:
    """mean / standard deviation of differences [n]; None where they are all alike, or one."""
    d = _checked(diff_n)
    if len(d) < 2 or np.ptp(d) == 0:
        return None
    return float(d.mean() / d.std(ddof=1))


def rank_biserial(diff_n: ArrayLike) -> float | None:
    """Matched-pairs rank-biserial correlation of differences [n], in [-1, 1]; None: all are 0."""
    d = _checked(diff_n)
    d = d[d != 0]
    if not len(d):
        return None
    ranks = rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum())


def _checked(diff_n: ArrayLike) -> np.ndarray:
    d = np.asarray(diff_n, np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(
            f"got differences of shape {list(d.shape)}, {int((~np.isfinite(d)).sum())} of them not "
            "finite; wanted finite [n], n >= 1: leave failed prompts out of both sides"
        )
    return d
