"""A calibration for people: the weights as YAML with their reasons, and the correlations drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from qirl_fast.evaluation.calibration import Weight

COLUMNS = 4


@dataclass(frozen=True)
class Proposal:
    """One category (None: prompts without one): its judges' weights in order, or why there are
    none, in which case the recipe's stay.
    """

    category: str | None
    prompts: int
    weights: Sequence[Weight]
    kept: str = ""


def rounded(weights: Sequence[float], digits: int = 4) -> list[float]:
    """The weights, which sum to 1, rounded so that they still do: the largest takes the rest."""
    short = [round(w, digits) for w in weights]
    largest = max(range(len(short)), key=short.__getitem__)
    short[largest] = round(short[largest] + 1 - sum(short), digits)
    return short


def recipe_yaml(
    recipe: Mapping[str, Any], proposals: Sequence[Proposal], names: Sequence[str], head: str
) -> str:
    """The recipe with the proposals for its weights, which stand first, as YAML with comments.

    recipe: plain, without `category_weights`; names: of its rewards, in the order of the weights.
    head: comment lines. A proposal without weights leaves the recipe's, and a comment says so.
    """
    lines = [head]
    tagged = [p for p in proposals if p.category is not None]
    made = [p for p in tagged if not p.kept]
    lines.append("category_weights:" if made else "category_weights: {}")
    for proposal in made:
        name = json.dumps(proposal.category, ensure_ascii=False)
        lines += [f"  {name}:  # {proposal.prompts} prompts", *_table(proposal, names, "    ")]
    for proposal in proposals:
        if proposal.kept:
            lines.append(f"# {_called(proposal)}: {_one_line(proposal.kept)}")
    rest = dict(recipe)
    for proposal in proposals:
        if proposal.category is None and not proposal.kept:
            del rest["rewards"]
            lines += [f"rewards:  # of {_called(proposal)}", *_table(proposal, names, "  ")]
    return "\n".join([*lines, "", OmegaConf.to_yaml(OmegaConf.create(rest))])


def _called(proposal: Proposal) -> str:
    name = "no category" if proposal.category is None else repr(proposal.category)
    return f"{name}, {proposal.prompts} prompts"


def _table(proposal: Proposal, names: Sequence[str], indent: str) -> list[str]:
    numbers = rounded([w.weight for w in proposal.weights])
    return [
        f"{indent}{json.dumps(name)}: {number:.4f}  # {_one_line(weight.reason)}"
        for name, number, weight in zip(names, numbers, proposal.weights, strict=True)
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def heat_map(
    tables: Mapping[str, np.ndarray], names: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Draw correlation matrices [K, K], one a panel by its title, as PNG; NaN is grey."""
    count = len(tables)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    side = 1.3 + 0.75 * len(names)
    figure = Figure(figsize=(columns * side + 1, rows * side), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.set_axis_off()
    image = None
    for panel, (title, table) in zip(panels, tables.items(), strict=False):
        image = panel.imshow(np.ma.masked_invalid(table), cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_facecolor("lightgrey")
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        for (i, j), value in np.ndenumerate(table):
            text = "-" if np.isnan(value) else f"{value:.2f}"
            color = "white" if abs(value) > 0.7 else "black"
            panel.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    assert image is not None, "at least one table"
    figure.colorbar(image, ax=panels.tolist(), shrink=0.7, label="correlation inside groups")
    path = Path(path)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(path)
    return path
