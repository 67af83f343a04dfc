"""A run killed with SIGKILL at any moment ends, once resumed, in the same bytes as one left alone.

All that a step can depend on is switched on: averaged weights, a rising learning rate, several
optimizer steps a rollout, stochastic steps drawn anew, a judge that draws from the global
generators and has a state of its own.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 4
SETTINGS = (
    f"train.steps={STEPS}",
    "train.lr=0.01",
    "train.warmup=5",
    "train.ema={decay: 0.5, every: 1}",
    "train.updates_per_rollout=2",
    "train.weight_decay=0.01",
    "rollout.window=null",
    "rollout.sde_steps={count: 2, high: 3}",
    "evaluation.prompts=2",
    "evaluation.steps=2",
    "rewards={'noisy:score': 1.0}",
    "run=r",
)

# Draws from both global generators and moves with the number of images it has seen: its scores
# repeat only where both are part of a checkpoint and an evaluation leaves them as they were.
NOISY = """
import random
import numpy

class Noisy:
    seen = 0

    def __call__(self, images, metadata):
        count = len(metadata)
        self.seen += count
        draws = numpy.random.random(count) + [random.random() for _ in range(count)]
        return (draws / 2 + self.seen / 1000).astype(numpy.float32)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

score = Noisy()
"""

# Counts everything that reaches the disk for good and dies at the n-th: before a rename, after a
# sync; the two together hit every state that a crash can leave behind.
DIES = """
import os, pathlib, signal
left = [{n}]
def counted(whole, after):
    def call(*arguments, **named):
        result = whole(*arguments, **named) if after else None
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else whole(*arguments, **named)
    return call
os.fsync = counted(os.fsync, after=True)
pathlib.Path.rename = counted(pathlib.Path.rename, after=False)
pathlib.Path.replace = counted(pathlib.Path.replace, after=False)
"""

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def begin(
    small: tuple[str, ...], start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`begin(output, *settings, hook="")` starts the run `r` of these tests under output."""
    judges = tmp_path_factory.mktemp("judges")
    (judges / "noisy.py").write_text(NOISY)

    def make(output: Path, *settings: str, hook: str = "") -> Any:
        argv = [*small, *SETTINGS, f"output={output}", *settings]
        return start(argv, paths=[judges], hook=hook)

    return make


@pytest.fixture(scope="module")
def reference(begin: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("reference")
    run = begin(output)
    assert run.wait() == 0, run.output()
    return output / "r"


def content(run: Path) -> dict[str, bytes]:
    """Everything in a run's folder that must repeat to the byte."""
    files = [run / "metrics.jsonl", *sorted(p for p in (run / "checkpoints").rglob("*"))]
    found = {
        p.relative_to(run).as_posix(): p.read_bytes()
        for p in files
        if p.is_file() and "latest" not in p.parts
    }
    assert f"checkpoints/checkpoint-{STEPS}/state.safetensors" in found
    assert f"checkpoints/checkpoint-{STEPS}/pytorch_lora_weights.safetensors" in found
    assert (run / "checkpoints" / "latest").readlink().name == f"checkpoint-{STEPS}"
    return found


def assert_same(run: Path, reference: Path) -> None:
    ours, theirs = content(run), content(reference)
    assert set(ours) == set(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    judges = [json.loads((r / "summary.json").read_text())["judges"] for r in (run, reference)]
    assert judges[0] == judges[1]


def test_the_course_depends_on_the_generators(reference: Path, begin, tmp_path: Path) -> None:
    """What the tests below could miss: the judge's draws matter, and a seed fixes them."""
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    scores = [row["reward/noisy:score"] for row in rows]
    assert len(set(scores)) == STEPS
    run = begin(tmp_path, "train.steps=1")
    assert run.wait() == 0
    (row,) = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row) == rows[0]


def test_a_judge_that_draws_numbers_sees_chunks_in_order(begin, tmp_path: Path, read_jsonl) -> None:
    metrics = []
    for threads in (1, 3):
        run = begin(tmp_path / str(threads), "rollout.max_rows=2", f"threads={threads}")
        assert run.wait() == 0, run.output()
        metrics.append(read_jsonl(tmp_path / str(threads) / "r" / "metrics.jsonl"))
    assert metrics[0] == metrics[1]


@pytest.mark.chaos("kill -9 at random times: the bits of a run left alone")
def test_killed_at_random_times(reference: Path, begin, tmp_path: Path) -> None:
    """Five times, up to a step and a half after the loop is entered; once before it is. A run that
    was faster than that leaves its place to another.
    """
    lines = (reference / "timings.jsonl").read_text().splitlines()
    step_s = sum(json.loads(line)["seconds"] for line in lines) / STEPS
    moments = random.Random(20)
    killed = 0
    while killed < 6:
        run = begin(tmp_path, "resume=auto")
        while killed and "from step" not in run.output() and run.process.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5) * step_s)
        run.kill()
        if run.wait() == -signal.SIGKILL:
            killed += 1
        else:
            assert run.wait() == 0, run.output()
            assert_same(tmp_path / "r", reference)
            shutil.rmtree(tmp_path / "r")
    last = begin(tmp_path, "resume=auto")
    assert last.wait() == 0, last.output()
    assert_same(tmp_path / "r", reference)


