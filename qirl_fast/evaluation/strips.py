"""Pictures of a curation: the histogram of ranges, and strips of example prompts' samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from qirl_fast.evaluation.curation import KEPT, VERDICTS, Decision
from qirl_fast.evaluation.grid import FONT, FONT_SIZE, GAP, INK, TEXT_WIDTH, WHITE, enlarge, wrap

SIDE = 128  # of a drawn image, pixels
SHOWN = 10  # most samples of a strip
BINS = 30
COLORS = dict(zip(VERDICTS, ("#2a7f3f", "#9a9a9a", "#b03030", "#3060b0", "#d09020"), strict=True))


def histogram(decision: Decision, path: str | os.PathLike[str]) -> Path:
    """Draw the ranges by verdict with the threshold, and range against mean reward, as PNG.

    Failed prompts have no range and are not drawn; their number stands in the legend.
    """
    verdicts = np.array(decision.verdicts)
    whole = ~np.isnan(decision.range)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, max(float(decision.range[whole].max()), 1e-9), BINS + 1)
    groups = [v for v in VERDICTS if (verdicts == v).any()]
    drawn = [verdicts == v for v in groups]
    labels = [f"{v} ({int((verdicts == v).sum())})" for v in groups]
    colors = [COLORS[v] for v in groups]
    values = [decision.range[mask & whole] for mask in drawn]
    left.hist(values, edges, stacked=True, color=colors, label=labels)
    left.axvline(decision.threshold, color="black", linestyle="--", label="threshold")
    left.set(xlabel="range of the group, in standard deviations", ylabel="prompts")
    left.legend()
    for mask, color in zip(drawn, colors, strict=True):
        both = mask & whole
        right.scatter(decision.reward[both].mean(1), decision.range[both], 12, color)
    right.axhline(decision.threshold, color="black", linestyle="--")
    right.set(xlabel="mean reward of the group", ylabel="range")
    path = Path(path)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(path)
    return path


def examples(decision: Decision, each: int = 4) -> dict[str, list[int]]:
    """Prompts to show by heading: those kept of the widest and the least range, and of each other
    verdict the `each` whose ranges lie evenly spread.
    """
    verdicts = np.array(decision.verdicts)
    found: dict[str, list[int]] = {}
    for verdict in VERDICTS[:-1]:  # a failed one has no range
        own = np.flatnonzero(verdicts == verdict)
        own = own[np.argsort(decision.range[own], kind="stable")]
        if verdict == KEPT:
            half = min(each, (len(own) + 1) // 2)
            found["kept, widest range"] = own[::-1][:half].tolist()
            found["kept, least range"] = own[: min(each, len(own) - half)].tolist()
        else:
            spread = np.unique(np.linspace(0, len(own) - 1, each).round().astype(int))
            found[f"dropped: {verdict}"] = own[spread].tolist() if len(own) else []
    return {heading: prompts for heading, prompts in found.items() if prompts}


@dataclass(frozen=True)
class Strip:
    """One prompt's samples: uint8 [n, H, W, 3], a reward each, and what is written beside them."""

    text: str
    images: np.ndarray
    rewards: Sequence[float]


def strips(groups: dict[str, list[Strip]], path: str | os.PathLike[str]) -> Path:
    """Draw strips under their headings as PNG, each from its best sample to its worst.

    Of more than SHOWN samples as many are drawn, evenly by rank. One strip or more.
    """
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    most = max(min(SHOWN, len(s.rewards)) for group in groups.values() for s in group)
    row_height, heading_height = SIDE + 2 * GAP + FONT_SIZE, 3 * GAP
    rows = sum(len(group) for group in groups.values())
    size = (
        TEXT_WIDTH + 2 * GAP + most * (SIDE + GAP),
        GAP + rows * row_height + len(groups) * heading_height,
    )
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for heading, group in groups.items():
        draw.text((GAP, top + GAP / 2), heading, INK, font.font_variant(size=FONT_SIZE + 6))
        top += heading_height
        for strip in group:
            draw.multiline_text((GAP, top), wrap(strip.text, font), INK, font, spacing=5)
            order = np.argsort(-np.asarray(strip.rewards), kind="stable")
            shown = order[
                np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)
            ]
            for column, i in enumerate(shown.tolist()):
                x = TEXT_WIDTH + 2 * GAP + column * (SIDE + GAP)
                canvas.paste(enlarge(strip.images[i], SIDE), (x, top))
                spot = (x + SIDE / 2, top + SIDE + GAP / 2 + FONT_SIZE / 2)
                draw.text(spot, f"{strip.rewards[i]:.2f}", INK, font, anchor="mm")
            top += row_height
    path = Path(path)
    beside = path.with_name(f".{path.name}")
    canvas.save(beside, format="PNG", optimize=True)
    beside.replace(path)
    return path
