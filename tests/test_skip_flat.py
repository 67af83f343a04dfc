"""The online filter: chunks whose advantages are all 0 are left out, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast.algorithms.grpo import Grpo
from qirl_fast.batch import StepFailed
from qirl_fast.config import changes, load_config
from qirl_fast.trainer import Trainer

GROUPS, SIZE = 4, 4


@pytest.fixture
def updated(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, float], dict[str, Tensor], int]]:
    """`updated(advantage, *settings)`: metrics, every tensor of the learner, chunks replayed."""
    replayed: list[int] = []
    real = Grpo.loss

    def counted(*args: Any) -> Any:
        replayed.append(1)
        return real(*args)

    monkeypatch.setattr(Grpo, "loss", counted)

    def run(advantage: Tensor, *settings: str) -> Any:
        own = [f"output={tmp_path}", f"data.prompts_per_step={GROUPS}", f"rollout.max_rows={SIZE}"]
        trainer = Trainer(load_config([*small, *own, *settings]))
        batch = trainer.rollout(next(trainer.sampler), 1)
        replayed.clear()
        metrics = trainer.learner.update(batch.trajectories, advantage, ["t2i"] * len(advantage))
        state = trainer.learner.state()
        moments = state["optimizer"]["state"]
        tensors = dict(state["weights"])
        tensors |= {f"{n}.{i}": m[n] for i, m in moments.items() for n in ("exp_avg", "exp_avg_sq")}
        return metrics, {n: t.clone() for n, t in tensors.items()}, len(replayed)

    return run


def advantages(*flat: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(GROUPS, SIZE, generator=generator)
    value[list(flat)] = 0.0
    return value.flatten()


@pytest.mark.parametrize(
    ("flat", "settings", "replayed"),
    [
        ((1,), (), 3),
        ((0, 3), (), 2),
        ((0, 1, 2, 3), (), 0),
        ((1, 2, 3), ("train.updates_per_rollout=2",), 1),
        ((2,), ("train.replay_steps=2", "train.updates_per_rollout=2", "train.lr=0.1"), 3),
    ],
)
def test_no_number_changes(updated, flat, settings, replayed) -> None:
    on, weights, count = updated(advantages(*flat), *settings, "train.skip_flat=true")
    off, wanted, all_of_them = updated(advantages(*flat), *settings, "train.skip_flat=false")
    assert (count, all_of_them) == (replayed, GROUPS)
    assert on.pop("skipped_share") == len(flat) / GROUPS and off.pop("skipped_share") == 0
    assert on == off
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_kl_needs_every_chunk(updated) -> None:
    metrics, _, count = updated(advantages(1), "algorithm.kl_weight=0.1")
    assert count == GROUPS and metrics["skipped_share"] == 0 and "kl" in metrics


def test_an_advantage_that_is_no_number_is_not_taken_for_flat(updated) -> None:
    bad = advantages(1)
    bad[SIZE] = float("nan")
    with pytest.raises(StepFailed, match="loss of rows"):
        updated(bad)


def test_a_run_may_go_on_with_the_filter_turned(small) -> None:
    assert not changes(load_config([*small]), load_config([*small, "train.skip_flat=false"]))
