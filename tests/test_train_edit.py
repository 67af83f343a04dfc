"""A run on editing rows: condition images reach the model and the judges, bad ones are dealt with.

Tests do not depend on how well the packaged model edits.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from small_transformers import EDITORS, edit_folder

from qirl_fast.config import ConfigError, load_config
from qirl_fast.curate import main as curate
from qirl_fast.memory import plan
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rewards.judge import SOURCES
from qirl_fast.rollout.sample import sample
from qirl_fast.tiny import packaged
from qirl_fast.trainer import Trainer

Start = Callable[..., Any]

# Writes down what it is shown; the score is how much of the source is left.
JUDGE = """
import numpy
from qirl_fast.rewards.judge import SOURCES
from qirl_fast.rollout.sample import sample

seen = []

def score(images, metadata):
    for image, row in zip(images, metadata):
        (source,) = row[SOURCES]
        assert source.dtype == numpy.uint8 and source.shape == image.shape, source.shape
        seen.append((row["prompt"], image.shape))
    pairs = [numpy.abs(i - r[SOURCES][0].astype(float)).mean() for i, r in zip(images, metadata)]
    return (1 - numpy.array(pairs) / 255).astype(numpy.float32)
"""


@pytest.fixture
def small(small: tuple[str, ...]) -> tuple[str, ...]:
    """Settings of a short run, but for what it is judged by."""
    return tuple(s for s in small if not s.startswith("rewards"))


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    """A folder with edits.jsonl, its eight pictures, and the judge `watching:score`."""
    source = packaged("tiny:edit-train")
    rows = [json.loads(line) for line in source.read_text().splitlines()[:8]]
    (tmp_path / "edits").mkdir()
    for row in rows:
        shutil.copy(source.parent / row["image"], tmp_path / row["image"])
    write(tmp_path / "edits.jsonl", rows)
    (tmp_path / "watching.py").write_text(JUDGE)
    recipe = yaml.safe_load(Path("configs/tiny_grpo.yaml").read_text())
    recipe["rewards"] = {"edit_accuracy": 0.5, "preservation": 0.5}
    recipe["judges"] = {"preservation": {"kind": "preservation"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings(folder: Path, *more: str) -> list[str]:
    file = folder / "edits.jsonl"
    own = [f"data.train={file}", f"data.heldout={file}", f"output={folder}/runs", "run=edit"]
    return [str(folder / "recipe.yaml"), *own, *more]


def judge_by(folder: Path, name: str) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"rewards": {name: 1.0}, "judges": {}})
    )


def spoil(folder: Path, row: int, kind: str) -> str:
    """Damages the picture of a row; its name."""
    rows = read(folder / "edits.jsonl")
    path = folder / rows[row]["image"]
    if kind == "missing":
        path.unlink()
    elif kind == "cut":  # the header is whole
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(picture).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    return path.name


def test_a_run_on_edits_ends_with_a_report(small, start: Start, edits: Path) -> None:
    run = start([*small, *settings(edits)])
    assert run.wait() == 0, run.output()
    folder = edits / "runs/edit"
    judges = json.loads((folder / "summary.json").read_text())["judges"]
    assert set(judges) == {"edit_accuracy", "preservation"}
    metrics, timings = read(folder / "metrics.jsonl"), read(folder / "timings.jsonl")
    assert all(line["pre_update_ratio_error"] == 0 for line in metrics)
    assert all("data" in line["phases_s"] for line in timings)
    with Image.open(folder / "samples/before_after.png") as picture:
        wide = picture.width
    assert wide > 300 + 3 * 192  # text, and three pictures a row

    # The same again: nothing is encoded anew, and the numbers are the same.
    kept = {p.name: p.stat().st_mtime_ns for p in (edits / "runs/embeddings").iterdir()}
    assert len(kept) >= 2 * 4  # of each row drawn, with its text and with none
    again = start([*small, *settings(edits, "run=again")])
    assert again.wait() == 0, again.output()
    assert {p.name: p.stat().st_mtime_ns for p in (edits / "runs/embeddings").iterdir()} == kept
    same = (edits / "runs/again/metrics.jsonl").read_bytes()
    assert same == (folder / "metrics.jsonl").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(small, start: Start, edits: Path) -> None:
    spoil(edits, 2, "cut")
    own = settings(edits, "train.steps=6", "data.bad_images=skip", "evaluation.prompts=2")
    whole = start([*small, *own])
    assert whole.wait() == 0, whole.output()
    hook = """
