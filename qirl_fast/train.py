"""`python -m qirl_fast.train [recipe.yaml] [key=value ...] [--dry-run]`: GRPO on a model folder.

Without a recipe it trains the packaged tiny model on the CPU. Under torchrun the processes share
the samples of each update, and the numbers do not depend on how many they are. The loop is `loop`;
the verbs it calls are methods of `Trainer`. A step's metrics are written before its checkpoint, so
a run killed at any moment resumes (`resume=auto`) with the same metrics and weights, bit for bit.
"""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from qirl_fast.batch import Batch, StepFailed, save_batch
from qirl_fast.checkpoint import CheckpointError
from qirl_fast.config import (
    Config,
    ConfigError,
    derived,
    describe,
    load_config,
    require_work,
    training,
)
from qirl_fast.data.prompts import PromptError
from qirl_fast.distributed import PeerFailed, World, joined, started
from qirl_fast.entry import run
from qirl_fast.heldout_samples import EvaluationFailed
from qirl_fast.interruption import Interrupted, Interruption
from qirl_fast.memory import describe_plan, fp8_plan, plan
from qirl_fast.models.fp8 import describe as describe_layers
from qirl_fast.models.fp8.te import Unavailable
from qirl_fast.reporting.kept import before_evaluation, draw_samples, draw_strip, strip_updates
from qirl_fast.reporting.summary import write_report
from qirl_fast.reward_ranks import serve, served, told_when_over
from qirl_fast.run_folder import prepare_run_dir, profiled
from qirl_fast.saving import Saver, resume
from qirl_fast.tracking import Tracker
from qirl_fast.trainer import Trainer

USAGE = f"""{__doc__}
  key=value    any setting by its dotted name, e.g. seed=1 run=mine train.steps=200
  --dry-run    print the resolved settings, derived batch sizes, planned memory; then stop
"""


@contextmanager
def log_file(run_dir: Path) -> Iterator[None]:
    """Inside, what the package has to say (which backend, which attention, ...) goes to log.txt."""
    handler = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("qirl_fast")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def train(cfg: Config) -> Path:
    """Train by the recipe, in all processes that torchrun started, and return the run's folder."""
    cuda, own = cfg.device != "cpu" and torch.cuda.is_available(), cfg.processes
    training(cfg, started())
    with (
        joined(own.timeout_s, cuda, own.sequence, own.rewards) as world,
        told_when_over(world, own.rewards),
    ):
        if world.rank >= world.size:
            serve(cfg, world)
            return Path(cfg.output, str(cfg.run))
        fresh = not any(Path(cfg.output, str(cfg.run)).glob("*"))
        with world.agreed():
            run_dir = prepare_run_dir(cfg) if world.rank == 0 else Path(cfg.output, str(cfg.run))
        with log_file(run_dir) if world.rank == 0 else nullcontext():
            trainer, step = prepared(cfg, run_dir, fresh, world)
            try:
                return loop(trainer, step, cfg, run_dir)
            finally:
                trainer.close()


def prepared(cfg: Config, run_dir: Path, fresh: bool, world: World) -> tuple[Trainer, int]:
    """The trainer, at the step it goes on from; a fresh folder is taken away again on failure."""
    try:
        with world.agreed():
            trainer = Trainer(cfg, world, partial(served, cfg, world))
        return trainer, resume(trainer, run_dir, cfg)
    except BaseException as error:
        if fresh and world.rank == 0:
            shutil.rmtree(run_dir)  # nothing was computed: the mended command finds its place free
        # Refused by model, prompts, checkpoint, disk; or a library that was asked for is missing.
        if isinstance(error, ValueError | OSError | Unavailable):
            raise ConfigError([str(error)]) from error
        raise


