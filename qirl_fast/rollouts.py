"""How one update's samples come to be: drawn, judged, and, in fp8, chosen or scored again."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast.advantages import advantages, mean_scores, spread_metrics
from qirl_fast.algorithms import Algorithm
from qirl_fast.batch import Batch, StepFailed
from qirl_fast.conditioning import Conditioning
from qirl_fast.config import Config
from qirl_fast.data.prompts import Prompt
from qirl_fast.distributed import World
from qirl_fast.models import Model
from qirl_fast.models.adapter import NotFinite, require_finite
from qirl_fast.rewards.judge import FAILED
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.verdict import BadReward, Pending, Span, Verdict
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory, decode, sample_then
from qirl_fast.rollout.workers import Workers
from qirl_fast.shares import own_chunks

Judged = tuple[Trajectory, np.ndarray, Pending]  # a chunk, its images, its scores on their way


def best_and_worst(value: Tensor, groups: int, keep: int) -> list[int]:
    """Indices, ascending, of the keep / 2 largest and smallest of each of `groups` equal parts.

    value: [N], N a multiple of groups. Of equal values the first are the smaller ones.
    """
    order = value.view(groups, -1).argsort(dim=1, stable=True)
    picked = torch.cat([order[:, : keep // 2], order[:, -(keep // 2) :]], dim=1)
    first = torch.arange(groups)[:, None] * order.shape[1]
    return (picked + first).flatten().sort().values.tolist()


def _spread(values: Sequence[Any], places: Sequence[int], count: int) -> list[Any]:
    """A list of `count` with the values at their places, None elsewhere."""
    found: list[Any] = [None] * count
    for place, value in zip(places, values, strict=False):
        found[place] = value
    return found


@dataclass
class Rollouts:
    """Makes an update's batch. how: of the rollout, but for the size; on: inside it the rollout's
    fp8 is on, if any; conditioning: what model and judges are given of prompts; world: who shares
    the chunks of a minibatch. `waits`: when, in the last batch, nothing was left to do but wait for
    judges.
    """

    cfg: Config
    model: Model
    algorithm: Algorithm
    judges: Judges
    workers: Workers
    how: Sampling
    scheduler: Mapping[str, Any]
    on: Callable[[], AbstractContextManager[None]]
    conditioning: Conditioning
    world: World
    waits: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        fp8 = self.cfg.model.fp8
        self.mode = None if fp8 is None else fp8.mode

    def batch(self, prompts: list[Prompt], update: int) -> Batch:
        """Every prompt's group, drawn and judged; under fp8 as its mode says."""
        self.waits.clear()
        self.judges.begin()
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
        explored, scores, valid = len(found.scores), found.scores[kept], found.valid[kept]
        means = mean_scores(self.cfg, found).items()
        spreads = spread_metrics(self.cfg, found).items()
        del found  # its images
        batch = self._draw(prompts, update, kept)
        gap = (batch.scores - scores)[batch.valid & valid]
        metrics = {f"explored/{n.removeprefix('reward/')}": value for n, value in means}
        metrics |= {f"explored/{n}": value for n, value in spreads}
        if len(gap):
            metrics["explored/score_gap"] = gap.double().abs().mean().item()
        return replace(batch, metrics=metrics, explored=explored)

    def _rescored(self, batch: Batch) -> Batch:
        """The batch with log-probs of the forward that trains in place of fp8's."""

        @torch.no_grad()
        def logps(chunk: Trajectory) -> list[Tensor]:
            return [step.logp for step in replay(self.model, chunk, self.how)]

        with self.world.agreed(StepFailed):
            found = self.workers.tensors(logps, batch.trajectories)
            pairs = zip(batch.trajectories, found, strict=True)
            chunks = [replace(chunk, logp=tuple(logp)) for chunk, logp in pairs]
            pairs = zip(chunks, batch.trajectories, strict=True)
            gaps = [(torch.stack(new.logp) - torch.stack(old.logp)).abs() for new, old in pairs]
            own = [
                (c.rows.start, gap.double().sum().item(), gap.numel())
                for c, gap in zip(chunks, gaps, strict=True)
            ]
        told = sorted(tuple(each) for found in self.world.gather(own) for each in found)
        gap = sum(total for _, total, _ in told) / sum(count for *_, count in told)
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
        r, total = self.cfg.rollout, len(prompts) * self.cfg.rollout.group_size
        how = self.how if record else replace(self.how, max_rows=r.max_rows)
        owner = [k // r.group_size for k in (range(total) if samples is None else samples)]
        rows = [prompts[p] for p in owner]
        parts = self.cfg.train.updates_per_rollout if record else 1
        try:
            own = own_chunks(
                self.world, self.model, self.conditioning, prompts, owner, how.max_rows, parts
            )
        except (ValueError, OSError) as error:
            raise StepFailed(str(error)) from error
        used = sorted({p for k in own for p in owner[k * how.max_rows : (k + 1) * how.max_rows]})
        shown = {k * how.max_rows for k in self.world.shown(own)}
        recorded = self.algorithm.record(r, self.cfg.seed, update)
        trajectories: list[Trajectory] = []
        chunks: list[Judged] = []

        def draw(chunk: Trajectory) -> tuple[Trajectory, np.ndarray | NotFinite | None]:
            if not record:
                chunk = replace(chunk, recorded=(), x=(), x_next=(), delta=(), logp=())
            try:
                if self.judges.names and chunk.rows.start in shown:
                    return chunk, decode(self.model, chunk.latents, how, self.workers)
                require_finite(chunk.latents)  # and nobody looks, or another process does
                nothing = np.empty((len(chunk.rows), 0, 0, 3), np.uint8)
                return chunk, nothing if chunk.rows.start in shown else None
            except NotFinite as error:
                return chunk, error

        def failed(message: str, found: Sequence[Verdict] = ()) -> StepFailed:
            """The error, with what there is of the batch; found: on the first chunks."""
            scores = torch.full((len(rows), len(self.judges.names)), torch.nan)
            status = torch.full(scores.shape, FAILED, dtype=torch.int8)
            for (chunk, _, _), known in zip(chunks, found, strict=False):
                part = slice(chunk.rows.start, chunk.rows.stop)
                status[part] = torch.as_tensor(known.status)
                valid = torch.as_tensor(known.valid)
                scores[part] = torch.where(valid, torch.as_tensor(known.scores), torch.nan)
            return StepFailed(message, Batch(prompts, trajectories, drawn(), scores, status))

        def drawn() -> np.ndarray:
            size = (0, how.height, how.width, 3) if self.judges.names else (0, 0, 0, 3)
            return np.concatenate([np.empty(size, np.uint8), *(images for _, images, _ in chunks)])

        with (
            self.world.agreed(StepFailed),
            self.algorithm.sampling(),
            self.model.gathered(),
        ):
            try:
                given = self.conditioning.of([prompts[p] for p in used or [0]])
            except (ValueError, OSError) as error:
                raise StepFailed(str(error)) from error
            how = replace(how, height=given.height, width=given.width)
            several = isinstance(given.null, list)
            for chunk, images in sample_then(
                draw,
                self.workers,
                self.model,
                _spread(given.embeddings, used, len(prompts)),
                _spread(given.null, used, len(prompts)) if several else given.null,
                how,
                self.scheduler,
                group_size=r.group_size,
                seed=self.cfg.seed,
                update=update,
                recorded=recorded,
                shared_noise=r.shared_noise,
                samples=samples,
                chunks=own,
            ):
                if isinstance(images, NotFinite):
                    row = chunk.rows.start + images.row
                    raise failed(f"rollout: row {row} ({rows[row].prompt!r}): {images}")
                trajectories.append(chunk)
                if images is None:
                    continue
                # Judges see the chunks in order, whichever was drawn first: one may draw numbers.
                part = owner[chunk.rows.start : chunk.rows.stop]
                metadata = [given.rows[used.index(p)] for p in part]
                chunks.append((chunk, images, self.judges.submit(images, metadata)))
            found = self._verdicts(rows, chunks, failed)
        whole = self._whole(chunks, found)
        for problem in self._over_budget(whole, len(rows)):
            raise failed(problem, found)
        scores, status = torch.as_tensor(whole.scores), torch.as_tensor(whole.status)
        return Batch(prompts, trajectories, drawn(), scores, status)

    def _verdicts(
        self, rows: list[Prompt], chunks: list[Judged], failed: Callable[..., StepFailed]
    ) -> list[Verdict]:
        """What the judges say of the chunks that this process has shown them.

        A reward that is none, and a judge that fails on more rows than it may, stop the step.
        """
        begin = time.perf_counter()
        found: list[Verdict] = []
        for chunk, _, pending in chunks:
            try:
                found.append(pending.result())
            except BadReward as error:
                row = chunk.rows.start + error.row
                raise failed(
                    f"judge {error.judge!r}, row {row} ({rows[row].prompt!r}): {error.reason}",
                    [*found, error.verdict(self.judges.names, len(chunk.rows))],
                ) from error
            for problem in self._over_budget(Verdict.of(found), len(rows)):
                raise failed(problem, found)
        self.waits.append((begin, time.perf_counter()))
        return found

    def _whole(self, chunks: list[Judged], found: list[Verdict]) -> Verdict:
        """The verdict on all rows, of the verdicts on every process's chunks."""
        own = [[c.rows.start, v.as_json()] for (c, _, _), v in zip(chunks, found, strict=True)]
        told = sorted((each for part in self.world.gather(own) for each in part), key=itemgetter(0))
        return Verdict.of([Verdict.from_json(v, len(self.judges.names)) for _, v in told])

    def _over_budget(self, found: Verdict, rows: int) -> Iterator[str]:
        """For each judge that has failed on more of all `rows` than it may, what to say."""
        allowed = self.cfg.failures
        for i, name in enumerate(self.judges.names):
            share = int((found.status[:, i] == FAILED).sum()) / rows
            if share > allowed.budget:
                reason = next(text for (_, n), text in found.reasons.items() if n == name)
                yield (
                    f"judge {name!r} failed on {share:.0%} of the images (failures.reask="
                    f"{allowed.reask}) and failures.budget allows {allowed.budget:.0%}; "
                    f"the first reason: {reason}"
                )
