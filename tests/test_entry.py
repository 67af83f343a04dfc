"""What every entry point does around its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qirl_fast.entry import run
from qirl_fast.interruption import Interrupted

ROOT = Path(__file__).resolve().parents[1]


class Wrong(Exception):
    """Settings."""


class Stopped(Exception):
    """A run."""


def code(work: Callable[[list[str]], int | None], *words: str) -> int:
    return run(words, "how to", work, wrong=Wrong, stopped=Stopped, again="say please")


def raising(error: BaseException) -> Callable[[list[str]], int | None]:
    def work(args: list[str]) -> int | None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Wrong("[red]a[/red]\nb"), 2, "error: [red]a[/red]\nb\n"),
        (Stopped("no disk"), 1, "stopped: no disk; after mending the cause say please\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; to go on say please\n"),
        (
            Interrupted(signal.SIGTERM),
            143,
            "stopped by SIGTERM, all steps that were finished saved; to go on say please\n",
        ),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, capsys, monkeypatch
) -> None:
    assert code(raising(error), "x") == status
    assert capsys.readouterr() == ("", said)
    monkeypatch.setenv("RANK", "1")
    assert code(raising(error), "x") == status
    assert capsys.readouterr() == ("", ""), "process 0 says it"


def test_work_and_help(capsys) -> None:
    got: list[list[str]] = []
    assert code(lambda args: got.append(args), "a", "b=1") == 0 and got == [["a", "b=1"]]
    assert code(lambda args: 3) == 3
    assert code(raising(Wrong("not asked")), "a", "--help") == 0
    assert capsys.readouterr() == ("how to\n", "")
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        code(raising(ZeroDivisionError()))


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_is_no_traceback(tmp_path: Path) -> None:
    """While images are drawn; the same command then goes on."""
    settings = tmp_path / "evaluate.yaml"
    settings.write_text(
        f'output: {tmp_path / "out"}\nmodels: {{base: {{}}}}\nprompts: "tiny:heldout"\n'
        "height: 64\nwidth: 64\nscore: [aesthetics]\nthreads: 1\nmax_rows: 1\n"
    )
    command = [sys.executable, "-m", "qirl_fast.evaluate", str(settings)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # as from a terminal
    )  # fmt: skip
    assert process.stdout is not None
    assert any("drawing 96" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said.endswith("run the same command again: images that were drawn are kept\n")
    assert "Traceback" not in said
