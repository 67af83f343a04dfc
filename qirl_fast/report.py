"""The evaluation before training, sample grids, and the report a run ends with."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qirl_fast import _cpu
from qirl_fast.config import ConfigError
from qirl_fast.evaluation.curves import reward_curves
from qirl_fast.evaluation.grid import before_after_grid
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.evaluation.paired import paired_bootstrap
from qirl_fast.tracking import Tracker, summary_table
from qirl_fast.trainer import Trainer
from qirl_fast.whole import write_text

GRID = 16  # prompts in a picture
PACKAGES = ("qirl_fast", "torch", "diffusers", "transformers", "peft", "numpy")


def before_evaluation(trainer: Trainer, run_dir: Path) -> Evaluation:
    """The untrained policy on the held-out prompts; kept in the run folder for resuming.

    Process 0 reads and writes it; what the others get is for nobody.
    """
    path, world = run_dir / "samples" / "before.npz", trainer.world
    ids = np.array([p.id for p in trainer.heldout])
    with world.agreed():
        kept = _kept(trainer, path, ids, run_dir) if world.rank == 0 else None
    if world.gather(kept is not None)[0]:
        return kept or Evaluation({}, [])
    with trainer.model.reference():
        before = trainer.evaluate_weights()
    if world.rank == 0:
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(".before.npz")
        arrays: dict[str, Any] = {f"score_{name}": values for name, values in before.scores.items()}
        arrays |= {f"image_{i}": image for i, image in enumerate(before.images)}
        np.savez(beside, prompts=ids, **arrays)
        beside.replace(path)
    return before


def _kept(trainer: Trainer, path: Path, ids: np.ndarray, run_dir: Path) -> Evaluation | None:
    """The evaluation in this file, of prompts of these ids; None without a file."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as saved:
        if not np.array_equal(saved["prompts"], ids):
            raise ConfigError(
                [
                    f"data.heldout: {trainer.cfg.data.heldout} has changed since {run_dir} was "
                    "begun, and before and after are compared on the same prompts; put the "
                    "file back, or start anew under run=NAME"
                ]
            )
        scores = {n.removeprefix("score_"): saved[n] for n in saved if n.startswith("score_")}
        # One array, in runs begun before images could differ in size.
        own = saved.get("images", ())
        images = list(own) or [saved[f"image_{i}"] for i in range(len(ids))]
        return Evaluation(scores, images)


def draw_samples(trainer: Trainer, run_dir: Path, update: int) -> None:
    """samples/step-N.png: before and now, the same prompts and seeds all through the run."""
    before, now = before_evaluation(trainer, run_dir), trainer.evaluate(GRID)
    if trainer.world.rank == 0:
        _grid(trainer, before, now, run_dir / "samples" / f"step-{update}.png", list(range(GRID)))


def write_report(
    trainer: Trainer, tracker: Tracker, run_dir: Path, before: Evaluation, after: Evaluation
) -> None:
    """Print the before -> after table; write summary.json and two pictures in samples/."""
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
    _grid(trainer, before, after, picture, order)
    curves = run_dir / "samples" / "rewards.png"
    console = Console()
    if judges:
        title = f"{run_dir.name}: {len(trainer.heldout)} held-out prompts"
        console.print(summary_table(judges, title))
    said = f"picture {picture}\nsummary {path}"
    if trainer.judges.names:
        reward_curves(_lines(run_dir, "metrics"), trainer.cfg.rewards, trainer.cfg.watch, curves)
        said += f"\ncurves  {curves}"
    console.print(said, highlight=False, soft_wrap=True)


def _grid(
    trainer: Trainer, before: Evaluation, after: Evaluation, path: Path, order: list[int]
) -> None:
    order = [i for i in order if i < len(after.images)]
    before_after_grid(
        [before.images[i] for i in order],
        [after.images[i] for i in order],
        [trainer.heldout[i].prompt for i in order],
        [(_shown(before, i), _shown(after, i)) for i in order],
        path,
        trainer.conditioning.sources([trainer.heldout[i] for i in order]),
    )


def _shown(evaluation: Evaluation, i: int) -> float:
    """A prompt's score by the first judge that has one; NaN without."""
    found = [float(scores[i]) for scores in evaluation.scores.values()]
    return next((score for score in found if np.isfinite(score)), float("nan"))


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
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"