def loop(trainer: Trainer, step: int, cfg: Config, run_dir: Path) -> Path:
    """The loop of `train`.

    Where processes share out trained weights none can save alone: they finish a step together and
    save it when one of them is asked to stop.
    """
    world, saver, spread = trainer.world, Saver(trainer, run_dir, cfg), trainer.learner.spread
    with (
        Interruption(waits=spread) as interruption,
        Tracker(run_dir, cfg, step=step, rank=world.rank, speed=trainer.speed()) as tracker,
    ):
        several = f", {world.size} processes" if world.size > 1 else ""
        tracker.say(f"{run_dir}: from step {step} to {cfg.train.steps}{several}")
        tracker.say(f"{in_short(cfg)}; Ctrl-C saves and stops{' after a step' * spread}")
        for text in trainer.judges.warnings():
            tracker.say(f"warning: {text}")
        if not (run_dir / "samples" / "before.npz").exists():
            tracker.say("evaluating the untrained policy on the held-out prompts")
        with interruption.allowed():
            before = before_evaluation(trainer, run_dir)
        for update in range(step + 1, cfg.train.steps + 1):
            batch, position = None, trainer.position()
            try:
                wanted = cfg.tracking.profile if world.rank == 0 else ()
                with interruption.allowed(), profiled(run_dir, update, wanted):
                    with tracker.phase("data"):
                        prompts = trainer.next_prompts()
                    with tracker.phase("rollout"):
                        batch = trainer.rollout(prompts, update)
                    tracker.split("rollout", "reward", *trainer.judging_s())
                    tracker.judges = trainer.judge_load()
                    with tracker.phase("update"):
                        advantage = trainer.advantages(batch)
                        metrics = trainer.update(batch, advantage, interruption.hold)
            except (StepFailed, Interrupted) as error:
                if trainer.go_back(position):
                    saver.save_alone(update - 1)
                if isinstance(error, StepFailed):
                    raise stopped(error, batch or error.batch, run_dir, update, world) from error
                raise
            metrics |= trainer.reward_metrics(batch, advantage)
            images = len(batch.scores) + batch.explored
            try:
                with interruption.allowed():
                    metrics |= held_out(trainer, tracker, run_dir, update, cfg)
                tracker.log(update, metrics, images=images)
                samples_every = cfg.tracking.samples_every
                if samples_every and due(update, samples_every, cfg.train.steps):
                    with interruption.allowed():
                        draw_samples(trainer, run_dir, update)
                interruption.check()
            except (EvaluationFailed, Interrupted):  # the update itself stands
                if tracker.step < update:
                    tracker.log(update, metrics, images=images)
                saver.save_alone(update)
                raise
            asked = [n for n in world.gather(interruption.asked) if n] if spread else []
            if asked or due(update, cfg.tracking.checkpoint_every, cfg.train.steps):
                saver.save(update)
            saver.settle(wait=bool(asked) or update == cfg.train.steps)
            if asked:
                raise Interrupted(asked[0])
        tracker.say("evaluating the trained policy on the held-out prompts")
        with interruption.allowed():
            after = trainer.evaluate()
    if world.rank == 0:
        write_report(trainer, tracker, run_dir, before, after)
    return run_dir


def in_short(cfg: Config) -> str:
    """What a run does, in a line."""
    size = derived(cfg)
    judges = ", ".join(f"{name} {weight:.2g}" for name, weight in cfg.rewards.items())
    rewarded = f", rewarded by {judges}" if judges else ""
    images = size.samples + size.explored
    drawn = f"{images} images of {cfg.data.prompts_per_step} prompts a step"
    return f"{cfg.algorithm.name} on {cfg.model.path}: {drawn}{rewarded}"


def held_out(
    trainer: Trainer, tracker: Tracker, run_dir: Path, update: int, cfg: Config
) -> dict[str, float]:
    """What is drawn of the held-out prompts after an update: their mean scores, and the pictures of
    report.html, where they are due.
    """
    metrics = heldout_means(trainer, tracker, update, cfg)
    if update in strip_updates(cfg):
        with tracker.phase("evaluate"):
            draw_strip(trainer, tracker, run_dir, update)
    return metrics


def heldout_means(trainer: Trainer, tracker: Tracker, update: int, cfg: Config) -> dict[str, float]:
    """Mean held-out scores where an evaluation is due, of those judges that had any to give."""
    every = cfg.evaluation.every
    if not every or update % every or update == cfg.train.steps:
        return {}
    with tracker.phase("evaluate"):
        scores = trainer.evaluate().scores
    return {
        f"heldout/{n}": float(np.nanmean(s)) for n, s in scores.items() if not np.isnan(s).all()
    }


def due(update: int, every: int, last: int) -> bool:
    """True at every `every`-th update and at the last one; 0: at the last one only."""
    return update == last or (every > 0 and update % every == 0)


def stopped(
    error: StepFailed, batch: Batch | None, run_dir: Path, update: int, world: World
) -> StepFailed:
    """Save what there is of the batch, and make the error that ends the run; the update was not
    applied.
    """
    folder = run_dir / "failed" / f"step-{update}" / (f"process-{world.rank}" * (world.size > 1))
    found = world.gather(None if batch is None else str(save_batch(batch, folder)))
    where = ", ".join(path for path in found if path is not None)
    kept = f". The batch is in {where}" if where else ""
    return StepFailed(f"step {update} is stopped, its update not applied: {error}{kept}")


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 the run stopped, 2 the settings are wrong, 128 + n: signal n."""

    def work(args: list[str]) -> None:
        cfg = load_config([arg for arg in args if arg != "--dry-run"])
        if "--dry-run" not in args:
            train(cfg)
            return
        processes = training(cfg, started())
        require_work(cfg, processes)
        if int(os.environ.get("RANK", "0")):  # one of them speaks
            return
        print(describe(cfg))
        print(describe_plan(plan(cfg, processes), processes))
        if cfg.model.fp8 is not None:
            fp8 = cfg.model.fp8
            print(describe_layers(fp8_plan(cfg), fp8.recipe, fp8.library))

    return run(
        argv,
        USAGE,
        work,
        wrong=(ConfigError, PromptError, CheckpointError, FileNotFoundError),
        stopped=(StepFailed, EvaluationFailed, PeerFailed, OSError),
        again="run the same command with resume=auto",
    )


if __name__ == "__main__":
    sys.exit(main())
