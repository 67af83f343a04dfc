"""The reward server as a program: its settings, its token, how it ends and is started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from worlds import held_port

from qirl_fast import configs_dir, reward_server
from qirl_fast.config import ConfigError, load_settings
from qirl_fast.config.server import ServerConfig
from qirl_fast.listening import listen
from qirl_fast.rewards.judge import SCORED
from qirl_fast.rewards.remote import Remote, Settings

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 6, 3), np.uint8)
ROWS = [{"prompt": "x" * i} for i in range(6)]
EXPECTED = np.array([im.mean() + i for i, im in enumerate(IMAGES)], np.float32)


@contextmanager
def remote(url, judge="mean", **settings):
    quick = {"deadline_s": 120, "attempt_s": 60, "backoff_s": 0.02, "backoff_max_s": 0.05}
    found = Remote(Settings(kind="remote", url=url, judge=judge, **quick | settings))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def settings_file(tmp_path):
    def write(**settings):
        file = tmp_path / "server.yaml"
        file.write_text(json.dumps({"serve": ["aesthetics"], "device": "cpu"} | settings))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "0.0.0.0"}, "host: 0.0.0.0 can be reached from other machines"),
        ({"host": "::"}, "host: :: can be reached"),
        ({"host": "myhost"}, "host: myhost can be reached"),
        ({"serve": []}, "serve: "),
        ({"serve": ["alinment"]}, "serve: no judge is called 'alinment': did you mean 'alignment'"),
        ({"serve": ["aesthetics", "aesthetics"]}, "serve: 'aesthetics' is there twice"),
        (
            {"judges": {"alignment": {"kind": "python", "path": "a:b"}}},
            "judges.alignment: is the name of a packaged judge",
        ),
        ({"port": 70000}, "port: got 70000"),
        ({"limits": {"bytes": 1}}, "limits.bytes: unknown key"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings_file, settings, text, capsys):
    assert reward_server.main([settings_file(**settings)]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "token_env": "QIRL_TEST_TOKEN"},
        {"host": "0.0.0.0", "allow_unauthenticated": True},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "127.1.2.3"},
    ],
)
def test_who_listens_to_others_has_a_token_or_said_so(settings_file, settings):
    assert load_settings([settings_file(**settings)], ServerConfig).host == settings["host"]


@pytest.mark.parametrize("value", [None, "", "short", "with some spaces in it"])
def test_a_token_that_is_none_is_refused(settings_file, monkeypatch, capsys, value):
    monkeypatch.delenv("QIRL_TEST_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("QIRL_TEST_TOKEN", value)
    assert reward_server.main([settings_file(token_env="QIRL_TEST_TOKEN", port=0)]) == 2
    error = capsys.readouterr().err
    assert "QIRL_TEST_TOKEN is not set or no token; wanted 16 or more" in error
    assert not value or value not in error


def test_a_port_in_use_is_told(settings_file, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert reward_server.main([settings_file(port=port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_answers_are_not_delayed(settings_file):
    cfg = load_settings([settings_file(port=0)], ServerConfig)
    listening = listen(cfg.host, cfg.port)
    listening.listen()
    host, port = listening.getsockname()
    with listening, socket.create_connection((host, port)), listening.accept()[0] as connection:
        assert connection.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY on no other


def test_missing_libraries_are_told_with_what_brings_them(settings_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert reward_server.main([settings_file()]) == 2
    assert "uvicorn is not installed; `pip install 'qirl-fast[server]'`" in capsys.readouterr().err


def test_a_judge_that_cannot_be_built_is_named(settings_file, capsys):
    path = {"broken": {"kind": "python", "path": "json:nothing"}}
    assert reward_server.main([settings_file(serve=["broken"], judges=path, port=0)]) == 2
    assert "judge 'broken': " in capsys.readouterr().err


def test_help_and_no_settings(capsys):
    assert reward_server.main(["--help"]) == 0
    assert "python -m qirl_fast.reward_server" in capsys.readouterr().out
    assert reward_server.main([]) == 2


def test_the_packaged_settings_are_sound():
    path = str(configs_dir() / "reward_server.yaml")
    assert load_settings([path, "port=0"], ServerConfig).serve == ["alignment", "aesthetics"]
    with pytest.raises(ConfigError, match="unknown key"):
        load_settings([path, "prt=0"], ServerConfig)


SLOW_JUDGE = """
import os, time
from pathlib import Path