@pytest.mark.chaos("kill -9 between two writes: the bits of a run left alone")
def test_killed_between_any_two_writes(reference: Path, begin, tmp_path: Path) -> None:
    """In the middle of checkpoints, renames and metrics lines, wherever the draw falls."""
    draws = random.Random(7)
    killed = 0
    for n in [1, *(draws.randint(2, 20) for _ in range(5))]:
        run = begin(tmp_path, "resume=auto", hook=DIES.format(n=n))
        assert run.wait() in (-signal.SIGKILL, 0), run.output()
        killed += run.wait() == -signal.SIGKILL
    assert killed >= 4, "a step makes some twenty such writes"
    last = begin(tmp_path, "resume=auto")
    assert last.wait() == 0, last.output()
    assert_same(tmp_path / "r", reference)


@pytest.mark.slow
@pytest.mark.chaos("kill -9 between two writes: the bits of a run left alone")
@pytest.mark.parametrize("n", range(1, 60, 3))
def test_killed_at_every_write(reference: Path, begin, tmp_path: Path, n: int) -> None:
    run = begin(tmp_path, "resume=auto", hook=DIES.format(n=n))
    assert run.wait() in (-signal.SIGKILL, 0), run.output()
    last = begin(tmp_path, "resume=auto")
    assert last.wait() == 0, last.output()
    assert_same(tmp_path / "r", reference)


def truncated(checkpoint: Path) -> None:
    path = checkpoint / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flipped(checkpoint: Path) -> None:
    """One bit of one weight: safetensors itself would load it without a word."""
    path = checkpoint / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def flipped_lora(checkpoint: Path) -> None:
    path = checkpoint / "pytorch_lora_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def without_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


DAMAGES = (truncated, flipped, flipped_lora, without_state)


@pytest.mark.chaos("a checkpoint cut, flipped or half gone: said, the one before is used")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    reference: Path, begin, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(reference, tmp_path / "r", symlinks=True)
    (tmp_path / "r" / "summary.json").unlink()
    damage(tmp_path / "r" / "checkpoints" / f"checkpoint-{STEPS}")
    run = begin(tmp_path, "resume=auto")
    assert run.wait() == 0, run.output()
    said = run.output()
    assert "is damaged" in said or "is missing" in said
    assert f"checkpoint-{STEPS - 1} in place of the damaged one" in said
    assert f"from step {STEPS - 1} to {STEPS}" in said
    assert_same(tmp_path / "r", reference)


@pytest.mark.chaos("a checkpoint cut, flipped or half gone: said, the one before is used")
def test_when_no_checkpoint_is_whole_nothing_is_thrown_away(
    reference: Path, begin, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "r", symlinks=True)
    for n in (STEPS - 1, STEPS):
        flipped(tmp_path / "r" / "checkpoints" / f"checkpoint-{n}")
    before = content(tmp_path / "r")
    run = begin(tmp_path, "resume=auto")
    assert run.wait() == 2
    assert "no whole checkpoint is left" in run.output() and "Traceback" not in run.output()
    assert content(tmp_path / "r") == before


def test_a_longer_run_goes_on_where_the_shorter_ended(
    reference: Path, begin, tmp_path: Path
) -> None:
    short = begin(tmp_path, f"train.steps={STEPS - 2}")
    assert short.wait() == 0, short.output()
    run = begin(tmp_path, "resume=auto")
    assert run.wait() == 0, run.output()
    assert_same(tmp_path / "r", reference)


def test_resuming_from_a_named_checkpoint(reference: Path, begin, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "r", symlinks=True)
    older = tmp_path / "r" / "checkpoints" / f"checkpoint-{STEPS - 1}"
    run = begin(tmp_path, f"resume={older}")
    assert run.wait() == 0, run.output()
    assert f"from step {STEPS - 1} to {STEPS}" in run.output()
    assert_same(tmp_path / "r", reference)


def test_a_finished_run_resumed_reports_again(reference: Path, begin, tmp_path: Path) -> None:
    """Killed after the last checkpoint: no step is left, the report is."""
    shutil.copytree(reference, tmp_path / "r", symlinks=True)
    (tmp_path / "r" / "summary.json").unlink()
    run = begin(tmp_path, "resume=auto")
    assert run.wait() == 0, run.output()
    assert_same(tmp_path / "r", reference)
    summaries = [json.loads((r / "summary.json").read_text()) for r in (tmp_path / "r", reference)]
    assert summaries[0]["images_per_s"] == summaries[1]["images_per_s"] > 0


def test_other_held_out_prompts_are_not_compared(begin, tmp_path: Path) -> None:
    """Their scores before training are of other prompts."""
    row = '{"tag": "t", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}\n'
    heldout = tmp_path / "p.jsonl"
    heldout.write_text(4 * row)
    assert begin(tmp_path, "train.steps=1", f"data.heldout={heldout}").wait() == 0
    heldout.write_text(4 * row.replace("circle", "square"))
    run = begin(tmp_path, "train.steps=1", f"data.heldout={heldout}", "resume=auto")
    assert run.wait() == 2 and "has changed since" in run.output(), run.output()


def test_another_recipe_is_not_resumed(reference: Path, begin, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "r", symlinks=True)
    before = content(tmp_path / "r")
    run = begin(tmp_path, "resume=auto", "train.lr=0.02")
    assert run.wait() == 2
    assert "train.lr: was 0.01, is now 0.02" in run.output()
    assert content(tmp_path / "r") == before
