"""Bad days: what is done to a run here, it bears, or it says what happened and goes on to the same
bytes. `make chaos` runs these tests and all others of the mark, and ends in a table.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import content

ROOT = Path(__file__).resolve().parents[1]
Start = Callable[..., Any]


# Of a step in order, with how often each is called in a step of the small recipe.
PLACES = {
    "rollout.sample._sample_chunk": 1,
    "rewards.judges.Judges._once": 2,
    "learner.Learner._backward": 1,
    "learner.Learner._optimizer_step": 1,
    "tracking.Tracker._write": 2,
    "checkpoint.store.save_file": 1,
    "checkpoint.store.write_manifest": 1,
    "checkpoint.store._place": 1,
    "checkpoint.store._point_latest": 1,
    "checkpoint.store._prune": 1,
}


@pytest.mark.slow
@pytest.mark.chaos("kill -9 at 50 random moments of one run: the bits of a run left alone")
def test_killed_fifty_times(start: Start, small, finished, meddle, tmp_path: Path) -> None:
    draw, kills, steps = random.Random(5), 0, 40
    own = [*small, f"train.steps={steps}", "evaluation={prompts: 2, steps: 2}"]
    argv = [*own, f"output={tmp_path}", "run=r", "resume=auto"]
    seen: set[str] = set()
    while kills < 50:
        place = draw.choice(list(PLACES))
        n, after = draw.randint(1, 2 * PLACES[place]), draw.random() < 0.5
        run = start(argv, hook=meddle(place, n, "os.kill(os.getpid(), signal.SIGKILL)", after))
        assert run.wait() in (0, -signal.SIGKILL), run.output()
        if run.wait() == 0:
            break
        kills += 1
        seen.add(place)
    assert kills == 50 and seen == set(PLACES), "the run ended too early; give it more steps"
    assert start(argv).wait() == 0
    assert content(tmp_path / "r", steps) == content(finished("forty", *own), steps)


NODE = """
import os, signal, sys
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from qirl_fast import trainer
    whole, left = trainer.Trainer.rollout, [2]
    def dies(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)
    trainer.Trainer.rollout = dies