def score(images, rows):
    marker = Path(__file__).with_name("began")
    first = not marker.exists()
    marker.write_text("")
    time.sleep(float(os.environ["FIRST_S"]) if first else 0)
    return images.reshape(len(images), -1).mean(1) + [len(row["prompt"]) for row in rows]
"""


@pytest.fixture
def process(tmp_path, settings_file):
    """Start a server process of a judge whose first call takes first_s; all are killed at last."""
    (tmp_path / "slow_judge.py").write_text(SLOW_JUDGE)
    file = settings_file(serve=["slow_judge:score"])
    running = []

    def start(port=0, first_s=0.0, grace_s=30, **environment):
        environment |= {"PYTHONPATH": str(tmp_path), "FIRST_S": str(first_s)}
        log = open(tmp_path / f"log{len(running)}", "w+b")  # noqa: SIM115 (closed below)
        child = subprocess.Popen(
            [sys.executable, "-m", "qirl_fast.reward_server", file]
            + [f"port={port}", f"grace_s={grace_s}"]
            + (["token_env=QIRL_TEST_TOKEN"] if "QIRL_TEST_TOKEN" in environment else []),
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        running.append((child, log))
        line = child.stdout.readline()
        assert line.startswith("serving slow_judge:score on http://127.0.0.1:"), line
        return child, line.split()[-1]

    yield start
    for child, log in running:
        child.kill()
        child.wait()
        child.stdout.close()
        log.close()


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_killed_and_started_again_in_the_middle_changes_no_score(process, tmp_path):
    settings = {"deadline_s": 500, "rows_per_request": 2, "concurrency": 2, "backoff_max_s": 0.3}
    with (
        held_port() as port,
        remote(f"http://127.0.0.1:{port}", "slow_judge:score", **settings) as judge,
        ThreadPoolExecutor() as pool,
    ):
        first, _ = process(port=port, first_s=60)
        call = pool.submit(judge, IMAGES, ROWS)
        wait_for(tmp_path / "began")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        time.sleep(0.5)  # the client meets a closed port
        assert not call.done()
        process(port=port)
        scored = call.result()
    np.testing.assert_array_equal(scored.values, EXPECTED)
    np.testing.assert_array_equal(scored.status, np.full(6, SCORED))
    assert not scored.reasons


def test_sigterm_lets_it_finish_what_is_under_way(process, tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_TEST_TOKEN", "a-token-nobody-sees")
    child, url = process(first_s=1, QIRL_TEST_TOKEN="a-token-nobody-sees")
    with (
        remote(url, "slow_judge:score", retries=0, token_env="QIRL_TEST_TOKEN") as judge,
        ThreadPoolExecutor() as pool,
    ):
        call = pool.submit(judge, IMAGES, ROWS)
        wait_for(tmp_path / "began")
        child.send_signal(signal.SIGTERM)
        np.testing.assert_array_equal(call.result().values, EXPECTED)
    assert child.wait(120) == 0
    assert b"nobody-sees" not in (tmp_path / "log0").read_bytes()


def test_a_judge_that_does_not_end_does_not_hold_the_process(process, tmp_path):
    child, url = process(first_s=60, grace_s=3)
    with remote(url, "slow_judge:score") as judge, ThreadPoolExecutor() as pool:
        call = pool.submit(judge, IMAGES, ROWS)
        wait_for(tmp_path / "began")
        judge.close()  # the client goes, the judge does not
        assert isinstance(call.exception(), CancelledError)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 1
    assert b"a judge is busy 3 s after the signal" in (tmp_path / "log0").read_bytes()
