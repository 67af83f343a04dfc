"""The editing half of the tiny world: a picture, an instruction, and the picture it asks for.

A scene has one to three objects, no two of one colour and shape, each in its own quarter of the
canvas (0 top left, 1 top right, 2 bottom left, 3 bottom right). Four operations change it: recolour
an object, add one, remove one, move one into an empty quarter. What is not named stays where it is.

A row is one JSONL object:
`{"tag", "prompt", "image", "source": [4 quarters], "target": [4 quarters], "region": [boxes]}`;
tag: the operation; image: a PNG beside the file; a quarter: null or [colour, shape]; region: boxes
[x0, y0, x1, y1] of the quarters that change, as fractions of width and height.
All randomness comes from a numpy Generator, so a seed fixes every picture, wording and split.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qirl_fast.tiny import scenes
from qirl_fast.tiny.scenes import CELLS, COLORS, SHAPES, Row, Shape

Scene = tuple[Shape | None, ...]  # what each quarter holds

OPERATIONS = ("recolour", "add", "remove", "move")
PLACES = ("top left", "top right", "bottom left", "bottom right")
OBJECTS = (0.2, 0.45, 0.35)  # chances of one, two and three objects
WORDINGS = {
    "recolour": (
        "make the {thing} {color}",
        "change the {thing} to {color}",
        "turn the {thing} {color}",
    ),
    "add": (
        "add a {thing} at the {place}",
        "put a {thing} in the {place}",
        "draw a {thing} at the {place}",
    ),
    "remove": ("remove the {thing}", "delete the {thing}", "take away the {thing}"),
    "move": (
        "move the {thing} to the {place}",
        "put the {thing} in the {place}",
        "shift the {thing} to the {place}",
    ),
}
SPLITS = {"train": 192, "validation": 32, "heldout": 96}  # rows, all operations as often


@dataclass(frozen=True)
class Edit:
    """A scene and what is to be done. cell: the quarter of the object, or where one is added.

    color: the new one, of recolour. new: the object that add draws. to: the quarter of move.
    """

    tag: str
    source: Scene
    cell: int
    color: str = ""
    new: Shape | None = None
    to: int = -1

    @property
    def target(self) -> Scene:
        """The scene after the edit."""
        after = list(self.source)
        thing = after[self.cell]
        if self.tag == "add":
            after[self.cell] = self.new
        elif thing is None:
            raise ValueError(f"{self.tag} of an object in quarter {self.cell}, which is empty")
        elif self.tag == "recolour":
            after[self.cell] = replace(thing, color=self.color)
        else:
            after[self.cell] = None
            if self.tag == "move":
                (x, y), (to_x, to_y) = CELLS[self.cell], CELLS[self.to]
                after[self.to] = replace(thing, x=thing.x + to_x - x, y=thing.y + to_y - y)
        return tuple(after)

    def wordings(self) -> list[str]:
        """Every instruction that asks for it."""
        thing = self.new or self.source[self.cell]
        assert thing is not None
        place = PLACES[self.to if self.tag == "move" else self.cell]
        words = {"thing": f"{thing.color} {thing.kind}", "color": self.color, "place": place}
        return [wording.format(**words) for wording in WORDINGS[self.tag]]

    @property
    def key(self) -> str:
        """Equal for edits that ask for one change of one scene, in whatever words."""
        return json.dumps([named(self.source), named(self.target)])


def picture(scene: Scene) -> np.ndarray:
    """Draw it: uint8 [64, 64, 3]."""
    return scenes.render([shape for shape in scene if shape])


def named(scene: Scene) -> list[list[str] | None]:
    """Colour and shape in each quarter, as rows hold them."""
    return [[shape.color, shape.kind] if shape else None for shape in scene]


def shape_in(cell: int, thing: tuple[str, str], rng: np.random.Generator) -> Shape:
    """This colour and shape in quarter `cell`, of any size, a little off the middle."""
    color, kind = thing
    x, y = np.array(CELLS[cell]) + rng.uniform(-scenes.JITTER, scenes.JITTER, 2)
    return Shape(kind, color, float(x), float(y), float(rng.uniform(*scenes.RADIUS)))


def other(value: Any, options: Any, rng: np.random.Generator) -> Any:
    """One of the options that is not `value`; `value` where there is none."""
    rest = [option for option in options if option != value]
    return rest[rng.integers(len(rest))] if rest else value


def _cells(scene: Scene, full: bool) -> list[int]:
    return [cell for cell in range(4) if (scene[cell] is not None) == full]


def _colors_free(scene: Scene, cell: int) -> list[str]:
    """Colours that leave the object in `cell` unlike every other one."""
    kind = getattr(scene[cell], "kind", None)
    return [c for c in COLORS if not any(s and (s.color, s.kind) == (c, kind) for s in scene)]


def random_edit(tag: str, rng: np.random.Generator) -> Edit:
    """Any edit of this kind, of any scene."""
    count = 1 + int(rng.choice(3, p=OBJECTS))
    things = [(c, k) for c in COLORS for k in SHAPES]
    chosen = [things[i] for i in rng.choice(len(things), count + 1, replace=False)]
    cells = rng.permutation(4).tolist()
    scene: list[Shape | None] = [None] * 4
    for cell, thing in zip(cells[:count], chosen[:count], strict=True):
        scene[cell] = shape_in(cell, thing, rng)
    source, cell, empty = tuple(scene), cells[0], cells[count]
    if tag == "recolour":
        return Edit(tag, source, cell, color=str(rng.choice(_colors_free(source, cell))))
    if tag == "add":
        return Edit(tag, source, empty, new=shape_in(empty, chosen[count], rng))
    if tag == "remove":
        return Edit(tag, source, cell)
    if tag == "move":
        return Edit(tag, source, cell, to=empty)
    raise ValueError(f"operation {tag!r} is not one of {', '.join(OPERATIONS)}")


def misread(edit: Edit, rate: float, rng: np.random.Generator) -> Scene:
    """The scene after the edit with each of its attributes another one at probability `rate`.

    The attributes: which object, which colour, shape and place; and at half the rate nothing is
    done at all. Shown under the right instruction such targets give a model that knows every word
    but follows them part of the time only, as `scenes.misread` does for captions.
    """
    if rng.random() < 0.5 * rate:
        return edit.source
    full, empty = _cells(edit.source, True), _cells(edit.source, False)

    def wrong() -> bool:
        return bool(rng.random() < rate)

    if edit.tag == "add":
        assert edit.new is not None
        cell = other(edit.cell, empty, rng) if wrong() else edit.cell
        color = other(edit.new.color, COLORS, rng) if wrong() else edit.new.color
        kind = other(edit.new.kind, SHAPES, rng) if wrong() else edit.new.kind
        return replace(edit, cell=cell, new=shape_in(cell, (color, kind), rng)).target
    cell = other(edit.cell, full, rng) if wrong() else edit.cell
    color = other(edit.color, COLORS, rng) if edit.tag == "recolour" and wrong() else edit.color
    to = other(edit.to, empty, rng) if edit.tag == "move" and wrong() else edit.to
    return replace(edit, cell=cell, color=color, to=to).target


def row(edit: Edit, wording: int, image: str) -> Row:
    """The JSONL object of an edit. image: the name of its source picture."""
    before, after = named(edit.source), named(edit.target)
    changed = [cell for cell in range(4) if before[cell] != after[cell]]
    corners = [(0.5 * (cell % 2), 0.5 * (cell // 2)) for cell in changed]
    return {
        "tag": edit.tag,
        "prompt": edit.wordings()[wording],
        "image": image,
        "source": before,
        "target": after,
        "region": [[x, y, x + 0.5, y + 0.5] for x, y in corners],
    }


def split_edits(seed: int = 5) -> dict[str, list[tuple[Row, np.ndarray]]]:
    """Rows of each split with their source pictures, operations in turn.

    No change of a scene is asked for twice, in whatever words: none is in two splits.
    """
    rng = np.random.default_rng(seed)
    known: set[str] = set()
    splits: dict[str, list[tuple[Row, np.ndarray]]] = {name: [] for name in SPLITS}
    for name, count in SPLITS.items():
        while len(splits[name]) < count:
            number = len(splits[name])
            edit = random_edit(OPERATIONS[number % len(OPERATIONS)], rng)
            wording = int(rng.integers(len(edit.wordings())))
            if edit.key not in known:
                known.add(edit.key)
                image = f"edits/{name}-{number:03}.png"
                splits[name].append((row(edit, wording, image), picture(edit.source)))
    return splits


def asked_keys(names: tuple[str, ...] = ("validation", "heldout")) -> set[str]:
    """`Edit.key` of every row of these splits."""
    splits = split_edits()
    rows = [row for name in names for row, _ in splits[name]]
    return {json.dumps([row["source"], row["target"]]) for row in rows}
