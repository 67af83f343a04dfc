"""Samples of every prompt from the base model, drawn and judged as in training.

Prompts are drawn in chunks of rows of one size, neighbours among those of their size, at most
rollout.max_rows samples each, a prompt's samples in one chunk. Noise and stochastic steps of chunk
c are those that the sampler gives to update c of a seed that no run has, so a chunk depends on the
seed, its number, its prompts and the settings alone; judges with a state, and global generators,
begin every chunk as they began the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from qirl_fast.batch import StepFailed
from qirl_fast.checkpoint import rng_state, set_rng_state
from qirl_fast.conditioning import Given
from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.scores import Record, judged
from qirl_fast.models.adapter import NotFinite
from qirl_fast.rewards.judge import FAILED
from qirl_fast.rewards.verdict import BadReward, Verdict
from qirl_fast.rollout.sample import Trajectory, decode, sample_then
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
    """Draws `samples` images of each of `prompts` with the trainer's untrained policy.

    numbers: of the prompts' rows in their file, for messages; None: as they come.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        samples: int,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.trainer, self.prompts, self.samples = trainer, prompts, samples
        self.numbers = range(len(prompts)) if numbers is None else numbers
        self.chunks = self._chunks(max(1, trainer.cfg.rollout.max_rows // samples))
        self.place = {
            row: (number, i)
            for number, rows in enumerate(self.chunks)
            for i, row in enumerate(rows)
        }
        self.start = (rng_state(), trainer.judges.state_dict())
        self.images = 0  # judged so far
        self.failed = np.zeros(len(trainer.judges.names), np.int64)

    def _chunks(self, most: int) -> list[list[int]]:
        """Rows of each chunk, at most `most`, of one size."""
        sizes = [self.trainer.conditioning.target(p) for p in self.prompts]
        parts = [[i for i, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)]
        return [part[i : i + most] for part in parts for i in range(0, len(part), most)]

    def of(self, rows: Sequence[int]) -> Iterator[Drawn]:
        """These rows' samples, in order of their chunks, which are drawn whole.

        Raises StepFailed for an image or a reward that is not finite, and for a judge that fails on
        more than failures.budget of all images so far.
        """
        wanted = set(rows)
        numbers = sorted({self.place[row][0] for row in rows})
        ahead = AHEAD * self.trainer.workers.count
        pending: deque[tuple[int, np.ndarray, Future[Verdict]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="chunks") as judging:
            for first in range(0, len(numbers), ahead):
                for number, given, images in self._draw(numbers[first : first + ahead]):
                    verdict = judging.submit(self._judge, number, given, images)
                    pending.append((number, images, verdict))
                    if len(pending) > ahead:
                        yield from self._records(*pending.popleft(), wanted)
            while pending:
                yield from self._records(*pending.popleft(), wanted)

    def alone(self, row: int) -> np.ndarray:
        """One row's samples, uint8 [n, H, W, 3]: what `of` draws, up to the rounding of a forward
        of another shape.
        """
        number, place = self.place[row]
        own = range(place * self.samples, (place + 1) * self.samples)
        with self.trainer.model.reference(), self.trainer.in_fp8():
            return self._images(number, self._given(number), own)

    def _given(self, number: int) -> Given:
        prompts = [self.prompts[row] for row in self.chunks[number]]
        for place, error in self.trainer.conditioning.faults(prompts).items():
            mend = "mend it, or take the row out"
            raise StepFailed(self._where(self.chunks[number][place], f"{error}; {mend}"))
        return self.trainer.conditioning.of(prompts)

    def _draw(self, numbers: Sequence[int]) -> Iterator[tuple[int, Given, np.ndarray]]:
        trainer = self.trainer
        given = [self._given(number) for number in numbers]
        with trainer.model.reference(), trainer.in_fp8():
            drawn = trainer.workers.map(
                lambda chunk: self._images(*chunk), list(zip(numbers, given, strict=True))
            )
            yield from zip(numbers, given, drawn, strict=True)

    def _images(self, number: int, given: Given, own: Sequence[int] | None = None) -> np.ndarray:
        """uint8 [rows * n, H, W, 3] of a chunk; own: numbers of the samples wanted, None: all."""
        trainer, r = self.trainer, self.trainer.cfg.rollout
        rows, height, width = self.chunks[number], given.height, given.width
        recorded = trainer.algorithm.record(r, trainer.cfg.seed + SEEDS, number)
        how = replace(trainer.rollout_sampling, max_rows=r.max_rows, height=height, width=width)
        workers = Workers(1, trainer.workers.rows)

        def decoded(chunk: Trajectory) -> np.ndarray:
            try:
                return decode(trainer.model, chunk.latents, how, workers)
            except NotFinite as error:
                row = rows[(chunk.rows.start + error.row) // self.samples]
                raise StepFailed(self._where(row, str(error))) from error

        parts = sample_then(
            decoded,
            workers,
            trainer.model,
            given.embeddings,
            given.null,
            how,
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
        return f"prompt {self.numbers[row] + 1} ({self.prompts[row].prompt!r}): {what}"

    def _judge(self, number: int, given: Given, images: np.ndarray) -> Verdict:
        generators, judges = self.start
        set_rng_state(generators)
        self.trainer.judges.load_state_dict(judges)
        rows = self.chunks[number]
        metadata = [row for row in given.rows for _ in range(self.samples)]
        try:
            return self.trainer.judges.score(images, metadata)
        except BadReward as error:
            row = rows[error.row // self.samples]
            raise StepFailed(self._where(row, f"judge {error.judge!r}: {error.reason}")) from error

    def _records(
        self, number: int, images: np.ndarray, future: Future[Verdict], wanted: set[int]
    ) -> Iterator[Drawn]:
        verdict = future.result()
        for place, row in enumerate(self.chunks[number]):
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
