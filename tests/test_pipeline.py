"""The pipeline: its stages as commands, what it refuses, and a whole run killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from qirl_fast.config import ConfigError, load_config, load_settings
from qirl_fast.config.pipeline import PipelineConfig
from qirl_fast.pipeline import StageFailed, Stages, main, mix

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = str(ROOT / "configs" / "tiny_pipeline.yaml")


def test_the_packaged_settings_are_whole() -> None:
    cfg = load_settings([PACKAGED], PipelineConfig)
    assert list(cfg.tasks) == ["t2i", "edit"]
    recipes = [load_config([t.recipe, *t.set]) for t in cfg.tasks.values()]
    drawn = [c.train.steps * c.data.prompts_per_step * c.rollout.group_size for c in recipes]
    # The baseline draws as many images as teachers and student together, to a twentieth.
    import yaml

    student, baseline = (
        yaml.safe_load((ROOT / stage.recipe).read_text()) for stage in (cfg.student, cfg.baseline)
    )
    for plain in (student, baseline):
        images = plain["data"]["prompts_per_step"] * plain["rollout"]["group_size"]
        drawn.append(plain["train"]["steps"] * images)
    *others, own = drawn
    assert 0.95 < own / sum(others) < 1.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["student.set=[output=x]"], "student.set: got 'output=x'; wanted key=value of the recipe"),
        (["tasks.edit.set=[resume]"], "tasks.edit.set: got 'resume'"),
        (["task.edit.judge=x"], "task: unknown key; did you mean tasks"),
        (["prompts=0"], "prompts: got 0"),
        (["tasks.t2i.recipe=nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["tasks.t2i.set=[model.adapter=full]"], "tasks.t2i: model.adapter is 'full'"),
        (["tasks.t2i.set=[train.stepz=3]"], "train.stepz: unknown key"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_before_any_stage(
    settings: list[str], words: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([PACKAGED, f"output={tmp_path / 'p'}", *settings]) == 2
    said = capsys.readouterr()
    assert words in " ".join(said.err.split())
    assert "python -m" not in said.out


def test_rows_are_mixed_in_turn_and_say_their_task(tmp_path: Path) -> None:
    recipes = {
        "t2i": load_config([str(ROOT / "configs/tiny_grpo.yaml")]),
        "edit": load_config([str(ROOT / "configs/tiny_edit.yaml")]),
    }
    words = mix(tmp_path, recipes)
    prompts = ROOT / "qirl_fast" / "tiny" / "prompts"
    assert words[1] == f"data.images={prompts}" and words[3] == f"data.heldout_images={prompts}"
    rows = [json.loads(x) for x in (tmp_path / "mixed-heldout.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["t2i", "edit"] * 96
    again = load_config([str(ROOT / "configs/tiny_edit.yaml"), f"data.heldout_images={tmp_path}"])
    with pytest.raises(ConfigError, match="wanted one folder"):
        mix(tmp_path, recipes | {"edit": again})


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stage_runs_once_and_under_the_same_words_only(
    side_by_side: int, tmp_path: Path, capfd
) -> None:
    run = Stages(tmp_path, side_by_side).run
    help_ = ["--help", "resume=auto"]
    run("a stage", "curate", help_, "a")
    said = capfd.readouterr().out
    assert "python -m qirl_fast.curate --help" in said and "curate [recipe.yaml" in said
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").touch()
    run("a stage", "curate", help_, "a")
    assert "done before" in capfd.readouterr().out
    with pytest.raises(ConfigError, match=r"ended in .* as another command; go back"):
        run("a stage", "curate", ["--help", "seed=1", "resume=auto"], "a")
    with pytest.raises(StageFailed, match="b stage did not come to its end"):
        run("b stage", "train", ["nowhere.yaml"], "never")


@pytest.mark.slow
def test_a_stage_that_fails_stops_those_beside_it(tmp_path: Path, capfd) -> None:
    stages = Stages(tmp_path, 2)
    recipe = [str(ROOT / "configs" / "tiny_grpo.yaml"), f"output={tmp_path}", "run=long"]
    done = []

    def fails() -> None:
        timings = tmp_path / "long" / "timings.jsonl"
        while not (timings.exists() and timings.read_text()):
            time.sleep(0.1)
        stages.run("wrong", "train", ["nowhere.yaml"], "wrong")

    def long() -> None:
        stages.run(
            "long", "train", [*recipe, "evaluation.prompts=2", "data.prompts_per_step=1"], "long"
        )

    def last() -> None:
        stages.run("last", "train", recipe, "long")
        done.append("it ran")

    with pytest.raises(StageFailed, match="wrong did not come to its end"):
        stages.all([long, fails, last], last, after=[fails])
    said = capfd.readouterr().out
    assert "wrong        | error: nowhere.yaml" in said and "last  " not in said and not done
    assert "long         | stopped by SIGTERM" in said
    assert (tmp_path / "long" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("side_by_side", [1, 2, 3])
def test_the_last_stage_starts_when_those_it_needs_have_ended(
    side_by_side: int, tmp_path: Path
) -> None:
    ended: list[str] = []
    over = Event()

    def chain(name: str, seconds: float) -> None:
        time.sleep(seconds)
        ended.append(name)

    def other() -> None:
        if side_by_side > 1:
            assert over.wait(60), "the last one did not start beside it"
        ended.append("other")

    def last() -> None:
        ended.append("last")
        over.set()

    needed = [partial(chain, "a", 0.2), partial(chain, "b", 0.3)]
    Stages(tmp_path, side_by_side).all([other, *needed], last, after=needed)
    if side_by_side == 1:
        assert ended == ["other", "a", "b", "last"]
    else:
        assert ended[2:] == ["last", "other"] and set(ended[:2]) == {"a", "b"}


@pytest.mark.slow
def test_a_whole_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    short = "train.steps=2,train.decay=1,curation.samples=2,evaluation.prompts=4"
    settings = [PACKAGED, f"output={tmp_path}", "prompts=8", "samples_per_prompt=1"]
    for key in ("tasks.t2i", "tasks.edit", "student", "baseline"):
        own = short if key.startswith("tasks") else short.replace("curation.samples=2,", "")
        settings.append(f"{key}.set=[{own}]")
    command = [sys.executable, "-m", "qirl_fast.pipeline", *settings]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    timings = tmp_path / "edit" / "timings.jsonl"
    try:
        for _ in range(6000):
            if (timings.exists() and timings.read_text()) or first.poll() is not None:
                break
            time.sleep(0.1)
        assert first.poll() is None, "it ended before it could be killed"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("t2i-curation", "t2i", "edit-curation"):
        assert f"done before: {tmp_path / stage / 'summary.json'}" in again.stdout
    assert f"done before: {tmp_path / 'edit' / 'summary.json'}" not in again.stdout
    found = json.loads((tmp_path / "comparison.json").read_text())
    models = ["base", "t2i teacher", "edit teacher", "baseline", "baseline unguided", "student"]
    assert list(found["models"]) == models
    for model, tasks in found["models"].items():
        for task, kept in tasks.items():
            file = tmp_path / "evaluation" / f"{task}-{model.replace(' ', '-')}.npz"
            judge = {"t2i": "score_alignment", "edit": "score_edit_accuracy"}[task]
            with np.load(file) as arrays:
                assert arrays[judge].shape == (8,)
                assert kept["mean"] == pytest.approx(arrays[judge].mean())
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    table = (tmp_path / "comparison.md").read_text()
    assert "| student | none |" in table and "student above the baseline" in table
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert third.returncode == 0 and third.stdout.count("done before") == 6
