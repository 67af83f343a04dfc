"""How one update's samples come to be: drawn, judged, and, in fp8, chosen or scored again."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.config import Config
from qirl_fast.data.prompts import Prompt
from qirl_fast.models import Model
from qirl_fast.models.adapter import NotFinite
from qirl_fast.rewards.composite import BadReward, score_all, weights_for
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory, sample_then
from qirl_fast.rollout.workers import Workers

Judged = tuple[Trajectory, np.ndarray, Future[tuple[Tensor, Tensor]]]  # a chunk, images, scores


def best_and_worst(value: Tensor, groups: int, keep: int) -> list[int]:
    """Indices, ascending, of the keep / 2 largest and smallest of each of `groups` equal parts.

    value: [N], N a multiple of groups. Of equal values the first are the smaller ones.
    """
    order = value.view(groups, -1).argsort(dim=1, stable=True)
    picked = torch.cat([order[:, : keep // 2], order[:, -(keep // 2) :]], dim=1)
    first = torch.arange(groups)[:, None] * order.shape[1]
    return (picked + first).flatten().sort().values.tolist()


def advantages(cfg: Config, batch: Batch, clamp: float | None = None) -> ops.GroupAdvantage:
    """Group advantages of the optimised judges, by each prompt's category weights.

    clamp: in place of the recipe's.
    """
    names = list(cfg.rewards)
    group = len(batch.scores) // len(batch.prompts)
    categories = [p.category for p in batch.prompts for _ in range(group)]
    weights = weights_for(categories, cfg.rewards, cfg.category_weights, names)
    a = cfg.advantage
    return ops.group_advantage(
        batch.scores[:, : len(names)],
        torch.arange(len(batch.prompts)).repeat_interleave(group),
        torch.as_tensor(weights),
        std=a.std,
        ddof=a.ddof,
        eps=a.eps,
        std_floor=a.std_floor,
        clamp=a.clamp if clamp is None else clamp,
        min_range=a.min_range,
        mode=a.mode,
        valid=batch.valid[:, : len(names)],
    )


def mean_scores(cfg: Config, batch: Batch) -> dict[str, float]:
    """Mean score of each judge over its valid rows.

    `reward` is the weighted mean of the optimised ones, absent where one failed on all rows.
    """
    metrics = {}
    for i, name in enumerate([*cfg.rewards, *cfg.watch]):
        valid = batch.valid[:, i]
        if bool(valid.any()):
            metrics[f"reward/{name}"] = batch.scores[valid, i].double().mean().item()
    if all(f"reward/{name}" in metrics for name in cfg.rewards):
        metrics["reward"] = sum(w * metrics[f"reward/{n}"] for n, w in cfg.rewards.items())
    return metrics


def score(judges: list[str], images: np.ndarray, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Scores float32 [B, K] and valid bool [B, K] of K judges."""
    scores, valid = score_all(judges, images, [p.metadata for p in prompts])
    return torch.as_tensor(scores), torch.as_tensor(valid)


