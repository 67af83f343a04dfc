"""Out of memory: a chunk is done in parts, with the result of the whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import ended

from qirl_fast.checkpoint import load_checkpoint, unpack
from qirl_fast.config import load_config
from qirl_fast.learner import Learner
from qirl_fast.models.adapter import Adapter, NotFinite
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.sample import decode
from qirl_fast.rollout.workers import StepFailed, Workers, out_of_memory
from qirl_fast.trainer import Trainer

RECIPES = Path(__file__).parents[1] / "configs" / "algorithms"
LEVELS = (
    "algorithm.levels=2",
    "rollout.sde_steps=null",
    "rollout.dynamics=ode",
    "rollout.window=null",
    "rollout.ratio_mode=conditional",
)
FULL_WEIGHTS = ("model.adapter=full", "train.lr=1e-4")
CASES = {
    "grpo": (),
    "both branches and KLs": (
        "rollout.ratio_mode=full",
        "algorithm.kl_weight=0.1",
        "algorithm.velocity_kl_weight=0.1",
        "rollout.max_rows=4",
    ),
    "all weights": (*FULL_WEIGHTS, "rollout.ratio_mode=conditional"),
    "grpo_guard": ("train.updates_per_rollout=2", "rollout.sde_steps=null"),
    "dppo": ("train.updates_per_rollout=2", "rollout.sde_steps=null", "train.replay_steps=2"),
    "nft": LEVELS,
    "awm": ("train.updates_per_rollout=2", *LEVELS),
}


def refuse(monkeypatch: pytest.MonkeyPatch, most: int, gradient: bool = True) -> list[int]:
    """Forwards (with gradient alone, or all) and decodings of more rows than `most` run out of
    memory. Returns the rows of the forwards that do.
    """
    failed: list[int] = []

    def limited(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def run(self: Any, x: Tensor, *args: Any, **named: Any) -> Any:
            counts = name == "decode" or torch.is_grad_enabled() or not gradient
            if counts and len(x) > most:
                if name == "velocity":
                    failed.append(len(x))
                raise torch.OutOfMemoryError(f"CUDA out of memory with {len(x)} rows")
            return real(self, x, *args, **named)

        monkeypatch.setattr(owner, name, run)

    limited(Adapter, "velocity")
    limited(QwenImage21, "decode")
    return failed


@pytest.fixture
def updated(small, tmp_path, monkeypatch) -> Callable[..., Any]:
    """`updated(case)`: one update's batch, metrics and gradients; and the trainer."""
    seen: list[Tensor] = []
    real = Learner._optimizer_step

    def step(self: Learner) -> float:
        seen.extend(p.grad.clone() for p in self.trainable.values() if p.grad is not None)
        return real(self)

    monkeypatch.setattr(Learner, "_optimizer_step", step)

    def run(case: str) -> Any:
        seen.clear()
        recipe, common = RECIPES / f"{case}.yaml", [*small, f"output={tmp_path}"]
        if recipe.exists():
            own = (word for word in common if not word.startswith("algorithm="))
            common = [str(recipe), "model.path=tiny", *own]
        trainer = Trainer(load_config([*common, *CASES[case]]))
        batch = trainer.rollout(trainer.next_prompts(), 1)
        advantage = trainer.advantages(batch)
        metrics = trainer.update(batch, advantage)
        return batch, metrics, list(seen), trainer

    return run


def tensors(batch: Any) -> Iterator[Tensor]:
    for chunk in batch.trajectories:
        yield from (chunk.latents, chunk.seeds)
        for name in ("x", "x_next", "delta", "logp"):
            yield from (t for t in getattr(chunk, name) if t is not None)


