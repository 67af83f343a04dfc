"""Pictures of the tiny world in every state of repair, and what is to be seen in them, in words.

A picture starts from a scene and is spoiled as the tiny model spoils its own: each quarter is mixed
with another object, so that colours fall between two named ones, outlines between two shapes, and
objects fade; then blur, noise and specks. What is seen is read off the finished picture
(`rewards/alignment.py`), so the words are true of what is there, not of what was meant.
"""

from typing import Any

import numpy as np
from scipy import ndimage

from qirl_fast.rewards import alignment
from qirl_fast.tiny import scenes
from qirl_fast.tiny.scenes import CELLS, COLORS, RADIUS, SHAPES, SIZE, Shape

HALF = SIZE // 2
SURE = 0.5  # credit from which a shape or a colour is called by its name

# What a quarter holds: (colour or "odd", shape or "shape"), or None where it is empty.
Quarter = tuple[str, str] | None


def random_shape(cell: int, rng: np.random.Generator) -> Shape:
    """Any object in quarter `cell` (0 top left, 1 top right, 2 bottom left, 3 bottom right)."""
    x, y = np.array(CELLS[cell]) + rng.uniform(-scenes.JITTER, scenes.JITTER, 2)
    kind, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    return Shape(kind, color, float(x), float(y), float(rng.uniform(*RADIUS)))


def random_scene(rng: np.random.Generator) -> list[Shape]:
    """None to four objects, each in its own quarter."""
    count = rng.choice(5, p=(0.04, 0.24, 0.34, 0.24, 0.14))
    return [random_shape(int(cell), rng) for cell in rng.choice(4, count, replace=False)]


def spoil(shapes: list[Shape], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene and spoil it, the more the greater `strength` in [0, 1]: uint8 [64, 64, 3].

    0 is the clean scene. Each fault is drawn on its own, so a strong one leaves much untouched.
    """

    def happens(chance: float) -> bool:
        return bool(rng.random() < chance * strength)

    image = scenes.render(shapes).astype(np.float64)
    mixed = scenes.render([_changed(s, rng) for s in shapes]).astype(np.float64)
    empty = np.broadcast_to(np.array(scenes.BACKGROUND, np.float64), image.shape)
    for cell in range(4):
        rows, columns = (slice(HALF * i, HALF * (i + 1)) for i in divmod(cell, 2))
        if happens(0.5):
            share = rng.uniform(0.1, 0.9)
            image[rows, columns] += share * (mixed - image)[rows, columns]
        if happens(0.12):
            image[rows, columns] += rng.uniform(0.2, 0.8) * (empty - image)[rows, columns]
    if happens(0.5):
        sigma = rng.uniform(0.3, 1.8)
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    if happens(0.15):
        y, x = rng.integers(0, SIZE - 4, 2)
        image[y : y + 3, x : x + 3] = COLORS[str(rng.choice(list(COLORS)))]
    if happens(0.5):
        image += rng.normal(0.0, rng.uniform(1.0, 14.0), image.shape)
    return np.rint(np.clip(image, 0.0, 255.0)).astype(np.uint8)


def _changed(shape: Shape, rng: np.random.Generator) -> Shape:
    """The object with another colour, another shape or both, or gone smaller."""
    kind, color, radius = shape.kind, shape.color, shape.radius
    what = rng.integers(4)
    if what in (0, 2):
        color = str(rng.choice([c for c in COLORS if c != color]))
    if what in (1, 2):
        kind = str(rng.choice([s for s in SHAPES if s != kind]))
    if what == 3:
        radius *= float(rng.uniform(0.3, 0.7))
    return Shape(kind, color, shape.x, shape.y, radius)


def seen(found: list[dict[str, Any]]) -> list[Quarter]:
    """The largest object of each quarter, of what `alignment.explain(...)["found"]` lists."""
    quarters: list[Quarter] = [None] * 4
    sizes = [0.0] * 4
    for thing in found:
        x, y = thing["center"]
        cell = int(x >= HALF) + 2 * int(y >= HALF)
        size = thing["size"] * (0.5 + thing["present"])
        if thing["size"] < SURE or size <= sizes[cell]:
            continue
        color, shape = thing["color"], thing["class"]
        sizes[cell] = size
        quarters[cell] = (
            color if color and thing["color_credit"][color] >= SURE else "odd",
            shape if thing["present"] >= SURE and thing["shape_credit"][shape] >= SURE else "shape",
        )
    return quarters


def words(quarters: list[Quarter]) -> str:
    """'red circle, none, none, odd square.': top left, top right, bottom left, bottom right."""
    return ", ".join("none" if quarter is None else " ".join(quarter) for quarter in quarters) + "."


def look(image: np.ndarray) -> list[Quarter]:
    """What each quarter of a uint8 [64, 64, 3] picture holds, by segmentation."""
    anything = {"include": [{"class": SHAPES[0], "count": 1}]}
    return seen(alignment.explain(image, anything)["found"])
