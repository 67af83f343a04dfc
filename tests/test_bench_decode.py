"""python -m bench decode: every provider decodes the same files; a missing one is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import decode
from qirl_fast.data.images import header
from qirl_fast.data.sources import Source

SMALL = decode.Options(rounds=1, seconds=0.01, step_s=0.01, steps=2, images_per_step=2, scale=0.05)


def test_the_files_are_of_every_kind(tmp_path: Path) -> None:
    sources = decode.make_photos(tmp_path, 0.05)
    heads = [header(source) for source in sources]
    assert len(sources) == 8 * len(decode.KINDS)
    assert {head.format for head in heads} == {"JPEG", "PNG", "WEBP"}
    assert {max(head.height, head.width) for head in heads} == {64, 150, 51}


def test_result_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(decode, "VERSIONS", [(32, 32), (16, 16)])
    said: list[str] = []
    result = json.loads(json.dumps(decode.run(SMALL, said.append)))
    groups = [kind[0] for kind in decode.KINDS] + ["all", "all"]
    rows = [row for row in result["rows"] if row["provider"] == "pil"]
    assert [row["files"] for row in rows if row["threads"] == 1] == groups
    assert all(row["images_per_s"] > 0 and row["vs_pil"] == 1 for row in rows)
    assert [(row["provider"], row["prefetch"]) for row in result["loader"]] == [
        ("pil", True),
        ("pil", False),
    ]
    assert all(0 <= row["share"] < 1 for row in result["loader"])
    assert any("dali left out" in text and "pip install" in text for text in said)
    text = decode.markdown(result)
    assert text.count("| pil |") == 12 + 2 and "dali left out" in text
    decode.plot(result, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_bad_image_ends_the_loader_test(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        decode.waiting([Source("bad.png", tmp_path / "bad.png")], "pil", True, SMALL)
