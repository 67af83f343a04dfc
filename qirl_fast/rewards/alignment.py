"""How well an image of flat coloured shapes shows what its GenEval row asks for, in [0, 1].

A rule-based judge after GenEval (arXiv 2310.11513), without learned weights and with partial
credit where GenEval answers yes or no. Objects are segmented (`segment.py`) and given soft
credits for size, presence, shape and colour (`objects.py`).
Wanted objects are matched one to one with found ones (assignment of the greatest credit). Each
entry of `include` then asks for these attributes, each in [0, 1]:
- shape: presence (PRESENT + (1 - PRESENT) shape), mean over its `count` objects;
- color, if asked: presence colour, mean over its objects;
- count, if above 1: 1 - |number of such objects in the image - count| / count;
- position, if asked: see `_relation`, times the mean shape credit of the two objects.
score = mean of all attributes * (1 - EXTRA_COST) ** (sizes of unmatched objects)
                               * (1 - EXCLUDED_COST) for every entry of `exclude` that is met.
An object matched to a wish it does not fulfil is a mistake once, not also an extra.

Shapes: B images, H, W pixels, I entries of `include`, F found objects.
"""

import math
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from qirl_fast.rewards.objects import Found, measure
from qirl_fast.rewards.segment import check_images, resample, segment
from qirl_fast.tiny.scenes import COLORS, RELATIONS, SHAPES

Row = dict[str, Any]

SIDES = (64, 128)
PRESENT = 0.2
EXTRA_COST = 0.25
EXCLUDED_COST = 0.5
TIE_BREAK = 1e-3


def score(images_BHW3: np.ndarray, metadata: list[Row]) -> np.ndarray:
    """Alignment of uint8 images [B, H, W, 3] with their rows; float32 [B].

    Deterministic, and a row's score does not depend on its batch. ValueError for a row without
    `include` or with a word the judge does not know.
    """
    judged = [_judge(found, row)[0] for found, row in _found(images_BHW3, metadata)]
    return np.array(judged, np.float32)


def explain(image_HW3: np.ndarray, row: Row) -> dict[str, Any]:
    """The score of one image with what was found and every credit, for people to read."""
    ((found, _),) = _found(image_HW3[None], [row])
    value, detail = _judge(found, row)
    objects = [
        {
            "class": SHAPES[int(f.shape_S.argmax())],
            "color": list(COLORS)[int(f.color_K.argmax())] if f.color_K.any() else None,
            "center": f.center,
            "size": f.size,
            "present": f.present,
            "shape_credit": dict(zip(SHAPES, f.shape_S.tolist(), strict=True)),
            "color_credit": dict(zip(COLORS, f.color_K.tolist(), strict=True)),
        }
        for f in found
    ]
    return {"score": value, "found": objects, **detail}


def check_row(row: Row) -> None:
    """Raise ValueError, naming the row and the fault, unless the judge can score it."""
    include = row.get("include")
    if not isinstance(include, list) or not include:
        raise ValueError(f"the row has no 'include' list to be judged by: {row!r}")
    for i, entry in enumerate([*include, *row.get("exclude", [])]):
        if not isinstance(entry, dict):
            raise ValueError(f"entry {entry!r} is not an object with a 'class': {row!r}")
        _known("class", entry.get("class"), SHAPES, row)
        if entry.get("color"):
            _known("color", entry["color"], tuple(COLORS), row)
        count = entry.get("count", 1)
        if type(count) is not int or count < 1:
            raise ValueError(f"count {count!r} is not a whole number of at least 1: {row!r}")
        if entry.get("position"):
            _check_position(entry["position"], i, row)


def _check_position(position: Any, i: int, row: Row) -> None:
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise ValueError(f"position {position!r} is not [relation, index]: {row!r}")
    relation, target = position
    _known("relation", relation, RELATIONS, row)
    if type(target) is not int or target == i or not 0 <= target < len(row["include"]):
        raise ValueError(f"position {position!r} of entry {i} points to no other entry: {row!r}")


def _known(what: str, word: Any, vocabulary: tuple[str, ...], row: Row) -> None:
    if word not in vocabulary:
        known = ", ".join(vocabulary)
        raise ValueError(f"{what} {word!r} is not one the judge knows ({known}): {row!r}")


def _found(images_BHW3: np.ndarray, metadata: list[Row]) -> list[tuple[list[Found], Row]]:
    check_images(images_BHW3, metadata)
    for row in metadata:
        check_row(row)
    if not metadata:
        return []
    small = resample(images_BHW3, *SIDES)
    pixels = small.shape[1] * small.shape[2]
    return [
        ([measure(blob, pixels) for blob in scene.blobs], row)
        for scene, row in zip(segment(small), metadata, strict=True)
    ]


