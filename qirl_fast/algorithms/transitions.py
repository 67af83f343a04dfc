"""What algorithms of a likelihood ratio share: stochastic steps, chosen, kept and scored again.

A recorded step is one of `rollout.dynamics` with noise, so its transition has a density. Either a
window of neighbouring steps, which may move through the run (MixGRPO, arXiv 2507.21802), or steps
drawn anew for each update.

    loss = mean over rows and recorded steps of  weight surrogate      each algorithm's own
         + kl_weight          mean (mu - mu_ref)^2 / (2 s^2)
         + velocity_kl_weight mean (v - v_ref)^2

mu - mu_ref = c (v - v_ref), so the Gaussian KL is the true one (flow_grpo divides by g^2 and
leaves dt out). The reference is the policy with its adapter off.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qirl_fast.algorithms.algorithm import Algorithm, Settings, StepLoss
from qirl_fast.rollout.replay import Replayed, replay
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.section import NonNegative, Problem


def window_at(update: int, steps: int, start: int, size: int, every: int, stride: int) -> range:
    """The window of an update, counted from 1: moved on by `stride` after each `every` updates.

    Where it would pass the last step that may be trained, it begins at `start` again. every 0: it
    stays.
    """
    places = (steps - 1 - size - start) // stride + 1
    moves = (update - 1) // every if every else 0
    first = start + stride * (moves % places)
    return range(first, first + size)


def drawn_steps(count: int, high: int, seed: int, update: int) -> list[int]:
    """`count` distinct steps out of the first `high`, step i with weight high - i: high noise is
    favoured. Drawn anew for each (seed, update).
    """
    weight = np.arange(high, 0, -1, dtype=np.float64)
    rng = np.random.default_rng([seed, update, 2])
    return sorted(rng.choice(high, count, replace=False, p=weight / weight.sum()).tolist())


class TransitionSettings(Settings):
    """Base of the settings of a ratio: KLs to the policy before training."""

    kl_weight: NonNegative = Field(
        default=0.0, description="weight of the Gaussian KL to the reference"
    )
    velocity_kl_weight: NonNegative = Field(
        default=0.0, description="weight of the mean squared velocity difference to the reference"
    )

    @property
    def needs_reference(self) -> bool:
        """True when a KL to the untrained policy is part of the loss."""
        return self.kl_weight > 0 or self.velocity_kl_weight > 0

    def recorded_steps(self, rollout: Any) -> int:
        """The window's steps, or as many as are drawn."""
        chosen = rollout.window.size if rollout.window else 0
        return int(chosen + (rollout.sde_steps.count if rollout.sde_steps else 0))

    def problems(self, cfg: Any) -> Iterator[Problem]:
        """A ratio needs noise, a choice of steps, and a declaration of what guidance is in it."""
        rollout, name = cfg.rollout, cfg.algorithm.name
        if rollout.dynamics == "ode":
            yield (
                ("rollout.dynamics", "algorithm.name"),
                f"rollout.dynamics: got 'ode', which has no density, so {name} has no ratio to "
                f"train on; allowed for {name}: 'flow_sde', 'dance_sde', 'cps', 'langevin'",
            )
        elif (rollout.window is None) == (rollout.sde_steps is None):
            came = "neither" if rollout.window is None else "both"
            yield (
                ("rollout.window", "rollout.sde_steps"),
                f"rollout.window, rollout.sde_steps: got {came}; set exactly one and the other to "
                "null",
            )
        if rollout.guidance != 1 and rollout.ratio_mode is None:
            yield (
                ("rollout.ratio_mode", "rollout.guidance"),
                f"rollout.ratio_mode: not declared, but rollout.guidance={rollout.guidance:g} "
                "guides the rollout; set it to 'frozen_offset' (default choice), 'conditional' or "
                "'full'",
            )


class Prepared(NamedTuple):
    """Velocities [B, N, Z] at a chunk's recorded steps under other weights; None: not asked for."""

    reference: list[Tensor] | None = None
    old: list[Tensor] | None = None


