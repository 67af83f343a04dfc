"""How much each reward should weigh in each category: a proposal from the base model's samples.

n samples of each prompt, scored by K judges; c a category, m its prompts. All statistics are inside
groups, as the advantage is. x_ki = R_ki less the mean of its group. In float64:

    std_k      standard deviation of all scores of judge k, over all categories
    std_kc     sqrt(sum x_ki^2 / sum_m (n_m - 1)), pooled over the groups of c
    signal_kc  std_kc / std_k: of what the judge tells apart at all, how much it tells apart here
    C_kj       correlation of x_k and x_j over the samples that both scored
    shared_kc  sum_j max(0, C_kj)^2 over the judges that are not out, itself included: how many
               judges say the same
    agree_kc   max(0, Spearman with people's ratings); without ratings the mean of the judges that
               have some, and 1 where none has
    w_kc       ~ agree_kc signal_kc / shared_kc, and sums to 1

A judge is out, w 0, where std_kc is below `floor` std_k or below `least`, or it has fewer than two
scores in every group: a z-score would blow its noise up to the size of the others' signal. Two
judges that say the same share what one would have; one that contradicts another loses nothing.

Spearman is taken inside groups too: ranks of ratings and scores within each prompt, centred, then
correlated over all prompts. Where fewer than `least_ratings` lie in prompts with two or more, it is
over the ratings of the category across prompts; where these are too few, over all categories.
What is undefined, such as the correlation of a constant, is None, with the reason; never NaN.

Shapes: P prompts, n samples, K judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class Agreement:
    """With people: value in -1..1, None where undefined; count: ratings; how: over what, or why
    not.
    """

    value: float | None
    count: int
    how: str


@dataclass(frozen=True)
class Weight:
    """One judge in one category, see the module's equations. reason: for people to read."""

    weight: float
    std: float | None
    signal: float | None
    shared: float | None
    agreement: Agreement
    reason: str


@dataclass(frozen=True)
class Limits:
    """floor: share of a judge's std; least: in its own units; least_ratings: to count."""

    floor: float = 0.05
    least: float = 0.0
    least_ratings: int = 20


def centred(scores_PnK: np.ndarray) -> np.ndarray:
    """Scores less their group's mean, NaN where not scored or alone in the group."""
    scored = ~np.isnan(scores_PnK)
    count_P1K = scored.sum(1, keepdims=True)
    first_P1K = np.take_along_axis(scores_PnK, scored.argmax(1)[:, None], 1)
    away = np.where(scored, scores_PnK - first_P1K, 0.0)  # equal scores are exactly 0 away
    mean_P1K = away.sum(1, keepdims=True) / np.maximum(count_P1K, 1)
    return np.where(scored & (count_P1K > 1), away - mean_P1K, np.nan)


def pooled_std(x_PnK: np.ndarray) -> np.ndarray:
    """In-group standard deviation [K] of centred scores over all groups; NaN: no group has two."""
    count_PK = (~np.isnan(x_PnK)).sum(1)
    free_K = np.maximum(count_PK - 1, 0).sum(0)
    squares_K = np.nansum(np.square(x_PnK), axis=(0, 1))
    std_K = np.sqrt(squares_K / np.maximum(free_K, 1))
    return np.where(free_K > 0, std_K, np.nan)


