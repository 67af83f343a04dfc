"""DiffusionNFT: good samples attract and bad ones repel, without a likelihood (arXiv 2509.16117).

    x_t    a sample of rollout, noised anew, see `levels`
    v_old  the lagging policy, which rollout draws with, see `levels`
    loss   = mean over rows and levels of  ops.nft_loss: v+ = v_old + beta (v - v_old) is matched
             to the sample with weight p, v- = v_old - beta (v - v_old) with 1 - p,
             p = 1/2 + clip(A / adv_clip, -1, 1) / 2
           + ref_weight mean (v - v_ref)^2

No ratio, no noise on the way: rollout is by ODE. Where all of a group's advantages are 0, p is 1/2:
such rows hold the policy near to the lagging one. (The published script leaves them out, and so
trains on batches of uneven size.)

Source: the paper and its train_nft_sd3.py; defaults are those of its GenEval recipe. Levels are
drawn for an update where the script permutes each row's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qirl_fast import ops
from qirl_fast.algorithms.algorithm import StepLoss
from qirl_fast.algorithms.levels import LevelAlgorithm, LevelSettings
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.section import NonNegative, Positive

Answers = tuple[list[Tensor], list[Tensor] | None]  # v_old, v_ref


class Settings(LevelSettings):
    """DiffusionNFT: a contrast of better and worse."""

    name: Literal["nft"] = Field(description="DiffusionNFT: a contrast of better and worse")
    beta: Positive = Field(default=1.0, description="distance of the two implicit policies")
    adv_clip: Positive = Field(default=5.0, description="advantage at which p is 1")
    ref_weight: NonNegative = Field(
        default=1e-4, description="weight of the mean squared velocity difference to the reference"
    )


class Nft(LevelAlgorithm):
    """The contrast, under a lagging policy that draws."""

    settings: Settings

    def sampling(self) -> AbstractContextManager[None]:
        """The lagging policy draws."""
        return self.lagging.applied()

    def prepare(self, chunks: Sequence[Trajectory], tasks: Sequence[str]) -> list[Answers]:
        """For each chunk the lagging policy's and the reference's velocities."""
        reference: Sequence[list[Tensor] | None] = [None] * len(chunks)
        if self.settings.ref_weight:
            reference = self.reference_answers(chunks)
        return list(zip(self.lagging_answers(chunks), reference, strict=True))

    def loss(
        self, chunk: Trajectory, advantage: Tensor | None, prepared: Answers
    ) -> Iterator[StepLoss]:
        """One StepLoss per level. ValueError without advantages."""
        if advantage is None:
            raise ValueError("nft: advantages None; take them from the rollout")
        (old, reference), settings = prepared, self.settings
        noised, _ = self.noised(chunk)
        for i, v in enumerate(self.velocities(noised)):
            found = ops.nft_loss(
                v,
                old[i],
                noised.x[i],
                chunk.latents,
                torch.full((len(v),), chunk.sigmas[i], device=v.device),
                advantage,
                beta=settings.beta,
                v_ref=None if reference is None else reference[i],
                adv_clip=settings.adv_clip,
                ref_weight=settings.ref_weight,
            )
            metrics = {
                "better_mse": found.better_mse.mean(),
                "worse_mse": found.worse_mse.mean(),
            }
            if reference is not None:
                metrics["velocity_kl"] = found.ref_mse.mean()
            yield StepLoss(found.loss, metrics)
