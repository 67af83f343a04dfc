"""The numbers of one group of judged rows, each with its interval or the reason it has none.

Statistics come from agreement_stats.py as draws [S]: the data themselves first, then R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qirl_fast.evaluation.agreement_stats import (
    Calibration,
    Draws,
    Floats,
    Ints,
    Rows,
    correlations,
    different_pairs,
    errors,
    repeat_agreement,
)
from qirl_fast.evaluation.bootstrap import percentiles, resamples
from qirl_fast.evaluation.judged import Judged

LEVEL = 0.95
MIN_ROWS = 3
MAX_UNDEFINED = 0.05  # share of resamples

AGREEMENT = (
    "pearson",
    "spearman",
    "kendall",
    "pairwise_accuracy",
    "pairwise_accuracy_within_prompt",
    "mean_error",
    "rmse",
    "ece",
)
REPEATS = ("icc", "within_sd", "flips", "flips_within_prompt")
TOP_LABEL = ("overconfidence", "ece")


@dataclass(frozen=True)
class Part:
    """Statistics of n rows in some clusters, and what to say of one that is undefined."""

    n: int
    clusters: int
    draws: Draws
    reasons: Mapping[str, str]
    calibration: Calibration | None = None

    def tree(self) -> dict[str, Any]:
        """{"n", name: statistic, ..., "calibration": bins, where there is a curve}."""
        tree: dict[str, Any] = {"n": self.n}
        for name, draws in self.draws.items():
            tree[name] = self._statistic(draws, self.reasons[name])
        if "ece" in self.draws:
            tree["calibration"] = self._curve(self.calibration) if self.calibration else []
        if self.calibration:
            tree["ece"]["by_chance"] = self.calibration.by_chance if self.clusters > 1 else None
        return tree

    def _curve(self, curve: Calibration) -> list[dict[str, Any]]:
        columns = zip(curve.n, curve.predicted, curve.truth, curve.truth_draws.T, strict=True)
        return [
            {"n": int(n), "predicted": float(predicted), "truth": float(truth)}
            | self._interval(draws)
            for n, predicted, truth, draws in columns
        ]

    def _statistic(self, draws: Floats, reason: str) -> dict[str, Any]:
        if math.isnan(draws[0]):
            return {"value": None, "low": None, "high": None, "undefined": None, "reason": reason}
        return {"value": float(draws[0])} | self._interval(draws[1:])

    def _interval(self, draws: Floats) -> dict[str, Any]:
        undefined = int(np.isnan(draws).sum())
        if self.clusters > 1 and undefined <= MAX_UNDEFINED * len(draws):
            low, high = percentiles(draws[~np.isnan(draws)], LEVEL)
            return {"low": low, "high": high, "undefined": undefined}
        why = f"undefined on {undefined} of {len(draws)} resamples: too few prompts"
        if self.clusters < 2:
            why = "all rows are of one prompt: there is nothing to resample"
        return {"low": None, "high": None, "undefined": undefined, "reason": why}


def group_tree(items: Sequence[Judged], n_boot: int, seed: int) -> dict[str, Any]:
    """The group of agreement.py's docstring, without its categories. items: n >= 1, sorted."""
    names, cluster = _clusters(items)
    main, repeats, top = _parts(items, names, _counts(len(names), n_boot, seed))
    pairs = dict(zip(("all", "within_prompt"), different_pairs(_rows(items, cluster)), strict=True))
    sizes = {"n": len(items), "clusters": len(names), "pairs": pairs}
    return sizes | main.tree() | {"repeats": repeats.tree(), "top_label": top.tree()}


def overall_tree(
    dimensions: Mapping[str, Sequence[Judged]], n_boot: int, seed: int
) -> dict[str, Any]:
    """The mean over dimensions of each statistic, prompts resampled for all of them together."""
    names, _ = _clusters([item for items in dimensions.values() for item in items])
    counts = _counts(len(names), n_boot, seed)
    parts = {name: _parts(items, names, counts) for name, items in dimensions.items()}
    main, repeats, top = (
        _mean({name: found[k] for name, found in parts.items()}, len(names)) for k in range(3)
    )
    tree = {"clusters": len(names)} | main.tree()
    return tree | {"repeats": repeats.tree(), "top_label": top.tree()}


