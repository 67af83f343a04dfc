"""The training file: what it may hold, splits, leaks, tiers, and what is refused by file:line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from small_judges import picture

from qirl_fast.rewards.vlm import images as images_module
from qirl_fast.rewards.vlm.data import load_rows
from qirl_fast.rewards.vlm.images import BadImage, read_image
from qirl_fast.rewards.vlm.rows import DataError, Tiers, normalised, split_of

ROW = {"image": "a.png", "prompt": "a red circle", "dimension": "alignment", "score": 4.5}
EDIT = {
    "images": ["a.png", "b.png"],
    "instruction": "make it blue",
    "dimension": "instruction",
    "rationale": "done",
    "score": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd"):
        Image.fromarray(picture(16, 16, seed)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_are_read_as_they_stand(folder: Path) -> None:
    more = {"category": "colors", "split": "heldout", "tier_scores": {"alignment": 3}}
    aesthetic = ROW | {"image": "c.png", "prompt": "x", "dimension": "aesthetics"} | more
    rows = load_rows(write(folder, ROW, "", EDIT, aesthetic), 0.0)
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "3", "4"]
    assert rows[0].images == (folder / "a.png",) and rows[0].rationale == ""
    assert (rows[0].score, rows[0].category, rows[0].split) == (4.5, None, "train")
    assert rows[1].images == (folder / "a.png", folder / "b.png")
    assert (rows[1].text, rows[1].rationale, rows[1].score) == ("make it blue", "done", 2.0)
    assert (rows[2].category, rows[2].split) == ("colors", "heldout")
    assert rows[2].tier_scores == (("alignment", 3.0),)
    assert all(row.cluster for row in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": None}, "score is missing; wanted a number from 1 to 5"),
        ({"score": 0.9}, r"score is 0\.9; wanted a number from 1 to 5"),
        ({"score": 5.1}, r"score is 5\.1"),
        ({"score": float("nan")}, "score is nan"),
        ({"score": "4"}, "score is '4'"),
        ({"score": True}, "score is True"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt is 3; wanted text"),
        ({"prompt": "a <|image_pad|>"}, r"prompt holds the control token <\|image_pad\|>"),
        ({"prompt": "half \ud800"}, "prompt holds half a surrogate pair"),
        ({"instruction": "x"}, "instruction with dimension 'alignment'; wanted prompt"),
        ({"dimension": "beauty"}, "dimension is 'beauty'; wanted one of alignment, aesthetics"),
        ({"rationale": "Score: 3"}, "rationale holds 'Score:'"),
        ({"rationale": 5}, "rationale is 5; wanted text"),
        ({"split": "test"}, "split is 'test'; wanted one of train, heldout"),
        ({"images": ["a.png"]}, "wanted image, a path, or images"),
        ({"image": ["a.png"]}, r"image is \['a.png'\]; wanted a path"),
        ({"ratio": 1}, "unknown key 'ratio'; known are image, images"),
        ({"category": ""}, "category is empty"),
        ({"tier_scores": {"alignment": 9}}, r"tier_scores\.alignment is 9"),
        ({"tier_scores": {"beauty": 3}}, "tier_scores names 'beauty'"),
        ({"tier_scores": [3]}, r"tier_scores is \[3\]"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(folder: Path, change: Any, words: str) -> None:
    row = {k: v for k, v in (ROW | change).items() if v is not None}
    path = write(folder, ROW, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {words}"):
        load_rows(path, 0.0)


def test_wrong_images_of_an_edit(folder: Path) -> None:
    with pytest.raises(DataError, match="1 images of an edit; wanted"):
        load_rows(write(folder, EDIT | {"images": ["a.png"]}), 0.0)
    with pytest.raises(DataError, match="2 images; wanted one for dimension 'alignment'"):
        row = {k: v for k, v in ROW.items() if k != "image"}
        load_rows(write(folder, row | {"images": ["a.png", "b.png"]}), 0.0)


def test_lines_that_are_no_rows(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(folder, "{", "[1]", "nothing", ROW), 0.0)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0][-2:] for line in lines] == [":1", ":2", ":3"]
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(write(folder, ""), 0.0)
    (folder / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(folder / "rows.jsonl", 0.0)
    many = [ROW | {"score": 9}] * 30
    with pytest.raises(DataError, match=r"\.\.\. and 20 more"):
        load_rows(write(folder, *many), 0.0)


def test_images_that_cannot_be_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.fromarray(picture(16, 16, seed)) for seed in (0, 1)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "text.png").write_text("not an image")
    whole = (folder / "a.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (9000, 8000)).save(folder / "huge.png")
    names = ("moving.gif", "text.png", "torn.png", "huge.png", "none.png")
    rows = [ROW | {"image": name} for name in names]
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1]
    )
    with pytest.raises(DataError) as caught:
        load_rows(write(folder, *rows), 0.0)
    assert decoded and (9000, 8000) not in decoded, "refused by its header, before it is decoded"
    lines = str(caught.value).split("\n")
    wanted = (
        "2 frames, animated",
        "not an image in a known format",
        "unreadable or truncated",
        "9000 x 8000 = 72,000,000 pixels; at most 64,000,000",
        "no such file",
    )
    for number, (line, name, words) in enumerate(zip(lines, names, wanted, strict=True), 1):
        assert f"rows.jsonl:{number}: image {folder / name}" in line and words in line, line


def test_decoding(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert (read_image(path) == 255).all(), "what cannot be seen is white, not red"
    Image.new("L", (3, 2), 7).save(path)
    assert read_image(path).shape == (2, 3, 3)
    Image.fromarray(np.full((2, 2), 3000, np.uint16)).save(path)
    with pytest.raises(BadImage, match="more than 8 bits"):
        read_image(path)
    turned = Image.fromarray(picture(4, 8, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (8, 4, 3)
    assert images_module.MAX_PIXELS == 64_000_000


def test_the_split_is_a_function_of_the_normalised_prompt() -> None:
    assert normalised("  A  Red\tCircle \n") == normalised("a red circle") == "a red circle"
    assert normalised("\ufb01ne") == "fine"
    share = int(hashlib.sha256(b"a red circle").hexdigest()[:16], 16) / 2**64
    assert split_of("A red  circle", share + 1e-6) == "heldout"
    assert split_of("A red  circle", share - 1e-6) == "train"
    split = [split_of(f"prompt {i}", 0.3) for i in range(4000)]
    assert abs(split.count("heldout") / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert split_of("x", 0.0) == "train" and split_of("x", 1.0) == "heldout"


def test_a_prompt_or_an_image_in_both_splits_is_a_leak(folder: Path) -> None:
    train = ROW | {"split": "train"}
    same_prompt = ROW | {"image": "b.png", "prompt": "A RED  circle", "split": "heldout"}
    with pytest.raises(DataError, match=r":2: the same prompt 'a red circle'.*train at .*:1;"):
        load_rows(write(folder, train, same_prompt), 0.0)
    Image.open(folder / "a.png").save(folder / "copy.bmp")  # other bytes, same pixels
    same_image = ROW | {"image": "copy.bmp", "prompt": "a house", "split": "heldout"}
    with pytest.raises(DataError, match=r":2: the same image \(by its pixels\).*:1; give both"):
        load_rows(write(folder, train, same_image), 0.0)
    source = EDIT | {"images": ["a.png", "c.png"], "split": "heldout"}
    with pytest.raises(DataError, match="the same image"):
        load_rows(write(folder, train, source), 0.0)
    other = ROW | {"image": "b.png", "prompt": "a house", "split": "heldout"}
    assert len(load_rows(write(folder, train, other), 0.0)) == 2


def test_a_failed_higher_tier_caps_the_lower_ones(folder: Path) -> None:
    failed = ROW | {"score": 2}
    later = ROW | {"dimension": "aesthetics", "score": 4}
    portrait = ROW | {"dimension": "portrait", "score": 2.5}
    elsewhere = later | {"image": "b.png"}  # another image of the prompt: not touched
    path = write(folder, failed, later, portrait, elsewhere)
    order = ("alignment", "aesthetics", "portrait")
    assert [row.score for row in load_rows(path, 0.0)] == [2, 4, 2.5, 4], "off by default"
    with pytest.raises(DataError, match=r":2: score 4 in aesthetics though alignment failed"):
        load_rows(path, 0.0, Tiers(order))
    capped = load_rows(path, 0.0, Tiers(order, cap_labels=True))
    assert [row.score for row in capped] == [2, 2.5, 2.5, 4]
    assert [r.score for r in load_rows(path, 0.0, Tiers(order[::-1]))] == [2, 4, 2.5, 4]
    inline = later | {"image": "c.png", "tier_scores": {"alignment": 1}}
    path = write(folder, inline)
    (row,) = load_rows(path, 0.0, Tiers(order, failed_below=2, cap=3, cap_labels=True))
    assert row.score == 3