import os, signal
from qirl_fast.trainer import Trainer
real = Trainer.update
def update(self, *given):
    if self.learner.optimizer_steps == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *given)
Trainer.update = update
"""
    killed = start([*small, *own, "run=killed"], hook=hook)
    assert killed.wait() == -9, killed.output()
    rest = start([*small, *own, "run=killed", "resume=auto"])
    assert rest.wait() == 0, rest.output()
    files = [edits / "runs" / run / "metrics.jsonl" for run in ("edit", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The row that shows its damage only when decoded was met, named, and never drawn again.
    log = (edits / "runs/edit/log.txt").read_text()
    assert log.count("left out for good") == 1 and "train-002.png" in log


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_bad_image_stops_the_run_and_says_which(small, start: Start, edits: Path, kind) -> None:
    name = spoil(edits, 7, kind)
    own = settings(edits, "train.steps=4", "evaluation.prompts=2")
    run = start([*small, *own])
    said = run.output() if run.wait() else ""
    assert run.wait() == {"missing": 2, "cut": 1}[kind], run.output()
    assert name in said and "data.bad_images=skip" in said
    if kind == "missing":
        assert not (edits / "runs/edit").exists()  # nothing was begun
        return
    assert "not applied" in said and "resume=auto" in said
    Image.new("RGB", (64, 64)).save(edits / "edits" / name)
    run = start([*small, *own, "resume=auto"])
    assert run.wait() == 0, run.output()


def test_bad_rows_are_left_out_where_that_is_asked_for(small, edits: Path) -> None:
    spoil(edits, 0, "missing")
    spoil(edits, 1, "cut")
    own = settings(edits, "data.bad_images=skip", "evaluation.prompts=6")
    trainer = Trainer(load_config([*small, *own]))
    rows = read(edits / "edits.jsonl")
    assert [p.metadata for p in trainer.heldout] == rows[2:]  # decoded before they are compared on
    drawn = {p.metadata["image"] for _ in range(12) for p in trainer.next_prompts()}
    assert drawn == {row["image"] for row in rows[2:]}
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: got 7.*allowed: 2 to 6"):
        Trainer(load_config([*small, *own, "evaluation.prompts=7"]))


def test_a_row_mended_or_broken_meanwhile_does_not_stop_the_rest(small, start, edits) -> None:
    spoil(edits, 3, "missing")
    own = settings(edits, "data.bad_images=skip", "evaluation.prompts=2")
    run = start([*small, *own])
    assert run.wait() == 0, run.output()
    Image.new("RGB", (64, 64)).save(edits / "edits/train-003.png")
    spoil(edits, 7, "missing")
    rest = start([*small, *own, "train.steps=6", "resume=auto"])
    assert rest.wait() == 0, rest.output()
    assert len(read(edits / "runs/edit/metrics.jsonl")) == 6


def test_an_image_that_the_encoder_does_not_take_is_a_bad_one(small, edits: Path) -> None:
    picture = read(edits / "edits.jsonl")[0]["image"]
    Image.new("RGB", (16_000, 60)).save(edits / picture)  # the processor's ratio ends at 200
    own = settings(edits, "data.condition_pixels=1048576")
    with pytest.raises(ConfigError, match=r"train-000\.png: .*so long.*16384: crop it"):
        Trainer(load_config([*small, *own]))
    with pytest.raises(ConfigError, match=r"train-000\.png: .*short side rounds to 0"):
        Trainer(load_config([*small, *settings(edits)]))
    Image.new("RGB", (64, 64)).save(edits / picture)
    with pytest.raises(ConfigError, match=r"train-000\.png: .*choose an area it takes"):
        Trainer(load_config([*small, *own]))


def test_a_run_begun_with_images_of_one_size_goes_on(small, start: Start, edits: Path) -> None:
    run = start([*small, *settings(edits)])
    assert run.wait() == 0, run.output()
    before = edits / "runs/edit/samples/before.npz"
    with np.load(before) as saved:
        kept = {name: saved[name] for name in saved if not name.startswith("image_")}
        images = np.stack([saved[f"image_{i}"] for i in range(4)])
    np.savez(before, images=images, **kept)
    rest = start([*small, *settings(edits, "train.steps=3", "resume=auto")])
    assert rest.wait() == 0, rest.output()


def test_every_update_is_of_one_size(small, start: Start, edits: Path) -> None:
    rows = read(edits / "edits.jsonl")
    for row in rows[:4]:
        Image.new("RGB", (128, 64), "red").save(edits / row["image"])
    own = settings(edits, "data.buckets=[[64, 64], [32, 64]]", "train.steps=4")
    own += ["evaluation.prompts=8"]
    judge_by(edits, "watching:score")
    hook = f"""