def _mean(parts: Mapping[str, Part], clusters: int) -> Part:
    draws, reasons = {}, {}
    for name in next(iter(parts.values())).draws:
        draws[name] = np.mean([part.draws[name] for part in parts.values()], axis=0)
        lacking = [d for d, part in parts.items() if math.isnan(part.draws[name][0])]
        reasons[name] = f"undefined in dimension {', '.join(lacking)}"
    return Part(sum(part.n for part in parts.values()), clusters, draws, reasons)


def _clusters(items: Sequence[Judged]) -> tuple[list[str], Ints]:
    """The clusters' names, sorted, and each item's place among them, int64 [n]."""
    names = sorted({item.cluster for item in items})
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[item.cluster] for item in items], np.int64)


def _counts(n_clusters: int, n_boot: int, seed: int) -> Floats:
    """A row of ones for the data themselves, then the resamples: float64 [1 + n_boot, C]."""
    return np.concatenate([np.ones((1, n_clusters)), *resamples(n_clusters, n_boot, seed)])


def _rows(items: Sequence[Judged], cluster: Ints) -> Rows:
    truth, predicted = ([getattr(i, name) for i in items] for name in ("truth", "predicted"))
    return Rows(np.array(truth, np.float64), np.array(predicted, np.float64), cluster)


def _parts(items: Sequence[Judged], names: list[str], counts: Floats) -> tuple[Part, Part, Part]:
    """Agreement, repeats and top label. counts: [S, C], columns as names, which hold the items'."""
    columns = {name: place for place, name in enumerate(names)}
    found = []
    for make, members, few, statistics in (
        (_agreement, items, "rows", AGREEMENT),
        (_repeats, [i for i in items if len(i.repeats) > 1], "rows judged twice or more", REPEATS),
        (_top_label, [i for i in items if i.probs is not None], "rows with probs", TOP_LABEL),
    ):
        own, cluster = _clusters(members)
        if len(members) < MIN_ROWS:
            why = f"{MIN_ROWS} {few} are needed, got {len(members)}"
            nothing = np.full(len(counts), np.nan)
            draws, reasons = dict.fromkeys(statistics, nothing), dict.fromkeys(statistics, why)
            found.append(Part(len(members), len(own), draws, reasons))
        else:
            found.append(make(members, cluster, counts[:, [columns[name] for name in own]]))
    return found[0], found[1], found[2]


def _agreement(items: Sequence[Judged], cluster: Ints, counts: Floats) -> Part:
    rows = _rows(items, cluster)
    draws = correlations(rows, counts)
    error_draws, curve = errors(rows, counts)
    constant = [
        f"every {what} is {values[0]:g}"
        for what, values in (("truth", rows.truth), ("prediction", rows.predicted))
        if (values == values[0]).all()
    ]
    reasons = dict.fromkeys(AGREEMENT, " and ".join(constant))
    reasons["pairwise_accuracy"] = "no two rows have different truths"
    reasons["pairwise_accuracy_within_prompt"] = "no prompt has two rows of different truth"
    return Part(len(items), counts.shape[1], draws | error_draws, reasons, curve)


def _repeats(items: Sequence[Judged], cluster: Ints, counts: Floats) -> Part:
    reasons = {
        "icc": "all judgements of all rows are equal",
        "within_sd": "no row was judged twice",
        "flips": "no judgement puts two rows in an order",
        "flips_within_prompt": "no judgement puts two rows of one prompt in an order",
    }
    draws = repeat_agreement([item.repeats for item in items], cluster, counts)
    return Part(len(items), counts.shape[1], draws, reasons)


def _top_label(items: Sequence[Judged], cluster: Ints, counts: Floats) -> Part:
    """The likeliest score (the lower of two equal ones) is right where the truth rounds to it; a
    truth half-way between two scores makes either half right.
    """
    probs = np.array([item.probs for item in items], np.float64)
    away = np.abs(np.array([item.truth for item in items]) - (probs.argmax(axis=1) + 1))
    right = np.where(away < 0.5, 1.0, np.where(away == 0.5, 0.5, 0.0))
    found, curve = errors(Rows(right, probs.max(axis=1), cluster), counts)
    draws = {"overconfidence": found["mean_error"], "ece": found["ece"]}
    return Part(len(items), counts.shape[1], draws, dict.fromkeys(TOP_LABEL, ""), curve)
