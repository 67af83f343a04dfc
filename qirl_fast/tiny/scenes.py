"""The tiny world: flat coloured shapes on a pale background, drawn from GenEval-form metadata.

Each object stands in one quarter of the canvas, a little off its middle: few enough places for a
model of half a million parameters to learn in minutes, enough for counts and relations.

A row is one JSONL object of GenEval (arXiv 2310.11513, `evaluation_metadata.jsonl`):
`{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "prompt"}`,
where `position` of entry i relates it to entry `index` ("left of", "right of", "above", "below").
All randomness comes from a numpy Generator, so a seed fixes every scene, caption and split.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"right of": "left of", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three"}
TAGS = ("single_object", "colors", "counting", "two_object", "position", "color_attr")
BACKGROUND = (236, 236, 240)
HELDOUT = {"position": 32, "color_attr": 44}
TRAIN = 96
RADIUS = (9.5, 12.0)
CELLS = ((16.0, 16.0), (48.0, 16.0), (16.0, 48.0), (48.0, 48.0))
JITTER = 3.0


@dataclass(frozen=True)
class Shape:
    """One drawn object: centre (x, y) and radius in pixels of a SIZE x SIZE canvas, y down."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


def _signed_distance(shape: Shape, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """Approximate signed distance in pixels, negative inside."""
    dx, dy, r = x_HW - shape.x, y_HW - shape.y, shape.radius
    if shape.kind == "circle":
        return np.hypot(dx, dy) - r
    if shape.kind == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r
    if shape.kind == "triangle":
        slope = 0.8944 * np.abs(dx) - 0.4472 * (dy + r)
        return np.maximum(slope, dy - 0.85 * r)
    raise ValueError(f"shape {shape.kind!r} is not one of {', '.join(SHAPES)}")


def render(shapes: list[Shape], size: int = SIZE) -> np.ndarray:
    """Draw shapes, edges anti-aliased over one pixel, later ones on top: uint8 [size, size, 3]."""
    scale = SIZE / size
    y_HW, x_HW = (np.mgrid[0:size, 0:size] + 0.5) * scale
    image = np.broadcast_to(np.array(BACKGROUND, np.float64), (size, size, 3)).copy()
    for shape in shapes:
        alpha = np.clip(0.5 - _signed_distance(shape, x_HW, y_HW) / scale, 0.0, 1.0)[..., None]
        image += alpha * (np.array(COLORS[shape.color]) - image)
    return np.rint(image).astype(np.uint8)


def _related(shape: Shape, other: Shape, relation: str) -> bool:
    """True when `shape` is `relation` `other`, clearly: the axis dominates and the gap is real."""
    dx, dy = shape.x - other.x, shape.y - other.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return along > shape.radius + other.radius and along > 1.5 * abs(across)


def _place(count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres [count, 2] in different quarters of the canvas, off the middle by up to JITTER."""
    cells = rng.choice(len(CELLS), count, replace=False)
    return np.array(CELLS)[cells] + rng.uniform(-JITTER, JITTER, (count, 2))


def sample_scene(row: Row, rng: np.random.Generator) -> list[Shape]:
    """Draw a random scene that satisfies a row's `include` (free colours and places are random)."""
    entries = row["include"]
    kinds, colors = [], []
    for entry in entries:
        color = entry.get("color") or str(rng.choice(list(COLORS)))
        kinds += [entry["class"]] * entry["count"]
        colors += [color] * entry["count"]
    if len(kinds) > len(CELLS):
        raise ValueError(f"{len(kinds)} objects asked for, at most {len(CELLS)} fit: {row}")
    first = np.cumsum([0] + [entry["count"] for entry in entries])
    while True:
        radii = rng.uniform(*RADIUS, len(kinds))
        centers = _place(len(kinds), rng)
        shapes = [
            Shape(k, c, float(x), float(y), float(r))
            for k, c, (x, y), r in zip(kinds, colors, centers, radii, strict=True)
        ]
        if all(
            _related(shapes[first[i]], shapes[first[e["position"][1]]], e["position"][0])
            for i, e in enumerate(entries)
            if e.get("position")
        ):
            return shapes


def _entry(kind: str, color: str | None = None, count: int = 1) -> Row:
    entry: Row = {"class": kind, "count": count}
    if color:
        entry["color"] = color
    return entry


def _phrase(entry: Row) -> str:
    noun = " ".join(filter(None, [entry.get("color"), entry["class"]]))
    return f"a {noun}" if entry["count"] == 1 else f"{NUMBERS[entry['count']]} {noun}s"


def caption(include: list[Row]) -> str:
    """The English prompt of an `include` list, in GenEval's wording."""
    phrases = [_phrase(entry) for entry in include]
    if len(include) == 2 and include[1].get("position"):
        return f"a photo of {phrases[1]} {include[1]['position'][0]} {phrases[0]}"
    return "a photo of " + " and ".join(phrases)


def _row(tag: str, *include: Row) -> Row:
    row: Row = {"tag": tag, "include": list(include)}
    if tag == "counting":  # as GenEval: no more than were asked for
        row["exclude"] = [entry | {"count": entry["count"] + 1} for entry in include]
    return row | {"prompt": caption(list(include))}


def all_rows() -> list[Row]:
    """Every prompt of the world, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    hues = list(COLORS)
    rows = [_row("single_object", _entry(s)) for s in SHAPES]
    rows += [_row("colors", _entry(s, c)) for s in SHAPES for c in hues]
    rows += [
        _row("counting", _entry(s, c, n)) for s in SHAPES for c in [None, *hues] for n in (2, 3)
    ]
    rows += [_row("two_object", _entry(a), _entry(b)) for a, b in pairs]
    rows += [
        _row("position", _entry(a, c), _entry(b, d) | {"position": [r, 0]})
        for a, b in pairs
        for r in RELATIONS
        for c, d in [(None, None), *itertools.product(hues, hues)]
    ]
    rows += [
        _row("color_attr", _entry(a, c), _entry(b, d))
        for a, b in pairs
        for c, d in itertools.product(hues, hues)
    ]
    return rows


def sample_row(rows_by_tag: dict[str, list[Row]], rng: np.random.Generator) -> Row:
    """One row, tags drawn evenly."""
    rows = rows_by_tag[TAGS[rng.integers(len(TAGS))]]
    return rows[rng.integers(len(rows))]


def misread(row: Row, rate: float, rng: np.random.Generator) -> Row:
    """The row with each attribute replaced by a random other one at probability `rate`.

    Drawing the scene of `misread(row)` under the caption of `row` gives what web captions give:
    a model that knows every word but follows none reliably.
    """

    def other(value: Any, options: tuple[Any, ...] | list[Any]) -> Any:
        if rng.random() >= rate:
            return value
        rest = [option for option in options if option != value]
        return rest[rng.integers(len(rest))]

    include: list[Row] = []
    for entry in row["include"]:
        new = dict(entry)
        taken = [e["class"] for e in include]
        new["class"] = other(entry["class"], SHAPES)
        if new["class"] in taken:
            new["class"] = next(s for s in SHAPES if s not in taken)
        if "color" in entry:
            new["color"] = other(entry["color"], list(COLORS))
        if len(row["include"]) == 1:
            new["count"] = other(entry["count"], tuple(NUMBERS))
        if entry.get("position"):
            new["position"] = [other(entry["position"][0], RELATIONS), 0]
        include.append(new)
    return _row(row["tag"], *include)


def scene_key(row: Row) -> str:
    """Equal for rows that ask for one picture in other words.

    "a circle and a square" is "a square and a circle"; A left of B is B right of A.
    """
    entries = [{k: v for k, v in entry.items() if k != "position"} for entry in row["include"]]
    position = row["include"][-1].get("position")
    if position is None:
        return json.dumps(sorted(entries, key=json.dumps))
    relation = position[0]
    if relation in OPPOSITE:
        return json.dumps([entries[0], OPPOSITE[relation], entries[1]])
    return json.dumps([entries[1], relation, entries[0]])


def split_rows(seed: int = 3) -> dict[str, list[Row]]:
    """Train, validation and heldout prompts, no scene in two of them, with what tags they can have.

    Of each tag's rows a third, at most HELDOUT, goes to heldout, an eighth, at most 16, to
    validation, and the rest, at most TRAIN, to train: the many colourings of relations would crowd
    out the others. All wordings of a scene go together.
    """
    rng = np.random.default_rng(seed)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "heldout": []}
    for tag in TAGS:
        rows = [row for row in all_rows() if row["tag"] == tag]
        wordings: dict[str, list[Row]] = {}
        for row in rows:
            wordings.setdefault(scene_key(row), []).append(row)
        scenes = list(wordings.values())
        shuffled = iter([scenes[i] for i in rng.permutation(len(scenes))])
        room = {
            "heldout": min(HELDOUT.get(tag, len(rows)), len(rows) // 3),
            "validation": min(16, len(rows) // 8),
            "train": TRAIN,
        }
        for name, most in room.items():
            own: list[Row] = []
            while len(own) < most and (scene := next(shuffled, None)):
                own += scene
            splits[name] += own
    return {name: [rows[i] for i in rng.permutation(len(rows))] for name, rows in splits.items()}
