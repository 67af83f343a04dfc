"""What a run ends with: the before -> after table, summary.json, pictures, and report.html."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qirl_fast import _cpu
from qirl_fast.evaluation.curves import reward_curves
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.evaluation.paired import paired_bootstrap
from qirl_fast.reporting.checks import checks
from qirl_fast.reporting.kept import GRID, draw_grid, keep_after
from qirl_fast.reporting.page import write_page
from qirl_fast.reporting.run import read_run
from qirl_fast.tracking import Tracker, summary_table
from qirl_fast.trainer import Trainer
from qirl_fast.whole import write_text

PACKAGES = ("qirl_fast", "torch", "diffusers", "transformers", "peft", "numpy")


def write_report(
    trainer: Trainer, tracker: Tracker, run_dir: Path, before: Evaluation, after: Evaluation
) -> None:
    """Print the before -> after table and what report.html warns of; write summary.json,
    samples/after.npz, two pictures beside it, and report.html.
    """
    keep_after(trainer, run_dir, after)
    judges: dict[str, dict[str, float]] = {}
    for name in trainer.judges.names:
        pairs = np.isfinite(before.scores[name]) & np.isfinite(after.scores[name])
        if pairs.sum() < 2:
            tracker.say(f"judge {name!r} had something to judge in {pairs.sum()} held-out pairs")
            continue
        r = paired_bootstrap(before.scores[name][pairs], after.scores[name][pairs])
        judges[name] = {k: getattr(r, k) for k in ("before", "after", "diff", "low", "high", "n")}
    summary = {
        "judges": judges,
        "phases_s": _phases(run_dir),
        "online_filter": _online_filter(run_dir),
        "images_per_s": _images_per_s(run_dir),
        **_worst(run_dir, "pre_update_clip_fraction", "pre_update_ratio_error"),
        "steps": trainer.cfg.train.steps,
        "seed": trainer.cfg.seed,
        "versions": _versions() | {"threads": str(trainer.workers.count)},
        "commit": _commit(),
    }
    path = run_dir / "summary.json"
    write_text(path, json.dumps(summary, indent=2) + "\n")
    tags = [p.category for p in trainer.heldout]
    order = sorted(range(len(tags)), key=lambda i: (tags[:i].count(tags[i]), i))[:GRID]
    picture = run_dir / "samples" / "before_after.png"
    draw_grid(trainer, before, after, picture, order)
    curves = run_dir / "samples" / "rewards.png"
    console = Console()
    if judges:
        title = f"{run_dir.name}: {len(trainer.heldout)} held-out prompts"
        console.print(summary_table(judges, title))
    said = f"picture {picture}\nsummary {path}"
    if trainer.judges.names:
        reward_curves(_lines(run_dir, "metrics"), trainer.cfg.rewards, trainer.cfg.watch, curves)
        said += f"\ncurves  {curves}"
    said += f"\nreport  {write_page(run_dir)}  (opens in a browser: curves, pictures, warnings)"
    console.print(said, highlight=False, soft_wrap=True)
    for found in checks(read_run(run_dir)):
        if found.state == "warning":
            text = f"warning: {found.name}: {found.text}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    text = (run_dir / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _phases(run_dir: Path) -> dict[str, float]:
    """Seconds by phase over all steps of the run, resumed parts included."""
    totals: dict[str, float] = {}
    for line in _lines(run_dir, "timings"):
        for name, seconds in line["phases_s"].items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals


def _online_filter(run_dir: Path) -> dict[str, float]:
    """The share of rows whose replay was left out, and the seconds that saved, an estimate: the
    rows left out at the mean cost of those replayed; no seconds where none was replayed.
    """
    lines = _lines(run_dir, "metrics")
    share = sum(line.get("skipped_share", 0.0) for line in lines) / max(1, len(lines))
    update_s = _phases(run_dir).get("update", 0.0)
    saved = {"saved_s": update_s * share / (1 - share)} if share < 1 else {}
    return {"skipped_share": share} | saved


def _images_per_s(run_dir: Path) -> float:
    """Sampled images per second over all steps of the run, resumed parts included."""
    lines = _lines(run_dir, "timings")
    seconds = sum(line["seconds"] for line in lines)
    images = sum(line["images_per_s"] * line["seconds"] for line in lines)
    return images / seconds if seconds else 0.0


def _worst(run_dir: Path, *metrics: str) -> dict[str, float]:
    """The largest value of each metric that any update has."""
    lines = _lines(run_dir, "metrics")
    found = {name: [line[name] for line in lines if name in line] for name in metrics}
    return {name: max(values) for name, values in found.items() if values}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cpu_kernels": _cpu.available_isas()[-1]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str:
    """The commit of the checkout this package runs from; 'unknown' for an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"
