"""Every judge's score through a run, those optimised beside those only watched.

A reward that rises while the watched ones stay or fall is a reward that is being gamed, and this
picture is where it is seen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

WIDTH, HEIGHT, COLUMNS = 4.2, 2.6, 3  # inches of a panel, panels in a row
SMOOTH = 20  # updates in the running mean of a long run, at most a tenth of it
OPTIMISED, WATCHED = "tab:blue", "tab:orange"


def reward_curves(
    rows: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
    watched: Sequence[str],
    path: str | os.PathLike[str],
) -> Path:
    """Draw the curves as PNG and return its path.

    rows: of metrics.jsonl. weights: the optimised judges. Each judge has a panel: the mean over the
    rollout of every update, pale, its running mean, the in-group standard deviation around it, and
    the held-out means where the run took any. An update without a score leaves a gap.
    """
    from matplotlib.figure import Figure

    names = [*weights, *watched]
    columns = min(COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        optimised = name in weights
        role = f"optimised, weight {weights[name]:.2g}" if optimised else "watched"
        axes.set_title(f"{name}  ({role})", fontsize=9, loc="left")
        _panel(axes, rows, name, OPTIMISED if optimised else WATCHED)
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    with matplotlib.rc_context({"font.size": 8}):
        figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
    return path


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    step = np.array([row["step"] for row in rows])
    mean, spread = (
        np.array([row.get(f"{what}/{name}", np.nan) for row in rows], np.float64)
        for what in ("reward", "std")
    )
    smooth = running_mean(mean, max(1, min(SMOOTH, len(rows) // 10)))
    axes.plot(step, mean, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(step, smooth, color=color, linewidth=1.6, label="rollout")
    axes.fill_between(
        step, smooth - spread, smooth + spread, color=color, alpha=0.1, label="in-group std"
    )
    points = [(row["step"], row[f"heldout/{name}"]) for row in rows if f"heldout/{name}" in row]
    if points:
        axes.plot(*zip(*points, strict=True), "k.", markersize=5, label="held out")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("update", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` numbers at each place [n], of those there are; NaN where none is."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    count = counts[ends] - counts[starts]
    total = sums[ends] - sums[starts]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