@pytest.mark.parametrize(
    ("case", "gradient"),
    [("grpo", True), ("all weights", True), *((case, False) for case in CASES)],
)
def test_an_update_in_parts_is_that_of_the_whole(updated, monkeypatch, case, gradient) -> None:
    """What is drawn is equal to the bit, here on a CPU whose matrix products give a row the same
    bits in any batch. Gradients are sums over rows in another order, of terms that nearly cancel,
    as advantages sum to 0: 1e-4 of the norm leaves room for a sum 1000 times less than its terms,
    each rounded by 6e-8.
    """
    batch, metrics, gradients, _ = updated(case)
    failed = refuse(monkeypatch, 3, gradient)
    in_parts, found, sums, trainer = updated(case)
    assert 1 <= len(failed) <= 3, "of 8 rows, 4 and 2 (guided: 4) fail once, then never again"
    assert len(in_parts.trajectories) == len(batch.trajectories)
    assert [c.rows for c in in_parts.trajectories] == [c.rows for c in batch.trajectories]
    owners = [[c.prompts.owner for c in b.trajectories] for b in (in_parts, batch)]
    assert owners[0] == owners[1]
    pairs = list(zip(tensors(in_parts), tensors(batch), strict=True))
    assert len(pairs) >= 2 and all(torch.equal(ours, whole) for ours, whole in pairs)
    assert np.array_equal(in_parts.images, batch.images)
    assert torch.equal(in_parts.scores, batch.scores)
    for ours, whole in zip(sums, gradients, strict=True):
        assert (ours - whole).norm() <= 1e-4 * whole.norm() + 1e-12
    if len(set(metrics) & {"pre_update_ratio_error"}):
        assert found["pre_update_ratio_error"] == metrics["pre_update_ratio_error"] == 0
    assert found.pop("backoff_rows") == trainer.workers.rows["forward"] < 4
    # A ratio after the first optimizer step is of weights that already differ by rounding.
    for name in set(metrics) - {"ratio_error", "clip_fraction", "approx_kl", "masked_fraction"}:
        assert found[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-7), name
    assert found.keys() == metrics.keys()


HOOK = """
import torch
from qirl_fast.models.adapter import Adapter
whole = Adapter.velocity
def limited(self, x, *args, **named):
    if len(x) > {most} and {when}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    return whole(self, x, *args, **named)
Adapter.velocity = limited
"""


def weights(folder: Path) -> dict[str, Tensor]:
    found = load_checkpoint(folder / "checkpoints" / "latest")
    state: dict[str, Tensor] = unpack(found.tensors, found.state["tree"])["learner"]["weights"]
    return state


@pytest.mark.chaos("out of memory in replay: chunks in parts, the same samples and loss")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_goes_on_in_parts(start, small, finished, read_jsonl, tmp_path, threads) -> None:
    own = ["train.steps=3", "rollout.max_rows=4", f"threads={threads}"]
    hook = HOOK.format(most=2, when="torch.is_grad_enabled()")
    run = start([*small, *own, f"output={tmp_path}", "run=r"], hook=hook)
    assert run.wait() == 0, run.output()
    alone = finished("left-alone", "train.steps=3", "rollout.max_rows=4")
    ours, theirs = (read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path / "r", alone))
    for row in ours:
        assert row.pop("backoff_rows") == 2 and row["pre_update_ratio_error"] == 0
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for name, value in theirs[0].items():  # of one policy
        close = name in ("loss", "grad_norm", "approx_kl")
        assert ours[0][name] == (pytest.approx(value, rel=1e-5, abs=1e-9) if close else value), name
    for name, value in weights(alone).items():  # Adam moves a weight by lr whatever its gradient
        assert (weights(tmp_path / "r")[name] - value).norm() <= 0.01 * value.norm() + 1e-9
    log = (tmp_path / "r" / "log.txt").read_text()
    assert log.count("out of memory with") == 1, "said once"
    assert "out of memory with 4 rows of a chunk at a time, forward (CUDA out of memory" in log
    assert "from now on 2" in log and "lower rollout.max_rows" in log


