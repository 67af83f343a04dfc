"""GRPO-Guard: a ratio without its bias, of the same spread at every step (arXiv 2510.22319).

    exponent  = (logp - logp_old + w mean (mu - mu_old)^2) / (2 w s)     a row each
              = mean eps (mu - mu_old),   eps the noise that rollout drew
    ratio     = exp(exponent)
    surrogate = mean max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) / (-dt)

mu - mu_old = c (v - v_old), the mean of a step against rollout's. For a Gaussian log-prob,
w = 1 / (2 s^2), this is the paper's exp((logp - logp_old + mean (mu - mu_old)^2 / (2 s^2)) s); cps,
whose score is no density, gets the same exponent. Without the bias a log-ratio has mean below 0, so
the upper clip rarely fires. mu_old is rollout's at rollout's weights, which are those before the
first optimizer step of an update; where there is but one step the bias is 0, value and gradient.

Source: the paper and flow_grpo's train_sd3_GRPO_Guard.py, whose clip range of 2e-6 is the default.
Differs from that script: its bias is one number, averaged over the batch, so that rows share each
other's; here, as in the paper, each row has its own. Its KL leaves dt out; see `transitions`.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qirl_fast.algorithms.algorithm import StepLoss, clipped
from qirl_fast.algorithms.transitions import TransitionAlgorithm, TransitionSettings, mean_shift
from qirl_fast.rollout.dynamics import StepCoefficients
from qirl_fast.rollout.replay import Replayed
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.section import Positive


class Settings(TransitionSettings):
    """GRPO-Guard: a clipped ratio of equal spread at every step."""

    name: Literal["grpo_guard"] = Field(description="GRPO-Guard: a ratio without bias")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=2e-6, description="lower ratio clip"
    )
    clip_high: Positive = Field(default=2e-6, description="upper ratio clip")


class GrpoGuard(TransitionAlgorithm):
    """The clipped surrogate of the corrected ratio."""

    settings: Settings
    compares_means: ClassVar[bool] = True

    def surrogate(self, step: Replayed, advantage: Tensor, old: Tensor) -> StepLoss:
        """Of one step, not yet divided by -dt."""
        k = step.coefficients
        exponent = (step.logp - step.logp_old + k.w * mean_shift(step, old)) / (2 * k.w * k.s)
        own = self.settings
        return clipped(exponent, torch.zeros_like(exponent), advantage, own.clip_low, own.clip_high)

    def weights(self, chunk: Trajectory) -> list[float]:
        """1 / (-dt)."""
        pairs = zip(chunk.sigmas, chunk.coefficients, strict=True)
        return [-1 / step_length(*pair) for pair in pairs]


def step_length(sigma: float, step: StepCoefficients) -> float:
    """dt = sigma' - sigma < 0 of a step from noise level sigma.

    x = (1 - sigma) x0 + sigma eps and v = eps - x0 make the share of x0 in a x + c v
    a (1 - sigma) - c, which every dynamics makes 1 - sigma'.
    """
    return step.c + (1 - sigma) * (1 - step.a)
