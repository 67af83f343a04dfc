"""Kept images: back bit for bit, or noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qirl_fast.contest.kept_images import KeptImages

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)


def kept(folder: Path) -> KeptImages:
    own = KeptImages(folder)
    own.put("k", IMAGES)
    return own


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_they_come_back(tmp_path: Path) -> None:
    own = kept(tmp_path / "x")
    assert own.sound("k", 3) and not own.sound("other", 3) and own.damaged == []
    assert np.array_equal(own.get("k", 3), IMAGES)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped": ("k-001.png", flip),
    "truncated": ("k-002.png", lambda p: p.write_bytes(p.read_bytes()[:-20])),
    "emptied": ("k-000.png", lambda p: p.write_bytes(b"")),
    "gone": ("k-000.png", lambda p: p.unlink()),
    "index flipped": ("k.json", flip),
    "index truncated": ("k.json", lambda p: p.write_bytes(p.read_bytes()[:30])),
    "index of another kind": ("k.json", lambda p: p.write_text("[]")),
    "index of fewer": ("k.json", lambda p: p.write_text('{"files": {}}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_said(tmp_path: Path, damage: str) -> None:
    own = kept(tmp_path)
    name, do = DAMAGES[damage]
    do(tmp_path / name)
    assert not own.sound("k", 3)
    (line,) = own.damaged
    assert name.split(".")[0] in line and "its chunk of 3 images is drawn again" in line


def test_what_was_being_written_is_not_there(tmp_path: Path) -> None:
    kept(tmp_path)
    (tmp_path / "k.json").unlink()
    own = KeptImages(tmp_path)
    assert not own.sound("k", 3) and own.damaged == []
