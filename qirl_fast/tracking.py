"""Metrics and their writers, and what a person sees while a run goes on.

Progress is a rich bar on a terminal, and one plain line a step where stdout is no terminal.
"""

from __future__ import annotations

import json
import math
import operator
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qirl_fast.checkpoint import truncate_metrics
from qirl_fast.clock import Speed, device_use, flat_clock, memory_mib
from qirl_fast.config import Config, ConfigError
from qirl_fast.config.reward import RewardConfig


class Tracker:
    """Progress, metrics and their writers, for one process; the others call with rank > 0.

    run_dir: from `prepare_run_dir`. step: last finished step, 0 at the start; the files are cut
    back to it, so that a resumed run's metrics.jsonl equals an uninterrupted one's. rank: a process
    of another rank than 0 writes and shows nothing. stream: where progress goes, default stdout.
    speed: of this process, for the MFU of phases. `judges`: what a step's clock says of them.
    `phase_s`: seconds by phase since the last `log`; `beside_s`: those in which a phase's work went
    on beside another; `totals_s`: over all steps of this process.
    Raises ConfigError if W&B is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        cfg: Config | RewardConfig,
        *,
        step: int = 0,
        rank: int = 0,
        stream: TextIO | None = None,
        speed: Speed | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.step = step
        self.total = cfg.train.steps
        self.phase_s: dict[str, float] = {}
        self.beside_s: dict[str, float] = {}
        self.totals_s: dict[str, float] = {}
        self.judges: dict[str, float] = {}
        self._speed, self._flops = speed, dict[str, int]()
        self.images = 0
        self._inside = ""
        self._stream = stream or sys.stdout
        self._files: dict[str, TextIO] = {}
        self._writer: Any = None
        self._wandb: Any = None
        self._bar: Progress | None = None
        if rank == 0:
            self._open(cfg)

    def _open(self, cfg: Config | RewardConfig) -> None:
        if cfg.tracking.wandb:
            self._wandb = _start_wandb(self.run_dir, cfg)
        for name in ("metrics", "timings"):
            path = self.run_dir / f"{name}.jsonl"
            truncate_metrics(path, self.step)
            self._files[name] = path.open("a", encoding="utf-8")
        if cfg.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir / "tb"), purge_step=self.step + 1)
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[phase]:>10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bar.add_task("train", total=self.total, completed=self.step, phase="", note="")
            self._bar.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of a step (rollout, reward, replay, update, ...) and show its name.

        Phases follow one another; one inside another would count its seconds twice.
        """
        assert not self._inside, f"phase {name!r} inside phase {self._inside!r}"
        self._inside = name
        if self._bar:
            self._bar.update(self._bar.task_ids[0], phase=name)
        start, before = time.perf_counter(), self._speed.done() if self._speed else 0
        try:
            yield
        finally:
            if self._speed:
                done = self._speed.done() - before
                self._flops[name] = self._flops.get(name, 0) + done
            seconds = time.perf_counter() - start
            self._inside = ""
            self.phase_s[name] = self.phase_s.get(name, 0.0) + seconds

    def split(self, phase: str, name: str, seconds: float, beside: float) -> None:
        """Take `seconds` out of a finished phase for one of another name, which also worked for
        `beside` seconds at the same time as it.
        """
        self.phase_s[phase] -= seconds
        self.phase_s[name] = self.phase_s.get(name, 0.0) + seconds
        self.beside_s[name] = self.beside_s.get(name, 0.0) + beside

    def log(self, step: int, metrics: Mapping[str, Any], *, images: int = 0) -> None:
        """Write the metrics of a finished step and the seconds of its phases.

        step: counts from 1 (0: before training). metrics: finite numbers by name, of Python, NumPy
        or PyTorch. images: sampled in this step, for images/s. Lines are on disk on return.
        Raises ValueError naming each that is NaN, infinite or no number; then nothing is written.
        """
        row = _checked(step, metrics)
        seconds = sum(self.phase_s.values())
        self.images += images
        for name, value in self.phase_s.items():
            self.totals_s[name] = self.totals_s.get(name, 0.0) + value
        clock: dict[str, Any] = {"step": step, "phases_s": self.phase_s, "seconds": seconds}
        if self.beside_s:
            clock["beside_s"] = self.beside_s
        clock["memory_mib"] = memory_mib()
        if images and seconds:
            clock["images_per_s"] = images / seconds
        clock |= device_use(self._speed, self._flops, self.phase_s)
        clock |= {"judges": self.judges} if self.judges else {}
        self.phase_s, self.beside_s, self.judges, self._flops = {}, {}, {}, {}
        self.step = step
        if self.rank:
            return
        self._write("metrics", row)
        self._write("timings", clock)
        scalars = {k: v for k, v in row.items() if k != "step"}
        if self._writer:
            for name, value in {**scalars, **flat_clock(clock)}.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb:
            self._wandb.log({**scalars, **flat_clock(clock)}, step=step)
        self._show(step, scalars, clock)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        file = self._files[name]
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())

    def _show(self, step: int, scalars: Mapping[str, float], clock: Mapping[str, Any]) -> None:
        parts = [f"{clock['images_per_s']:.1f} images/s"] if "images_per_s" in clock else []
        shown = "reward" if "reward" in scalars else "loss"
        parts += [f"{shown} {scalars[shown]:.4f}"] if shown in scalars else []
        note = "  ".join(parts)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
            return
        left = (self.total - step) * clock["seconds"]
        beside = {k: f" (+{v:.2f}s beside)" for k, v in clock.get("beside_s", {}).items()}
        phases = " ".join(f"{k} {v:.2f}s{beside.get(k, '')}" for k, v in clock["phases_s"].items())
        self.say(f"step {step}/{self.total}  {note}  {phases}  about {left:.0f}s left")

    def say(self, text: str) -> None:
        """Print one line (rank 0 only), above the progress bar if there is one."""
        if self.rank:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def images_per_s(self) -> float:
        """Return sampled images per second over all logged steps of this process, 0 without any."""
        seconds = sum(self.totals_s.values())
        return self.images / seconds if seconds else 0.0

    def close(self) -> None:
        """Stop the bar and close every writer; may be called twice."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        for file in self._files.values():
            file.close()
        if self._writer:
            self._writer.close()
            self._writer = None
        if self._wandb:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _start_wandb(run_dir: Path, cfg: Config | RewardConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            ["tracking.wandb: wandb is not installed; run `pip install wandb`, or set it to false"]
        ) from error
    return wandb.init(
        project="qirl_fast",
        name=cfg.run,
        id=cfg.run,
        dir=str(run_dir),
        config=cfg.model_dump(mode="json"),
        resume="allow",
    )


def _checked(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return {"step", metrics} as plain ints and floats, exactly."""
    wrong = []
    row: dict[str, float] = {"step": step}
    for name, value in metrics.items():
        number = _number(value)
        if number is None or name == "step":
            wrong.append(f"{name} = {value!r}")
        else:
            row[name] = number
    if wrong:
        raise ValueError(f"step {step}: metrics must be finite numbers, got " + ", ".join(wrong))
    return row


def _number(value: Any) -> float | None:
    """Return an int or a finite float, None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        number = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def summary_table(judges: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """Return the before -> after table.

    judges: name -> {"before", "after", "diff", "low", "high", "n"} as in summary.json; low and high
    bound the 95 % interval of diff, over n prompts; where it holds 0, neither better nor worse is
    shown.
    """
    table = Table(title=title)
    table.add_column("judge", no_wrap=True)
    for name in ("before", "after", "change", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, row in judges.items():
        up, down = row["low"] > 0, row["high"] < 0
        table.add_row(
            name,
            f"{row['before']:.3f}",
            f"{row['after']:.3f}",
            f"{row['diff']:+.3f}",
            f"{row['low']:+.3f} to {row['high']:+.3f}",
            f"{row['n']:.0f}",
            "better" if up else "worse" if down else "not shown to differ",
            style="green" if up else "red" if down else "",
        )
    return table
