"""A run's checkpoints: when they are written, by which processes, and how a run goes on from one.

What every process holds is written by process 0. Trained weights that processes share out, with
their moments and averages, are copied when a checkpoint is due, and written by each process beside
the next steps; when all have written, process 0 makes a checkpoint of it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.distributed.tensor import DTensor

from qirl_fast.checkpoint import (
    Part,
    begin_checkpoint,
    beside_of,
    entry,
    fill_from,
    find_latest,
    finish_checkpoint,
    load_checkpoint,
    pack,
    save_checkpoint,
    unpack,
    write_part,
)
from qirl_fast.config import Config, ConfigError, refuse_changes, settings
from qirl_fast.trainer import Trainer


@dataclass
class Saver:
    """Writes the checkpoints of a run; all processes call `save` and `settle` together."""

    trainer: Trainer
    run_dir: Path
    cfg: Config
    writing: tuple[int, Future[dict[str, Any]]] | None = None  # a step, what this process writes
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save(self, update: int) -> None:
        """Write checkpoint-`update`, exports included, or begin to.

        StepFailed where processes no longer hold the same weights, which they must to the bit.
        """
        self.settle()
        self.trainer.require_same_weights()
        world = self.trainer.world
        if not self.trainer.learner.spread:
            with world.agreed(OSError):
                if world.rank == 0:
                    self.write(update)
            return
        tensors, state = self._state()
        shared = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
        rest = {name: t for name, t in tensors.items() if name not in shared}
        size = sum(t.numel() * t.element_size() for t in shared.values())
        with world.agreed(OSError):
            if world.rank == 0:
                begin_checkpoint(self.run_dir, update, rest, state, None, size)
        part = Part.of(shared)
        self.writing = update, self.pool.submit(self._write_part, update, part)

    def _write_part(self, update: int, part: Part) -> dict[str, Any]:
        path = write_part(beside_of(self.run_dir, update), part)
        return {part.name: entry(path)} if part.tensors else {}

    def settle(self, wait: bool = True) -> None:
        """Make a checkpoint of what is being written; without `wait` only where all have done so.

        OSError where one could not write.
        """
        if self.writing is None:
            return
        world, (update, written) = self.trainer.world, self.writing
        if not wait and not all(world.gather(written.done())):
            return
        self.writing = None
        with world.agreed(OSError):
            own = written.result()
        known = {name: of for found in world.gather(own) for name, of in found.items()}
        with world.agreed(OSError):
            if world.rank == 0:
                keep = self.cfg.tracking.keep_checkpoints
                finish_checkpoint(self.run_dir, update, keep, known)

    def save_alone(self, update: int) -> None:
        """Write checkpoint-`update` if there is none as new; by process 0, as others may be gone.

        Nothing where they hold a part of it.
        """
        if self.trainer.world.rank != 0 or self.trainer.learner.spread:
            return
        latest = find_latest(self.run_dir)
        if update and (latest is None or latest.step < update):
            self.write(update)

    def write(self, update: int) -> None:
        """Write checkpoint-`update` of this process's state."""
        tensors, state = self._state()
        kept = self.cfg.tracking.keep_checkpoints
        save_checkpoint(self.run_dir, update, tensors, state, self.trainer.lora(), kept)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, tree = pack(self.trainer.state())
        return tensors, {"tree": tree, "config": settings(self.cfg)}


def resume(trainer: Trainer, run_dir: Path, cfg: Config) -> int:
    """Load what `resume` asks for and return its step; 0 where there is nothing to resume."""
    if cfg.resume == "never":
        return 0
    world, spread, found = trainer.world, trainer.learner.spread, None
    with world.agreed():
        if world.rank == 0:  # it may move `latest`
            shards: Literal["check", "read"] = "check" if spread else "read"
            auto = cfg.resume == "auto"
            found = (
                find_latest(run_dir, shards=shards)
                if auto
                else load_checkpoint(Path(cfg.resume), shards)
            )
    path = world.gather(None if found is None else str(found.path))[0]
    if path is None:
        return 0
    with world.agreed():
        found = found or load_checkpoint(path, "leave" if spread else "read")
        saved = found.state["config"]
        if isinstance(saved, str):
            raise ConfigError(
                [
                    f"resume: {found.path} was written by an earlier version, which kept a hash of "
                    "its settings alone; resume it with that version, or start anew under run=NAME"
                ]
            )
        refuse_changes(saved, cfg, f"resume: {found.path}")
        tensors = dict(found.tensors)
        if spread and found.shards is not None:
            trainer.learner.ready()
            live = pack(trainer.state())[0]
            shared = {name: t for name, t in live.items() if isinstance(t, DTensor)}
            fill_from(found.shards, shared)
            tensors |= shared
        trainer.load_state(unpack(tensors, found.state["tree"]))
        return found.step
