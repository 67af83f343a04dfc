"""How many prompts an evaluation needs: sample size and power of a paired difference.

For n differences of standard deviation s around a mean of delta, the two-sided t-test at level
alpha has the power

    P(|T| > t_{1 - alpha/2, n-1}),  T noncentral t, n - 1 degrees, noncentrality delta sqrt(n) / s

(Cohen 1988, 2.3; exact for normal differences, and nearly so for the mean of many others). The
number needed is the least n whose power reaches the wanted one; the least visible effect of n is
the delta at which it does. s is taken from an evaluation at hand: of means over as many samples a
prompt as that one drew.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import nct, norm, t

MOST = 10_000_000  # prompts; more are said to be out of reach


def power(n: int, effect: float, sd: float, alpha: float = 0.05) -> float:
    """The chance, in (0, 1], that n prompts show a mean difference of `effect`.

    n >= 2; effect, sd > 0 in points of the score; alpha in (0, 1). ValueError otherwise.
    """
    _check(effect, sd, alpha, 0.5)
    if n < 2:
        raise ValueError(f"got {n} prompts; wanted 2 or more")
    return _power(n, effect / sd, alpha)


def prompts_needed(
    effect: float, sd: float, alpha: float = 0.05, wanted: float = 0.8
) -> int | None:
    """The least number of prompts, 2 or more, whose power for `effect` is `wanted`; None: above
    MOST. Arguments as of `power`; wanted in (alpha, 1).
    """
    _check(effect, sd, alpha, wanted)
    d = effect / sd
    normal = ((float(norm.ppf(1 - alpha / 2)) + float(norm.ppf(wanted))) / d) ** 2
    if normal > MOST:
        return None
    high = max(2, math.ceil(normal))  # the t-test needs a few more than the normal one
    while _power(high, d, alpha) < wanted:
        high += max(1, high // 8)
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        if middle >= 2 and _power(middle, d, alpha) >= wanted:
            high = middle
        else:
            low = middle
    return high


def least_effect(n: int, sd: float, alpha: float = 0.05, wanted: float = 0.8) -> float:
    """The mean difference, in points of the score, that n prompts show with power `wanted`."""
    _check(1.0, sd, alpha, wanted)
    if n < 2:
        raise ValueError(f"got {n} prompts; wanted 2 or more")
    high = 1.0
    while _power(n, high, alpha) < wanted:
        high *= 2
    return float(brentq(lambda d: _power(n, d, alpha) - wanted, 1e-12, high)) * sd


def _power(n: int, d: float, alpha: float) -> float:
    """Of d standard deviations. The far tail is below 1e-12 where the near one is 0.5."""
    critical, shift = float(t.ppf(1 - alpha / 2, n - 1)), d * math.sqrt(n)
    near, far = nct.sf(critical, n - 1, shift), nct.cdf(-critical, n - 1, shift)
    found = float(near) + (float(far) if math.isfinite(far) else 0.0)
    if math.isfinite(found):
        return min(1.0, found)
    return float(norm.sf(critical - shift))  # scipy's series gives up at large noncentralities


def _check(effect: float, sd: float, alpha: float, wanted: float) -> None:
    if not (effect > 0 and sd > 0 and math.isfinite(effect) and math.isfinite(sd)):
        raise ValueError(f"got effect {effect}, standard deviation {sd}; wanted both above 0")
    if not 0 < alpha < wanted < 1:
        raise ValueError(f"got alpha {alpha}, power {wanted}; wanted 0 < alpha < power < 1")
