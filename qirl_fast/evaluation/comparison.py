"""Several models on several tasks: what each gains over the base, and how sure that is.

All models draw the same prompts from the same initial noise, so every statement is about pairs; its
interval is a percentile bootstrap over prompts, each task's drawn by itself (Efron 1979).

Shapes: n prompts of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qirl_fast.evaluation.bootstrap import percentiles, resamples

RESAMPLES = 10_000
Scores = Mapping[str, np.ndarray]  # by task, float64 [n]


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def _means(scores: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES bootstrap samples; equal seeds draw equal prompts."""
    n = len(scores)
    return np.concatenate([(c * scores).sum(1) for c in resamples(n, RESAMPLES, seed)]) / n


def gain(base: np.ndarray, model: np.ndarray) -> Estimate:
    """Mean of model - base over the prompts."""
    low, high = percentiles(_means(model - base, 0), 0.95)
    return Estimate(float((model - base).mean()), low, high)


def share(base: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> Estimate | None:
    """The student's gain over the base as a share of the teacher's; None where it is not certain
    that there is any: not every resample has one.
    """
    theirs, own = teacher - base, student - base
    resampled = _means(theirs, 0)
    if not resampled.min() > 0:
        return None
    low, high = percentiles(_means(own, 0) / resampled, 0.95)
    return Estimate(float(own.mean() / theirs.mean()), low, high)


def lead(model: Scores, other: Scores) -> Estimate:
    """By how much the sum of the tasks' mean scores is above the other model's."""
    differences = [model[task] - other[task] for task in model]
    resampled = sum(_means(d, seed) for seed, d in enumerate(differences))
    low, high = percentiles(np.asarray(resampled), 0.95)
    return Estimate(float(sum(d.mean() for d in differences)), low, high)