import atexit, json, os
real, os._exit = os._exit, lambda code: (end(), real(code))
def end():
    import watching
    open({str(edits / "seen.json")!r}, "w").write(json.dumps(watching.seen))
"""
    run = start([*small, *own], paths=[edits], hook=hook)
    assert run.wait() == 0, run.output()
    wide = {row["prompt"] for row in rows[:4]}
    seen = json.loads((edits / "seen.json").read_text())
    assert {tuple(shape) for _, shape in seen} == {(64, 64, 3), (32, 64, 3)}
    assert all((shape[0] == 32) == (prompt in wide) for prompt, shape in seen)
    judges = json.loads((edits / "runs/edit/summary.json").read_text())["judges"]
    assert judges["watching:score"]["n"] == 8


def test_judges_and_model_see_the_picture_over_white(small, edits: Path) -> None:
    rows = read(edits / "edits.jsonl")
    half = np.zeros((64, 64, 4), np.uint8)
    half[:32, :, 3] = 255  # above black, below transparent
    Image.fromarray(half).save(edits / rows[0]["image"])
    trainer = Trainer(load_config([*small, *settings(edits)]))
    given = trainer.conditioning.of(trainer.sampler.prompts[:1])
    (source,) = given.rows[0][SOURCES]
    assert np.unique(source[:32]).tolist() == [0] and np.unique(source[32:]).tolist() == [255]
    # The autoencoder reads alpha: the latents are not those of the picture over white.
    own = trainer.model.condition(rows[0]["prompt"], [[half]])
    assert np.array_equal(own.latents, given.embeddings[0].latents)
    over = trainer.model.condition(rows[0]["prompt"], [[source]])
    assert not np.array_equal(over.latents, own.latents)


def test_rows_with_and_without_images_train_together(small, start: Start, edits: Path) -> None:
    rows = read(edits / "edits.jsonl")
    for row in rows[:4]:
        del row["image"]
    write(edits / "edits.jsonl", rows)
    judge_by(edits, "edit_accuracy")
    run = start([*small, *settings(edits)])
    assert run.wait() == 0, run.output()
    # Each row is guided away from its own unconditional branch, as if it were drawn alone.
    trainer = Trainer(load_config([*small, *settings(edits)]))
    prompts = [trainer.sampler.prompts[i] for i in (5, 1, 7)]
    given = trainer.conditioning.of(prompts)
    how = replace(trainer.heldout_samples.how, max_rows=1)

    def latents(embeddings: list[Any], null: Any, samples: list[int]) -> list[Any]:
        drawn = sample(
            trainer.model,
            embeddings,
            null,
            how,
            trainer.scheduler,
            group_size=1,
            seed=0,
            update=0,
            samples=samples,
        )
        return [chunk.latents for chunk in drawn]

    together = latents(given.embeddings, given.null, [0, 1, 2])
    for i in range(3):
        (alone,) = latents(given.embeddings, given.null[i], [i])
        assert np.array_equal(alone, together[i])
    other = latents(given.embeddings, given.null[0], [2])[0]
    assert not np.array_equal(other, together[2])


@pytest.mark.parametrize("name", EDITORS)
def test_every_editing_family_is_planned_and_trains(small, start, edits, weights, name) -> None:
    folder = edit_folder(name, weights, edits / "model")
    own = settings(edits, f"model.path={folder}", "train.steps=1", "evaluation.prompts=2")
    images = ("keys and values of the prompts", "activations of replay")
    with_images = plan(load_config([*small, *own]))
    assert all(with_images[purpose] > 0 for purpose in images)
    # Twice the area, more of everything that holds condition tokens.
    larger = plan(load_config([*small, *own, "data.condition_pixels=16384"]))
    assert all(larger[purpose] > with_images[purpose] for purpose in images[1:])
    run = start([*small, *own])
    assert run.wait() == 0, run.output()
    (line,) = read(edits / "runs/edit/metrics.jsonl")
    assert line["pre_update_ratio_error"] == 0


def test_a_model_that_draws_from_text_alone_is_told_so(small, edits: Path, monkeypatch) -> None:
    monkeypatch.setattr(QwenImage21, "takes_images", classmethod(lambda cls: False))
    with pytest.raises(ConfigError, match=r"edits\.jsonl: row 1 has a condition image.*text alone"):
        Trainer(load_config([*small, *settings(edits)]))
    monkeypatch.undo()
    monkeypatch.setattr(QwenImage21, "needs_images", True)
    rows = read(edits / "edits.jsonl")
    del rows[3]["image"]
    write(edits / "edits.jsonl", rows)
    with pytest.raises(ConfigError, match=r"row 4 has no condition image.*only edits"):
        Trainer(load_config([*small, *settings(edits)]))


def test_the_images_may_lie_elsewhere(small, edits: Path) -> None:
    (edits / "photos").mkdir()
    (edits / "edits").rename(edits / "photos/edits")
    with pytest.raises(ConfigError, match=r"8 of 8 rows have an image that cannot be used"):
        Trainer(load_config([*small, *settings(edits)]))
    roots = [f"data.{name}={edits / 'photos'}" for name in ("images", "heldout_images")]
    trainer = Trainer(load_config([*small, *settings(edits, *roots)]))
    assert len(trainer.next_prompts()) == 2
    with pytest.raises(ConfigError, match=r"data\.images: no such folder"):
        load_config([*small, *settings(edits, "data.images=/no/such")])


def test_edits_are_curated_and_keep_their_pictures(small, edits: Path, capsys) -> None:
    more = ["curation={samples: 2, quantile: null, threshold: 0.0}", "evaluation.prompts=2"]
    assert curate([*small, *settings(edits, *more)]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    found = edits / "runs/edit-curation"
    rows = [row for name in ("kept", "dropped") for row in read(found / f"{name}.jsonl")]
    assert sorted(row["image"] for row in rows) == [f"edits/train-00{i}.png" for i in range(8)]
    assert f"data.images={edits}" in said and (found / "strips.png").exists()
    argv = [f"data.train={found / 'kept.jsonl'}", f"data.images={edits}", *more]
    assert Trainer(load_config([*small, *settings(edits, *argv)])).next_prompts()
    assert curate([*small, *settings(edits, f"data.train={edits / 'edits'}", *more)]) == 2
    assert "curation copies rows" in capsys.readouterr().err
    # A row left out moves no other's scores, and a mended one is not mixed in.
    spoil(edits, 0, "missing")
    skip = [*small, *settings(edits, *more, "run=skip", "data.bad_images=skip")]
    assert curate(skip) == 0
    assert "cannot be used are in no file written here: 1 " in capsys.readouterr().out.replace(
        "\n", " "
    )
    found = edits / "runs/skip-curation"
    scores = read(found / "scores.jsonl")
    rows = [row for name in ("kept", "dropped") for row in read(found / f"{name}.jsonl")]
    assert {row["prompt"] for row in scores} == {row["prompt"] for row in rows}
    assert sorted(row["image"] for row in rows) == [f"edits/train-00{i}.png" for i in range(1, 8)]
    Image.new("RGB", (64, 64)).save(edits / "edits/train-000.png")
    assert curate(skip) == 2 and "rows left out: was [0]" in capsys.readouterr().err
    # Damage that shows when a row is drawn stops it, scores kept, and says which row.
    name = spoil(edits, 6, "cut")
    assert curate([*small, *settings(edits, *more, "run=cut")]) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "prompt 7" in said and name in said and "the scores so far are kept" in said


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed (extra 'dali')",
)
def test_dali_gives_the_same_run(small, start: Start, edits: Path) -> None:
    for decoder in ("pil", "dali"):
        run = start([*small, *settings(edits, f"data.decoder={decoder}", f"run={decoder}")])
        assert run.wait() == 0, run.output()
        shutil.rmtree(edits / "runs/embeddings")
    pil, dali = ((edits / "runs" / d / "metrics.jsonl").read_bytes() for d in ("pil", "dali"))
    assert pil == dali
    assert "dali" in (edits / "runs/dali/log.txt").read_text().lower()


def test_a_missing_dali_is_an_error_before_the_run(small, edits: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"data\.decoder: DALI.*pip install 'qirl-fast\[dali\]'"):
        Trainer(load_config([*small, *settings(edits, "data.decoder=dali")]))
