"""What algorithms of the forward process share: clean samples, noised anew and looked at again.

    x_t = (1 - t) x0 + t eps        x0 a sample of rollout, t one of the schedule's noise levels

Rollout may be by any solver, and keeps no state but the last. The levels of an update are those of
so many steps, one drawn from each of equal parts of the schedule (AWM's "discrete"), alike for all
rows; eps is a function of the row's seed and of the step alone, so that all weights that are asked
about a sample see the same states.

A second policy lags behind the trained one, moved once an update by the schedule that DiffusionNFT
(arXiv 2509.16117) and AWM (arXiv 2509.25050) publish:

    lagging <- d lagging + (1 - d) weights,   d = min(most, rate max(0, optimizer steps - after))

A guided rollout draws x0 by both branches while the loss is about the conditional one alone, which
so takes the guidance in (rollout.ratio_mode: conditional); the papers draw without guidance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qirl_fast.algorithms.algorithm import Algorithm, Policy, Settings
from qirl_fast.models.ema import Ema
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import velocities
from qirl_fast.rollout.sample import Keeps, Trajectory, initial_noise
from qirl_fast.section import Count, Decay, Natural, NonNegative, Problem, Section

LEVEL_NOISE = 1 << 41  # Philox offset, of which the step's index is added


class LagSettings(Section):
    """How a policy lags behind the trained one: the share of it that an update keeps."""

    after: Natural = Field(default=0, description="optimizer steps during which none is kept")
    rate: NonNegative = Field(default=0.001, description="rise of the share by optimizer step")
    most: Decay = Field(default=0.5, description="largest share")

    def decay(self, step: int) -> float:
        """The share kept after `step` optimizer steps."""
        return min(self.most, self.rate * max(0, step - self.after))


class LevelSettings(Settings):
    """Base of the settings: which noise levels, and the lagging policy."""

    keeps: ClassVar[Keeps] = "levels"

    levels: Count | None = Field(
        default=None, description="noise levels that an update trains on; null: every step's"
    )
    first: Natural = Field(default=0, description="they are steps' from this one on, 0 being noise")
    lag: LagSettings = LagSettings()

    def recorded_steps(self, rollout: Any) -> int:
        """As many as there are levels."""
        return self.levels or int(rollout.steps) - self.first

    def problems(self, cfg: Any) -> Iterator[Problem]:
        """Stochastic steps, which have no use; undeclared guidance; more levels than steps."""
        rollout, name = cfg.rollout, cfg.algorithm.name
        if rollout.dynamics != "ode":
            yield (
                ("rollout.dynamics", "algorithm.name"),
                f"rollout.dynamics: got {rollout.dynamics!r}, and {name} looks at the clean sample "
                "alone, to which noise on the way only adds; set rollout.dynamics=ode",
            )
        if rollout.window is not None or rollout.sde_steps is not None:
            yield (
                ("rollout.window", "rollout.sde_steps", "algorithm.name"),
                f"rollout.window, rollout.sde_steps: choose steps of a ratio, and {name} has none; "
                "set both to null, and algorithm.levels for a part of the noise levels",
            )
        if rollout.guidance != 1 and rollout.ratio_mode != "conditional":
            yield (
                ("rollout.ratio_mode", "rollout.guidance", "algorithm.name"),
                f"rollout.ratio_mode: got {rollout.ratio_mode!r} with rollout.guidance="
                f"{rollout.guidance:g}; {name} trains the conditional branch alone, on samples of "
                "both: declare it with rollout.ratio_mode=conditional, or set rollout.guidance=1",
            )
        if self.first + self.recorded_steps(rollout) > rollout.steps or self.first >= rollout.steps:
            yield (
                ("algorithm.levels", "algorithm.first", "rollout.steps"),
                f"algorithm.levels: got {self.levels} from step {self.first} on; with "
                f"rollout.steps={rollout.steps} there are levels of steps 0 to {rollout.steps - 1}",
            )


class LevelAlgorithm(Algorithm):
    """Base of the algorithms: levels, noised states, and the lagging policy."""

    settings: LevelSettings

    def __init__(self, settings: LevelSettings, policy: Policy):
        super().__init__(settings, policy)
        self.lagging = Ema(list(policy.trainable.values()), 0.0, 1)

    def record(self, rollout: Any, seed: int, update: int) -> tuple[int, ...]:
        """Steps whose noise levels the update trains on."""
        first, count = self.settings.first, self.settings.recorded_steps(rollout)
        edges = [first + k * (rollout.steps - first) // count for k in range(count + 1)]
        rng = np.random.default_rng([seed, update, 2])
        return tuple(int(rng.integers(*part)) for part in pairwise(edges))

    def noised(self, chunk: Trajectory) -> tuple[Trajectory, list[Tensor]]:
        """The chunk with x_t as its states `x`, in the dtype of its latents, and each eps, float32
        [B, N, Z].
        """
        x0 = chunk.latents.float()
        noise = [
            initial_noise(chunk.seeds, (x0.shape[1], x0.shape[2]), x0.device, LEVEL_NOISE + i)
            for i in chunk.recorded
        ]
        levels = zip(chunk.sigmas, noise, strict=True)
        x = tuple(((1 - t) * x0 + t * eps).to(chunk.latents.dtype) for t, eps in levels)
        return replace(chunk, x=x), noise

    def velocities(self, noised: Trajectory) -> Iterator[Tensor]:
        """The model's velocity [B, N, Z] at each x_t, conditional."""
        return velocities(self.model, noised, Guidance(), self.how.replay_steps)

    def answers(self, chunks: Sequence[Trajectory]) -> list[list[Tensor]]:
        """Velocities at the noised states of each chunk, under the weights as they are."""

        @torch.no_grad()
        def of(chunk: Trajectory) -> list[Tensor]:
            return list(self.velocities(self.noised(chunk)[0]))

        with self.model.gathered():
            return list(self.policy.workers.tensors(of, chunks))

    def reference_answers(self, chunks: Sequence[Trajectory]) -> list[list[Tensor]]:
        """The same of the untrained policy."""
        with self.model.reference():
            return self.answers(chunks)

    def lagging_answers(self, chunks: Sequence[Trajectory]) -> list[list[Tensor]]:
        """The same of the lagging policy."""
        with self.lagging.applied():
            return self.answers(chunks)

    def after_step(self, step: int) -> None:
        """After the last optimizer step of an update the lagging policy moves."""
        if step % self.policy.updates == 0:
            self.lagging.decay = self.settings.lag.decay(step)
            self.lagging.update(step)

    def state(self) -> dict[str, Any]:
        """The lagging policy."""
        return {"lagging": self.lagging.average}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.lagging.load(state["lagging"])
