"""Prompt files: every bad row is named by file and line; real public files read whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from qirl_fast.data.prompts import PromptError, load_prompts

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"
ROW = {
    "tag": "position",
    "include": [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 2, "position": ["left of", 0]},
    ],
    "exclude": [{"class": "circle", "count": 2}],
    "prompt": "two squares left of a red circle",
    "note": {"kept": [1.5, None]},
}


def write(path: Path, *rows: object, end: str = "\n") -> Path:
    text = end.join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes((text + end).encode())
    return path


def test_geneval_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROW, {"prompt": " a cat "})
    first, second = load_prompts(path)
    assert (first.prompt, first.category, first.metadata) == (ROW["prompt"], "position", ROW)
    assert (second.prompt, second.category, second.metadata) == (
        " a cat ",
        None,
        {"prompt": " a cat "},
    )
    assert len({first.id, second.id}) == 2 and len(first.id) == 16


def test_id_is_of_the_content_not_of_key_order_or_place(tmp_path: Path) -> None:
    turned = dict(reversed(ROW.items()))
    (a,) = load_prompts(write(tmp_path / "a.jsonl", ROW))
    _, b = load_prompts(write(tmp_path / "b.jsonl", {"prompt": "x"}, turned))
    (c,) = load_prompts(write(tmp_path / "c.jsonl", {**ROW, "tag": "other"}))
    assert a.id == b.id != c.id


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_byte_order_mark_and_line_ends(
    tmp_path: Path, suffix: str, mark: bytes, end: bytes, last: bool
) -> None:
    texts = ["ein gr\u00fcner W\u00fcrfel", "\U0001f600 line\u2028separator\x0bkept", "c"]
    rows = [t if suffix == ".txt" else json.dumps({"prompt": t}, ensure_ascii=False) for t in texts]
    path = tmp_path / f"p{suffix}"
    path.write_bytes(mark + end.join(row.encode() for row in rows) + (end if last else b""))
    assert [prompt.prompt for prompt in load_prompts(path)] == texts


def test_repeats_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.txt", "a", "b", "a", "a")
    assert len(load_prompts(path)) == 4
    assert "2 of 4 prompts repeat an earlier one" in caplog.text


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"prompt": "a"', "malformed JSON at column 15"),
        ("", "got a blank line"),
        ("[1]", "got a list ([1]); wanted a JSON object"),
        ('"a cat"', 'got a text ("a cat"); wanted a JSON object'),
        ({}, "no 'prompt' among the keys (none)"),
        ({"text": "a"}, "no 'prompt' among the keys (text)"),
        ({"prompt": ""}, "the prompt is blank"),
        ({"prompt": " \t"}, "the prompt is blank"),
        ({"prompt": 3}, "'prompt' is a number (3); wanted a text"),
        ({"prompt": None}, "'prompt' is null (null); wanted a text"),
        ({**ROW, "tag": 1}, "'tag' is a number (1); wanted a text"),
        ({**ROW, "include": {}}, "'include' is an object ({}); wanted a list of objects"),
        ({**ROW, "exclude": ["x"]}, 'exclude[0]: got a text ("x"); wanted an object'),
        ({**ROW, "include": [{"count": 1}]}, "include[0]: no 'class' among the keys (count)"),
        ({**ROW, "include": [{"class": "a"}]}, "include[0]: no 'count' among the keys (class)"),
        ({**ROW, "include": [{"class": "a", "count": "1"}]}, "'count' is a text"),
        ({**ROW, "include": [{"class": "a", "count": True}]}, "'count' is a true/false value"),
        ({**ROW, "include": [{"class": "a", "count": -1}]}, "got count -1; wanted 0 or more"),
        ({**ROW, "include": [{"class": "a", "count": 1, "color": 3}]}, "'color' is a number"),
        (
            {**ROW, "include": [{"class": "a", "count": 1, "position": ["left of", 1]}]},
            'got position ["left of", 1]; wanted [relation, index of another object]',
        ),
        (
            {**ROW, "include": [{"class": "a", "count": 1, "position": "left"}]},
            'got position "left"; wanted',
        ),
        ('{"prompt": "a", "x": NaN}', "got NaN; wanted a finite number"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, part: str) -> None:
    path = write(tmp_path / "p.jsonl", ROW, row, ROW)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ") and part in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    empty = tmp_path / "e.jsonl"
    for content in (b"", b"\xef\xbb\xbf"):
        empty.write_bytes(content)
        with pytest.raises(PromptError, match="the file is empty; wanted at least one prompt"):
            load_prompts(empty)
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        (tmp_path / "folder.txt").mkdir()
        load_prompts(tmp_path / "folder.txt")
    with pytest.raises(PromptError, match=r"got a \.csv file; wanted \.jsonl or \.txt"):
        load_prompts(tmp_path / "p.csv")
    (tmp_path / "l.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(PromptError, match=r"l\.txt:2: byte 3 is not UTF-8"):
        load_prompts(tmp_path / "l.txt")
    (tmp_path / "b.txt").write_bytes(b"fine\n  \nfine\n")
    with pytest.raises(PromptError, match=r"b\.txt:2: the prompt is blank"):
        load_prompts(tmp_path / "b.txt")


@pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"public prompt files are not at {PUBLIC}")
@pytest.mark.parametrize(
    ("name", "rows", "tags"),
    [
        ("geneval_test.jsonl", 2212, {"counting": 320, "color_attr": 400, "single_object": 320}),
        ("counting_edit_test.jsonl", 112, {"counting": 112}),
        ("drawbench_test.txt", 1000, {}),
        ("ocr_test.txt", 1018, {}),
        ("pickscore_sfw_test.txt", 1024, {}),
    ],
)
def test_public_files(name: str, rows: int, tags: dict[str, int]) -> None:
    prompts = load_prompts(PUBLIC / name)
    assert len(prompts) == rows
    counts = Counter(prompt.category for prompt in prompts)
    assert {tag: counts[tag] for tag in tags} == tags
    assert set(counts) == {None} or None not in counts
    lines = (PUBLIC / name).read_text(encoding="utf-8").split("\n")
    last = lines[rows - 1]
    assert prompts[-1].prompt == (json.loads(last)["prompt"] if tags else last.strip())


def test_paths_may_be_text(tmp_path: Path) -> None:
    assert len(load_prompts(os.fspath(write(tmp_path / "p.txt", "a")))) == 1
