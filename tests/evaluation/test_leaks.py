"""Leaks: each kind is found, and what is none is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qirl_fast.data.prompts import Prompt, load_prompts
from qirl_fast.evaluation.leaks import find_leaks


def rows(folder: Path, name: str, *rows: dict | str) -> list[Prompt]:
    """Rows of a .jsonl file."""
    path = folder / f"{name}.jsonl"
    plain = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return load_prompts(path)


LONG = "an old lighthouse on a cliff above a stormy sea at night with a red boat"


def test_each_kind(tmp_path: Path) -> None:
    trained = rows(
        tmp_path,
        "train",
        {"prompt": "a red cube", "tag": "x"},
        "Two  Blue\u3000spheres",
        LONG,
        "a cat",
    )
    own = rows(
        tmp_path,
        "own",
        {"prompt": "a red cube", "tag": "x"},
        {"prompt": "a red cube", "tag": "y"},
        "two blue spheres",
        f"{LONG}, masterpiece, 4k, award winning photo",
        "a cat on a mat",
        "a green cone",
    )
    found = find_leaks(own, {"train": trained}, 0.9)
    assert [(leak.index, leak.kind) for leak in found] == [
        (0, "row"),
        (1, "text"),
        (2, "text"),
        (3, "near"),  # contained, though its Jaccard similarity is 0.72
    ]
    assert found[3].likeness == 1.0 and found[3].trained == LONG and found[3].source == "train"


def test_jaccard_is_the_share_of_common_words(tmp_path: Path) -> None:
    trained = rows(tmp_path, "train", "a b c d", "x y")
    own = rows(tmp_path, "own", "d! C, b e")
    assert find_leaks(own, {"t": trained}, 0.61) == []
    (leak,) = find_leaks(own, {"t": trained}, 0.6)
    assert leak.likeness == pytest.approx(3 / 5) and leak.trained == "a b c d"


def test_against_a_plain_loop(tmp_path: Path) -> None:
    """Blocks and sparse products give what sets give."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(12)])
    trained = [" ".join(rng.choice(words, 6)) for _ in range(80)]
    own = [" ".join(rng.choice(words, 6)) for _ in range(600)]
    found = find_leaks(rows(tmp_path, "own", *own), {"t": rows(tmp_path, "train", *trained)}, 0.7)
    wanted = {}
    sets = [set(text.split()) for text in trained]
    for i, text in enumerate(own):
        e = set(text.split())
        likest = max(len(e & t) / len(e | t) for t in sets)
        if likest >= 0.7:
            wanted[i] = likest
    got = {leak.index: leak.likeness for leak in found}
    assert got == pytest.approx(wanted) and len(got) > 20


def test_an_edit_is_known_by_its_picture(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 90)):
        pixels = np.full((8, 8, 3), value, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    trained = rows(tmp_path, "train", {"prompt": "make it red", "image": "a.png"}, "make it blue")
    own = rows(
        tmp_path,
        "own",
        {"prompt": "make it green", "image": "c.png"},
        {"prompt": "make it red", "image": "b.png"},
        {"prompt": "make it red", "image": "gone.png"},
        "make it red",
    )
    found = find_leaks(own, {"t": trained}, 0.9)
    assert [(leak.index, leak.kind) for leak in found] == [(0, "image")]


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a number above 0"):
        find_leaks(rows(tmp_path, "own", "a"), {}, 0.0)
