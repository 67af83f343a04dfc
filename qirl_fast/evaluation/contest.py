"""Several models on the same prompts: means by category, accuracies, comparisons of pairs.

All models draw a prompt's samples from the same initial noise, and the unit of every statement is
the prompt: its samples are averaged first. A score that failed, or where there was nothing to
judge, is NaN; the prompt then enters with its other samples, or where it has none not at all.

Shapes: P prompts, S samples of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from qirl_fast.evaluation.comparison import Estimate, gain
from qirl_fast.evaluation.planner import least_effect, prompts_needed
from qirl_fast.evaluation.significance import (
    SignTest,
    cohen_dz,
    holm,
    rank_biserial,
    sign_test,
)

ALL = "all"
Scores = Mapping[str, Mapping[str, np.ndarray]]  # judge -> model -> float64 [P, S], NaN for none


@dataclass(frozen=True)
class Mean:
    """value: mean over `prompts` prompts, None where there is none."""

    value: float | None
    prompts: int


@dataclass(frozen=True)
class Comparison:
    """How a model's scores by one judge differ from another's, over the prompts that both have.

    gain: mean difference and its 95 % interval. signs: the sign test; adjusted: its p after Holm.
    sd: of the differences. dz, rank_biserial: effect sizes, None where they are not defined.
    needed: prompts that show a difference of `effect` (see `compared`), None: too many; visible:
    the least difference that this many show; both None where all differences are alike.
    """

    judge: str
    model: str
    other: str
    prompts: int
    gain: Estimate
    signs: SignTest
    adjusted: float
    sd: float
    dz: float | None
    rank_biserial: float | None
    effect: float
    needed: int | None = None
    visible: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """images: judged. right: share of them that is right, None without any."""

    right: float | None
    images: int


def prompt_means(scores_PS: np.ndarray) -> np.ndarray:
    """Mean of each prompt's scores, float64 [P]; NaN where it has none."""
    some_PS = ~np.isnan(scores_PS)
    total_P = np.where(some_PS, scores_PS, 0.0).sum(1)
    count_P = some_PS.sum(1)
    return np.where(count_P > 0, total_P / np.maximum(count_P, 1), np.nan)


def by_category(scores_PS: np.ndarray, categories: Sequence[str | None]) -> dict[str, Mean]:
    """The mean over all prompts under ALL, then of each category, named "-" where it has none."""
    means_P = prompt_means(scores_PS)
    names = [category or "-" for category in categories]
    found = {ALL: _mean(means_P)}
    several = len(set(names)) > 1 or "-" not in names
    for name in sorted(set(names)) if several else ():
        found[name] = _mean(means_P[[n == name for n in names]])
    return found


def _mean(values_P: np.ndarray) -> Mean:
    some = values_P[~np.isnan(values_P)]
    return Mean(float(some.mean()) if len(some) else None, len(some))


def accuracies(
    scores_PS: np.ndarray, tags: Sequence[str | None], correct_at: float
) -> dict[str, Accuracy]:
    """GenEval's table: the share of right images of each tag, and the mean of the tags under ALL.

    Right is a score of `correct_at` or more. The mean is unweighted: a tag counts once, however
    many prompts it has (arXiv 2310.11513, evaluation/summary_scores.py). Prompts without a tag are
    left out.
    """
    found: dict[str, Accuracy] = {}
    for tag in sorted({tag for tag in tags if tag}):
        own = scores_PS[[t == tag for t in tags]].ravel()
        own = own[~np.isnan(own)]
        right = float((own >= correct_at).mean()) if len(own) else None
        found[tag] = Accuracy(right, len(own))
    shares = [one.right for one in found.values() if one.right is not None]
    images = sum(one.images for one in found.values())
    return {ALL: Accuracy(float(np.mean(shares)) if shares else None, images), **found}


def compared(
    scores: Scores,
    pairs: Sequence[tuple[str, str]],
    effects: Mapping[str, float],
    alpha: float,
    power: float,
) -> list[Comparison]:
    """Each pair (model, other) by each judge; Holm's correction is over all of them.

    effects (by judge), alpha, power: of the planned evaluation, whose level is alpha / comparisons
    (Bonferroni, the hardest step of Holm's). A pair with fewer than two common prompts is left out.
    """
    found = list(_compared(scores, pairs, effects))
    adjusted = holm([one.signs.p for one in found])
    level = alpha / max(1, len(found))
    plans = [_plan(one, level, power) for one in found]
    return [
        replace(one, adjusted=p, needed=needed, visible=visible)
        for one, p, (needed, visible) in zip(found, adjusted, plans, strict=True)
    ]


def _compared(
    scores: Scores, pairs: Sequence[tuple[str, str]], effects: Mapping[str, float]
) -> Iterator[Comparison]:
    for judge, of_model in scores.items():
        for model, other in pairs:
            own, theirs = prompt_means(of_model[model]), prompt_means(of_model[other])
            both = ~(np.isnan(own) | np.isnan(theirs))
            if both.sum() < 2:
                continue
            own, theirs = own[both], theirs[both]
            d = own - theirs
            yield Comparison(
                judge,
                model,
                other,
                int(both.sum()),
                gain(theirs, own),
                sign_test(d),
                1.0,
                float(d.std(ddof=1)),
                cohen_dz(d),
                rank_biserial(d),
                effects[judge],
            )


def _plan(one: Comparison, level: float, power: float) -> tuple[int | None, float | None]:
    """(prompts needed, visible difference); nothing where all differences are alike."""
    if one.dz is None:
        return None, None
    return (
        prompts_needed(one.effect, one.sd, level, power),
        least_effect(one.prompts, one.sd, level, power),
    )


def pairs_of(models: Sequence[str], reference: str, every: bool) -> list[tuple[str, str]]:
    """(model, other): each other model with the reference, or every pair."""
    if every:
        return [(later, earlier) for earlier, later in combinations(models, 2)]
    return [(model, reference) for model in models if model != reference]