def correlations(x_PnK: np.ndarray) -> np.ndarray:
    """Pearson [K, K] of centred scores over samples that both judges scored; NaN: undefined."""
    x_NK = x_PnK.reshape(-1, x_PnK.shape[-1])
    k = x_NK.shape[1]
    found = np.full((k, k), np.nan)
    for i in range(k):
        for j in range(i, k):
            both = x_NK[~np.isnan(x_NK[:, [i, j]]).any(1)][:, [i, j]]
            found[i, j] = found[j, i] = _pearson(both[:, 0], both[:, 1])
    return found


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of deviations from 0, clipped to -1..1; NaN where one is constant."""
    if len(a) < 3:
        return np.nan
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float(np.clip((a * b).sum() / scale, -1.0, 1.0)) if scale > 0 else np.nan


def agreement(scores_Pn: np.ndarray, ratings_Pn: np.ndarray, least: int) -> Agreement:
    """Spearman of one judge's scores with ratings, NaN where a sample has none.

    Inside groups where `least` ratings lie in groups of two or more, else across prompts.
    """
    both = ~np.isnan(scores_Pn) & ~np.isnan(ratings_Pn)
    count = int(both.sum())
    if count < least:
        return Agreement(None, count, f"{count} ratings, of {least} wanted")
    inside = both & (both.sum(1, keepdims=True) > 1)
    if inside.sum() >= least:
        how = "inside groups"
        groups = [(scores_Pn[p][m], ratings_Pn[p][m]) for p, m in _rows(inside)]
    else:
        how, groups = "across prompts", [(scores_Pn[both], ratings_Pn[both])]
    ranks = [[rankdata(side) - (len(side) + 1) / 2 for side in pair] for pair in groups]
    score_N, rating_N = (np.concatenate(side) for side in zip(*ranks, strict=True))
    value = _pearson(score_N, rating_N)
    if np.isnan(value):
        who = "the judge" if not score_N.any() else "people"
        return Agreement(None, count, f"undefined: {who} rated all alike, {how}")
    return Agreement(value, count, how)


def _rows(mask_Pn: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(int(p), mask_Pn[p]) for p in np.flatnonzero(mask_Pn.any(1))]


def propose(
    scores_PnK: np.ndarray,
    std_K: np.ndarray,
    agreements: Sequence[Agreement],
    names: Sequence[str],
    limits: Limits,
) -> list[Weight]:
    """The weights of one category's K judges; all 0 where every judge is out.

    std_K: each judge's over all categories. agreements: with people, one a judge.
    """
    x_PnK = centred(scores_PnK)
    own_K, c_KK = pooled_std(x_PnK), correlations(x_PnK)
    outs = [_why_out(own_K[k], std_K[k], limits) for k in range(len(names))]
    alive = [k for k, out in enumerate(outs) if not out]
    known = [max(0.0, a.value) for k in alive if (a := agreements[k]).value is not None]
    default = float(np.mean(known)) if known else 1.0
    raw, shared, reasons = [0.0] * len(names), {}, list(outs)
    for k in alive:
        overlap = {j: max(0.0, float(np.nan_to_num(c_KK[k, j]))) ** 2 for j in alive if j != k}
        shared[k] = 1.0 + sum(overlap.values())
        found = agreements[k]
        agree = default if found.value is None else max(0.0, found.value)
        raw[k] = agree * float(own_K[k] / std_K[k]) / shared[k]
        reasons[k] = _reason(own_K[k] / std_K[k], found, default, bool(known))
        if overlap and max(overlap.values()) >= 0.1:
            j = max(overlap, key=overlap.__getitem__)
            reasons[k] += f"; says much the same as {names[j]} (correlation {c_KK[k, j]:.2f})"
    total = sum(raw) or 1.0
    return [
        Weight(
            raw[k] / total,
            None if np.isnan(own_K[k]) else float(own_K[k]),
            float(own_K[k] / std_K[k]) if std_K[k] > 0 and not np.isnan(own_K[k]) else None,
            shared.get(k),
            agreements[k],
            reasons[k],
        )
        for k in range(len(names))
    ]


def _why_out(own: float, std: float, limits: Limits) -> str:
    if np.isnan(own):
        return "out: no group has two scores"
    if std == 0:
        return "out: the judge is constant"
    if own < limits.floor * std:
        share, least = own / std, limits.floor
        return f"out: its in-group std {own:.3g} is {share:.1%} of its std, below {least:.0%}"
    if own < limits.least:
        return f"out: its in-group std {own:.3g} is below advantage.std_floor {limits.least:g}"
    return ""


def _reason(signal: float, found: Agreement, default: float, any_known: bool) -> str:
    text = f"in-group std {signal:.0%} of its std"
    if found.value is not None:
        text += f"; agrees {found.value:+.2f} with {found.count} ratings {found.how}"
        return text + (", so it weighs nothing" if found.value <= 0 else "")
    if any_known:
        return text + f"; no agreement ({found.how}), taken as the others' mean {default:.2f}"
    return text