def _relation(a: Found, b: Found, relation: str) -> float:
    """Credit in [0, 1] for `a` being `relation` `b`.

    With `along` the signed distance of the centres on the asked axis and `across` the other:
    the angle between them gives 1 up to 36 degrees, 0.2 at 54 (the other axis dominates) and 0
    from 90 on; up to half of it is lost as the boxes come to overlap along the axis.
    """
    axis = 0 if relation in ("left of", "right of") else 1
    along = a.center[axis] - b.center[axis]
    if relation in ("left of", "above"):
        along = -along
    if along <= 0.0:
        return 0.0
    across = abs(a.center[1 - axis] - b.center[1 - axis])
    angle = math.degrees(math.atan2(across, along))
    apart = along / (0.9 * (a.half[axis] + b.half[axis]))
    return float(np.interp(angle, (36, 54, 90), (1.0, 0.2, 0.0))) * (0.5 + 0.5 * min(1.0, apart))


def _identity(found: list[Found], entry: Row) -> tuple[list[float], list[float]]:
    """For every found object its shape credit and colour credit (1 if free) for one entry."""
    s = SHAPES.index(entry["class"])
    shape = [float(f.shape_S[s]) for f in found]
    if not entry.get("color"):
        return shape, [1.0] * len(found)
    k = list(COLORS).index(entry["color"])
    return shape, [float(f.color_K[k]) for f in found]


def _match(found: list[Found], include: list[Row]) -> list[list[int]]:
    """Indices of the found objects given to each entry, by greatest total credit.

    Ties, as between two equal circles of which one is to be left, go to the better place.
    """
    wanted = [i for i, entry in enumerate(include) for _ in range(entry.get("count", 1))]
    lean = np.zeros((len(include), 2))
    for i, entry in enumerate(include):
        if entry.get("position"):
            relation, target = entry["position"]
            way = -1.0 if relation in ("left of", "above") else 1.0
            axis = 0 if relation in ("left of", "right of") else 1
            lean[i, axis] += way
            lean[target, axis] -= way
    credit_IF = np.zeros((len(include), len(found)))
    for i, entry in enumerate(include):
        shape, color = _identity(found, entry)
        for j, f in enumerate(found):
            asked = shape[j] + color[j] if entry.get("color") else 2.0 * shape[j]
            place = lean[i, 0] * f.center[0] + lean[i, 1] * f.center[1]
            credit_IF[i, j] = f.present * (1.0 + asked) + TIE_BREAK * place / SIDES[1]
    rows, columns = linear_sum_assignment(credit_IF[wanted], maximize=True)
    matched: list[list[int]] = [[] for _ in include]
    for r, c in zip(rows.tolist(), columns.tolist(), strict=True):
        matched[wanted[r]].append(c)
    return matched


def _judge(found: list[Found], row: Row) -> tuple[float, dict[str, Any]]:
    """Score and its parts: attributes per entry, extra objects, exclusions met."""
    include = row["include"]
    matched = _match(found, include)
    attributes = [_attributes(found, include, matched, i) for i in range(len(include))]
    taken = {j for group in matched for j in group}
    extra = sum(f.size for j, f in enumerate(found) if j not in taken)
    met = [
        min(1.0, max(0.0, _number(found, entry) - entry.get("count", 1) + 1.0))
        for entry in row.get("exclude", [])
    ]
    credits = [value for entry in attributes for value in entry.values()]
    value = sum(credits) / len(credits) * (1.0 - EXTRA_COST) ** extra
    for m in met:
        value *= 1.0 - EXCLUDED_COST * m
    return value, {"entries": attributes, "matched": matched, "extra": extra, "excluded_met": met}


def _number(found: list[Found], entry: Row) -> float:
    """How many objects of the entry's class and colour there are, doubtful ones in part."""
    shape, color = _identity(found, entry)
    return sum(f.present * s * c for f, s, c in zip(found, shape, color, strict=True))


def _attributes(
    found: list[Found], include: list[Row], matched: list[list[int]], i: int
) -> dict[str, float]:
    entry, count = include[i], include[i].get("count", 1)
    shape, color = _identity(found, entry)
    present = {j: found[j].present for j in matched[i]}
    credit = {
        "shape": sum(n * (PRESENT + (1 - PRESENT) * shape[j]) for j, n in present.items()) / count
    }
    if entry.get("color"):
        credit["color"] = sum(n * color[j] for j, n in present.items()) / count
    if count > 1:
        credit["count"] = max(0.0, 1.0 - abs(_number(found, entry) - count) / count)
    if entry.get("position"):
        relation, target = entry["position"]
        other, _ = _identity(found, include[target])
        pairs = [
            _relation(found[a], found[b], relation)
            * (found[a].present * shape[a] + found[b].present * other[b])
            / 2
            for a in matched[i]
            for b in matched[target]
        ]
        credit["position"] = sum(pairs) / len(pairs) if pairs else 0.0
    return credit
