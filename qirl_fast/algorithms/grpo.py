"""GRPO for flow matching: some steps stochastic, clipped ratio, optional KL (arXiv 2505.05470).

    ratio     = exp(logp - logp_old)
    surrogate = mean max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

over all rows and recorded steps, weighted by step (see `step_weights`); KLs: see `transitions`.

By its rollout it is Flow-GRPO (flow_sde at all steps but the last), Flow-GRPO-Fast (flow_sde at one
or two drawn steps), DanceGRPO (dance_sde, arXiv 2505.07818), MixGRPO (a window that moves, arXiv
2507.21802), Flow-CPS (cps, arXiv 2509.05952).

Differs from flow_grpo: the guided branch stays out of the objective (see rollout/guidance.py), the
stochastic steps are drawn anew at each update (theirs are seeded alike at every call), dropped
groups keep their rows with advantage 0 so that replay runs at the shape of rollout.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from qirl_fast.algorithms.algorithm import StepLoss, clipped
from qirl_fast.algorithms.transitions import TransitionAlgorithm, TransitionSettings
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.replay import Replayed
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.section import Positive


class Settings(TransitionSettings):
    """GRPO: a clipped ratio of transitions."""

    name: Literal["grpo"] = Field(description="GRPO: a clipped ratio")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-4, description="lower ratio clip"
    )
    clip_high: Positive = Field(default=1e-4, description="upper ratio clip")
    step_weights: Literal["equal", "noise"] = Field(
        default="equal",
        description="recorded steps in the loss: equal; noise: weighted so that the log-prob of "
        "each pulls on the velocity alike",
    )


class Grpo(TransitionAlgorithm):
    """The clipped surrogate, with KLs to the reference."""

    settings: Settings

    def surrogate(self, step: Replayed, advantage: Tensor, old: Tensor) -> StepLoss:
        """The clipped ratio; `old` has no part in it."""
        own = self.settings
        return clipped(step.logp, step.logp_old, advantage, own.clip_low, own.clip_high)

    def weights(self, chunk: Trajectory) -> list[float]:
        """By `step_weights`."""
        return step_weights(chunk.coefficients, self.settings.step_weights)


def step_weights(steps: Sequence[StepCoefficients], kind: str) -> list[float]:
    """Weight of each recorded step's surrogate; their mean is 1. kind: of Settings.step_weights.

    "noise": d logp / d v = 2 w c s eps, so late steps, of little noise, outweigh the early ones,
    which settle what is drawn where. A weight of 1 / (2 w s |c|) makes all alike; TempFlow-GRPO
    (arXiv 2508.04324) and GRPO-Guard (arXiv 2510.22319) weigh by noise level to the same end.
    """
    if kind == "equal":
        return [1.0] * len(steps)
    lacking = [1 / (2 * step.w * step.s * abs(step.c)) for step in steps]
    return [value * len(steps) / sum(lacking) for value in lacking]
