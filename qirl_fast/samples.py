"""Samples of every prompt from the base model, drawn and judged as in training.

Prompts are drawn in chunks of neighbouring rows, at most rollout.max_rows samples each, a prompt's
samples in one chunk. Noise and stochastic steps of chunk c are those that the sampler gives to
update c of a seed that no run has, so a chunk depends on the seed, its number, its prompts and the
settings alone; judges with a state, and global generators, begin every chunk as they began the
first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from qirl_fast.batch import StepFailed
from qirl_fast.checkpoint import rng_state, set_rng_state
from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.scores import Record, judged
from qirl_fast.models.adapter import NotFinite
from qirl_fast.rewards.judge import FAILED
from qirl_fast.rewards.judges import BadReward, Verdict
from qirl_fast.rollout.sample import Trajectory, sample_then
from qirl_fast.rollout.workers import Workers
from qirl_fast.trainer import Trainer

SEEDS = 0x43555241 << 32  # added to the run's seed, which is below 2**32
AHEAD = 2  # chunks drawn for each worker before their scores are waited for
ENOUGH = 64  # images after which a judge's share of failures is a share


@dataclass(frozen=True)
class Drawn:
    """One prompt's samples: its record and uint8 images [n, H, W, 3]."""

    record: Record
    images: np.ndarray


class BaseSamples:
    """Draws `samples` images of each of `prompts` with the trainer's untrained policy."""

    def __init__(self, trainer: Trainer, prompts: Sequence[Prompt], samples: int) -> None:
        self.trainer, self.prompts, self.samples = trainer, prompts, samples
        self.per_chunk = max(1, trainer.cfg.rollout.max_rows // samples)
        self.start = (rng_state(), trainer.judges.state_dict())
        self.images = 0  # judged so far
        self.failed = np.zeros(len(trainer.judges.names), np.int64)

    def of(self, rows: Sequence[int]) -> Iterator[Drawn]:
        """These rows' samples, in order; whole chunks are drawn for them.

        Raises StepFailed for an image or a reward that is not finite, and for a judge that fails on
        more than failures.budget of all images so far.
        """
        wanted = set(rows)
        numbers = sorted({row // self.per_chunk for row in rows})
        ahead = AHEAD * self.trainer.workers.count
        pending: deque[tuple[int, np.ndarray, Future[Verdict]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="chunks") as judging:
            for first in range(0, len(numbers), ahead):
                for number, images in self._draw(numbers[first : first + ahead]):
                    pending.append((number, images, judging.submit(self._judge, number, images)))
                    if len(pending) > ahead:
                        yield from self._records(*pending.popleft(), wanted)
            while pending:
                yield from self._records(*pending.popleft(), wanted)

    def alone(self, row: int) -> np.ndarray:
        """One row's samples, uint8 [n, H, W, 3]: what `of` draws, up to the rounding of a forward
        of another shape.
        """
        number, place = divmod(row, self.per_chunk)
        own = range(place * self.samples, (place + 1) * self.samples)
        with self.trainer.model.reference(), self.trainer.in_fp8():
            return self._images(number, self._embedded(number), own)

    def _rows(self, number: int) -> range:
        first = number * self.per_chunk
        return range(first, min(first + self.per_chunk, len(self.prompts)))

    def _embedded(self, number: int) -> list[Tensor]:
        return self.trainer.embed([self.prompts[row].prompt for row in self._rows(number)])

    def _draw(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        trainer = self.trainer
        chunks = [(number, self._embedded(number)) for number in numbers]
        with trainer.model.reference(), trainer.in_fp8():
            drawn = trainer.workers.map(lambda chunk: self._images(*chunk), chunks)
            yield from zip(numbers, drawn, strict=True)

    def _images(
        self, number: int, embeddings: Sequence[Tensor], own: Sequence[int] | None = None
    ) -> np.ndarray:
        """uint8 [rows * n, H, W, 3] of a chunk; own: numbers of the samples wanted, None: all."""
        trainer, r = self.trainer, self.trainer.cfg.rollout
        rows = self._rows(number)
        recorded = trainer.algorithm.record(
            r.steps,
            (r.window.start, r.window.size) if r.window else None,
            (r.sde_steps.count, r.sde_steps.high or r.steps - 1) if r.sde_steps else None,
            trainer.cfg.seed + SEEDS,
            number,
        )

        def decoded(chunk: Trajectory) -> np.ndarray:
            try:
                return trainer.model.decode(chunk.latents, r.height, r.width)
            except NotFinite as error:
                row = rows[(chunk.rows.start + error.row) // self.samples]
                raise StepFailed(self._where(row, str(error))) from error

        parts = sample_then(
            decoded,
            Workers(1),
            trainer.model,
            embeddings,
            trainer.null,
            replace(trainer.rollout_sampling, max_rows=r.max_rows),
            trainer.scheduler,
            group_size=self.samples,
            seed=trainer.cfg.seed + SEEDS,
            update=number,
            recorded=recorded,
            shared_noise=r.shared_noise,
            samples=own,
        )
        return np.concatenate(list(parts))

    def _where(self, row: int, what: str) -> str:
        return f"prompt {row + 1} ({self.prompts[row].prompt!r}): {what}"

    def _judge(self, number: int, images: np.ndarray) -> Verdict:
        generators, judges = self.start
        set_rng_state(generators)
        self.trainer.judges.load_state_dict(judges)
        rows = self._rows(number)
        metadata: list[dict[str, Any]] = [
            self.prompts[row].metadata for row in rows for _ in range(self.samples)
        ]
        try:
            return self.trainer.judges.score(images, metadata)
        except BadReward as error:
            row = rows[error.row // self.samples]
            raise StepFailed(self._where(row, f"judge {error.judge!r}: {error.reason}")) from error

    def _records(
        self, number: int, images: np.ndarray, future: Future[Verdict], wanted: set[int]
    ) -> Iterator[Drawn]:
        verdict = future.result()
        for place, row in enumerate(self._rows(number)):
            own = range(place * self.samples, (place + 1) * self.samples)
            if row in wanted:
                prompt = self.prompts[row]
                found = judged(self.trainer.judges.names, verdict, own)
                record = Record(row, prompt.id, prompt.category, prompt.prompt, **found)
                yield Drawn(record, images[own.start : own.stop])
        self._check_budget(verdict)

    def _check_budget(self, verdict: Verdict) -> None:
        self.images += len(verdict.status)
        self.failed += (verdict.status == FAILED).sum(0)
        allowed = self.trainer.cfg.failures
        for name, failed in zip(self.trainer.judges.names, self.failed.tolist(), strict=True):
            if self.images >= ENOUGH and failed > allowed.budget * self.images:
                reason = next((r for (_, n), r in verdict.reasons.items() if n == name), "")
                raise StepFailed(
                    f"judge {name!r} failed on {failed} of {self.images} images (failures.reask="
                    f"{allowed.reask}) and failures.budget allows {allowed.budget:.0%}"
                    + (f"; a reason: {reason}" if reason else "")
                )
