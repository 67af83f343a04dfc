"""Whatever bytes come in, what comes out is a value or the one error that the reader promises.

`make fuzz` gives each reader QIRL_FUZZ inputs of hypothesis, then many more that atheris guides
(fuzz/guided.py); `make test` gives a few dozen, and every file of fuzz/corpora. Inputs that once
failed stand there or as examples beside their test.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from readers import CORPORA, QUESTION, READERS, checkpoint, picture, readers

COUNT = int(os.environ.get("QIRL_FUZZ", "50"))
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    database=DirectoryBasedExampleDatabase(str(Path(__file__).parent / "fuzz" / "found")),
    suppress_health_check=list(HealthCheck),
)
Feed = dict[str, Callable[[bytes], None]]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=12) | JSON,
        "image": st.sampled_from(["a.png", "../a.png", "/etc/passwd", ""]) | JSON,
        "images": st.lists(st.sampled_from(["a.png", "b.png"])) | JSON,
        "include": st.lists(st.dictionaries(st.sampled_from(["class", "count", "color"]), JSON))
        | JSON,
        "tag": st.text(max_size=4) | JSON,
        "category": JSON,
        "metadata": JSON,
    },
)
TEXT = st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "replace"))


def changed(data: st.DataObject, whole: bytes) -> bytes:
    """`whole` with bytes changed, some of it gone, or something added."""
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(found)) | st.just(len(found)))
    return bytes(found[:cut]) + data.draw(st.binary(max_size=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def feed(place: Path) -> Feed:
    return readers(place)


KEPT = sorted(path for path in CORPORA.glob("*/*"))


@pytest.mark.parametrize("file", KEPT, ids=lambda path: f"{path.parent.name}-{path.name[:12]}")
def test_what_is_kept(feed: Feed, file: Path) -> None:
    feed[file.parent.name](file.read_bytes())


def test_every_reader_has_a_corpus(feed: Feed) -> None:
    assert {path.parent.name for path in KEPT} == set(feed) and set(READERS) < set(feed)
    assert all(path.stat().st_size <= 4096 for path in KEPT)


@fuzz
@given(st.lists(ROW.map(lambda row: json.dumps(row).encode()) | TEXT, max_size=4))
@example([b'{"prompt": "a", "include": [{"class": "circle", "count": 1e400}]}'])
@example([b"[" * 100_000])
def test_prompt_files(feed: Feed, lines: list[bytes]) -> None:
    feed["prompts"](b"\n".join(lines))


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "train", "steps", "path", "lora", "x"]), inner)
    ),
    max_leaves=8,
)


@fuzz
@given(TEXT | YAML.map(lambda value: json.dumps(value).encode()))
@example(b"a: &a [*a, *a]")
@example(b"!!python/object/apply:os.system ['false']")
@example(b"train: ${train}")
@example(b"seed=${oc.env:HOME}")
def test_recipes(feed: Feed, text: bytes) -> None:
    feed["recipes"](text)


@fuzz
@given(st.data(), st.sampled_from([picture(form) for form in ("PNG", "JPEG", "WEBP")]))
def test_images(feed: Feed, data: st.DataObject, whole: bytes) -> None:
    feed["images"](changed(data, whole))


@fuzz
@given(data=st.data())
def test_checkpoints(feed: Feed, place: Path, data: st.DataObject) -> None:
    files = list(checkpoint(place).values())
    which = data.draw(st.integers(0, len(files) - 1))
    feed["checkpoints"](bytes([which]) + changed(data, files[which]))


@fuzz
@given(data=st.data())
def test_requests_and_answers(feed: Feed, data: st.DataObject) -> None:
    body = data.draw(st.binary(max_size=200)) if data.draw(st.booleans()) else None
    feed["requests"](changed(data, QUESTION) if body is None else body)
    answer = json.dumps({"version": 1, "request": "r"} | data.draw(ROW)).encode()
    feed["answers"](changed(data, answer))


HEAD = b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(QUESTION)


@fuzz
@given(st.data(), st.sampled_from([HEAD, HEAD + QUESTION, b"GET /health HTTP/1.0\r\n\r\n"]))
def test_http(feed: Feed, data: st.DataObject, whole: bytes) -> None:
    feed["http"](changed(data, whole))


@pytest.mark.slow
def test_guided_by_coverage() -> None:
    """A few hundred inputs a reader under atheris, as `make fuzz` gives tens of thousands."""
    pytest.importorskip("atheris", reason=".ci/install fuzz")
    script = Path(__file__).parent / "fuzz" / "guided.py"
    done = subprocess.run(
        [sys.executable, script, "300"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count(" inputs, ") == len(READERS) + 1


def test_nothing_is_kept_of_what_came(feed: Feed) -> None:
    """After hundreds of bad inputs there are as many objects as after the first dozens."""

    def objects(times: int) -> int:
        for i in range(times):
            for name in ("prompts", "recipes", "requests", "http"):
                feed[name](b'{"prompt": "' + bytes([i % 256]) * (i % 97))
        gc.collect()
        return len(gc.get_objects())

    first = objects(40)
    assert objects(120) - first < 120
