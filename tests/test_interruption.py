"""A run that is asked to stop does so at once and goes on, once resumed, to the same bytes."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qirl_fast.checkpoint import load_checkpoint
from qirl_fast.interruption import Interrupted, Interruption

Start = Callable[..., Any]
SETTINGS = ("train.steps=3", "train.updates_per_rollout=2", "evaluation.prompts=2", "run=r")
# What, how often before, how many steps are done then.
MOMENTS = [
    ("train.before_evaluation", 1, 0),
    ("trainer.Trainer.next_prompts", 2, 1),
    ("trainer.Trainer.rollout", 1, 0),
    ("trainer.Trainer.advantages", 3, 2),
    ("learner.Learner._backward", 3, 1),  # of the second update
    ("learner.Learner._optimizer_step", 3, 2),  # its first half: it is finished
    ("tracking.Tracker.log", 1, 1),
    ("trainer.Trainer.state", 1, 3),  # while a checkpoint is written
    ("trainer.Trainer.evaluate", 1, 3),
]
ASKED = "os.kill(os.getpid(), signal.{})"


@pytest.mark.chaos("SIGTERM: stops at once, saves the steps before, goes on to the same bits")
@pytest.mark.parametrize(("where", "n", "done"), MOMENTS)
def test_a_run_stops_at_once_and_loses_nothing(
    start: Start, small, finished, meddle, tmp_path: Path, where, n, done
) -> None:
    own = [*small, *SETTINGS, f"output={tmp_path}", "tracking.checkpoint_every=0"]
    stopped = start(own, hook=meddle(where, n, ASKED.format("SIGTERM")))
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.output()
    assert "stopped by SIGTERM" in stopped.output() and "resume=auto" in stopped.output()
    metrics = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, done + 1))
    kept = [p.name for p in (tmp_path / "r/checkpoints").glob("checkpoint-*")]
    assert kept == ([f"checkpoint-{done}"] if done else [])
    assert start([*own, "resume=auto"]).wait() == 0
    whole = finished("whole", *SETTINGS, "run=whole", "tracking.checkpoint_every=0")
    for file in ("metrics.jsonl", "checkpoints/checkpoint-3/state.safetensors"):
        assert (tmp_path / "r" / file).read_bytes() == (whole / file).read_bytes()


# Asked in its second step, or in the write after its first. What would take a minute is cut short.
ASKED_AT = f"open(CLOCK, 'w').write(str(time.monotonic())); {ASKED.format('SIGTERM')}"
LARGE = [
    ("trainer.Trainer.rollout", 2, f"{ASKED_AT}; time.sleep(60)"),
    ("rewards.judges.Judges._once", 6, ASKED_AT),  # of four a step
    ("learner.Learner._backward", 2, f"{ASKED_AT}; time.sleep(60)"),
    ("checkpoint.store.save_file", 1, ASKED_AT),
]


@pytest.mark.slow
@pytest.mark.chaos("SIGTERM in steps of the packaged recipe: saved and gone within 30 s")
def test_a_run_has_saved_and_is_gone_within_30_s(start: Start, meddle, tmp_path: Path) -> None:
    """Pre-empted in rollout, reward, backward and checkpoint, each time with a step to save."""
    own = ["threads=1", "evaluation={prompts: 2, steps: 2}", f"output={tmp_path}", "run=r"]
    own += ["resume=auto", "train.steps=4", "tracking.checkpoint_every=0"]
    clock = tmp_path / "clock"
    for done, (where, n, then) in enumerate(LARGE, 1):
        hook = meddle(where, n, then, after=False)
        run = start(own, hook=f"import time; CLOCK = {str(clock)!r}\n{hook}")
        assert run.wait() == 128 + signal.SIGTERM, run.output()
        seconds = time.monotonic() - float(clock.read_text())
        assert load_checkpoint(tmp_path / "r/checkpoints/latest").step == done
        assert seconds < 30, where


def test_ctrl_c_does_the_same(start: Start, small, meddle, tmp_path: Path) -> None:
    own = [*small, *SETTINGS, f"output={tmp_path}"]
    hook = meddle("trainer.Trainer.rollout", 2, ASKED.format("SIGINT"))
    stopped = start(own, hook=hook)
    assert stopped.wait() == 128 + signal.SIGINT
    assert "stopped by Ctrl-C, all steps that were finished saved" in stopped.output()
    assert "Traceback" not in stopped.output()


def test_a_signal_waits_where_it_must_and_only_there():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)
        with pytest.raises(Interrupted) as error:
            interruption.check()
    assert error.value.signal == signal.SIGTERM and str(error.value) == "SIGTERM"
    with Interruption() as interruption:
        interruption.check()
        with pytest.raises(Interrupted), interruption.allowed():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")
        with pytest.raises(KeyboardInterrupt):  # the person means it
            signal.raise_signal(signal.SIGINT)
    with Interruption() as interruption, interruption.allowed():
        interruption.hold()
        signal.raise_signal(signal.SIGTERM)  # waits
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
