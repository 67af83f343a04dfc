"""Held-out evaluation: ODE sampling with fixed seeds, scored by every judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qirl_fast.rollout.sample import Model, Sampling, sample_then
from qirl_fast.rollout.workers import Workers

ScoreFn = Callable[[np.ndarray, list[dict[str, Any]]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """Per prompt: each judge's mean score, float64 [P], NaN where it had nothing to judge; the
    first image, uint8 [H, W, 3].
    """

    scores: dict[str, np.ndarray]
    images: list[np.ndarray]

    @classmethod
    def of(cls, parts: Sequence["Evaluation"], rows: Sequence[Sequence[int]]) -> "Evaluation":
        """One of several; rows: which prompts of the whole each part holds."""
        order = np.argsort([row for part in rows for row in part])
        scores = {
            name: np.concatenate([part.scores[name] for part in parts])[order]
            for name in parts[0].scores
        }
        images = [image for part in parts for image in part.images]
        return cls(scores, [images[i] for i in order])


def evaluate(
    model: Any,
    embeddings: Sequence[Any],
    null: Any,
    metadata: Sequence[dict[str, Any]],
    how: Sampling,
    scheduler_config: Mapping[str, Any],
    score: ScoreFn,
    workers: Workers,
    *,
    samples_per_prompt: int,
    seed: int,
) -> Evaluation:
    """Sample every prompt `samples_per_prompt` times and score the images.

    Args:
        model: a model adapter.
        embeddings: P tensors [L_p, C], or what else its prefix takes; null: the unconditional one,
            or a list of one for each; metadata: P rows for the judges.
        how: sampling with dynamics "ode" steps only (nothing is recorded).
        score: images [B, H, W, 3] and B metadata rows -> {judge: [B]}, NaN for what is left out.
        workers: make the chunks.
    """
    model_: Model = model
    images = sample_then(
        lambda chunk: model.decode(chunk.latents, how.height, how.width),
        workers,
        model_,
        embeddings,
        null,
        how,
        scheduler_config,
        group_size=samples_per_prompt,
        seed=seed,
        update=0,
    )
    drawn: np.ndarray = np.concatenate(list(images))
    rows = [row for row in metadata for _ in range(samples_per_prompt)]
    scores = {
        name: _mean_of_some(values.astype(np.float64).reshape(-1, samples_per_prompt))
        for name, values in score(drawn, rows).items()
    }
    return Evaluation(scores, list(drawn[::samples_per_prompt]))


def _mean_of_some(values_PS: np.ndarray) -> np.ndarray:
    """Mean of each row's numbers, NaN where there is none."""
    some_PS = ~np.isnan(values_PS)
    if some_PS.all():
        return values_PS.mean(1)
    count_P = some_PS.sum(1)
    total_P = np.where(some_PS, values_PS, 0.0).sum(1)
    return np.where(count_P > 0, total_P / np.maximum(count_P, 1), np.nan)
