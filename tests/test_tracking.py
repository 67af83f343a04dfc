"""Run folders, metrics that are equal between equal runs, writers, and what is shown."""

from __future__ import annotations

import builtins
import io
import json
import os
import pty
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qirl_fast.clock import Speed, peak_flops
from qirl_fast.config import Config, ConfigError, load_config
from qirl_fast.rollout.workers import Workers
from qirl_fast.run_folder import prepare_run_dir
from qirl_fast.tracking import Tracker, summary_table

RECIPE = Path(__file__).with_name("recipe.yaml")


def make_config(tmp_path: Path, *argv: str) -> Config:
    return load_config([str(RECIPE), f"output={tmp_path}", "run=r", "train.steps=4", *argv])


def run_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name in ("rollout", "reward"):
            with tracker.phase(name):
                pass
        tracker.log(step, {"reward": step / 3, "loss": -1e-9 * step, "flat_groups": step}, images=8)


def test_layout(tmp_path: Path) -> None:
    run_dir = prepare_run_dir(make_config(tmp_path))
    assert run_dir == tmp_path / "r"
    assert sorted(os.listdir(run_dir)) == ["checkpoints", "config.resolved.yaml", "samples", "tb"]
    again = load_config([str(run_dir / "config.resolved.yaml")])
    assert again == make_config(tmp_path)


def test_folder_that_holds_a_run(tmp_path: Path) -> None:
    run_dir = prepare_run_dir(make_config(tmp_path))
    with pytest.raises(ConfigError, match=r"already holds a run; .*resume=auto.*run=NAME.*remove"):
        prepare_run_dir(make_config(tmp_path))
    assert prepare_run_dir(make_config(tmp_path, "resume=auto")) == run_dir
    assert prepare_run_dir(make_config(tmp_path, "run=other")) == tmp_path / "other"


