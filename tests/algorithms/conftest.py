"""A toy policy beside its float64 twin, moved away from where it drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast.algorithms import Algorithm, Policy, StepLoss, make_algorithm
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, Trajectory, sample
from qirl_fast.rollout.workers import Workers

SCHEDULER = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
STEPS, GROUP, ROWS = 5, 4, 12


class Bench:
    """A toy model, a chunk that it drew, and an algorithm on it.

    nudge: moves the weights, as optimizer steps would. exact: the model as it is, in float64.
    """

    def __init__(
        self,
        make_toy: Any,
        text: tuple[list[Tensor], Tensor],
        settings: Any,
        recorded: Sequence[int],
        *,
        dynamics: str = "flow_sde",
        guidance: Guidance | None = None,
        updates: int = 1,
    ):
        self.make_toy, self.model = make_toy, make_toy()
        self.how = Sampling(
            64, 64, STEPS, guidance or Guidance(), dynamics, keeps=type(settings).keeps
        )
        trainable = dict(self.model.named_parameters())
        policy = Policy(self.model, trainable, self.how, Workers(1), updates)
        self.algorithm: Algorithm = make_algorithm(settings, policy)
        with self.algorithm.sampling():
            (self.chunk,) = sample(
                self.model,
                *text,
                self.how,
                SCHEDULER,
                group_size=GROUP,
                seed=1,
                update=3,
                recorded=tuple(recorded),
            )

    def nudge(self, by: float, seed: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))

    def exact(self, weights: Sequence[Tensor] | None = None) -> Any:
        """A float64 model of these weights, or of the model's as they are."""
        twin = self.make_toy(torch.float64)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), weights or self.model.parameters(), strict=True):
                p.copy_(q)
        twin.untrained = [p.double() for p in self.model.untrained]
        return twin

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def prepare(self) -> Any:
        (prepared,) = self.algorithm.prepare([self.chunk], ["t2i"] * ROWS)
        return prepared

    def losses(
        self, advantage: Tensor | None, prepared: Any, chunk: Trajectory | None = None
    ) -> list[StepLoss]:
        return list(self.algorithm.loss(chunk or self.chunk, advantage, prepared))

    def velocities(self, model: Any, states: Sequence[Tensor]) -> list[Tensor]:
        """A float64 model's at given states of the recorded steps."""
        prefix = self.chunk.prompts.prefix(model)
        return [
            model.velocity(x.double(), [sigma], prefix)
            for x, sigma in zip(states, self.chunk.sigmas, strict=True)
        ]

    def reference_velocities(self, states: Sequence[Tensor]) -> list[Tensor]:
        twin = self.exact(self.model.untrained)
        return [v.detach() for v in self.velocities(twin, states)]


@pytest.fixture
def make_bench(make_toy, toy_text) -> Callable[..., Bench]:
    """`make_bench(settings, recorded, dynamics=, guidance=, updates=)`: see Bench."""
    return lambda settings, recorded, **more: Bench(make_toy, toy_text, settings, recorded, **more)


@pytest.fixture
def advantage() -> Tensor:
    """Of 12 rows, from -2 to 2 in some order, none 0."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    return torch.linspace(-2, 2, ROWS)[order]


@pytest.fixture
def agree() -> Callable[..., None]:
    """`agree(bench, twin, steps, wanted)`: loss and gradients of both, float32 against float64.

    A log-prob is right to about 1e-5 in float32 (w up to 40 times 1e-7 of squares up to 3), the
    gradient of a ratio therefore to 1e-4 of the largest.
    """

    def check(bench: Bench, twin: Any, steps: list[StepLoss], wanted: Tensor) -> None:
        ours = torch.stack([step.loss for step in steps]).mean()
        ours.backward()
        wanted.backward()
        assert abs(ours.item() - wanted.item()) < 1e-4 * max(1.0, abs(wanted.item()))
        for p, q in zip(bench.model.parameters(), twin.parameters(), strict=True):
            assert q.grad.abs().max() > 0
            assert (p.grad - q.grad).abs().max() < 2e-4 * q.grad.abs().max()

    return check


@pytest.fixture
def resumes(small: tuple[str, ...], tmp_path) -> Callable[..., tuple[dict, dict]]:
    """`resumes(recipe, *settings)`: two updates, a checkpoint, a third, in one trainer and in
    another that begins at the checkpoint; both third updates' metrics and weights must be equal
    bit for bit. Returns the metrics, and the state that the algorithm saved.
    """
    from qirl_fast.checkpoint import pack, unpack
    from qirl_fast.config import load_config
    from qirl_fast.trainer import Trainer

    def once(trainer: Any, update: int) -> dict[str, float]:
        batch = trainer.rollout(trainer.next_prompts(), update)
        return trainer.update(batch, trainer.advantages(batch))

    def run(recipe: str, *settings: str) -> tuple[dict, dict]:
        own = [
            *("threads=1", "data.prompts_per_step=2", "rollout.group_size=4", "rollout.steps=4"),
            *("train.lr=0.01", "train.warmup=0", "train.ema=null", f"output={tmp_path}"),
        ]
        cfg = load_config([recipe, *own, *settings])
        trainer = Trainer(cfg)
        for update in (1, 2):
            once(trainer, update)
        tensors, tree = pack(trainer.state())
        tensors = {name: t.clone() for name, t in tensors.items()}
        other = Trainer(cfg)
        other.load_state(unpack(tensors, tree))
        wanted, found = once(trainer, 3), once(other, 3)
        assert found == wanted
        weights = trainer.learner.trainable
        assert all(torch.equal(p, other.learner.trainable[name]) for name, p in weights.items())
        return found, unpack(tensors, tree)["learner"]["algorithm"]

    return run
