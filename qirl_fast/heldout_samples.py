"""The held-out evaluation of a run: images of fixed seeds, drawn and judged by all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qirl_fast.checkpoint import rng_state, set_rng_state
from qirl_fast.conditioning import Conditioning
from qirl_fast.config import Config
from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sources import ImageError
from qirl_fast.distributed import World
from qirl_fast.evaluation.heldout import Evaluation, draw_and_score, images_of
from qirl_fast.models import Model
from qirl_fast.models.adapter import NotFinite
from qirl_fast.rewards.judge import FAILED
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.verdict import BadReward, Verdict
from qirl_fast.rollout.sample import Sampling, sample_then
from qirl_fast.rollout.workers import StepFailed, Workers
from qirl_fast.shares import own_chunks


class EvaluationFailed(RuntimeError):
    """A judge could not score the held-out images, so there is nothing to compare."""


@dataclass
class HeldoutSamples:
    """Draws and scores prompts under the model's weights as they are. how: but for the size."""

    cfg: Config
    model: Model
    judges: Judges
    workers: Workers
    how: Sampling
    scheduler: Mapping[str, Any]
    conditioning: Conditioning
    world: World

    def evaluate(self, prompts: Sequence[Prompt]) -> Evaluation:
        """Generators and judges are left as they were: a resumed run may not evaluate again.

        Raises EvaluationFailed where an image cannot be drawn, or judged within the budget.
        """
        generators, judges = rng_state(), self.judges.state_dict()
        sizes = [self.conditioning.target(p) for p in prompts]
        parts = [[i for i, s in enumerate(sizes) if s == size] for size in dict.fromkeys(sizes)]
        try:
            found = [self._of_one_size([prompts[i] for i in part]) for part in parts]
        except BaseException:  # a signal among them, after which the run's state is saved
            self.judges.abandon()
            raise
        finally:
            set_rng_state(generators)
            self.judges.load_state_dict(judges)
        return Evaluation.of(found, parts)

    def _of_one_size(self, prompts: list[Prompt]) -> Evaluation:
        samples, names = self.cfg.evaluation.samples_per_prompt, self.judges.names
        chunks = self._own(prompts, samples)
        with self.world.agreed(EvaluationFailed), self.model.gathered():
            try:
                given = self.conditioning.of(prompts)
                images, pending = draw_and_score(
                    self.model,
                    given.embeddings,
                    given.null,
                    given.rows,
                    replace(self.how, height=given.height, width=given.width),
                    self.scheduler,
                    self.judges.submit,
                    self.workers,
                    samples_per_prompt=samples,
                    seed=self.cfg.evaluation.seed,
                    chunks=chunks,
                    shown=self.world.shown(chunks),
                )
                own = [part.result().as_json() for part in pending]
            except (NotFinite, ImageError, BadReward, StepFailed) as error:
                raise EvaluationFailed(f"held-out images: {error}") from error
        told = [v for found in self.world.gather(own) for v in found]
        scores = self._scores(Verdict.of([Verdict.from_json(v, len(names)) for v in told]))
        return Evaluation.of_samples(scores, self.world.concatenated(images), samples)

    def first_images(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """The images, uint8 [H, W, 3] each, that an `evaluate` of these prompts would have, without
        asking a judge. Generators are left as they were.
        """
        generators = rng_state()
        sizes = [self.conditioning.target(p) for p in prompts]
        found: list[np.ndarray] = [np.empty(0)] * len(prompts)
        try:
            for size in dict.fromkeys(sizes):
                part = [i for i, own in enumerate(sizes) if own == size]
                drawn = self._drawn([prompts[i] for i in part])
                for i, image in zip(part, drawn, strict=True):
                    found[i] = image
        finally:
            set_rng_state(generators)
        return found

    def _own(self, prompts: list[Prompt], samples: int) -> list[int]:
        """Which chunks of `samples` images of each prompt are made here."""
        owner = [p for p in range(len(prompts)) for _ in range(samples)]
        rows = self.how.max_rows
        try:
            return own_chunks(self.world, self.model, self.conditioning, prompts, owner, rows)
        except (ValueError, OSError) as error:
            raise EvaluationFailed(f"held-out images: {error}") from error

    def _drawn(self, prompts: list[Prompt]) -> np.ndarray:
        """The first image of each prompt, uint8 [P, H, W, 3]."""
        samples = self.cfg.evaluation.samples_per_prompt
        chunks = self._own(prompts, 1)
        with self.world.agreed(EvaluationFailed), self.model.gathered():
            try:
                given = self.conditioning.of(prompts)
                how = replace(self.how, height=given.height, width=given.width)
                shown = [k * how.max_rows for k in self.world.shown(chunks)]
                images = sample_then(
                    lambda chunk: images_of(
                        self.model, chunk, how, self.workers, chunk.rows.start in shown
                    ),
                    self.workers,
                    self.model,
                    given.embeddings,
                    given.null,
                    how,
                    self.scheduler,
                    group_size=samples,
                    seed=self.cfg.evaluation.seed,
                    update=0,
                    samples=range(0, len(prompts) * samples, samples),
                    chunks=chunks,
                )
                own = [np.empty((0, how.height, how.width, 3), np.uint8), *images]
            except (NotFinite, ImageError, StepFailed) as error:
                raise EvaluationFailed(f"held-out images: {error}") from error
        return self.world.concatenated(np.concatenate(own))

    def _scores(self, found: Verdict) -> dict[str, np.ndarray]:
        """Scores of each judge; NaN where there was nothing to judge, or it failed within its
        budget: the prompt is left out of the comparison.
        """
        allowed = self.cfg.failures
        share = (found.status == FAILED).mean(0)
        failed = [n for n, s in zip(self.judges.names, share, strict=True) if s > allowed.budget]
        if failed:
            reason = next(text for (_, name), text in found.reasons.items() if name == failed[0])
            raise EvaluationFailed(
                f"judges {failed} failed on up to {share.max():.0%} of the held-out images "
                f"(failures.reask={allowed.reask}) and failures.budget allows "
                f"{allowed.budget:.0%}; the first reason of {failed[0]!r}: {reason}"
            )
        scores = np.where(found.valid, found.scores, np.float32("nan"))
        return {name: scores[:, i] for i, name in enumerate(self.judges.names)}
