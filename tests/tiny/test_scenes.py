"""The tiny world: prompts in GenEval form, disjoint splits, scenes that show what is asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qirl_fast.data.prompts import load_prompts
from qirl_fast.rewards import alignment
from qirl_fast.tiny import scenes
from qirl_fast.tiny.scenes import Row, Shape

PROMPTS = Path(scenes.__file__).parent / "prompts"


def key(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def test_splits_are_disjoint_and_show_every_tag() -> None:
    splits = scenes.split_rows()
    assert set(splits) == {"train", "validation", "heldout"}
    assert len(splits["heldout"]) >= 96 and len(splits["train"]) >= 96
    prompts = {name: {row["prompt"] for row in rows} for name, rows in splits.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    assert sum(map(len, prompts.values())) == sum(map(len, splits.values())), "no repeats"
    asked = {name: {scenes.scene_key(row) for row in rows} for name, rows in splits.items()}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())), "nor in other words"
    everything = {key(row) for row in scenes.all_rows()}
    for name, rows in splits.items():
        assert {key(row) for row in rows} <= everything
        if name != "validation":
            assert {row["tag"] for row in rows} == set(scenes.TAGS)
    tags = [row["tag"] for row in splits["heldout"][:48]]
    assert len(set(tags)) >= 4, "tags are mixed from the top of the file, which is what is used"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a red circle and a blue square", "a blue square and a red circle", True),
        ("a red circle and a blue square", "a blue circle and a red square", False),
        ("a circle left of a square", "a square right of a circle", True),
        ("a circle left of a square", "a circle right of a square", False),
        ("a red circle above a blue square", "a blue square below a red circle", True),
        ("a red circle above a blue square", "a blue square above a red circle", False),
        ("two circles", "two red circles", False),
    ],
)
def test_scene_key_sees_through_wording(one: str, other: str, same: bool) -> None:
    rows = {row["prompt"].removeprefix("a photo of "): row for row in scenes.all_rows()}
    assert (scenes.scene_key(rows[one]) == scenes.scene_key(rows[other])) == same


def test_splits_follow_their_seed() -> None:
    assert scenes.split_rows(3) == scenes.split_rows(3)
    assert scenes.split_rows(3) != scenes.split_rows(4)


@pytest.mark.parametrize("name", ["train", "validation", "heldout"])
def test_packaged_files_are_the_splits(name: str) -> None:
    """Read back by the project's own reader, every row known to the judge."""
    read = load_prompts(PROMPTS / f"{name}.jsonl")
    assert [prompt.metadata for prompt in read] == scenes.split_rows()[name]
    for prompt in read:
        assert prompt.category in scenes.TAGS
        alignment.check_row(prompt.metadata)


def test_every_prompt_is_one_row_in_geneval_form() -> None:
    rows = scenes.all_rows()
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) - {"exclude"} == {"tag", "include", "prompt"}
        assert ("exclude" in row) == (row["tag"] == "counting")
        for entry, unwanted in zip(row["include"], row.get("exclude", ()), strict=False):
            assert unwanted == entry | {"count": entry["count"] + 1}
        assert 1 <= len(row["include"]) <= 2
        for entry in row["include"]:
            assert set(entry) <= {"class", "count", "color", "position"}
            assert entry["class"] in row["prompt"] and entry.get("color", "") in row["prompt"]
    by_tag = Counter(row["tag"] for row in rows)
    assert set(by_tag) == set(scenes.TAGS)


@pytest.mark.parametrize(
    ("include", "prompt"),
    [
        ([{"class": "circle", "count": 1}], "a photo of a circle"),
        ([{"class": "square", "count": 3, "color": "red"}], "a photo of three red squares"),
        (
            [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
            "a photo of a circle and a square",
        ),
        (
            [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "square", "count": 1, "color": "blue", "position": ["above", 0]},
            ],
            "a photo of a blue square above a red circle",
        ),
    ],
)
def test_captions(include: list[Row], prompt: str) -> None:
    assert scenes.caption(include) == prompt


def stands(shape: Shape, other: Shape, relation: str) -> bool:
    """The relation by centres alone: the asked axis dominates."""
    dx, dy = shape.x - other.x, shape.y - other.y
    horizontal = abs(dx) > abs(dy)
    return {
        "left of": horizontal and dx < 0,
        "right of": horizontal and dx > 0,
        "above": not horizontal and dy < 0,
        "below": not horizontal and dy > 0,
    }[relation]


