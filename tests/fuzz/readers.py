"""What reads bytes of others, as functions of bytes: each returns, or its reader's own error comes.

That error is caught here; anything else is a fault. Hypothesis (test_fuzz.py) and atheris
(guided.py) feed them, and `make test` feeds them every file of corpora/<reader>/ again.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import h11
import numpy as np
import torch
import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qirl_fast.checkpoint import CheckpointError, load_checkpoint, manifest, save_checkpoint
from qirl_fast.config import ConfigError, load_config
from qirl_fast.data.images import Decoder, ImageError
from qirl_fast.data.prompts import PromptError, load_prompts
from qirl_fast.data.sources import Source
from qirl_fast.reward_app import App
from qirl_fast.rewards import wire, wire_answer
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.served import Served
from qirl_fast.rewards.wire import WireError

CORPORA = Path(__file__).parent / "corpora"
LIMITS = wire.Limits(body_bytes=2**16, rows=8, image_pixels=2**12, request_pixels=2**13)
PIXELS = np.arange(16 * 12 * 4, dtype=np.uint8).reshape(16, 12, 4)
QUESTION = wire.encode(
    "r", "aesthetics", ["a", "b"], np.zeros((2, 4, 4, 3), np.uint8), [{"prompt": "a"}, {}]
)
DECODER = Decoder("pil", threads=1)


def picture(form: str) -> bytes:
    """A small sound file: "PNG", "JPEG" or "WEBP"."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert("RGBA" if form == "PNG" else "RGB").save(buffer, form)
    return buffer.getvalue()


def prompts(place: Path, data: bytes) -> None:
    """A prompt file."""
    file = place / "rows.jsonl"
    file.write_bytes(data)
    with suppress(PromptError):
        assert all(isinstance(p.prompt, str) and p.prompt for p in load_prompts(file))


def recipes(place: Path, data: bytes) -> None:
    """A recipe, then a word of the command line."""
    file = place / "recipe.yaml"
    file.write_bytes(data)
    word = data.decode("utf-8", "replace")
    for words in ([str(file)], [word], [f"run={word}"]):
        with suppress(ConfigError):
            load_config(words)


def images(place: Path, data: bytes) -> None:
    """A picture; its name fits its first bytes, or is any."""
    name = {b"\x89": "a.png", b"R": "a.webp"}.get(data[:1], "a.jpg")
    file = place / name
    file.write_bytes(data)
    (found,) = DECODER([Source(name, file)], [[(8, 8)]])
    if not isinstance(found, ImageError):
        assert found[0].shape[:2] == (8, 8) and found[0].dtype == np.uint8


def checkpoint(place: Path) -> dict[Path, bytes]:
    """Files of a small sound checkpoint, in order."""
    folder = place / "run" / "checkpoints" / "checkpoint-1"
    if not folder.exists():
        save_checkpoint(place / "run", 1, {"w": torch.arange(5.0)}, {"tree": [1, 2]}, None, keep=1)
    names = ["manifest.json", "state.json", "state.safetensors"]
    return {folder / name: (folder / name).read_bytes() for name in names}


def checkpoints(place: Path, data: bytes) -> None:
    """A checkpoint with the file that the first byte names replaced; then signed anew."""
    whole = checkpoint(place)
    file = list(whole)[data[0] % 3 if data else 0]
    file.write_bytes(data[1:])
    try:
        with suppress(CheckpointError):
            found = load_checkpoint(file.parent)
            assert torch.equal(found.tensors["w"], torch.arange(5.0))
            assert found.state == {"tree": [1, 2]}
        if file.name != "manifest.json":
            (file.parent / "manifest.json").unlink()
            with mock.patch.object(manifest, "sync"):  # to the disk: not for this
                manifest.write_manifest(file.parent, 1)
            with suppress(CheckpointError):
                found = load_checkpoint(file.parent)
                assert all(isinstance(t, torch.Tensor) for t in found.tensors.values())
                assert isinstance(found.state, dict)
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


def requests(place: Path, data: bytes) -> None:
    """The body of a question to the reward server."""
    with suppress(WireError):
        wire.decode(data, LIMITS).unpack()


def answers(place: Path, data: bytes) -> None:
    """The body of a reward server's answer."""
    with suppress(WireError):
        wire_answer.decode(data, "r", ["a"])


class Wire(asyncio.Transport):
    """What the reward server writes to a client."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.came, self.closed = b"", False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.came += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Http:
    """The reward server as uvicorn runs it, on bytes in place of sockets."""

    def __init__(self) -> None:
        judges = {"aesthetics": Served(Judges(["aesthetics"]), kept=4)}
        app = App(judges, None, LIMITS, requests=4, body_s=20.0).starlette()
        self.config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None)
        self.config.load()
        self.loop = asyncio.new_event_loop()

    def __call__(self, place: Path, data: bytes) -> None:
        """All bytes of a client that sends and leaves."""
        self.loop.run_until_complete(self.client(data))

    async def client(self, data: bytes) -> None:
        state, wire_ = ServerState(), Wire()
        protocol = H11Protocol(self.config, state, {}, _loop=self.loop)
        protocol.connection_made(wire_)
        try:
            if data:
                protocol.data_received(data)
        except h11.LocalProtocolError as error:
            # uvicorn 0.54 answers a HEAD with a broken body by a body; asyncio closes what raises.
            protocol.connection_lost(error)
        while state.tasks:
            if protocol.cycle.more_body:  # it never comes
                protocol.connection_lost(None)
            await asyncio.wait(state.tasks)
        protocol.connection_lost(None)
        if wire_.came:
            version, status = wire_.came.split()[:2]
            assert version == b"HTTP/1.1" and 100 <= int(status) < 500, wire_.came


READERS = {
    "prompts": prompts,
    "recipes": recipes,
    "images": images,
    "checkpoints": checkpoints,
    "requests": requests,
    "answers": answers,
}


def readers(place: Path) -> dict[str, Callable[[bytes], None]]:
    """All of them by name; files are written in `place`."""
    return {name: partial(read, place) for name, read in (READERS | {"http": Http()}).items()}
