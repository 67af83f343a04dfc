"""GRPO for flow matching: some steps stochastic, clipped ratio, optional KL (arXiv 2505.05470).

    ratio = exp(logp - logp_old)
    loss  = mean max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
          + kl_weight          mean (mu - mu_ref)^2 / (2 s^2)
          + velocity_kl_weight mean (v - v_ref)^2

over all rows and recorded steps, the first term weighted by step (see `step_weights`).
mu - mu_ref = c (v - v_ref), so the Gaussian KL is the true one (flow_grpo divides by g^2 and
leaves dt out). The reference is the policy with its adapter off.

Differs from flow_grpo: the guided branch stays out of the objective (see rollout/guidance.py), the
stochastic steps are drawn anew at each update (theirs are seeded alike at every call), dropped
groups keep their rows with advantage 0 so that replay runs at the shape of rollout.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, Trajectory


@dataclass(frozen=True)
class Objective:
    """The weights of the loss; ranges are those of config.TrainConfig."""

    clip_low: float
    clip_high: float
    kl_weight: float = 0.0
    velocity_kl_weight: float = 0.0
    step_weights: Literal["equal", "noise"] = "equal"

    @property
    def needs_reference(self) -> bool:
        """True when a KL to the untrained policy is part of the loss."""
        return self.kl_weight > 0 or self.velocity_kl_weight > 0


@dataclass(frozen=True)
class StepLoss:
    """Loss of one recorded step of one chunk: a mean over rows, with graph; the rest detached."""

    loss: Tensor
    ratio: Tensor  # [B]
    metrics: dict[str, Tensor]  # scalars, means over rows


def record(
    steps: int,
    window: tuple[int, int] | None,
    draw: tuple[int, int] | None,
    seed: int,
    update: int,
) -> tuple[int, ...]:
    """Indices of the stochastic, trained steps of one update, ascending; never the last step.

    Args:
        window: (start, size), the same at every update.
        draw: (count, high): `count` distinct steps out of the first `high`, step i drawn with
            weight high - i: high noise is favoured.
    """
    if (window is None) == (draw is None):
        raise ValueError(f"give a window or a draw: window {window}, draw {draw}")
    if window is not None:
        start, size = window
        chosen = list(range(start, start + size))
    else:
        assert draw is not None
        count, high = draw
        weight = np.arange(high, 0, -1, dtype=np.float64)
        rng = np.random.default_rng([seed, update, 2])
        chosen = sorted(rng.choice(high, count, replace=False, p=weight / weight.sum()).tolist())
    if not chosen or chosen[0] < 0 or chosen[-1] > steps - 2:
        raise ValueError(f"recorded steps {chosen} do not lie in 0..{steps - 2}")
    return tuple(chosen)


def sampling(model: Any) -> AbstractContextManager[None]:
    """Context of the rollout: GRPO samples from the policy itself."""
    return nullcontext()


def idle(advantage: Tensor, objective: Objective) -> bool:
    """True where rows of these advantages add nothing to the loss or its gradient: all are 0 and no
    KL holds them. A NaN is not 0.
    """
    return not objective.needs_reference and not bool(advantage.any())


def references(
    model: Any, trajectories: list[Trajectory], how: Sampling, objective: Objective
) -> list[list[Tensor] | None]:
    """For each chunk the reference policy's velocity at every recorded step, where a KL needs it.

    Apart from `loss`, because turning the adapter off changes the model for everyone.
    """
    if not objective.needs_reference:
        return [None] * len(trajectories)
    with torch.no_grad(), model.reference():
        return [[step.velocity for step in replay(model, t, how)] for t in trajectories]


def step_weights(steps: Sequence[StepCoefficients], objective: Objective) -> list[float]:
    """Weight of each recorded step's surrogate; their mean is 1.

    "noise": d logp / d v = 2 w c s eps, so late steps, of little noise, outweigh the early ones,
    which settle what is drawn where. A weight of 1 / (2 w s |c|) makes all alike; TempFlow-GRPO
    (arXiv 2508.04324) and GRPO-Guard (arXiv 2510.22319) weigh by noise level to the same end.
    """
    if objective.step_weights == "equal":
        return [1.0] * len(steps)
    lacking = [1 / (2 * step.w * step.s * abs(step.c)) for step in steps]
    return [value * len(steps) / sum(lacking) for value in lacking]


def loss(
    model: Any,
    trajectory: Trajectory,
    advantage: Tensor,
    how: Sampling,
    objective: Objective,
    reference: list[Tensor] | None,
) -> Iterator[StepLoss]:
    """One StepLoss per recorded step.

    Args:
        advantage: float32 [B], of the chunk's rows; reference: the chunk's, from `references`.
    ValueError when the objective has a KL and no reference came.
    """
    if objective.needs_reference != (reference is not None):
        raise ValueError(f"{objective} and a reference of {reference}: take it from `references`")
    weights = step_weights(trajectory.coefficients, objective)
    for i, step in enumerate(replay(model, trajectory, how)):
        policy = ops.policy_loss(
            step.logp,
            step.logp_old,
            advantage,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
        )
        total = policy.loss * weights[i]
        metrics = {"clip_fraction": policy.clip_fraction, "approx_kl": policy.approx_kl}
        if reference is not None:
            velocity_kl = (step.velocity.float() - reference[i].float()).square().mean()
            k = step.coefficients
            kl = velocity_kl * (k.c**2 / (2 * k.s**2))
            total = total + objective.kl_weight * kl + objective.velocity_kl_weight * velocity_kl
            metrics |= {"kl": kl.detach(), "velocity_kl": velocity_kl.detach()}
        yield StepLoss(total, policy.ratio.detach(), metrics)


def after_step(model: Any) -> None:
    """Nothing: the sampling policy is the trained one."""