def test_resuming_under_another_recipe_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run_dir = prepare_run_dir(make_config(tmp_path))
    before = (run_dir / "config.resolved.yaml").read_bytes()
    with pytest.raises(
        ConfigError, match=r"other settings; (.|\n)*train\.lr: was 0\.001, is now 0"
    ):
        prepare_run_dir(make_config(tmp_path, "resume=auto", "train.lr=0.01"))
    assert (run_dir / "config.resolved.yaml").read_bytes() == before
    prepare_run_dir(make_config(tmp_path, "resume=auto", "train.steps=9", "threads=1"))
    assert "steps: 9" in (run_dir / "config.resolved.yaml").read_text()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: cannot write to .*choose another by output="):
        prepare_run_dir(make_config(tmp_path / "file"))
    with pytest.raises(ConfigError, match="output: cannot write to"):
        prepare_run_dir(make_config(Path("/proc")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_output_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ConfigError, match="Permission denied"):
        prepare_run_dir(make_config(tmp_path))


def test_metrics_are_equal_between_runs_and_the_clock_is_apart(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        cfg = make_config(tmp_path, f"run={name}")
        run_dir = prepare_run_dir(cfg)
        with Tracker(run_dir, cfg, stream=io.StringIO()) as tracker:
            run_steps(tracker, 1, 4)
        files.append((run_dir / "metrics.jsonl").read_bytes())
        clocks = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text().splitlines()]
        assert [clock["step"] for clock in clocks] == [1, 2, 3, 4]
        assert all(set(clock["phases_s"]) == {"rollout", "reward"} for clock in clocks)
        assert all(clock["images_per_s"] > 0 for clock in clocks)
    assert files[0] == files[1]
    rows = [json.loads(line) for line in files[0].decode().splitlines()]
    assert rows[1] == {"step": 2, "reward": 2 / 3, "loss": -2e-9, "flat_groups": 2}
    assert list(rows[1]) == ["step", "reward", "loss", "flat_groups"]


def test_resumed_metrics_equal_uninterrupted_ones(tmp_path: Path) -> None:
    straight = make_config(tmp_path, "run=straight")
    with Tracker(prepare_run_dir(straight), straight, stream=io.StringIO()) as tracker:
        run_steps(tracker, 1, 4)
    cfg = make_config(tmp_path, "run=cut")
    run_dir = prepare_run_dir(cfg)
    killed = Tracker(run_dir, cfg, stream=io.StringIO())  # never closed: what is logged is on disk
    run_steps(killed, 1, 3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with Tracker(run_dir, cfg, step=2, stream=io.StringIO()) as tracker:
        run_steps(tracker, 3, 4)
    expected = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert (run_dir / "metrics.jsonl").read_bytes() == expected
    timings = (run_dir / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in timings] == [1, 2, 3, 4]
    events = EventAccumulator(str(run_dir / "tb")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    run_dir = prepare_run_dir(cfg)
    run_steps(Tracker(run_dir, cfg, stream=io.StringIO()), 1, 3)
    with Tracker(run_dir, cfg, step=0, stream=io.StringIO()) as tracker:
        run_steps(tracker, 1, 2)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    events = EventAccumulator(str(run_dir / "tb")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2]


def test_tensorboard_holds_the_metrics(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    run_dir = prepare_run_dir(cfg)
    with Tracker(run_dir, cfg, stream=io.StringIO()) as tracker:
        run_steps(tracker, 1, 2)
    events = EventAccumulator(str(run_dir / "tb")).Reload()
    names = {
        "reward",
        "loss",
        "flat_groups",
        "time/rollout_s",
        "time/reward_s",
        "time/images_per_s",
        "memory/process_mib",
    }
    assert set(events.Tags()["scalars"]) == names
    assert [event.value for event in events.Scalars("reward")] == [
        pytest.approx(step / 3, rel=1e-7)  # TensorBoard stores float32
        for step in (1, 2)
    ]
    off = make_config(tmp_path, "run=off", "tracking.tensorboard=false")
    with Tracker(prepare_run_dir(off), off, stream=io.StringIO()) as tracker:
        run_steps(tracker, 1, 1)
    assert not list((tmp_path / "off" / "tb").iterdir())


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf")), "1", None]
)
def test_metric_that_is_no_finite_number(tmp_path: Path, bad: Any) -> None:
    cfg = make_config(tmp_path)
    run_dir = prepare_run_dir(cfg)
    with Tracker(run_dir, cfg, stream=io.StringIO()) as tracker:
        with pytest.raises(ValueError, match=r"step 1: .*got loss = .*, worse = ") as caught:
            tracker.log(1, {"loss": bad, "fine": 1.0, "worse": bad})
        assert "fine" not in str(caught.value)
    assert (run_dir / "metrics.jsonl").read_bytes() == b""


def test_numbers_of_every_kind_are_written_exactly(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    run_dir = prepare_run_dir(cfg)
    values: dict[str, Any] = {
        "a": np.float32(0.1),
        "b": torch.tensor(0.1, dtype=torch.float64),
        "c": 7,
        "d": -0.0,
    }
    values |= {"h": torch.tensor(3), "e": np.int64(2**60), "f": 5e-324, "g": True}
    with Tracker(run_dir, cfg, stream=io.StringIO()) as tracker:
        tracker.log(1, values)
    text = (run_dir / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 1, "a": 0.10000000149011612, "b": 0.1, "c": 7, "d": -0.0, "h": 3, '
        '"e": 1152921504606846976, "f": 5e-324, "g": 1}\n'
    )


def test_other_ranks_write_and_show_nothing(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    run_dir = prepare_run_dir(cfg)
    before = sorted(run_dir.rglob("*"))
    stream = io.StringIO()
    with Tracker(run_dir, cfg, rank=1, stream=stream) as tracker:
        run_steps(tracker, 1, 2)
        tracker.say("hello")
        assert tracker.images == 16 and tracker.images_per_s() > 0
        with pytest.raises(ValueError, match="loss"):
            tracker.log(3, {"loss": float("nan")})
    assert sorted(run_dir.rglob("*")) == before and stream.getvalue() == ""


def test_without_a_terminal_one_plain_line_a_step(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    stream = io.StringIO()
    with Tracker(prepare_run_dir(cfg), cfg, stream=stream) as tracker:
        tracker.say("a line [of] text")
        run_steps(tracker, 1, 2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a line [of] text" and len(lines) == 3 and "\x1b" not in stream.getvalue()
    assert re.fullmatch(
        r"step 2/4  [\d.]+ images/s  reward 0\.6667  rollout 0\.00s reward 0\.00s  "
        r"about 0s left",
        lines[2],
    )


def test_work_beside_a_phase_is_told_from_waiting(read_jsonl, tmp_path: Path) -> None:
    cfg, out = make_config(tmp_path), io.StringIO()
    with Tracker(prepare_run_dir(cfg), cfg, stream=out) as tracker:
        with tracker.phase("rollout"):
            pass
        whole = tracker.phase_s["rollout"]
        tracker.split("rollout", "reward", 0.01, 0.03)
        assert sum(tracker.phase_s.values()) == pytest.approx(whole), "no second counts twice"
        tracker.log(1, {"reward": 0.5})
        run_dir = tracker.run_dir
    (clock,) = read_jsonl(run_dir / "timings.jsonl")
    assert clock["phases_s"]["reward"] == 0.01 and clock["beside_s"] == {"reward": 0.03}
    assert "reward 0.01s (+0.03s beside)" in out.getvalue()


def test_mfu_is_of_what_each_phase_did(tmp_path: Path, read_jsonl) -> None:
    """7 TFLOPs in two phases, against 100 TFLOP/s; evaluation is no part of the step."""
    cfg, done = make_config(tmp_path), [0]
    speed = Speed(lambda: done[0], 100e12)
    with Tracker(prepare_run_dir(cfg), cfg, stream=io.StringIO(), speed=speed) as tracker:
        for name, flops in (("data", 0), ("rollout", 3), ("update", 4), ("evaluate", 50)):
            with tracker.phase(name):
                done[0] += flops * 10**12
        seconds = {name: 1.0 + i for i, name in enumerate(tracker.phase_s)}
        tracker.phase_s = dict(seconds)  # 1, 2, 3 and 4 seconds
        tracker.judges = {"queue_mean": 1.5, "queue_max": 3, "alignment_s": 0.25}
        tracker.log(1, {"reward": 0.5})
        with tracker.phase("rollout"):
            pass
        tracker.log(2, {"reward": 0.5})
    first, second = read_jsonl(tracker.run_dir / "timings.jsonl")
    assert first["tflop"] == {"rollout": 3, "update": 4, "evaluate": 50, "step": 7}
    wanted = {"rollout": 3 / 200, "update": 4 / 300, "evaluate": 50 / 400, "step": 7 / 600}
    assert first["mfu"] == pytest.approx(wanted, rel=1e-12)
    assert first["judges"] == {"queue_mean": 1.5, "queue_max": 3, "alignment_s": 0.25}
    assert not {"mfu", "tflop", "judges"} & set(second), "a step's own"
    shown = EventAccumulator(str(tracker.run_dir / "tb")).Reload()
    assert shown.Scalars("mfu/update")[0].value == pytest.approx(4 / 300)
    assert shown.Scalars("judges/queue_max")[0].value == 3


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_the_peak_of_a_known_gpu(monkeypatch, device: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_flops("cuda", torch.bfloat16, Workers(1)) == peak


@pytest.mark.parametrize("count", [1, 2])
def test_the_peak_of_a_cpu_is_measured(count: int) -> None:
    """Of matrix products alone: no slower than one of them takes with all that is around it."""
    a = torch.ones(384, 384)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    slow = 2 * 384**3 * 20 / (time.perf_counter() - start)
    before = torch.get_rng_state()
    assert peak_flops("cpu", torch.float32, Workers(count)) > 0.2 * slow
    assert torch.equal(torch.get_rng_state(), before)


TERMINAL = """
import sys, time
from qirl_fast.config import load_config
from qirl_fast.run_folder import prepare_run_dir
from qirl_fast.tracking import Tracker

cfg = load_config(["output=" + sys.argv[1], "run=r", "train.steps=3", "tracking.tensorboard=false"])
with Tracker(prepare_run_dir(cfg), cfg) as tracker:
    for step in (1, 2, 3):
        for name in ("rollout", "replay"):
            with tracker.phase(name):
                time.sleep(0.15)
        tracker.log(step, {"reward": 0.5}, images=4)
    tracker.say("done [here]")
"""


def test_on_a_terminal_a_bar_with_phase_speed_and_reward(tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(tmp_path)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(writer)
    shown = b""
    while True:
        try:
            block = os.read(reader, 4096)
        except OSError:  # Linux's end of file on a pseudo-terminal
            break
        if not block:
            break
        shown += block
    os.close(reader)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "rollout" in text and "replay" in text and "3/3" in text
    assert re.search(r"[\d.]+ images/s  reward 0\.5000", text)
    assert "done [here]" in text


def test_wandb_that_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_wandb(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    cfg = make_config(tmp_path, "tracking.wandb=true")
    run_dir = prepare_run_dir(cfg)
    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(ConfigError, match=r"wandb is not installed; run `pip install wandb`"):
        Tracker(run_dir, cfg)
    assert not (run_dir / "metrics.jsonl").exists()


def test_summary_table() -> None:
    judges = {
        "alignment": {"before": 0.45, "after": 0.7525, "diff": 0.3025, "low": 0.25, "high": 0.35},
        "aesthetics": {"before": 0.9, "after": 0.89, "diff": -0.01, "low": -0.02, "high": 0.001},
    }
    judges["sharpness"] = judges["aesthetics"] | {"high": -0.001}
    table = summary_table({name: row | {"n": 96} for name, row in judges.items()}, "held-out")
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [
        " ".join(re.findall(r"[\w.+%-]+", line)) for line in console.file.getvalue().split("\n")
    ]
    assert "judge before after change 95 % interval n verdict" in lines
    assert "alignment 0.450 0.752 +0.302 +0.250 to +0.350 96 better" in lines
    differ = "not shown to differ"
    assert f"aesthetics 0.900 0.890 -0.010 -0.020 to +0.001 96 {differ}" in lines
    assert "sharpness 0.900 0.890 -0.010 -0.020 to -0.001 96 worse" in lines