from qirl_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.chaos("one of two processes killed: torchrun starts both again, the same bits")
def test_one_of_two_processes_is_killed(restarted, finished, tmp_path: Path) -> None:
    own = ["train.steps=3", "rollout.max_rows=4"]
    said = restarted(2, NODE, [*own, f"output={tmp_path}", "run=r", "resume=auto"])
    assert "from step 0 to 3, 2 processes" in said
    assert "from step 1 to 3, 2 processes" in said
    assert content(tmp_path / "r", 3) == content(finished("three", *own), 3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


FULL = "open({!r}, 'wb', buffering=0).write(bytes(1 << 30))"  # as much of it as there is room for
MOMENTS = ["saving.Saver.write", "tracking.Tracker.log"]


@pytest.mark.chaos("the disk is full: said, the checkpoint before stays, the same bits later")
@pytest.mark.parametrize("where", MOMENTS)
def test_a_full_disk(start: Start, small, finished, meddle, disk: Path, where: str) -> None:
    own = [*small, "train.steps=3", f"output={disk}", "run=r", "tracking.tensorboard=false"]
    filler = disk / "filler"
    hook = meddle(where, 2, FULL.format(str(filler)), after=False)
    run = start(own, hook=hook)
    assert run.wait() == 1, run.output()
    assert "stopped: [Errno 28]" in run.output() and "resume=auto" in run.output()
    assert "Traceback" not in run.output()
    kept = [p.name for p in (disk / "r/checkpoints").iterdir()]
    assert sorted(kept) == ["checkpoint-1", "latest"]
    filler.unlink()
    again = start([*own, "resume=auto"])
    assert again.wait() == 0, again.output()
    whole = finished("three-steps", "train.steps=3", "tracking.tensorboard=false")
    assert content(disk / "r", 3) == content(whole, 3)


@pytest.mark.chaos("the disk becomes read-only: said, the checkpoint before stays, the same bits")
@pytest.mark.parametrize("where", MOMENTS)
def test_a_disk_that_becomes_read_only(
    start: Start, small, finished, meddle, disk: Path, where: str
) -> None:
    own = [*small, "train.steps=3", f"output={disk}", "run=r", "tracking.tensorboard=false"]
    # A mount that is written to cannot be turned; one of the folder over itself can.
    folder = disk / "r"
    turn = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    run = start(own, hook=meddle(where, 2, f"assert not os.system({turn!r})", after=False))
    status = run.wait()
    subprocess.run(["umount", "-l", str(folder)], check=True)
    assert status == 1, run.output()
    assert "stopped: [Errno 30]" in run.output() and "resume=auto" in run.output()
    again = start([*own, "resume=auto"])
    assert again.wait() == 0, again.output()
    whole = finished("three-steps", "train.steps=3", "tracking.tensorboard=false")
    assert content(disk / "r", 3) == content(whole, 3)


# Root passes over permissions; a run without this capability does not, whoever runs it.
HELD_TO_PERMISSIONS = """
import ctypes, os
libc, head, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(head, sets) == 0
sets[0] &= ~2  # CAP_DAC_OVERRIDE, of those in effect
assert libc.capset(head, sets) == 0
"""


@pytest.mark.chaos("write permission is taken away: said, the checkpoint before stays, same bits")
@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/.beside-2"])
def test_a_folder_that_may_no_longer_be_written(
    start: Start, small, finished, meddle, tmp_path: Path, place: str
) -> None:
    own = [*small, "train.steps=3", f"output={tmp_path}", "run=r"]
    folder = tmp_path / "r" / place
    where = "checkpoint.store.save_file" if place.endswith("2") else "saving.Saver.write"
    lost = meddle(where, 2, f"os.chmod({str(folder)!r}, 0o555)", after=False)
    run = start(own, hook=HELD_TO_PERMISSIONS + lost)
    assert run.wait() == 1, run.output()
    assert "ermission denied" in run.output() and "resume=auto" in run.output()
    assert "Traceback" not in run.output()
    folder = tmp_path / "r/checkpoints"
    folder.chmod(0o755)
    kept = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    assert kept == ["checkpoint-1", "latest"]
    again = start([*own, "resume=auto"])
    assert again.wait() == 0, again.output()
    assert content(tmp_path / "r", 3) == content(finished("three-plain", "train.steps=3"), 3)


CLOCK = """
import random, time
real, draw = time.time, random.Random(3)
time.time = lambda: real() + draw.uniform(-3e7, 3e7)  # a year each way, at every look
"""


@pytest.mark.chaos("the clock jumps by months: no number changes, no time is negative")
def test_a_clock_that_jumps(start: Start, small, finished, read_jsonl, tmp_path: Path) -> None:
    own = ["train.steps=3", "tracking.samples_every=1"]
    run = start([*small, *own, f"output={tmp_path}", "run=r"], hook=CLOCK)
    assert run.wait() == 0, run.output()
    assert content(tmp_path / "r", 3) == content(finished("pictures", *own), 3)
    for row in read_jsonl(tmp_path / "r/timings.jsonl"):
        assert 0 < row["seconds"] < 300 and all(s >= 0 for s in row["phases_s"].values())


@pytest.mark.chaos("NaN in latents: the step stops, its batch is kept, the same bits later")
def test_latents_that_are_no_numbers(start: Start, small, finished, meddle, tmp_path) -> None:
    own = [*small, "train.steps=3", f"output={tmp_path}", "run=r"]
    nan = "found.latents[1, 2, 3] = float('nan')"
    # Chunks 1 to 3: the evaluation before, the first update, its pictures for the report.
    run = start(own, hook=meddle("rollout.sample._sample_chunk", 4, nan))
    assert run.wait() == 1
    assert "step 2 is stopped" in run.output() and "latents are not finite" in run.output()
    assert (tmp_path / "r/failed/step-2/batch.npz").exists()
    assert start([*own, "resume=auto"]).wait() == 0
    assert content(tmp_path / "r", 3) == content(finished("three-plain", "train.steps=3"), 3)


# The address space may not grow by more than ROOM MiB while a gradient is computed.
SCARCE = """
import resource, sys
from qirl_fast.learner import Learner
whole = Learner._backward
def scarce(*arguments):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + (ROOM << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    try:
        return whole(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
Learner._backward = scarce
from qirl_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.chaos("memory that the system does not give: chunks in parts, the same samples")
def test_memory_runs_out(small, finished, read_jsonl, tmp_path: Path) -> None:
    """A chunk of 16 rows wants about 240 MiB, one row 90; what is freed goes back at once."""
    own = ["train.steps=1", "rollout.height=256", "rollout.width=256", "rollout.group_size=8"]
    own += ["evaluation={prompts: 2, steps: 2}"]
    script = tmp_path / "scarce.py"
    script.write_text(SCARCE.replace("ROOM", "150"))
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *small, *own, f"output={tmp_path}", "run=r"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | allocator,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "can't allocate memory" in (tmp_path / "r/log.txt").read_text()
    (alone,) = read_jsonl(finished("large", *own) / "metrics.jsonl")
    (row,) = read_jsonl(tmp_path / "r/metrics.jsonl")
    assert 1 <= row.pop("backoff_rows") <= 8 and row.keys() == alone.keys()
    for name in ("loss", "grad_norm", "approx_kl"):  # sums in another order
        assert row.pop(name) == pytest.approx(alone.pop(name), rel=1e-4, abs=1e-8)
    assert row == alone