def test_sampled_scenes_satisfy_their_rows() -> None:
    rng = np.random.default_rng(0)
    for row in scenes.all_rows()[::3]:
        shapes = scenes.sample_scene(row, rng)
        wanted = [e for e in row["include"] for _ in range(e["count"])]
        assert [s.kind for s in shapes] == [e["class"] for e in wanted]
        assert all(s.color == e.get("color", s.color) for s, e in zip(shapes, wanted, strict=True))
        for i, shape in enumerate(shapes):
            low, high = shape.radius, scenes.SIZE - shape.radius
            assert low <= shape.x <= high and low <= shape.y <= high, "inside the canvas"
            for other in shapes[:i]:
                gap = np.hypot(shape.x - other.x, shape.y - other.y)
                assert gap > shape.radius + other.radius, "no overlap"
        for i, entry in enumerate(row["include"]):
            if entry.get("position"):
                relation, target = entry["position"]
                assert stands(shapes[i], shapes[target], relation)


def test_the_judge_sees_what_was_drawn() -> None:
    """Right scenes score near 1, scenes of other rows lower."""
    rng = np.random.default_rng(1)
    rows = scenes.split_rows()["heldout"]
    images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in rows])
    right = alignment.score(images, rows)
    wrong = alignment.score(images, rows[1:] + rows[:1])
    assert right.min() > 0.9
    assert wrong.mean() < 0.7


def test_scenes_follow_the_generator() -> None:
    row = scenes.all_rows()[-1]
    one, same, other = (scenes.sample_scene(row, np.random.default_rng(s)) for s in (5, 5, 6))
    assert one == same != other


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rendering(size: int) -> None:
    scale = size / scenes.SIZE
    shapes = [
        Shape(k, c, 16.0 + 32 * i, 20.0, 10.0)
        for i, (k, c) in enumerate([("circle", "red"), ("square", "blue")])
    ]
    image = scenes.render(shapes, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    for shape in shapes:
        pixel = image[int(shape.y * scale), int(shape.x * scale)]
        assert tuple(pixel) == scenes.COLORS[shape.color]
    assert tuple(image[-1, -1]) == tuple(image[0, 0]) == scenes.BACKGROUND
    painted = (image != scenes.BACKGROUND).any(-1).sum() / scale**2
    # a disc of radius 10 and a square of half side 8.8; the antialiased rim adds half a pixel
    area, rim = np.pi * 100 + 17.6**2, 2 * np.pi * 10 + 4 * 17.6
    assert area - rim < painted < area + rim


def test_later_shapes_lie_on_top() -> None:
    under, over = Shape("square", "red", 32, 32, 12), Shape("circle", "blue", 32, 32, 5)
    assert tuple(scenes.render([under, over])[32, 32]) == scenes.COLORS["blue"]
    assert tuple(scenes.render([over, under])[32, 32]) == scenes.COLORS["red"]


def test_misreading_at_its_rate() -> None:
    """Each attribute of 4000 rows; a share of n draws is within 4 standard errors of the rate."""
    rng, n, rate = np.random.default_rng(2), 4000, 0.35
    single = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2, "color": "red"}],
        "prompt": "",
    }
    pair = {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1, "color": "red"},
            {"class": "square", "count": 1, "color": "red", "position": ["above", 0]},
        ],
        "prompt": "",
    }
    changed: Counter[str] = Counter()
    for _ in range(n):
        (entry,) = scenes.misread(single, rate, rng)["include"]
        for name in ("class", "count", "color"):
            changed[name] += entry[name] != single["include"][0][name]
        read = scenes.misread(pair, rate, rng)
        first, second = read["include"]
        assert first["class"] != second["class"] and {first["count"], second["count"]} == {1}
        changed["first class"] += first["class"] != "circle"
        changed["second color"] += second["color"] != "red"
        changed["relation"] += second["position"][0] != "above"
        assert read["prompt"] == scenes.caption(read["include"]), "the row says what is drawn"
    error = 4 * (rate * (1 - rate) / n) ** 0.5
    assert len(changed) == 6
    for name, count in changed.items():
        assert abs(count / n - rate) < error, name


def test_misreading_at_the_ends_of_the_scale() -> None:
    rng = np.random.default_rng(3)
    for row in scenes.all_rows()[::7]:
        assert scenes.misread(row, 0.0, rng) == row
        first, was = scenes.misread(row, 1.0, rng)["include"][0], row["include"][0]
        assert first["class"] != was["class"]
        assert "color" not in was or first["color"] != was["color"]


def test_what_cannot_be_drawn_is_refused() -> None:
    crowd = {"include": [{"class": "circle", "count": 5}], "prompt": "five circles"}
    with pytest.raises(ValueError, match="5 objects asked for, at most"):
        scenes.sample_scene(crowd, np.random.default_rng(0))
    with pytest.raises(ValueError, match="shape 'star' is not one of circle, square, triangle"):
        scenes.render([Shape("star", "red", 32, 32, 10)])
