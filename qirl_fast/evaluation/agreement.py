"""How well a judge agrees with people, on held-out data, with intervals: JSON, a table and a plot.

Per dimension and per category of a dimension: Pearson, Spearman, Kendall tau-b, pairwise accuracy
over all pairs and over pairs of images of one prompt (the only ones GRPO compares), mean error,
RMSE, calibration curve and expected calibration error, agreement of repeated judgements, and the
calibration of the likeliest score. agreement_stats.py has the formulas.

Each number stands with a bootstrap percentile interval: prompts are resampled, not rows, as several
images of a prompt are not independent. Every dimension and category is resampled on its own, so
its numbers do not depend on what else is in the data, nor on the order of the rows. `overall` is
the mean over dimensions, not the pooled rows (whose correlation would also hold the differences
between dimensions), with the prompts resampled for all dimensions together.

A number that is undefined is null with a reason. A resample on which it is undefined is left out of
the interval and counted; with more than a twentieth of them the interval is null too.

validation.json: {"n", "n_boot", "seed", "level", "overall", "dimensions": {name: group}}; a group:
{"n", "clusters", "pairs": {"all", "within_prompt"}, STATISTIC..., "calibration": [bin...],
"repeats", "top_label"}, a dimension's also with "categories": {name: group} and
"without_category": rows. `overall` has no pairs and an empty curve.
STATISTIC: {"value", "low", "high", "undefined": resamples, "reason": only where one is null}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qirl_fast.evaluation.agreement_groups import LEVEL, group_tree, overall_tree
from qirl_fast.evaluation.agreement_report import draw, table
from qirl_fast.evaluation.judged import Judged, sort_key, what_is_wrong

__all__ = ["Judged", "write_validation"]


def write_validation(
    items: Sequence[Judged], folder: Path, *, n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Write validation.json, .md and .png into the folder and return the JSON tree.

    n_boot: at least 100 resamples. Equal items and seeds give equal files, whatever the order of
    the items. The folder is made if need be; each file appears whole or not at all. Raises
    ValueError naming the item (counted from 0) and what is wrong with it, before anything is
    written.
    """
    _check(items, folder, n_boot, seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = sorted(items, key=sort_key)
    dimensions = _split(items, lambda item: item.dimension)
    tree: dict[str, Any] = {"n": len(items), "n_boot": n_boot, "seed": seed, "level": LEVEL}
    tree["overall"] = overall_tree(dimensions, n_boot, seed)
    tree["dimensions"] = {}
    for name, members in dimensions.items():
        group = group_tree(members, n_boot, seed)
        categories = _split(members, lambda item: item.category)
        group["categories"] = {c: group_tree(rows, n_boot, seed) for c, rows in categories.items()}
        group["without_category"] = sum(item.category is None for item in members)
        tree["dimensions"][name] = group
    figure = draw(tree, {d: [(i.predicted, i.truth) for i in m] for d, m in dimensions.items()})
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    _write(folder / "validation.png", lambda path: figure.savefig(path, format="png", dpi=120))
    _write(folder / "validation.md", lambda path: path.write_text(table(tree), encoding="utf-8"))
    _write(folder / "validation.json", lambda path: path.write_text(text, encoding="utf-8"))
    return tree


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    write(beside)
    beside.replace(path)


def _check(items: Sequence[Judged], folder: Path, n_boot: int, seed: int) -> None:
    if not items:
        raise ValueError("got no judged items; wanted at least one: is the held-out split empty?")
    if n_boot < 100 or seed < 0:
        raise ValueError(f"got n_boot {n_boot}, seed {seed}; wanted n_boot >= 100 and seed >= 0")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write validation.* into")
    for index, item in enumerate(items):
        wrong = what_is_wrong(item)
        if wrong:
            raise ValueError(f"item {index} (dimension {item.dimension!r}): {wrong}")


def _split(
    items: Sequence[Judged], name: Callable[[Judged], str | None]
) -> dict[str, list[Judged]]:
    """Items by name, in the names' order; those named None are left out."""
    groups: dict[str, list[Judged]] = {}
    for item in items:
        key = name(item)
        if key is not None:
            groups.setdefault(key, []).append(item)
    return dict(sorted(groups.items()))