class TransitionAlgorithm(Algorithm):
    """Base of the algorithms of a ratio: which steps, their loss, and what other weights say.

    One has `surrogate`, and `weights` where steps do not count alike. `compares_means`: it needs
    the velocity that rollout had, whose weights are gone after the first optimizer step.
    """

    settings: TransitionSettings
    compares_means: ClassVar[bool] = False

    def surrogate(self, step: Replayed, advantage: Tensor, old: Tensor) -> StepLoss:
        """The policy's loss of one step, without weight and KL.

        old: the velocity of rollout, detached. Where one optimizer step follows a rollout, or
        `compares_means` is False, that is the step's own.
        """
        raise NotImplementedError

    def weights(self, chunk: Trajectory) -> list[float]:
        """Weight of each recorded step's surrogate."""
        return [1.0] * len(chunk.recorded)

    def record(self, rollout: Any, seed: int, update: int) -> tuple[int, ...]:
        """The stochastic, trained steps of an update; never the last one."""
        steps, window, drawn = rollout.steps, rollout.window, rollout.sde_steps
        if window is not None:
            own = (window.start, window.size, window.every, window.stride)
            return tuple(window_at(update, steps, *own))
        return tuple(drawn_steps(drawn.count, drawn.high or steps - 1, seed, update))

    def idle(self, advantage: Tensor) -> bool:
        """True where all advantages are 0 and no KL holds the rows. A NaN is not 0."""
        return not self.settings.needs_reference and not bool(advantage.any())

    def prepare(self, chunks: Sequence[Trajectory], tasks: Sequence[str]) -> list[Prepared]:
        """Velocities of the reference, where a KL needs them, and of the weights as they are, where
        they will have moved before the loss asks.
        """
        reference: Sequence[list[Tensor] | None] = [None] * len(chunks)
        old = reference
        if self.compares_means and self.policy.updates > 1:
            old = self._velocities(chunks)
        if self.settings.needs_reference:
            with self.model.reference():
                reference = self._velocities(chunks)
        return [Prepared(*both) for both in zip(reference, old, strict=True)]

    def _velocities(self, chunks: Sequence[Trajectory]) -> list[list[Tensor]]:
        @torch.no_grad()
        def of(chunk: Trajectory) -> list[Tensor]:
            return [step.velocity for step in replay(self.model, chunk, self.how)]

        with self.model.gathered():
            return list(self.policy.workers.tensors(of, chunks))

    def loss(
        self, chunk: Trajectory, advantage: Tensor | None, prepared: Prepared
    ) -> Iterator[StepLoss]:
        """One StepLoss per recorded step; prepared: the chunk's, from `prepare`.

        ValueError without advantages, and where the objective has a KL and no reference came.
        """
        reference, settings = prepared.reference, self.settings
        if advantage is None or settings.needs_reference != (reference is not None):
            raise ValueError(
                f"{settings} with advantages {advantage} and a reference of {reference}: take "
                "them from the rollout and from `prepare`"
            )
        weights = self.weights(chunk)
        for i, step in enumerate(replay(self.model, chunk, self.how)):
            old = step.velocity.detach() if prepared.old is None else prepared.old[i]
            found = self.surrogate(step, advantage, old)
            total, metrics = found.loss * weights[i], found.metrics
            if reference is not None:
                velocity_kl = (step.velocity.float() - reference[i].float()).square().mean()
                k = step.coefficients
                kl = velocity_kl * (k.c**2 / (2 * k.s**2))
                total = total + settings.kl_weight * kl
                total = total + settings.velocity_kl_weight * velocity_kl
                metrics = metrics | {"kl": kl.detach(), "velocity_kl": velocity_kl.detach()}
            yield StepLoss(total, metrics, found.ratio)


def mean_shift(step: Replayed, old: Tensor) -> Tensor:
    """mean_i (mu - mu_old)^2 float32 [B] of a step's transition mean, with graph."""
    return step.coefficients.c**2 * (step.velocity.float() - old.float()).square().mean((1, 2))
