"""A run whose judge is on a server that dies in the middle of a step and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import held_port

# The fourth call of the first server (two requests an update, after the evaluation's) never ends.
JUDGE = """
import os, time
from pathlib import Path
from qirl_fast.rewards import alignment

calls = 0

def score(images, rows):
    global calls
    calls += 1
    if os.environ.get("STUCK") and calls == 4:
        Path(os.environ["STUCK"]).write_text("")
        time.sleep(600)
    return alignment.score(images, rows)
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`serve(port, stuck="")`: a reward server of the judge."""
    (tmp_path / "far_judge.py").write_text(JUDGE)
    (tmp_path / "server.yaml").write_text("{serve: ['far_judge:score']}")
    running: list[subprocess.Popen[str]] = []

    def start(port: int, stuck: str = "") -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [sys.executable, "-m", "qirl_fast.reward_server", "server.yaml", f"port={port}"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "STUCK": stuck},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(server)
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line == f"serving far_judge:score on http://127.0.0.1:{port}\n"
        return server

    yield start
    for server in running:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as number:
        yield number


def outcome(run: Path) -> tuple[str, bytes]:
    state = run / "checkpoints" / "checkpoint-2" / "state.safetensors"
    return (run / "metrics.jsonl").read_text(), state.read_bytes()


@pytest.mark.slow
@pytest.mark.chaos("the reward server is killed and started again: no number changes")
def test_a_server_killed_in_the_middle_of_a_step_changes_no_number(
    serve: Any, start: Any, small: tuple[str, ...], tmp_path: Path, port: int
) -> None:
    here = [*small, f"output={tmp_path}", "rewards={'far_judge:score': 1.0}", "watch=[]"]
    local = start([*here, "run=local"], paths=[tmp_path])
    assert local.wait() == 0, local.output()

    stuck = tmp_path / "stuck"
    server = serve(port, stuck=str(stuck))
    far = f"{{kind: remote, url: 'http://127.0.0.1:{port}', judge: 'far_judge:score', "
    far += "rows_per_request: 4, concurrency: 1, backoff_s: 0.1}"
    rewards = ("rewards={far: 1.0}", f"judges={{far: {far}}}")
    remote = start([*small, f"output={tmp_path}", "watch=[]", *rewards, "run=remote"])
    deadline = time.monotonic() + 300
    while not stuck.exists():
        assert time.monotonic() < deadline and remote.process.is_alive(), remote.output()
        time.sleep(0.05)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    serve(port=port)
    assert remote.wait() == 0, remote.output()

    metrics, state = outcome(tmp_path / "remote")
    wanted, wanted_state = outcome(tmp_path / "local")
    assert metrics.replace("/far", "/far_judge:score") == wanted
    assert state == wanted_state
    assert "asking again" in (tmp_path / "remote" / "log.txt").read_text()
