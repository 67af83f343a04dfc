"""What every algorithm has: the settings under `algorithm:`, and its part in each update.

An update: `record` says at which steps the loss will look, rollout draws inside `sampling` and
keeps what `Settings.keeps` names, `prepare` computes what other weights than the trained ones have
to say, `loss` is differentiated chunk by chunk, `after_step` follows each optimizer step.

Shapes: B rows of a chunk, S recorded steps, N latent tokens, Z channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.sample import Keeps, Sampling, Trajectory
from qirl_fast.rollout.workers import Workers
from qirl_fast.section import Problem, Section


@dataclass(frozen=True)
class Policy:
    """What is trained: the model's adapter, its trainable weights by name, how it samples, the
    threads that work on chunks, and the optimizer steps of an update.
    """

    model: Any
    trainable: dict[str, Tensor]
    sampling: Sampling
    workers: Workers
    updates: int = 1


@dataclass(frozen=True)
class StepLoss:
    """Loss of one recorded step of one chunk: a mean over rows, with graph; the rest detached."""

    loss: Tensor
    metrics: dict[str, Tensor]  # scalars, means over rows
    ratio: Tensor | None = None  # [B], where the loss has one: 1 before the first update


def clipped(logp: Tensor, logp_old: Tensor, advantage: Tensor, low: float, high: float) -> StepLoss:
    """mean max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logp - logp_old); all [B]."""
    policy = ops.policy_loss(logp, logp_old, advantage, clip_low=low, clip_high=high)
    metrics = {"clip_fraction": policy.clip_fraction, "approx_kl": policy.approx_kl}
    return StepLoss(policy.loss, metrics, policy.ratio.detach())


class Settings(Section):
    """Base of an algorithm's settings."""

    keeps: ClassVar[Keeps] = "transitions"
    shards: ClassVar[bool] = True  # works where the transformer is spread over processes
    rewarded: ClassVar[bool] = True  # the loss needs advantages, so judges and groups

    @property
    def guides(self) -> bool:
        """True where the loss runs guided forwards of its own, which need unconditional prompts."""
        return False

    @property
    def tasks(self) -> set[str] | None:
        """The tasks of rows that can be trained on; None: all."""
        return None

    @property
    def models(self) -> dict[str, Path]:
        """Whole model folders that answer beside the trained one, by what an error calls them."""
        return {}

    def recorded_steps(self, rollout: Any) -> int:
        """How many steps of a trajectory the loss looks at. rollout: the recipe's section."""
        raise NotImplementedError

    def problems(self, cfg: Any) -> Iterator[Problem]:
        """What in the rest of the recipe does not go with this algorithm."""
        raise NotImplementedError


class Algorithm:
    """Base of an algorithm: on-policy sampling, nothing to prepare, no state."""

    def __init__(self, settings: Any, policy: Policy):
        self.settings, self.policy = settings, policy
        self.model, self.how = policy.model, policy.sampling

    def record(self, rollout: Any, seed: int, update: int) -> tuple[int, ...]:
        """Indices of the steps of this update that the loss will look at, ascending.

        rollout: the recipe's section.
        """
        raise NotImplementedError

    def sampling(self) -> AbstractContextManager[None]:
        """Inside, the model draws as rollout should: here as the policy itself."""
        return nullcontext()

    def idle(self, advantage: Tensor) -> bool:
        """True where rows of these advantages add nothing to the loss or its gradient."""
        return False

    def prepare(self, chunks: Sequence[Trajectory], tasks: Sequence[str]) -> list[Any]:
        """For each chunk what `loss` needs and other weights, or the weights before any optimizer
        step, compute. Apart from `loss`, because switching weights changes the model for everyone.

        chunks: all of the update, in order; tasks: of all their rows. What is found is a tree (of
        lists, tuples, NamedTuples) whose tensors are [B, ...]: of a part of the rows it is cut.
        """
        return [None] * len(chunks)

    def loss(
        self, chunk: Trajectory, advantage: Tensor | None, prepared: Any
    ) -> Iterator[StepLoss]:
        """One StepLoss per recorded step, or per forward that takes several.

        advantage: float32 [B], of the chunk's rows; None where the algorithm is not `rewarded`.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after optimizer step number `step`, counted from 1."""

    def state(self) -> dict[str, Any]:
        """What the next update depends on beside the policy's weights, a tree of tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
