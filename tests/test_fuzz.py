"""Whatever bytes come in, what comes out is a value or the one error that the reader promises.

`make fuzz` gives each reader QIRL_FUZZ inputs (20,000), `make test` a few dozen. Inputs that once
failed stand as examples beside their test; hypothesis keeps new ones in tests/fuzz-corpus.
"""

from __future__ import annotations

import gc
import io
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from PIL import Image

from qirl_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from qirl_fast.config import ConfigError, load_config
from qirl_fast.data.images import Decoder, ImageError
from qirl_fast.data.prompts import PromptError, load_prompts
from qirl_fast.data.sources import Source
from qirl_fast.rewards import wire, wire_answer
from qirl_fast.rewards.wire import WireError

COUNT = int(os.environ.get("QIRL_FUZZ", "50"))
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    database=DirectoryBasedExampleDatabase(str(Path(__file__).parent / "fuzz-corpus")),
    suppress_health_check=list(HealthCheck),
)

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


@fuzz
@given(st.lists(ROW.map(lambda row: json.dumps(row).encode()) | TEXT, max_size=4))
@example([b'{"prompt": "a", "include": [{"class": "circle", "count": 1e400}]}'])
@example([b"[" * 100_000])
def test_prompt_files(place: Path, lines: list[bytes]) -> None:
    file = place / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    with suppress(PromptError):
        assert all(isinstance(p.prompt, str) and p.prompt for p in load_prompts(file))


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "train", "steps", "path", "lora", "x"]), inner)
    ),
    max_leaves=8,
)


@fuzz
@given(TEXT | YAML.map(lambda value: json.dumps(value).encode()), st.text(max_size=20))
@example(b"a: &a [*a, *a]", "x")
@example(b"!!python/object/apply:os.system ['false']", "x")
@example(b"train: ${train}", "x")
@example(b"", "seed=${oc.env:HOME}")
def test_recipes(place: Path, text: bytes, word: str) -> None:
    file = place / "recipe.yaml"
    file.write_bytes(text)
    with suppress(ConfigError):
        load_config([str(file), f"run={word}"])
    with suppress(ConfigError):
        load_config([word])


def pictures() -> dict[str, bytes]:
    pixels = np.arange(16 * 12 * 4, dtype=np.uint8).reshape(16, 12, 4)
    found = {}
    for name, mode in (("a.png", "RGBA"), ("a.jpg", "RGB"), ("a.webp", "RGB")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, {"a.jpg": "JPEG"}.get(name, name[2:]))
        found[name] = buffer.getvalue()
    return found


PICTURES = pictures()
DECODER = Decoder("pil", threads=1)


@fuzz
@given(st.data(), st.sampled_from(sorted(PICTURES)))
def test_images(place: Path, data: st.DataObject, name: str) -> None:
    file = place / name
    file.write_bytes(changed(data, PICTURES[name]))
    (found,) = DECODER([Source(name, file)], [[(8, 8)]])
    if not isinstance(found, ImageError):
        assert found[0].shape[:2] == (8, 8) and found[0].dtype == np.uint8


@fuzz
@given(data=st.data())
def test_checkpoints(place: Path, data: st.DataObject) -> None:
    run = place / "run"
    tensors, state = {"w": torch.arange(5.0)}, {"tree": [1, 2]}
    if not run.exists():
        save_checkpoint(run, 1, tensors, state, None, keep=1)
    folder = run / "checkpoints" / "checkpoint-1"
    file = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    whole = file.read_bytes()
    file.write_bytes(changed(data, whole))
    try:
        with suppress(CheckpointError):
            found = load_checkpoint(folder)
            assert torch.equal(found.tensors["w"], tensors["w"]) and found.state == state
    finally:
        file.write_bytes(whole)


LIMITS = wire.Limits()
QUESTION = wire.encode(
    "r", "j", ["a", "b"], np.zeros((2, 4, 4, 3), np.uint8), [{"prompt": "a"}, {}]
)


@fuzz
@given(data=st.data())
def test_requests_and_answers(data: st.DataObject) -> None:
    body = data.draw(st.binary(max_size=200)) if data.draw(st.booleans()) else None
    with suppress(WireError):
        wire.decode(changed(data, QUESTION) if body is None else body, LIMITS).unpack()
    answer = json.dumps({"version": 1, "request": "r"} | data.draw(ROW)).encode()
    with suppress(WireError):
        wire_answer.decode(changed(data, answer), "r", ["a"])


def test_nothing_is_kept_of_what_came(place: Path) -> None:
    """After hundreds of bad inputs there are as many objects as after the first dozens."""
    file = place / "leak.jsonl"

    def feed(times: int) -> int:
        for i in range(times):
            file.write_bytes(b'{"prompt": "' + bytes([i % 256]) * (i % 97))
            with suppress(PromptError):
                load_prompts(file)
            with suppress(ConfigError):
                load_config([f"train.lr={'x' * (i % 97)}"])
            with suppress(WireError):
                wire.decode(bytes([i % 256]) * (i % 97), LIMITS)
        gc.collect()
        return len(gc.get_objects())

    first = feed(40)
    assert feed(120) - first < 120
