"""How well an edited picture of the tiny world does what it was told, in [0, 1].

A rule-based judge without learned weights, on the segmentation and the soft credits of
`alignment.py`. The row says what each quarter of the canvas holds before and after
(`source`, `target`: four of null or [colour, shape], left to right, then down); the quarters in
which these differ are the edited ones. With, of each quarter, all in [0, 1],
    t  credit for what it should hold: presence, shape and colour in equal parts as in `alignment`,
       less EXTRA_COST for each further object; where it should be empty, 1 - its objects
    s  how much it is still as before: presence x shape x colour, or 1 - its objects
the edit is
    done = mean of t (1 - s) over edited quarters that should hold something
           x (1 + mean of t (1 - s) over edited quarters that should be empty) / 2
    (either factor alone where there are no quarters of the other kind)
    intact = max(done, product of s over edited quarters): the object is there, old or new
    kept = mean of t over the other quarters that held something, less EXTRA_COST for each object in
           the empty ones
    score = kept x (FAITHFUL intact + (1 - FAITHFUL) done)
so that a right edit scores 1, the unchanged picture FAITHFUL, another wrong colour or shape in the
right place 1/2, and a picture whose objects are gone or no objects at all 0. The background and how
precisely things were kept are for the judge of preservation to see.

Shapes: B images, H, W pixels.
"""

import math
from typing import Any

import numpy as np

from qirl_fast.rewards.alignment import EXTRA_COST, PRESENT, SIDES
from qirl_fast.rewards.objects import Found, measure
from qirl_fast.rewards.segment import check_images, resample, segment
from qirl_fast.tiny.scenes import COLORS, SHAPES

Row = dict[str, Any]
Quarter = list[str] | None

FAITHFUL = 0.25
NEITHER = f"wanted null or [colour, shape] of {', '.join(COLORS)}; {', '.join(SHAPES)}"


def score(images_BHW3: np.ndarray, metadata: list[Row]) -> np.ndarray:
    """How well uint8 images [B, H, W, 3] show the edits of their rows; float32 [B].

    Deterministic, and a row's score does not depend on its batch. ValueError for a row that
    `check_row` refuses.
    """
    return np.array([parts["score"] for parts in explain(images_BHW3, metadata)], np.float32)


def explain(images_BHW3: np.ndarray, metadata: list[Row]) -> list[dict[str, float]]:
    """score, done, intact and kept of each image."""
    check_images(images_BHW3, metadata)
    for row in metadata:
        check_row(row)
    if not metadata:
        return []
    small = resample(images_BHW3, *SIDES)
    height, width = small.shape[1:3]
    found = []
    for scene, row in zip(segment(small), metadata, strict=True):
        quarters: list[list[Found]] = [[] for _ in range(4)]
        for thing in (measure(blob, height * width) for blob in scene.blobs):
            x, y = thing.center
            quarters[int(2 * x >= width) + 2 * int(2 * y >= height)].append(thing)
        found.append(_judge(quarters, row["source"], row["target"]))
    return found


def check_row(row: Row) -> None:
    """Raise ValueError, naming the row and the fault, unless the judge can score it."""
    for name in ("source", "target"):
        quarters = row.get(name)
        if not isinstance(quarters, list) or len(quarters) != 4:
            raise ValueError(f"{name!r} is {quarters!r}; wanted a list of four quarters: {row!r}")
        for quarter in quarters:
            if quarter is not None and not (
                isinstance(quarter, (list, tuple))
                and len(quarter) == 2
                and quarter[0] in COLORS
                and quarter[1] in SHAPES
            ):
                raise ValueError(f"{name!r} holds {quarter!r}; {NEITHER}: {row!r}")
    if row["source"] == row["target"]:
        raise ValueError(f"'source' and 'target' are one scene: there is nothing to edit: {row!r}")


def _credits(thing: Found, quarter: Quarter) -> tuple[float, float]:
    """(shape credit, colour credit) of a found object for [colour, shape]."""
    assert quarter is not None
    color, kind = quarter
    return float(thing.shape_S[SHAPES.index(kind)]), float(thing.color_K[list(COLORS).index(color)])


def _shows(found: list[Found], quarter: Quarter) -> float:
    """t: credit for a quarter that should hold this."""
    if quarter is None:
        return _empty(found)
    best = 0.0
    for thing in found:
        shape, color = _credits(thing, quarter)
        extra = sum(other.size for other in found if other is not thing)
        asked = (PRESENT + (1 - PRESENT) * shape + color) / 2
        best = max(best, thing.present * asked * (1 - EXTRA_COST) ** extra)
    return best


def _same(found: list[Found], quarter: Quarter) -> float:
    """s: how much a quarter is what this says and nothing else."""
    if quarter is None:
        return _empty(found)
    return max((thing.present * math.prod(_credits(thing, quarter)) for thing in found), default=0)


def _empty(found: list[Found]) -> float:
    return max(0.0, 1.0 - sum(thing.size for thing in found))


def _judge(
    found: list[list[Found]], source: list[Quarter], target: list[Quarter]
) -> dict[str, float]:
    wanted: list[float] = []
    emptied: list[float] = []
    held: list[float] = []
    extra, still = 0.0, 1.0
    for here, before, after in zip(found, source, target, strict=True):
        if before != after:
            same = _same(here, before)
            (emptied if after is None else wanted).append(_shows(here, after) * (1 - same))
            still *= same
        elif after is None:
            extra += sum(thing.size for thing in here)
        else:
            held.append(_shows(here, after))
    done = sum(wanted) / len(wanted) if wanted else 1.0
    if emptied:
        cleared = sum(emptied) / len(emptied)
        done *= (1 + cleared) / 2 if wanted else cleared
    intact = max(done, still)
    kept = (sum(held) / len(held) if held else 1.0) * (1 - EXTRA_COST) ** extra
    value = kept * (FAITHFUL * intact + (1 - FAITHFUL) * done)
    return {"score": value, "done": done, "intact": intact, "kept": kept}
