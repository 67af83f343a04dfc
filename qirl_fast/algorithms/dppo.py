"""Flow-DPPO: where the ratio clip was, a mask by how far a transition moved (arXiv 2606.11025).

    ratio     = exp(logp - logp_old)
    D         = mean (mu - mu_old)^2 / (2 s^2)     KL of today's transition to rollout's, by element
    dropped   = D >= threshold and (A > 0 and ratio > 1  or  A < 0 and ratio < 1)
    surrogate = mean over rows of  0 where dropped, else -A ratio

A row that moved too far adds no gradient where its update would push it further; one that leads
back is kept, whatever D. The ratio itself is not clipped. mu - mu_old = c (v - v_old); variances
are equal, so D is exact, where a ratio is one noisy sample of it. Before the first optimizer step
of an update nothing has moved: with one step a rollout the mask never fires.

Source: the paper's equations 14 and 18 as its authors state them beside their code (Tencent
Hunyuan's UniRL, FlowDPPO), the threshold of 1e-5 on the mean over elements included. verl-omni has
the same rule with D > threshold. Differs: the KL to the reference is in `transitions`; the authors
recommend one standard deviation for the whole batch, which is advantage.std=global.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qirl_fast.algorithms.algorithm import StepLoss
from qirl_fast.algorithms.transitions import TransitionAlgorithm, TransitionSettings, mean_shift
from qirl_fast.rollout.replay import Replayed
from qirl_fast.section import Positive


class Settings(TransitionSettings):
    """Flow-DPPO: a trust region by divergence."""

    name: Literal["dppo"] = Field(description="Flow-DPPO: a mask by divergence, no clip")
    threshold: Positive = Field(
        default=1e-5,
        description="KL of a row's transition to rollout's, mean over elements, from which it "
        "moves no further",
    )


class Dppo(TransitionAlgorithm):
    """The ratio, unclipped, of the rows that the mask leaves."""

    settings: Settings
    compares_means: ClassVar[bool] = True

    def surrogate(self, step: Replayed, advantage: Tensor, old: Tensor) -> StepLoss:
        """Of one step; also the mean divergence and the share of rows dropped."""
        k = step.coefficients
        divergence = mean_shift(step, old).detach() / (2 * k.s**2)
        moved = step.logp - step.logp_old
        further = (advantage * moved.detach()) > 0
        dropped = (divergence >= self.settings.threshold) & further
        # Masked before exp, for an overflow there would reach the gradient as inf times 0.
        ratio = torch.where(dropped, 0.0, moved).exp()
        loss = -(torch.where(dropped, 0.0, advantage) * ratio).mean()
        metrics = {"masked_fraction": dropped.float().mean(), "divergence": divergence.mean()}
        return StepLoss(loss, metrics, moved.detach().exp())
