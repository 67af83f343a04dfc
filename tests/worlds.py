"""Runs in several processes: their environment, how they ended, and whether two did the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qirl_fast.checkpoint import load_checkpoint, unpack

CLOSE = 1e-4


@contextmanager
def held_port() -> Iterator[int]:
    """A port of 127.0.0.1 that inside is given to nobody who asks for any. A socket that does not
    listen holds it: who connects is refused, until another, told the number, listens beside it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def environments(count: int) -> Iterator[list[dict[str, str]]]:
    """What torchrun would tell each of `count` processes."""
    with held_port() as port:
        own = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        yield [own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def talk(count: int, source: str, *arguments: object) -> list[str]:
    """What each of `count` processes of this source prints, when all have ended well."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    with environments(count) as told:
        started = [
            subprocess.Popen(
                command,
                env=os.environ | own,
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                text=True,
            )
            for own in told
        ]
        outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return outputs


def ended(runs: Sequence[Any]) -> list[int]:
    """Their exit codes; -n of one that signal n killed."""
    return [run.process.exitcode for run in runs]


def written(folder: Path) -> dict[str, bytes]:
    """What must be the same in runs of the same numbers."""
    files = ["metrics.jsonl", "checkpoints/checkpoint-2/state.safetensors"]
    files.append("checkpoints/checkpoint-2/pytorch_lora_weights.safetensors")
    return {name: (folder / name).read_bytes() for name in files}


def content(folder: Path, step: int) -> list[bytes]:
    """What must repeat to the byte."""
    last = folder / "checkpoints" / f"checkpoint-{step}"
    files = [folder / "metrics.jsonl", last / "state.safetensors", last / "state.json"]
    return [file.read_bytes() for file in files]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(folder: Path, other: Path, weights: float, steps: int = 2) -> None:
    """Metrics of two runs of two optimizer steps an update agree to CLOSE, of the size of each;
    weights and their averages to `weights`, of the norm of each.
    """
    assert len(metrics(folder)) == len(metrics(other)) == steps
    for a, b in zip(metrics(folder), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=CLOSE, abs=CLOSE / 10), name
    states = []
    for f in (folder, other):
        found = load_checkpoint(f / "checkpoints" / f"checkpoint-{steps}")
        states.append(unpack(found.tensors, found.state["tree"])["learner"])
    ours, theirs = states
    assert ours["weights"].keys() == theirs["weights"].keys()
    held = [[*state["weights"].values(), *state["ema"]] for state in states]
    for a, b in zip(*held, strict=True):
        assert (a - b).norm() <= weights * b.norm()
    for state in states:
        assert state["optimizer_steps"] == state["optimizer"]["state"][0]["step"] == 2 * steps
