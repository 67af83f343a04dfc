"""GenEval's verdict on flat coloured shapes: 1 where it shows all its row asks for, or 0.

The rules of GenEval (arXiv 2310.11513, evaluation/evaluate_images.py) on what `alignment` finds in
the image: every entry of `include` has its `count` objects, each of the class and, where one is
asked for, the colour; where a position is asked for each of them stands so to each of the other
entry's; no entry of `exclude` is there `count` times. More objects than were asked for are no
fault, unless `exclude` says so.

Where it differs: objects are found by rule, not by Mask2Former, and one counts as there from half
its presence on. Entries are given objects by the best match of the whole row, so a row may ask for
two objects of one class in two colours. A stands left of B where the offset of their middles points
left by more than half its length; GenEval shrinks the offset by a tenth of the boxes first.
"""

import math
from typing import Any

import numpy as np

from qirl_fast.rewards import alignment
from qirl_fast.rewards.alignment import Row

PRESENT = 0.5
LEAST = 0.5  # share of the offset along the axis asked for
AXES = {"left of": (0, -1.0), "right of": (0, 1.0), "above": (1, -1.0), "below": (1, 1.0)}


def score(images_BHW3: np.ndarray, metadata: list[Row]) -> np.ndarray:
    """1.0 or 0.0 for each of uint8 images [B, H, W, 3]; float32 [B]. Errors as `alignment`."""
    pairs = zip(images_BHW3, metadata, strict=True)
    return np.array([float(correct(image, row)) for image, row in pairs], np.float32)


def correct(image_HW3: np.ndarray, row: Row) -> bool:
    """Whether the image shows all that its row asks for."""
    found = alignment.explain(image_HW3, row)
    objects = found["found"]
    include, matched = row["include"], found["matched"]
    for entry, own in zip(include, matched, strict=True):
        if len(own) < entry.get("count", 1) or not all(_is(objects[j], entry) for j in own):
            return False
        if entry.get("position"):
            relation, target = entry["position"]
            pairs = [(objects[a], objects[b]) for a in own for b in matched[target]]
            if not all(_stands(a, b, relation) for a, b in pairs):
                return False
    return not any(
        sum(_is(thing, entry) for thing in objects) >= entry.get("count", 1)
        for entry in row.get("exclude", [])
    )


def _is(thing: dict[str, Any], entry: Row) -> bool:
    """Whether a found object is there, of the entry's class and colour."""
    color = entry.get("color")
    return bool(
        thing["present"] >= PRESENT
        and thing["class"] == entry["class"]
        and (not color or thing["color"] == color)
    )


def _stands(a: dict[str, Any], b: dict[str, Any], relation: str) -> bool:
    axis, sign = AXES[relation]
    offset = [a["center"][k] - b["center"][k] for k in (0, 1)]
    return sign * offset[axis] > LEAST * math.hypot(*offset)
