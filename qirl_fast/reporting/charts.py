"""Curves as small SVG pictures: crisp at any width, coloured by the page's style sheet.

A chart is drawn WIDTH x HEIGHT units large and scales with its column; colours are the classes c0
to c7, which the page defines for light and dark. Long series are thinned to the least and the most
of each of BINS parts, so that a single peak stays to be seen.

Shapes: n points of a series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qirl_fast.reporting.markup import esc

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 8, 32  # of the plot's edges, from the picture's
BINS = 150
COLORS = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A series: y [n] over x [n] ascending, NaN a gap; spread [n]: a band of y - to y + it.

    color: a number, of COLORS. kind: "pale" for a thin line behind another, "dots" for points.
    """

    name: str
    x: Floats
    y: Floats
    color: int = 0
    kind: Literal["line", "pale", "dots"] = "line"
    spread: Floats | None = None


@dataclass(frozen=True)
class _Scale:
    """From values to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def points(self, x: Floats, y: Floats) -> str:
        pairs = zip(x.tolist(), y.tolist(), strict=True)
        return " ".join(f"{self.across(a):.1f},{self.down(b):.1f}" for a, b in pairs)


def chart(title: str, lines: Sequence[Line], x_label: str = "update", note: str = "") -> str:
    """A figure of curves, with a legend where there are several; note: a sentence below the title.

    An empty text where no series has a value.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    whole = [_edges(line) for line in lines]
    scale = _Scale(
        _range([line.x[np.isfinite(line.y)] for line in lines]),
        _range([edge for edges in whole for edge in edges], room=0.04),
    )
    shapes = [band for line in lines for band in _band(line, scale)]
    shapes += [_curve(line, scale) for line in lines]
    shown = [line for line in lines if line.kind != "pale"]
    return _figure(title, note, scale, shapes, [(n.name, n.color) for n in shown], x_label)


def stack(title: str, x: Floats, parts: Mapping[str, Floats], x_label: str = "update") -> str:
    """A figure of parts [n] of a sum over x [n], one on the other, the first undermost.

    Long series show the means of BINS neighbourhoods. An empty text without values.
    """
    if not len(x) or not parts:
        return ""
    blocks = np.array_split(np.arange(len(x)), min(BINS, len(x)))
    places = np.array([x[block].mean() for block in blocks])
    means = np.array([[np.nan_to_num(p[b]).mean() for b in blocks] for p in parts.values()])
    tops = np.cumsum(means, axis=0)
    scale = _Scale(_range([places]), _range([tops[-1], np.zeros(1)], room=0.04, floor=0.0))
    shapes = []
    for i, top in enumerate(tops):
        floor = tops[i - 1] if i else np.zeros_like(top)
        points = scale.points(np.concatenate([places, places[::-1]]), np.append(top, floor[::-1]))
        shapes.append(f'<polygon class="area c{i % COLORS}" points="{points}"/>')
    legend = [(name, i % COLORS) for i, name in enumerate(parts)]
    return _figure(title, "", scale, shapes, legend, x_label)


def interval(low: float, value: float, high: float, reach: float) -> str:
    """A bar for the interval and a dot for the value on an axis of -reach to reach."""
    a, b, c = (60 + 56 * v / reach if reach else 60.0 for v in (low, value, high))
    kind = "up" if low > 0 else "down" if high < 0 else "even"
    return (
        '<svg class="interval" viewBox="0 0 120 16" role="img" aria-label="interval">'
        '<line class="axis" x1="60" x2="60" y1="0" y2="16"/>'
        f'<line class="{kind}" x1="{a:.1f}" x2="{c:.1f}" y1="8" y2="8"/>'
        f'<circle class="{kind}" cx="{b:.1f}" cy="8" r="3.5"/></svg>'
    )


def thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most 2 BINS points of x, y [n] without gaps: the least and the most y of each part."""
    if len(x) <= 2 * BINS:
        return x, y
    kept = []
    for block in np.array_split(np.arange(len(x)), BINS):
        kept += sorted({int(block[y[block].argmin()]), int(block[y[block].argmax()])})
    return x[kept], y[kept]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high, about `count`; low < high."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [k * step for k in range(first, first + 2 * count + 2)]
    return [value for value in found if value <= high + 1e-9 * (high - low)]


def number(value: float) -> str:
    """A number of three or so digits, of no more characters than fit beside a chart."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2g}"
    if 0 < size < 1e-2 and len(f"{value:.4g}") > 7:
        return f"{value * 1e3:.4g}e-3"
    for bound, name in ((1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e6 if name == 'M' else 1e3):.4g}{name}"
    return f"{value:.4g}"


def _range(
    values: Sequence[ArrayLike], room: float = 0.0, floor: float | None = None
) -> tuple[float, float]:
    """Least and most of all finite values, something apart, with room as a share of that."""
    every = np.concatenate([np.asarray(v, np.float64).ravel() for v in values])
    every = every[np.isfinite(every)]
    low, high = float(every.min()), float(every.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        apart = abs(high) * 0.05 or 1.0
        return (low, high + apart) if low == 0 else (low - apart, high + apart)
    margin = room * (high - low)
    return (low - margin if floor is None else floor), high + margin


def _edges(line: Line) -> list[Floats]:
    return [line.y] if line.spread is None else [line.y, line.y - line.spread, line.y + line.spread]


def _band(line: Line, scale: _Scale) -> list[str]:
    if line.spread is None:
        return []
    known = np.isfinite(line.y) & np.isfinite(line.spread)
    x, y, spread = line.x[known], line.y[known], line.spread[known]
    blocks = np.array_split(np.arange(len(x)), min(BINS, len(x))) if len(x) else []
    x, y, spread = (np.array([v[b].mean() for b in blocks]) for v in (x, y, spread))
    if len(x) < 2:
        return []
    points = scale.points(np.append(x, x[::-1]), np.append(y + spread, (y - spread)[::-1]))
    return [f'<polygon class="band c{line.color % COLORS}" points="{points}"/>']


def _curve(line: Line, scale: _Scale) -> str:
    color = f"c{line.color % COLORS}"
    known = np.isfinite(line.y)
    if line.kind == "dots" or known.sum() == 1:
        x, y = line.x[known], line.y[known]
        where = [(scale.across(a), scale.down(b)) for a, b in zip(x, y, strict=True)]
        return "".join(
            f'<circle class="dot {color}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in where
        )
    found = []
    gaps = np.flatnonzero(np.diff(known.astype(int))) + 1
    for block in np.split(np.arange(len(known)), gaps):
        if len(block) and known[block[0]]:
            points = scale.points(*thinned(line.x[block], line.y[block]))
            found.append(f'<polyline class="{line.kind} {color}" points="{points}"/>')
    return "".join(found)


def _figure(
    title: str,
    note: str,
    scale: _Scale,
    shapes: Sequence[str],
    legend: Sequence[tuple[str, int]],
    x_label: str,
) -> str:
    bottom = HEIGHT - BOTTOM
    axes = []
    for value in ticks(*scale.y):
        y = scale.down(value)
        axes.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        axes.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">{number(value)}</text>')
    for value in ticks(*scale.x, count=6):
        x = scale.across(value)
        axes.append(f'<text x="{x:.1f}" y="{bottom + 14}" class="mid">{number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    axes.append(f'<text x="{middle}" y="{HEIGHT - 4}" class="mid">{esc(x_label)}</text>')
    names = "".join(f'<span class="key c{c}">{esc(name)}</span>' for name, c in legend)
    below = f"<small>{esc(note)}</small>" if note else ""
    keys = f'<div class="keys">{names}</div>' if len(legend) > 1 else ""
    return (
        f'<figure class="chart"><figcaption><b>{esc(title)}</b> {below}</figcaption>{keys}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">'
        f"{''.join(axes)}{''.join(shapes)}</svg></figure>\n"
    )
