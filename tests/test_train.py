"""`python -m qirl_fast.train` from end to end: what it writes, and every setting takes part."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qirl_fast.checkpoint import load_checkpoint, unpack
from qirl_fast.config import config_hash, load_config
from qirl_fast.train import main

METRICS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "clip_fraction",
    "approx_kl",
    "ratio_error",
    "pre_update_clip_fraction",
    "pre_update_ratio_error",
    "reward",
    "reward/alignment",
    "reward/aesthetics",
    "failed/alignment",
    "failed/aesthetics",
    "kept_groups",
    "diversity",
}

# Everything that is optional at once: a course that no other run of these tests takes.
VARIED = (
    "train.ema={decay: 0.5, every: 1}",
    "train.updates_per_rollout=2",
    "algorithm.kl_weight=0.1",
    "algorithm.velocity_kl_weight=0.1",
    "train.lr=0.01",
    "rollout.window=null",
    "rollout.sde_steps={count: 2, high: 3}",
    "rollout.ratio_mode=full",
    "rollout.dynamics=cps",
    "rollout.shared_noise=false",
    "evaluation.every=1",
    "tracking.samples_every=1",
    "tracking.tensorboard=false",
)


def state(folder: Path) -> dict[str, Any]:
    """The training state in the newest checkpoint."""
    found = load_checkpoint(folder / "checkpoints" / "latest")
    return unpack(found.tensors, found.state["tree"])["learner"]


@pytest.fixture(scope="module")
def cold(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run as a person starts it: a new interpreter, the module's name, another folder."""
    output = tmp_path_factory.mktemp("cold")
    done = subprocess.run(
        [sys.executable, "-m", "qirl_fast.train", *small, f"output={output}", "run=plain"],
        capture_output=True,
        text=True,
        cwd=output,
        env=os.environ,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and "alignment" in done.stdout
    return output / "plain"


def test_the_output_folder(cold: Path) -> None:
    found = {
        path.relative_to(cold).as_posix()
        for path in cold.rglob("*")
        if not path.is_dir() and not path.name.startswith("events.")
    }
    checkpoint = {
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "manifest.json",
        "pytorch_lora_weights.safetensors",
        "state.json",
        "state.safetensors",
    }
    assert found == {
        "config.resolved.yaml",
        "metrics.jsonl",
        "timings.jsonl",
        "log.txt",
        "summary.json",
        "report.html",
        "samples/before.npz",
        "samples/strip-1.npz",
        "samples/after.npz",
        "samples/before_after.png",
        "samples/rewards.png",
        *(f"checkpoints/checkpoint-{n}/{name}" for n in (1, 2) for name in checkpoint),
    }
    assert os.readlink(cold / "checkpoints" / "latest") == "checkpoint-2"
    assert list((cold / "tb").glob("events.*"))
    log = (cold / "log.txt").read_text()
    assert "attention: auto" in log and "guide_step on cpu: backend cpu" in log


def test_metrics(cold: Path, read_jsonl: Callable[[Path], list[dict[str, Any]]]) -> None:
    rows = read_jsonl(cold / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) >= METRICS and all(map(math.isfinite, row.values()))
        assert row["pre_update_ratio_error"] == row["pre_update_clip_fraction"] == 0
        assert row["grad_norm"] > 0
        mixed = 0.9 * row["reward/alignment"] + 0.1 * row["reward/aesthetics"]
        assert row["reward"] == pytest.approx(mixed, rel=1e-12)


def test_two_processes_compute_the_same(cold: Path, finished: Callable[..., Path]) -> None:
    """A fresh interpreter and a forked one, in different folders with cold and warm caches."""
    forked = finished("plain")
    assert (forked / "metrics.jsonl").read_bytes() == (cold / "metrics.jsonl").read_bytes()
    for name in ("state.safetensors", "state.json", "pytorch_lora_weights.safetensors"):
        ours, theirs = (run / "checkpoints" / "latest" / name for run in (forked, cold))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_another_seed_is_another_course(finished: Callable[..., Path]) -> None:
    one, other = finished("plain"), finished("seed1", "seed=1")
    assert (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()
    befores = [np.load(run / "samples" / "before.npz")["image_0"] for run in (one, other)]
    assert np.array_equal(*befores), "the evaluation has its own seed"


def test_summary(cold: Path, read_jsonl: Callable[[Path], list[dict[str, Any]]]) -> None:
    summary = json.loads((cold / "summary.json").read_text())
    assert set(summary) >= {
        "judges",
        "phases_s",
        "images_per_s",
        "pre_update_clip_fraction",
        "versions",
        "commit",
    }
    assert list(summary["judges"]) == ["alignment", "aesthetics"]
    with np.load(cold / "samples" / "before.npz") as before:
        for name, row in summary["judges"].items():
            assert set(row) == {"before", "after", "diff", "low", "high", "n"} and row["n"] == 4
            assert row["before"] == pytest.approx(before[f"score_{name}"].mean(), rel=1e-12)
            assert row["diff"] == pytest.approx(row["after"] - row["before"], abs=1e-12)
            assert row["low"] <= row["diff"] <= row["high"]
    timings = read_jsonl(cold / "timings.jsonl")
    for phase in ("rollout", "update"):
        seconds = sum(row["phases_s"][phase] for row in timings)
        assert summary["phases_s"][phase] == pytest.approx(seconds) and seconds > 0
    for row in timings:
        assert set(row["mfu"]) == set(row["tflop"]) >= {"rollout", "update", "step"}
        assert all(0 < share < 10 for share in row["mfu"].values())
        assert row["judges"].keys() == {"alignment_s", "aesthetics_s", "queue_mean", "queue_max"}
    assert "MFU is of" in (cold / "log.txt").read_text()
    # two updates of eight images each
    assert summary["images_per_s"] == pytest.approx(16 / sum(r["seconds"] for r in timings))
    assert summary["pre_update_clip_fraction"] == 0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["threads"] == "1"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", summary["commit"])


def test_tensorboard_shows_the_metrics(
    cold: Path, read_jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(cold / "tb"))
    events.Reload()
    rows = read_jsonl(cold / "metrics.jsonl")
    for name in METRICS - {"step"}:
        shown = [(e.step, e.value) for e in events.Scalars(name)]
        assert shown == [(row["step"], float(np.float32(row[name]))) for row in rows]


def test_the_picture_is_a_picture(cold: Path) -> None:
    with Image.open(cold / "samples" / "before_after.png") as picture:
        picture.verify()
    with Image.open(cold / "samples" / "before_after.png") as picture:
        assert picture.format == "PNG"
        # four prompts, before and after, 64 pixels a side at least
        assert picture.width * picture.height >= 8 * 64 * 64
        assert np.asarray(picture.convert("RGB")).std() > 1


def test_the_resolved_recipe_is_the_run(cold: Path, small) -> None:
    resolved = load_config([str(cold / "config.resolved.yaml")])
    assert config_hash(resolved) == config_hash(load_config(small))
    assert resolved.run == "plain" and resolved.train.steps == 2


def test_prompts_are_encoded_once(cold: Path, small, start: Callable[..., Any]) -> None:
    """A second run over the same prompts adds no embedding and rewrites none."""
    cache = cold.parent / "embeddings"
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2 * 2 + 4 + 1, "two updates of two prompts, four held out, the empty one"
    run = start([*small, f"output={cold.parent}", "run=again"])
    assert run.wait() == 0, run.output()
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, small, capsys) -> None:
    assert main([*small, f"output={tmp_path}/new", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "prompts_per_step: 2" in printed
    assert "# samples per update      8 = 2 prompts x 4 samples" in printed
    assert not list(tmp_path.iterdir())
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert config_hash(load_config([str(again)])) == config_hash(load_config(small))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capsys) -> None:
    assert main([flag]) == 0
    printed = capsys.readouterr().out
    assert "key=value" in printed and "--dry-run" in printed and "resume=auto" in printed


def test_a_finished_run_is_not_overwritten(
    finished: Callable[..., Path], small, start: Callable[..., Any]
) -> None:
    folder = finished("plain")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    run = start([*small, f"output={folder.parent}", "run=plain"])
    assert run.wait() == 2
    assert "already holds a run; go on with it by resume=auto" in run.output()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_every_option_at_once(
    finished: Callable[..., Path], read_jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """EMA, two updates a rollout, drawn steps, KLs, full guidance, evaluations and samples."""
    folder = finished("varied", *VARIED)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert set(rows[0]) >= METRICS | {"kl", "velocity_kl"}
    held = {"heldout/alignment", "heldout/aesthetics"}
    assert set(rows[0]) - set(rows[1]) == held, "the last evaluation is the report's"
    for row in rows:
        assert row["pre_update_ratio_error"] == row["pre_update_clip_fraction"] == 0
        assert row["ratio_error"] > 0, "the second minibatch meets a policy that has moved"
        assert row["velocity_kl"] > 0 and row["kl"] > 0
    saved = state(folder)
    assert saved["optimizer_steps"] == 4, "two updates of two minibatches"
    names = {p.name for p in (folder / "samples").glob("*.png")}
    assert names == {"step-1.png", "step-2.png", "before_after.png", "rewards.png"}
    assert not list((folder / "tb").iterdir())


def test_the_learning_rate_rises_and_falls(finished: Callable[..., Path], read_jsonl) -> None:
    folder = finished("rates", "train={steps: 5, lr: 0.002, warmup: 2, decay: 3}")
    rates = [row["lr"] for row in read_jsonl(folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.001, 0.002, 0.002, 0.002 * 2 / 3, 0.002 / 3])


def test_the_export_is_the_average(finished: Callable[..., Path]) -> None:
    folder = finished("varied", *VARIED)
    saved = state(folder)
    exported = load_file(folder / "checkpoints" / "latest" / "pytorch_lora_weights.safetensors")
    average = dict(zip(saved["weights"], saved["ema"], strict=True))
    assert len(exported) == len(average) > 0
    for name, tensor in average.items():
        assert torch.equal(exported[f"transformer.{name.replace('.default', '')}"], tensor)
    assert any(not torch.equal(saved["weights"][n], t) for n, t in average.items())


def test_full_parameters(
    finished: Callable[..., Path], read_jsonl: Callable[[Path], list[dict[str, Any]]], weights: Path
) -> None:
    """Every weight of the transformer is trained and saved; there is no adapter to export."""
    folder = finished(
        "full", "model.adapter=full", "train.lr=1e-4", "rollout.ratio_mode=conditional"
    )
    start = load_file(weights / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = state(folder)["weights"]
    assert set(trained) == set(start)
    moved = [name for name in start if not torch.equal(trained[name], start[name])]
    assert len(moved) > 0.9 * len(start)
    # Adam's first two steps move a weight by at most about lr each
    assert all((trained[n] - start[n]).abs().max() < 3e-4 for n in start)
    names = {p.name for p in (folder / "checkpoints" / "latest").iterdir()}
    assert names == {"state.safetensors", "state.json", "manifest.json"}
    rows = read_jsonl(folder / "metrics.jsonl")
    assert all(row["pre_update_ratio_error"] == 0 for row in rows)
    plain = finished("plain") / "samples" / "before.npz"
    with np.load(plain) as one, np.load(folder / "samples" / "before.npz") as other:
        assert np.array_equal(one["image_0"], other["image_0"]), "both start from the same policy"


def test_bfloat16(
    finished: Callable[..., Path], read_jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Model and storage in bfloat16, chunks that cut groups; the trained weights stay float32."""
    folder = finished(
        "bfloat16",
        "model.dtype=bfloat16",
        "rollout.storage_dtype=bfloat16",
        "rollout.max_rows=3",
        "algorithm.clip_low=1e-6",
        "algorithm.clip_high=1e-6",
        "rollout.dynamics=dance_sde",
    )
    for row in read_jsonl(folder / "metrics.jsonl"):
        assert row["pre_update_ratio_error"] == row["pre_update_clip_fraction"] == 0
    assert {t.dtype for t in state(folder)["weights"].values()} == {torch.float32}


def test_watched_judges_are_shown_and_not_optimised(
    small, tmp_path: Path, start: Callable[..., Any], read_jsonl: Callable[..., Any]
) -> None:
    settings = load_config(small).model_dump(mode="json")
    settings |= {"rewards": {"alignment": 1.0}, "watch": ["aesthetics"]}
    recipe = tmp_path / "watching.yaml"
    recipe.write_text(json.dumps(settings))
    run = start([recipe, "train.steps=1", f"output={tmp_path}", "run=watching"])
    assert run.wait() == 0, run.output()
    (row,) = read_jsonl(tmp_path / "watching" / "metrics.jsonl")
    assert row["reward"] == row["reward/alignment"] and "reward/aesthetics" in row
    summary = json.loads((tmp_path / "watching" / "summary.json").read_text())
    assert set(summary["judges"]) == {"alignment", "aesthetics"}


def test_deterministic_runs_repeat_and_on_a_cpu_are_those_of_any_run(
    start, small, finished, tmp_path: Path
) -> None:
    own = [*small, *VARIED, f"output={tmp_path}", "deterministic=true"]
    for name in ("first", "second"):
        run = start([*own, f"run={name}"])
        assert run.wait() == 0, run.output()
    folders = (tmp_path / "first", tmp_path / "second", finished("varied", *VARIED))
    for file in ("metrics.jsonl", "checkpoints/latest/state.safetensors"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1


def test_a_profile_shows_the_ops_and_changes_no_bit(start, small, finished, tmp_path: Path) -> None:
    run = start([*small, f"output={tmp_path}", "run=r", "tracking.profile=[2]"])
    assert run.wait() == 0, run.output()
    (trace,) = (tmp_path / "r" / "profile").iterdir()
    with gzip.open(trace, "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert trace.name == "step-2.json.gz"
    assert {"qirl::flow_step", "qirl::policy_loss"} <= names
    plain = finished("plain")
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
