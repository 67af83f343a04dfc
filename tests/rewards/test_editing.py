"""The judge of edits on pictures whose answer is known: right edits, wrong and destroyed ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qirl_fast.rewards import editing
from qirl_fast.rewards.editing import FAITHFUL
from qirl_fast.tiny import edits
from qirl_fast.tiny.edits import Edit, Scene, picture, shape_in

# Credits of cleanly drawn shapes are not all 1: a small circle's outline is near an octagon's.
NEAR = 0.06


def cases(count: int = 40) -> list[Edit]:
    rng = np.random.default_rng(2)
    return [edits.random_edit(edits.OPERATIONS[i % 4], rng) for i in range(count)]


def scores(pictures: list[np.ndarray], of: list[Edit]) -> np.ndarray:
    return editing.score(np.stack(pictures), [edits.row(edit, 0, "x.png") for edit in of])


def scene(**quarters: str) -> Scene:
    """`scene(q0="red circle")`: each at the same place of its quarter whenever it is asked for."""
    found: list[Any] = [None] * 4
    for name, words in quarters.items():
        color, kind = words.split()
        cell = int(name[1])
        found[cell] = shape_in(cell, (color, kind), np.random.default_rng(cell))
    return tuple(found)


def test_right_edits_score_one() -> None:
    of = cases()
    found = scores([picture(edit.target) for edit in of], of)
    assert found.dtype == np.float32 and found.min() >= 1 - NEAR and found.max() <= 1


def test_the_unchanged_picture_is_in_the_middle() -> None:
    of = cases()
    found = scores([picture(edit.source) for edit in of], of)
    assert np.abs(found - FAITHFUL).max() <= NEAR


@pytest.mark.parametrize("how", ["blank", "noise", "grey"])
def test_destroyed_pictures_score_nothing(how: str) -> None:
    """A blank is the right answer where the only object is to be removed, and only there."""
    rng = np.random.default_rng(0)
    of = [e for e in cases() if any(e.target)]
    shape = (len(of), 64, 64, 3)
    destroyed = {
        "blank": np.broadcast_to(picture((None,) * 4), shape),
        "noise": rng.integers(0, 256, shape, np.uint8),
        "grey": np.full(shape, 128, np.uint8),
    }[how]
    assert scores(list(destroyed), of).max() <= 0.01


RED, BLUE = scene(q0="red circle", q3="blue square"), scene(q0="blue circle", q3="blue square")
ADDED = scene(q0="red circle", q3="blue square", q1="green triangle")
ADDED_BLUE = scene(q0="blue circle", q1="red circle", q3="blue square")
ELSEWHERE = scene(q0="red circle", q3="blue square", q2="green triangle")
RECOLOUR = Edit("recolour", RED, 0, color="blue")
ADD = Edit("add", RED, 1, new=ADDED[1])
REMOVE = Edit("remove", RED, 0)
MOVE = Edit("move", RED, 0, to=1)


@pytest.mark.parametrize(
    ("edit", "shown", "low", "high"),
    [
        (RECOLOUR, scene(q0="green circle", q3="blue square"), 0.45, 0.55),  # another colour
        (RECOLOUR, scene(q0="blue triangle", q3="blue square"), 0.5, 0.7),  # another shape, too
        (RECOLOUR, scene(q0="red circle", q3="yellow square"), 0.08, 0.2),  # the other object
        (RECOLOUR, scene(q0="blue circle", q3="green square"), 0.45, 0.55),  # both objects
        (RECOLOUR, scene(q0="blue circle"), 0, 0.01),  # the other object is gone
        (RECOLOUR, scene(q3="blue square"), 0, 0.01),  # the object itself is gone
        (RECOLOUR, ADDED_BLUE, 0.7, 0.8),  # and one more
        (ADD, scene(q0="red circle", q3="blue square", q1="red triangle"), 0.45, 0.55),
        (ADD, scene(q0="red circle", q3="blue square", q1="green circle"), 0.5, 0.7),
        (ADD, ELSEWHERE, 0.15, 0.2),
        (REMOVE, scene(q0="red circle"), 0, 0.01),  # the other one
        (REMOVE, scene(q0="green circle", q3="blue square"), 0, 0.01),  # recoloured instead
        (MOVE, scene(q0="red circle", q1="red circle", q3="blue square"), 0.45, 0.55),  # copied
        (MOVE, scene(q1="green circle", q3="blue square"), 0.45, 0.55),  # moved and recoloured
        (MOVE, scene(q3="blue square"), 0, 0.01),  # removed instead
    ],
)
def test_each_fault_has_its_price(edit: Edit, shown: Scene, low: float, high: float) -> None:
    assert low <= scores([picture(shown)], [edit])[0] <= high


def test_what_is_half_there_is_worth_less() -> None:
    """Fading the right picture into the unchanged one, the score falls and never rises."""
    before, after = (picture(s).astype(float) for s in (ADD.source, ADD.target))
    faded = [np.rint(before + a * (after - before)).astype(np.uint8) for a in (1, 0.6, 0.4, 0)]
    found = scores(faded, [ADD] * 4)
    assert (np.diff(found) <= 0).all() and found[0] > 0.9 and found[-1] < FAITHFUL + NEAR


def test_a_row_does_not_depend_on_its_batch_or_the_size() -> None:
    of = cases(8)
    pictures = [picture(edit.target) for edit in of]
    together = scores(pictures, of)
    alone = [scores([p], [e])[0] for p, e in zip(pictures, of, strict=True)]
    assert together.tolist() == alone
    large = [p.repeat(4, 0).repeat(4, 1) for p in pictures]
    assert np.abs(scores(large, of) - together).max() <= NEAR
    assert editing.score(np.zeros((0, 64, 64, 3), np.uint8), []).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "'source' is None; wanted a list of four quarters"),
        ({"target": [None] * 3}, "'target' is .* wanted a list of four quarters"),
        ({"target": [["pink", "circle"], None, None, None]}, "holds .*pink.*; wanted null or"),
        ({"target": [["red"], None, None, None]}, "wanted null or .colour, shape. of red, green"),
        ({"target": edits.row(ADD, 0, "")["source"]}, "nothing to edit"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(change: dict[str, Any], message: str) -> None:
    row = edits.row(ADD, 0, "x.png") | change
    for judge in (editing.check_row, lambda r: editing.score(picture(RED)[None], [r])):
        with pytest.raises(ValueError, match=message):
            judge(row)


def test_it_is_a_judge_by_name() -> None:
    from qirl_fast.rewards.judges import Judges

    judges = Judges(["edit_accuracy"])
    row = edits.row(replace(ADD), 0, "x.png")
    assert judges.score(picture(ADD.target)[None], [row]).scores[0, 0] > 1 - NEAR
    weighs = {"edit_accuracy": 1.0}
    assert [name for name, _ in judges.check_row({"prompt": "x"}, weighs)] == ["edit_accuracy"]
    judges.close()