@pytest.mark.chaos("out of memory with one row: the step stops, and what to set is said")
def test_one_row_that_does_not_fit(start, small, finished, tmp_path) -> None:
    own = [*small, f"output={tmp_path}", "run=r"]
    hook = HOOK.format(most=0, when="torch.is_grad_enabled()")
    run = start(own, hook=hook)
    assert run.wait() == 1, run.output()
    said = " ".join(run.output().split())
    assert "step 1 is stopped, its update not applied: out of memory with one row" in said
    assert "rollout.height, rollout.width" in said and "train.recompute_blocks" in said
    assert "Traceback" not in said
    assert start([*own, "resume=auto"]).wait() == 0
    ours, theirs = (folder / "metrics.jsonl" for folder in (tmp_path / "r", finished("plain")))
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_of_two_processes_backs_off(processes, finished, read_jsonl, tmp_path) -> None:
    own = ["rollout.max_rows=4", "train.steps=2"]
    hook = HOOK.format(most=2, when="__import__('os').environ['RANK'] == '1'")
    runs = processes(2, [*own, f"output={tmp_path}", "run=r"], hook=hook)
    assert ended(runs) == [0, 0], runs[1].output()
    alone = read_jsonl(finished("four-rows", *own) / "metrics.jsonl")
    ours = read_jsonl(tmp_path / "r" / "metrics.jsonl")
    assert [row["backoff_rows"] for row in ours] == [1, 1]  # of two, guided: one at a time
    assert ours[0]["reward"] == alone[0]["reward"]
    assert ours[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5, abs=1e-9)


def work(most: int, rows: list[tuple[int, int]]) -> Callable[[slice], list[int]]:
    def of(part: slice) -> list[int]:
        rows.append((part.start, part.stop))
        if part.stop - part.start > most:
            raise MemoryError
        return list(range(part.start, part.stop))

    return of


def test_halves_of_halves_and_what_is_kept_to() -> None:
    workers, seen = Workers(1), list[tuple[int, int]]()
    found = workers.parts(work(2, seen), 7)
    assert [row for part in found for row in part] == list(range(7))
    assert seen == [(0, 7), (0, 4), (0, 2), (2, 4), (4, 6), (6, 7)]
    seen.clear()
    assert workers.parts(work(2, seen), 3) == [[0, 1], [2]]
    assert seen == [(0, 2), (2, 3)], "no size that failed is tried again"
    assert workers.parts(work(9, seen), 5, "decode") == [list(range(5))], "a limit of its own"
    assert workers.rows == {"forward": 2}
    assert workers.parts(work(2, seen), 0) == []


def test_the_failed_try_is_gone_before_the_second() -> None:
    workers, held = Workers(1), list[weakref.ref[Any]]()
    released: list[bool] = []
    workers.release = lambda: released.append(True)
    gc.disable()  # nothing but the end of the frames frees it
    try:

        def of(part: slice) -> None:
            assert all(one() is None for one in held)
            big = torch.empty(10)
            held.append(weakref.ref(big))
            if part.stop - part.start > 1:
                raise torch.OutOfMemoryError("no")

        workers.parts(of, 4)
    finally:
        gc.enable()
    assert len(held) == 6 and released == [True, True]


def test_what_is_no_lack_of_memory_is_raised() -> None:
    def of(part: slice) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Workers(1).parts(of, 4)


def test_what_says_that_memory_does_not_suffice() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(huge.value) and out_of_memory(MemoryError())
    wrapped = ValueError("cannot compile")
    wrapped.__cause__ = torch.OutOfMemoryError("no")
    assert out_of_memory(wrapped) and not out_of_memory(ValueError("no"))


def test_processes_in_step_are_told_what_to_set() -> None:
    workers = Workers(1)
    workers.in_step = True
    with pytest.raises(StepFailed, match=r"go in step.*lower rollout\.max_rows"):
        workers.parts(work(2, []), 4)


def test_a_row_that_is_not_finite_keeps_its_number(frozen_model, monkeypatch) -> None:
    refuse(monkeypatch, 2)
    latents, workers = torch.randn(6, 16, 16), Workers(1)
    how: Any = type("How", (), {"height": 64, "width": 64})
    images = decode(frozen_model, latents, how, workers)
    assert images.shape == (6, 64, 64, 3) and workers.rows == {"decode": 2}
    monkeypatch.undo()
    assert np.array_equal(images, frozen_model.decode(latents, 64, 64))
    latents[4, 2, 3] = torch.nan
    with pytest.raises(NotFinite) as error:
        decode(frozen_model, latents, how, workers)
    assert error.value.row == 4