@dataclass
class Rollouts:
    """Makes an update's batch. how: of the rollout; on: inside it the rollout's fp8 is on, if any;
    embed: prompts to text embeddings [L, C] each; null: that of the empty prompt.
    """

    cfg: Config
    model: Model
    algorithm: ModuleType
    workers: Workers
    how: Sampling
    scheduler: Mapping[str, Any]
    on: Callable[[], AbstractContextManager[None]]
    embed: Callable[[Sequence[str]], list[Tensor]]
    null: Tensor
    _judging: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="judges")
    )

    def __post_init__(self) -> None:
        fp8 = self.cfg.model.fp8
        self.mode = None if fp8 is None else fp8.mode
        self.judges = [*self.cfg.rewards, *self.cfg.watch]

    def batch(self, prompts: list[Prompt], update: int) -> Batch:
        """Every prompt's group, drawn and judged; under fp8 as its mode says."""
        if self.mode == "explore":
            return self._explored(prompts, update)
        with self.on():
            batch = self._draw(prompts, update)
        return self._rescored(batch) if self.mode == "corrected" else batch

    def _explored(self, prompts: list[Prompt], update: int) -> Batch:
        """The best and the worst of what fp8 draws, drawn again without it (arXiv 2604.06916)."""
        fp8 = self.cfg.model.fp8
        assert fp8 is not None and fp8.keep is not None
        with self.on():
            found = self._draw(prompts, update, record=False)
        value = advantages(self.cfg, found, clamp=math.inf).advantage  # clamped ones tie
        kept = best_and_worst(value, len(prompts), fp8.keep)
        explored, scores, valid = len(found.images), found.scores[kept], found.valid[kept]
        means = mean_scores(self.cfg, found).items()
        del found  # its images
        batch = self._draw(prompts, update, kept)
        gap = (batch.scores - scores)[batch.valid & valid]
        metrics = {f"explored/{n.removeprefix('reward/')}": value for n, value in means}
        if len(gap):
            metrics["explored/score_gap"] = gap.double().abs().mean().item()
        return replace(batch, metrics=metrics, explored=explored)

    def _rescored(self, batch: Batch) -> Batch:
        """The batch with log-probs of the forward that trains in place of fp8's."""

        def again(chunk: Trajectory) -> Trajectory:
            with torch.no_grad():
                steps = replay(self.model, chunk, self.how)
                return replace(chunk, logp=tuple(step.logp for step in steps))

        chunks = list(self.workers.map(again, batch.trajectories))
        pairs = zip(chunks, batch.trajectories, strict=True)
        gaps = [(torch.stack(new.logp) - torch.stack(old.logp)).abs() for new, old in pairs]
        gap = torch.cat([g.flatten() for g in gaps]).double().mean().item()
        return replace(batch, trajectories=chunks, metrics={"fp8/logp_gap": gap})

    def _draw(
        self,
        prompts: list[Prompt],
        update: int,
        samples: list[int] | None = None,
        record: bool = True,
    ) -> Batch:
        """Sample every prompt's group; judges score one chunk while the next is sampled.

        samples: numbers of those to draw, as many of each prompt; None: all. record: keep what
        replay needs.
        """
        r = self.cfg.rollout
        total = len(prompts) * r.group_size
        rows = [prompts[k // r.group_size] for k in (range(total) if samples is None else samples)]
        recorded = self.algorithm.record(
            r.steps,
            (r.window.start, r.window.size) if r.window else None,
            (r.sde_steps.count, r.sde_steps.high or r.steps - 1) if r.sde_steps else None,
            self.cfg.seed,
            update,
        )

        def draw(chunk: Trajectory) -> tuple[Trajectory, np.ndarray | NotFinite]:
            if not record:
                chunk = replace(chunk, recorded=(), x=(), x_next=(), delta=(), logp=())
            try:
                return chunk, self.model.decode(chunk.latents, r.height, r.width)
            except NotFinite as error:
                return chunk, error

        chunks: list[Judged] = []

        def failed(message: str, results: Sequence[Tensor] = ()) -> StepFailed:
            """The error, with what there is of the batch; results: scores of the first chunks."""
            scores = torch.full((len(rows), len(self.judges)), torch.nan)
            for (chunk, _, _), known in zip(chunks, results, strict=False):
                scores[chunk.rows.start : chunk.rows.stop] = known
            size = (0, r.height, r.width, 3)
            drawn = np.concatenate([np.empty(size, np.uint8), *(images for _, images, _ in chunks)])
            trajectories = [chunk for chunk, _, _ in chunks]
            return StepFailed(
                message, Batch(prompts, trajectories, drawn, scores, scores.isfinite())
            )

        with self.algorithm.sampling(self.model):
            for chunk, images in sample_then(
                draw,
                self.workers,
                self.model,
                self.embed([p.prompt for p in prompts]),
                self.null,
                self.how if record else replace(self.how, max_rows=r.max_rows),
                self.scheduler,
                group_size=r.group_size,
                seed=self.cfg.seed,
                update=update,
                recorded=recorded,
                shared_noise=r.shared_noise,
                samples=samples,
            ):
                if isinstance(images, NotFinite):
                    row = chunk.rows.start + images.row
                    raise failed(f"rollout: row {row} ({rows[row].prompt!r}): {images}")
                # Judges see the chunks in order, whichever was drawn first: one may draw numbers.
                part = rows[chunk.rows.start : chunk.rows.stop]
                chunks.append(
                    (chunk, images, self._judging.submit(score, self.judges, images, part))
                )
        scores, valid = self._scores(rows, chunks, failed)
        drawn = np.concatenate([images for _, images, _ in chunks])
        return Batch(prompts, [chunk for chunk, _, _ in chunks], drawn, scores, valid)

    def _scores(
        self, rows: list[Prompt], chunks: list[Judged], failed: Callable[..., StepFailed]
    ) -> tuple[Tensor, Tensor]:
        """Scores and valid [B, K] of all chunks; a reward that is none stops the step."""
        results: list[tuple[Tensor, Tensor]] = []
        for chunk, _, future in chunks:
            try:
                results.append(future.result())
            except BadReward as error:
                row = chunk.rows.start + error.row
                known = [scores for scores, _ in results]
                if error.scores is not None:
                    scores = torch.full((len(chunk.rows), len(self.judges)), torch.nan)
                    scores[:, self.judges.index(error.judge)] = torch.as_tensor(error.scores)
                    known.append(scores)
                raise failed(
                    f"judge {error.judge!r}, row {row} ({rows[row].prompt!r}): {error.reason}",
                    known,
                ) from error
        scores, valid = (torch.cat(parts) for parts in zip(*results, strict=True))
        return scores, valid
