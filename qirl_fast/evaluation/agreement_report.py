"""The tree of agreement.py as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qirl_fast.evaluation.agreement_groups import AGREEMENT, REPEATS, TOP_LABEL

HEADS = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "pairwise_accuracy": "pairs",
    "pairwise_accuracy_within_prompt": "pairs of a prompt",
    "mean_error": "mean error",
    "rmse": "RMSE",
    "ece": "ECE",
    "icc": "ICC(1,1)",
    "within_sd": "sd of a row",
    "flips": "flips",
    "flips_within_prompt": "flips of a prompt",
    "overconfidence": "overconfidence",
}
LEGEND = """\
Value [low, high]: {level:.0%} percentile interval over {n_boot} resamples of the prompts, seed
{seed}; with fewer than about 20 prompts such intervals are too narrow. "all dimensions" is the mean over
dimensions. Pairs: share of pairs of different truth that are put in the right order, 1/2 for a tie.
Mean error: predicted less truth, in score units, as RMSE and ECE (expected calibration error). ECE
is never negative and chance raises it, more so in its resamples: compare it with the ECE in
brackets, which chance alone gives a judge without any; its interval leans upwards.
"""
LONGEST = 28  # characters of a name in the picture
POINTS = 3000  # drawn points of a dimension; more are a blot and a slow file


def table(tree: Mapping[str, Any]) -> str:
    """Markdown: agreement, calibration curves, repeats, top label, and why a number is missing."""
    lines = ["# Agreement with people", "", *LEGEND.format(**tree).splitlines(), ""]
    groups = list(_groups(tree))
    lines += _table(AGREEMENT, [(name, group) for name, group in groups])
    for key, statistics, title in (
        ("repeats", REPEATS, "Repeated judgements of the same image"),
        ("top_label", TOP_LABEL, "Likeliest score: is its probability how often it is right?"),
    ):
        found = [(name, group[key]) for name, group in groups if group[key]["n"]]
        lines += [f"## {title}", "", *(_table(statistics, found) if found else ["No data.", ""])]
    lines += [
        "## Calibration",
        "",
        "| rows of | n | mean predicted | mean truth |",
        "|---|--:|--:|--:|",
    ]
    for name, group in tree["dimensions"].items():
        for b in group["calibration"]:
            cell = _cell({"value": b["truth"]} | b)
            lines.append(f"| {_plain(name)} | {b['n']} | {b['predicted']:.3f} | {cell} |")
    reasons = list(_reasons(groups))
    return "\n".join([*lines, *(["", "## Missing numbers", "", *reasons] if reasons else []), ""])


def _groups(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "all dimensions", tree["overall"]
    for dimension, group in tree["dimensions"].items():
        yield dimension, group
        for category, part in group["categories"].items():
            yield f"{dimension}: {category}", part


def _table(names: Sequence[str], groups: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A row per group; prompts stand where the group has a count of them."""
    heads = ["rows of", "n", *(HEADS[name] for name in names)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for label, group in groups:
        prompts = f" of {group['clusters']} prompts" if "clusters" in group else ""
        cells = [_plain(label), f"{group['n']}{prompts}", *(_cell(group[name]) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    interval = " [-]" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    chance = f" ({found['by_chance']:.3f})" if found.get("by_chance") is not None else ""
    return f"{found['value']:.3f}{interval}{chance}"


def _plain(text: str) -> str:
    """A name that cannot break the table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _reasons(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    for label, group in groups:
        for part in (group, group["repeats"], group["top_label"]):
            if part is not group and not part["n"]:
                continue
            for name, found in part.items():
                if isinstance(found, dict) and "reason" in found:
                    yield f"- {_plain(label)}, {HEADS[name]}: {found['reason']}"


def draw(tree: Mapping[str, Any], points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """One line of two panels per dimension: predicted against truth with the calibration curve, and
    Spearman and pairwise accuracy within prompts by category. points: (predicted, truth) of each.
    """
    dimensions = tree["dimensions"]
    heights = [max(4.2, 1.6 + 0.42 * len(g["categories"])) for g in dimensions.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(dimensions), 2, squeeze=False, height_ratios=heights, width_ratios=[4, 6]
    )
    for (name, group), (left, right) in zip(dimensions.items(), axes, strict=True):
        _draw_calibration(left, name, group, points[name])
        _draw_categories(right, name, group)
    return figure


def _draw_calibration(
    axes: Axes, name: str, group: Mapping[str, Any], points: Sequence[tuple[float, float]]
) -> None:
    shown = np.array(points[:: max(1, len(points) // POINTS)])
    axes.plot([1, 5], [1, 5], color="0.6", lw=1, zorder=1)
    axes.scatter(shown[:, 0], shown[:, 1], s=9, alpha=0.25, lw=0, color="tab:blue", zorder=2)
    bins = group["calibration"]
    x, y = ([b[key] for b in bins] for key in ("predicted", "truth"))
    axes.plot(x, y, "o-", color="tab:red", ms=4, zorder=4, label="mean truth of a bin")
    known = [b for b in bins if b["low"] is not None]
    if known:
        at, low, high = (np.array([b[k] for b in known]) for k in ("predicted", "low", "high"))
        axes.vlines(at, low, high, color="tab:red", lw=1.5, zorder=3)
    axes.set(xlim=(0.9, 5.1), ylim=(0.9, 5.1), aspect="equal", xlabel="predicted", ylabel="truth")
    axes.set_title(_short(name), parse_math=False)
    axes.text(
        0.03,
        0.97,
        f"n = {group['n']} of {group['clusters']} prompts\nECE {_cell(group['ece'])}",
        transform=axes.transAxes,
        va="top",
        fontsize=8,
    )
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _draw_categories(axes: Axes, name: str, group: Mapping[str, Any]) -> None:
    groups = {"all": group, **{_short(c): g for c, g in group["categories"].items()}}
    labels = [f"{label} ({g['n']})" for label, g in groups.items()]
    for shift, key, color, label in (
        (-0.13, "spearman", "tab:blue", "Spearman"),
        (0.13, "pairwise_accuracy_within_prompt", "tab:orange", "pairs of a prompt in order"),
    ):
        rows = [(place + shift, g[key]) for place, g in enumerate(groups.values())]
        rows = [(place, found) for place, found in rows if found["value"] is not None]
        axes.plot(
            [f["value"] for _, f in rows], [p for p, _ in rows], "o", color=color, label=label
        )
        for place, found in rows:
            if found["low"] is not None:
                axes.hlines(place, found["low"], found["high"], color=color, lw=2)
    axes.axvline(0, color="0.6", lw=1)
    axes.axvline(0.5, color="tab:orange", lw=1, ls=":")
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(min(-0.05, axes.get_xlim()[0]), 1.02)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("dotted: pairs put in order by chance", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8, frameon=False)


def _short(name: str) -> str:
    plain = " ".join(name.split())
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}..."
