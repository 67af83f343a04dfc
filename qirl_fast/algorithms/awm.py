"""AWM, advantage weighted matching: GRPO on the loss that pre-trained the model (arXiv 2509.25050).

    logp   = ops.awm_logp at x_t, a sample of rollout noised anew, see `levels`: how well its noise
             is undone, weighted by time and form
    ratio  = exp(logp - logp_old)
    loss   = mean over rows and levels of
             max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
           + ref_weight mean (v - v_ref)^2 + lag_weight mean (v - v_lag)^2

A is the advantage times adv_scale. logp_old is of the weights before the first optimizer step of an
update and of the same noise, so the ratio is 1 there; v_lag is the lagging policy's, see `levels`.
Rollout draws with the policy itself.

Source: the paper and its train_sd3_awm.py with `exp_first`; defaults are those of its GenEval and
OCR recipes, in which the clip range of 1 does next to nothing and advantages clipped at 5 are
scaled to 1. (Its levels end at 9/10 of the schedule; here the last step's takes part.)
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms.algorithm import StepLoss, clipped
from qirl_fast.algorithms.levels import LagSettings, LevelAlgorithm, LevelSettings
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.section import Count, Natural, NonNegative, Positive


class Settings(LevelSettings):
    """AWM: a clipped ratio of pseudo log-probs."""

    name: Literal["awm"] = Field(description="AWM: a clipped ratio of matching losses")
    levels: Count | None = Field(
        default=6, description="noise levels that an update trains on; null: every step's"
    )
    first: Natural = Field(default=1, description="they are steps' from this one on, 0 being noise")
    lag: LagSettings = LagSettings(most=0.3)
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = Field(
        default="ghuber", description="form of the pseudo log-prob, see ops.awm_logp"
    )
    power: Annotated[float, Field(gt=0, le=1)] = Field(default=0.25, description="ghuber's power")
    clip_low: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="lower ratio clip"
    )
    clip_high: Positive = Field(default=1.0, description="upper ratio clip")
    adv_scale: Positive = Field(default=0.2, description="advantages are multiplied by this")
    ref_weight: NonNegative = Field(
        default=0.003, description="weight of the mean squared velocity difference to the reference"
    )
    lag_weight: NonNegative = Field(default=1.0, description="the same to the lagging policy")


class Answers(NamedTuple):
    """Of other weights, at each level: log-probs [B], velocities [B, N, Z]; None: not asked for."""

    logp_old: list[Tensor] | None
    lagging: list[Tensor] | None
    reference: list[Tensor] | None


class Awm(LevelAlgorithm):
    """The clipped surrogate of pseudo log-probs, held by the reference and the lagging policy."""

    settings: Settings

    def idle(self, advantage: Tensor) -> bool:
        """True where all advantages are 0 and nothing holds the rows. A NaN is not 0."""
        held = self.settings.ref_weight or self.settings.lag_weight
        return not held and not bool(advantage.any())

    def logp(self, v: Tensor, noise: Tensor, chunk: Trajectory, sigma: float) -> Tensor:
        """Pseudo log-prob [B] of the chunk's samples at one level."""
        time = torch.full((len(v),), sigma, device=v.device)
        weighting, power = self.settings.weighting, self.settings.power
        return ops.awm_logp(v, noise, chunk.latents, time, weighting=weighting, power=power)

    def prepare(self, chunks: Sequence[Trajectory], tasks: Sequence[str]) -> list[Answers]:
        """For each chunk the log-probs before any optimizer step, where several follow, and the
        velocities of those that hold the policy.
        """
        old: Sequence[list[Tensor] | None] = [None] * len(chunks)
        lagging = reference = old
        if self.policy.updates > 1:
            with self.model.gathered():
                old = list(self.policy.workers.tensors(self._logps, chunks))
        if self.settings.lag_weight:
            lagging = self.lagging_answers(chunks)
        if self.settings.ref_weight:
            reference = self.reference_answers(chunks)
        return [Answers(*of) for of in zip(old, lagging, reference, strict=True)]

    @torch.no_grad()
    def _logps(self, chunk: Trajectory) -> list[Tensor]:
        noised, noise = self.noised(chunk)
        found = zip(self.velocities(noised), noise, chunk.sigmas, strict=True)
        return [self.logp(v, eps, chunk, sigma) for v, eps, sigma in found]

    def loss(
        self, chunk: Trajectory, advantage: Tensor | None, prepared: Answers
    ) -> Iterator[StepLoss]:
        """One StepLoss per level. ValueError without advantages."""
        if advantage is None:
            raise ValueError("awm: advantages None; take them from the rollout")
        settings = self.settings
        noised, noise = self.noised(chunk)
        for i, v in enumerate(self.velocities(noised)):
            logp = self.logp(v, noise[i], chunk, chunk.sigmas[i])
            old = logp.detach() if prepared.logp_old is None else prepared.logp_old[i]
            scaled = advantage * settings.adv_scale
            policy = clipped(logp, old, scaled, settings.clip_low, settings.clip_high)
            total, metrics = policy.loss, dict(policy.metrics)
            for name, held, weight in (
                ("velocity_kl", prepared.reference, settings.ref_weight),
                ("lag_kl", prepared.lagging, settings.lag_weight),
            ):
                if held is not None:
                    away = ops.velocity_loss(v, held[i])
                    total = total + weight * away.loss
                    metrics[name] = away.mse.mean()
            yield StepLoss(total, metrics, policy.ratio)
