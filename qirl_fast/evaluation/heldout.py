"""Held-out evaluation: ODE sampling with fixed seeds, scored by every judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qirl_fast.models.adapter import require_finite
from qirl_fast.rollout.sample import Model, Sampling, Trajectory, decode, sample_then
from qirl_fast.rollout.workers import Workers

S = TypeVar("S")


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

    @classmethod
    def of_samples(
        cls, scores: Mapping[str, np.ndarray], images: np.ndarray, samples: int
    ) -> "Evaluation":
        """Of `samples` images of each prompt, prompt by prompt; scores: [B] each, NaN for none."""
        means = {
            n: _mean_of_some(s.astype(np.float64).reshape(-1, samples)) for n, s in scores.items()
        }
        return cls(means, list(images[::samples]))


def images_of(
    model: Any, chunk: Trajectory, how: Sampling, workers: Workers, shown: bool
) -> np.ndarray:
    """uint8 [b, H, W, 3] of the chunk; shown: whether they are wanted here, else b is 0.

    NotFinite in either case, so that processes that draw a chunk together go on together.
    """
    if shown:
        return decode(model, chunk.latents, how, workers)
    require_finite(chunk.latents)
    return np.empty((0, how.height, how.width, 3), np.uint8)


def draw_and_score(
    model: Any,
    embeddings: Sequence[Any],
    null: Any,
    metadata: Sequence[dict[str, Any]],
    how: Sampling,
    scheduler_config: Mapping[str, Any],
    score: Callable[[np.ndarray, list[dict[str, Any]]], S],
    workers: Workers,
    *,
    samples_per_prompt: int,
    seed: int,
    chunks: Sequence[int],
    shown: Sequence[int],
) -> tuple[np.ndarray, list[S]]:
    """Sample every prompt `samples_per_prompt` times: images uint8 [B, H, W, 3], scores by chunk.

    Args:
        model: a model adapter.
        embeddings: P tensors [L_p, C], or what else its prefix takes; null: the unconditional one,
            or a list of one for each; metadata: P rows for the judges.
        how: sampling with dynamics "ode" steps only (nothing is recorded).
        score: images [b, H, W, 3] and b metadata rows of a chunk -> their scores.
        workers: make the chunks.
        chunks: numbers of the chunks that are made here, ascending; shown: of these, those that
            are decoded and scored here.
    """
    model_: Model = model
    rows = [row for row in metadata for _ in range(samples_per_prompt)]
    firsts = range(0, len(rows), how.max_rows)
    scored = [firsts[k] for k in shown]
    images = sample_then(
        lambda chunk: images_of(model, chunk, how, workers, chunk.rows.start in scored),
        workers,
        model_,
        embeddings,
        null,
        how,
        scheduler_config,
        group_size=samples_per_prompt,
        seed=seed,
        update=0,
        chunks=chunks,
    )
    drawn, scores = [np.empty((0, how.height, how.width, 3), np.uint8)], []
    for first, of_chunk in zip((firsts[k] for k in chunks), images, strict=True):
        if first in scored:
            drawn.append(of_chunk)
            scores.append(score(of_chunk, rows[first : first + len(of_chunk)]))
    return np.concatenate(drawn), scores


def _mean_of_some(values_PS: np.ndarray) -> np.ndarray:
    """Mean of each row's numbers, NaN where there is none."""
    some_PS = ~np.isnan(values_PS)
    if some_PS.all():
        return values_PS.mean(1)
    count_P = some_PS.sum(1)
    total_P = np.where(some_PS, values_PS, 0.0).sum(1)
    return np.where(count_P > 0, total_P / np.maximum(count_P, 1), np.nan)
