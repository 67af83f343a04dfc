"""A run's folder, read: finished, stopped half way, or written by an earlier version.

Only files of the folder are read: config.resolved.yaml, metrics.jsonl, timings.jsonl, summary.json
and samples/*.npz. What is missing is None or empty, and `notes` says in a sentence what that means;
what cannot be read is a RunError that says what came, what is wanted and how to mend it.

Shapes: U updates, P held-out prompts, H, W pixels.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from qirl_fast.evaluation.gridness import gridness

Floats = NDArray[np.float64]
Image_ = NDArray[np.uint8]
SETTINGS = "config.resolved.yaml"


class RunError(ValueError):
    """A folder of which no report can be made."""


@dataclass(frozen=True)
class Held:
    """One evaluation of the held-out prompts.

    scores: by judge float64 [P], NaN where it had nothing to judge. texts, categories: P each; a
    text is None where the file does not have it. update: after which it was taken.
    """

    path: Path
    ids: list[str]
    scores: dict[str, Floats]
    texts: list[str | None]
    categories: list[str | None]
    update: int

    def images(self, numbers: Iterable[int], name: str = "image") -> list[Image_ | None]:
        """Images uint8 [H, W, 3] of prompts of these numbers, None for one that has none; name:
        or "source".
        """
        with np.load(self.path, allow_pickle=False) as saved:
            if name == "image" and "images" in saved:  # an earlier version's
                return [saved["images"][i] for i in numbers]
            keys = [f"{name}_{i}" for i in numbers]
            return [saved.get(key) for key in keys]

    def gridness(self, count: int) -> Floats:
        """`evaluation.gridness` of the first images, `count` at most, as they were drawn."""
        with np.load(self.path, allow_pickle=False) as saved:
            if "gridness" in saved:
                return np.asarray(saved["gridness"][:count], np.float64)
        images = self.images(range(min(count, len(self.ids))))  # an earlier version's: whole
        return np.array([np.nan if image is None else gridness(image) for image in images])


@dataclass(frozen=True)
class Run:
    """What there is of a run. metrics, timings: a row for each of U updates, oldest first."""

    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    summary: dict[str, Any]
    before: Held | None
    after: Held | None
    strips: dict[int, list[Image_]]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the run calls itself."""
        return str(self.settings.get("run") or self.folder.resolve().name)

    @property
    def weights(self) -> dict[str, float]:
        """The optimised judges."""
        return dict(self.settings.get("rewards") or {})

    @property
    def judges(self) -> list[str]:
        """The optimised, then the watched."""
        return [*self.weights, *(self.settings.get("watch") or [])]

    @property
    def steps(self) -> int:
        """Updates that the recipe asks for."""
        return int((self.settings.get("train") or {}).get("steps") or 0)

    @property
    def done(self) -> int:
        """Updates that were made."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """All updates were made, and what follows them too."""
        return self.done >= self.steps and self.summary.get("steps", self.steps) == self.steps

    def column(self, name: str) -> Floats:
        """A metric [U], NaN where an update has none."""
        return column(self.metrics, name)

    def names(self) -> list[str]:
        """Of all metrics, in order of appearance."""
        return [n for n in dict.fromkeys(n for row in self.metrics for n in row) if n != "step"]

    def reward(self, held: Held) -> Floats:
        """Each held-out prompt's reward [P]: the judges' scores by its category's weights, over
        those that had something to judge; NaN without any.
        """
        judges = [name for name in self.weights if name in held.scores]
        if not judges:
            return np.full(len(held.ids), np.nan)
        own = self.settings.get("category_weights") or {}
        weights_PK = np.array(
            [[own.get(c, self.weights).get(n, 0.0) for n in judges] for c in held.categories]
        )
        scores_PK = np.stack([held.scores[name] for name in judges], axis=1)
        weights_PK = np.where(np.isfinite(scores_PK), weights_PK, 0.0)
        total_P = weights_PK.sum(1)
        sums_P = (weights_PK * np.nan_to_num(scores_PK)).sum(1)
        return np.where(total_P > 0, sums_P / np.where(total_P > 0, total_P, 1), np.nan)


def column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    """The values under a key, float64, NaN where a row has none."""
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises RunError."""
    wanted = f"wanted a run's folder, outputs/<run>, which holds {SETTINGS} and metrics.jsonl"
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing that is there"
        raise RunError(f"{folder}: got {what}; {wanted}")
    missing = [name for name in (SETTINGS, "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder}: got a folder without {' and '.join(missing)}; {wanted}")
    notes: list[str] = []
    metrics = _lines(folder / "metrics.jsonl", notes)
    timings = _lines(folder / "timings.jsonl", notes)
    done = int(metrics[-1]["step"]) if metrics else 0
    run = Run(
        folder,
        _settings(folder / SETTINGS),
        metrics,
        timings,
        _summary(folder / "summary.json"),
        _held(folder / "samples" / "before.npz", 0),
        _held(folder / "samples" / "after.npz", None),
        _strips(folder / "samples", done),
        notes,
    )
    _note(run)
    return run


def _note(run: Run) -> None:
    """What a reader has to know of a run that did not come to its end."""
    if not run.metrics:
        run.notes.append("No update was finished yet: there is nothing to draw curves of.")
    elif run.done < run.steps:
        run.notes.append(
            f"This run stopped, or is still running, at update {run.done} of {run.steps}. What "
            "there is of it is shown; resume=auto goes on with it."
        )
    taken = run.after.update if run.after else run.summary.get("steps")
    if taken is not None and run.steps and taken != run.steps:
        run.notes.append(
            f"Held-out results are those of update {taken}, when the run ended the first time."
        )
    elif taken is None and run.metrics and run.done >= run.steps:
        run.notes.append("All updates were made, and the evaluation after them was not finished.")
    if run.judges and run.summary and not run.after:
        run.notes.append(
            "This run has no samples/after.npz (an earlier version made it), so what it drew at "
            "the end is not shown."
        )


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # of a YAML library, in many kinds
        raise RunError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: got {type(found).__name__}; wanted settings by name")
    return {str(key): value for key, value in found.items()}


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); remove it, and resume the run") from error
    return found if isinstance(found, dict) else {}


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, none without the file; a last one cut short is left out."""
    if not path.exists():
        notes.append(f"There is no {path.name}.")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                notes.append(f"The last line of {path.name} was cut short, and is left out.")
                break
            raise RunError(
                f"{path}:{number}: got {line[:60]!r} ({error}); wanted a JSON object with a step; "
                "resume=auto cuts the file back to the newest checkpoint"
            ) from error
        rows.append(row)
    return rows


def _held(path: Path, update: int | None) -> Held | None:
    """An evaluation; update: after which it was taken, None: as it says itself."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            ids = [str(each) for each in saved["prompts"]]
            none: list[dict[str, Any]] = [{}] * len(ids)
            rows = json.loads(saved["rows"].tobytes()) if "rows" in saved else none
            return Held(
                path,
                ids,
                {n.removeprefix("score_"): saved[n] for n in saved if n.startswith("score_")},
                [row.get("prompt") for row in rows],
                [row.get("category") for row in rows],
                int(saved["update"]) if update is None else update,
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and resume") from error


def _strips(folder: Path, done: int) -> dict[int, list[Image_]]:
    """Images by update, ascending; those of updates that were undone since are left out."""
    found: dict[int, list[Image_]] = {}
    for path in folder.glob("strip-*.npz"):
        match = re.fullmatch(r"strip-(\d+)\.npz", path.name)
        if match is None or int(match[1]) > done:
            continue
        try:
            with np.load(path, allow_pickle=False) as saved:
                count = sum(name.startswith("image_") for name in saved)
                found[int(match[1])] = [saved[f"image_{i}"] for i in range(count)]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise RunError(f"{path}: cannot be read ({error}); remove it") from error
    return dict(sorted(found.items()))
