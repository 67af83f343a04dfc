"""docs/data.md: the rows load, the examples run, and the limits are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from qirl_fast.data.images import MAX_PIXELS, MAX_SIDE
from qirl_fast.data.prompts import load_prompts

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.M)
PYTHON = [body for language, body in BLOCKS if language == "python"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the rows of the page and their images, as the working directory."""
    (rows,) = [body for language, body in BLOCKS if language == "json"]
    (tmp_path / "edits.jsonl").write_text(rows)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photos" / "1.jpg")
    Image.new("RGBA", (40, 40), "blue").save(tmp_path / "photos" / "2.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_rows_load(place: Path) -> None:
    prompts = load_prompts(place / "edits.jsonl")
    assert [prompt.category for prompt in prompts] == ["colour", None, "counting"]
    assert [len(prompt.images) for prompt in prompts] == [1, 2, 1]
    assert prompts[1].metadata["source"] == "mine"


def test_the_folder_loads(place: Path) -> None:
    (text,) = [body for language, body in BLOCKS if language == "text"]
    for name in re.findall(r"set/\S+", text):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text('{"prompt": "p"}')
    assert [len(prompt.images) for prompt in load_prompts(place / "set")] == [1, 2]


@pytest.mark.parametrize("body", PYTHON)
def test_the_example_runs(body: str, place: Path) -> None:
    exec(compile(body, "docs/data.md", "exec"), {})


def test_the_limits_are_stated() -> None:
    assert f"{MAX_SIDE:,}" in PAGE and f"{MAX_PIXELS:,}" in PAGE and len(PYTHON) == 4
