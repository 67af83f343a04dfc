"""Strengths of models from votes between two of them, on Elo's scale, with intervals over prompts.

Bradley and Terry (Biometrika 39, 1952): model a is preferred to b with probability
s(theta_a - theta_b), s the logistic function. A prompt on which both were compared counts 1, split
w_ab + w_ba = 1 by its votes, a tie as half a win for each; so a prompt with many raters weighs as
much as one with a single rater. theta is the maximum of

    sum over a != b of (w_ab + PRIOR) log s(theta_a - theta_b)

PRIOR, half a win each way for every pair of models, is Jeffreys' (for two models Firth's, 1993:
share (w + 1/2) / (n + 1)). It keeps a model that only wins finite, and joins models that never met.
Newton's method from 0, no step above 1: the sum is strictly concave once theta_0 = 0 is fixed.

elo_m = ANCHOR + 400 / ln 10 (theta_m - theta_0): the first model stands at ANCHOR by definition,
and the interval of another is that of its distance to it. Percentile bootstrap (bootstrap.py): the
unit is the prompt, drawn with its votes of all pairs and raters. It is for one look at the planned
end; a share that is looked at while votes come in is win_share.py's. Where every resample gives the
same number (all prompts went one way) there is no interval: resampling knows nothing of what it did
not see. Fewer than FEWEST prompts have none either.

Shapes: n prompts, M models, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qirl_fast.evaluation.bootstrap import Floats, percentiles, resamples

PRIOR = 0.5
ANCHOR = 1000.0
SCALE = 400 / np.log(10)
MOST_STEPS = 200
FEWEST = 10  # prompts; resamples of fewer give intervals that are far too short


@dataclass(frozen=True)
class Ratings:
    """elo: float64 [M]. low, high: [M], NaN where there is no interval. prompts: with a vote."""

    elo: Floats
    low: Floats
    high: Floats
    prompts: int


def strengths(wins: Floats) -> Floats:
    """theta [..., M] with theta_0 = 0, of wins [..., M, M]: [a, b] is how much a had against b."""
    m = wins.shape[-1]
    won = wins + PRIOR * (1 - np.eye(m))
    met = won + np.swapaxes(won, -1, -2)
    total = won.sum(-1)
    theta = np.zeros(wins.shape[:-1])
    for _ in range(MOST_STEPS):
        p = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))  # of row against column
        gradient = total - (met * p).sum(-1)
        curvature = met * p * (1 - p)
        hessian = np.eye(m) * curvature.sum(-1)[..., None] - curvature
        step = np.zeros_like(theta)
        step[..., 1:] = np.linalg.solve(hessian[..., 1:, 1:], gradient[..., 1:, None])[..., 0]
        theta = theta + step.clip(-1, 1)
        if np.abs(step).max(initial=0) < 1e-10:
            return theta
    raise RuntimeError(f"no maximum after {MOST_STEPS} steps; last step {np.abs(step).max():g}")


def elo(theta: Floats) -> Floats:
    """Strengths on Elo's scale, the first model at ANCHOR."""
    found: Floats = ANCHOR + SCALE * (theta - theta[..., :1])
    return found


def rate(wins_nMM: Floats, *, n_boot: int = 2000, seed: int = 0, level: float = 0.95) -> Ratings:
    """Ratings of wins by prompt, each prompt's pairs summing to 1 or, where not compared, to 0.

    Raises ValueError naming what is wrong. Equal seeds give equal results.
    """
    _check(wins_nMM, n_boot, level)
    n, m = wins_nMM.shape[:2]
    flat = wins_nMM.reshape(n, m * m)
    theta = elo(strengths(flat.sum(0).reshape(m, m)))
    low, high = np.full((2, m), np.nan)
    if n >= FEWEST:
        draws = np.concatenate(
            [elo(strengths((c @ flat).reshape(-1, m, m))) for c in resamples(n, n_boot, seed)]
        )
        for k in range(1, m):
            if np.ptp(draws[:, k]) > 1e-6:
                low[k], high[k] = percentiles(draws[:, k], level)
    return Ratings(theta, low, high, n)


def _check(wins_nMM: Floats, n_boot: int, level: float) -> None:
    shape = wins_nMM.shape
    if wins_nMM.ndim != 3 or shape[0] < 1 or shape[1] < 2 or shape[1] != shape[2]:
        raise ValueError(
            f"got wins of shape {list(shape)}; wanted [prompts, models, models], 1 prompt and 2 "
            "models or more"
        )
    if n_boot < 100 or not 0 < level < 1:
        raise ValueError(f"got n_boot {n_boot}, level {level}; wanted >= 100 and within (0, 1)")
    met = wins_nMM + wins_nMM.transpose(0, 2, 1)
    sound = (wins_nMM >= 0) & (np.isclose(met, 1) | (met == 0))
    if not sound.all() or np.einsum("naa->", wins_nMM):
        n, a, b = (int(i) for i in np.argwhere(~sound | (np.eye(shape[1]) * wins_nMM > 0))[0])
        raise ValueError(
            f"prompt {n}: models {a} and {b} have {wins_nMM[n, a, b]} and {wins_nMM[n, b, a]}; "
            "wanted shares >= 0 that sum to 1, or 0 twice where they were not compared"
        )
