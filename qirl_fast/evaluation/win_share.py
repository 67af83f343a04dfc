"""How often a model is preferred, with an interval that may be looked at after every vote.

y_i in [0, 1] is a prompt's outcome: 1 the model was preferred, 0 the other, 1/2 neither; several
raters of one prompt are averaged. An interval made for one look at the end is wrong at some look
far more often than it says; this one is a confidence sequence: whatever the share mu,

    P(mu lies in the interval after every prompt, 1, 2, 3, ... at once) >= level

so one may stop, or go on, because of what it shows. It is the hedged capital of Waudby-Smith and
Ramdas ("Estimating means of bounded random variables by betting", JRSS B 86, 2024, section 4): two
gamblers bet that the mean is above, or below, m, and m is left out once one of them, having begun
with half a coin, holds 1 / alpha, alpha = 1 - level (Ville's inequality):

    K+_t(m) = prod_i (1 + min(b_i, c / m) (y_i - m)),   K- the same of 1 - y and 1 - m,   c = 1/2
    b_t = sqrt(2 log(2 / alpha) / (v_{t-1} t log(t + 1)))
    v_t = (1/4 + sum (y_i - u_i)^2) / (t + 1),   u_t = (1/2 + sum y_i) / (t + 1)

K+ falls in m, so the bounds are found by halving, not on a grid. Assumed: each prompt is a fresh
draw from those that the claim is about, in an order that does not depend on their outcomes (the
arena's is random). No normal approximation and no least number of prompts; the price is width.

Shapes: n prompts in the order of their outcomes, S studies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qirl_fast.evaluation.bootstrap import Floats

C = 0.5
HALVINGS = 50


@dataclass(frozen=True)
class Share:
    """Mean outcome of n prompts and its interval; without any prompt 1/2 in [0, 1]."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_no_difference(self) -> bool:
        """Whether 1/2 lies outside."""
        return not self.low <= 0.5 <= self.high


def win_share(outcomes: ArrayLike, level: float = 0.95) -> Share:
    """The share of outcomes [n], each in [0, 1], in the order in which they came."""
    y = np.asarray(outcomes, np.float64)
    if y.ndim != 1 or not ((y >= 0) & (y <= 1)).all():
        raise ValueError(f"got outcomes {list(y.shape)}; wanted [n], each a number in [0, 1]")
    if not 0 < level < 1:
        raise ValueError(f"got level {level}; wanted within (0, 1)")
    if not len(y):
        return Share(0.5, 0.0, 1.0, 0)
    b = _bets(y, level)
    low, high = _lower(y, b, level), 1 - _lower(1 - y, b, level)
    return Share(float(y.mean()), low, high, len(y))


def first_exclusion(outcomes_Sn: Floats, mean: float, level: float = 0.95) -> Floats:
    """After how many outcomes each study's interval first leaves `mean` out; infinity for never."""
    b, bar = _bets(outcomes_Sn, level), _bar(level)
    up = _log_capital(outcomes_Sn, b, mean)
    down = _log_capital(1 - outcomes_Sn, b, 1 - mean)
    out = np.maximum(up, down) >= bar
    return np.where(out.any(-1), out.argmax(-1) + 1.0, np.inf)


def needed(
    share: float,
    ties: float,
    *,
    most: int = 4000,
    power: float = 0.8,
    level: float = 0.95,
    studies: int = 1000,
    seed: int = 0,
) -> float:
    """Prompts by which `power` of simulated studies exclude 1/2; infinity where `most` are too few.

    One vote a prompt: a tie with probability `ties`, and `share` expected.
    """
    win = share - ties / 2
    if not (0 <= ties <= 1 and win >= 0 and win + ties <= 1):
        raise ValueError(f"got share {share}, ties {ties}; no votes have both")
    u = np.random.default_rng(seed).random((studies, most))
    y = np.where(u < win, 1.0, np.where(u < win + ties, 0.5, 0.0))
    stops = np.sort(first_exclusion(y, 0.5, level))
    return float(stops[math.ceil(power * studies) - 1])


def _bar(level: float) -> float:
    """log of what half a coin must have become."""
    return math.log(2 / (1 - level))


def _bets(y: Floats, level: float) -> Floats:
    """b_t [..., n] of outcomes [..., n]; each depends on what came before it alone."""
    t = np.arange(1, y.shape[-1] + 1)
    means = (0.5 + np.cumsum(y, -1)) / (t + 1)
    spread = (0.25 + np.cumsum((y - means) ** 2, -1)) / (t + 1)
    before = np.concatenate([np.full_like(spread[..., :1], 0.25), spread[..., :-1]], -1)
    found: Floats = np.sqrt(2 * _bar(level) / (before * t * np.log(t + 1)))
    return found


def _log_capital(y: Floats, b: Floats, m: float) -> Floats:
    """log K+_t(m) [..., n]."""
    return np.cumsum(np.log1p(np.minimum(b, C / m) * (y - m)), -1)


def _lower(y: Floats, b: Floats, level: float) -> float:
    """The least m that K+ leaves in."""
    inside, outside = 1.0, 0.0
    for _ in range(HALVINGS):
        m = (inside + outside) / 2
        if np.log1p(np.minimum(b, C / m) * (y - m)).sum() >= _bar(level):
            outside = m
        else:
            inside = m
    return outside
