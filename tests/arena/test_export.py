"""What a pipeline keeps becomes a study; a judge votes on it, apart from people."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from qirl_fast.arena.__main__ import main
from qirl_fast.arena.export import export
from qirl_fast.arena.store import Store
from qirl_fast.arena.study import load_study
from qirl_fast.config import ConfigError, load_settings
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.data.prompts import load_prompts
from qirl_fast.rewards.judge import SOURCES

T2I = [{"prompt": f"a photo of {c}", "tag": "colour"} for c in ("red", "blue")]
EDIT = [{"prompt": "make it red", "tag": "recolour", "image": "in.png", "source": [1, None]}]


@pytest.fixture
def pipeline(tmp_path):
    """As qirl_fast.pipeline leaves it: ids are those of each task's own file."""
    folder, images = tmp_path / "pipeline", tmp_path / "images"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "stages").mkdir()
    images.mkdir()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(images / "in.png")
    words = ["-m", "qirl_fast.train", f"data.heldout_images={images}"]
    (folder / "stages" / "student.json").write_text(json.dumps(words))
    mixed = [{"task": t, **row} for t, rows in (("t2i", T2I), ("edit", EDIT)) for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in mixed)
    (folder / "mixed-heldout.jsonl").write_text(text)
    for task, rows in (("t2i", T2I), ("edit", EDIT)):
        own = images / f"{task}.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ids = np.array([p.id for p in load_prompts(own)])
        for shade, model in enumerate(("base", "student", f"{task}-teacher")):
            drawn = {
                f"image_{i}": np.full((4, 4, 3), 80 * shade + i, np.uint8) for i in range(len(ids))
            }
            np.savez(folder / "evaluation" / f"{task}-{model}.npz", prompts=ids, **drawn)
    return folder


def test_a_pipeline_becomes_a_study_of_base_and_student(pipeline, tmp_path):
    cfg = load_settings([str(export(pipeline, tmp_path / "out"))], ArenaConfig)
    assert list(cfg.models) == ["base", "student"]
    study = load_study(cfg.models)
    assert sorted((p.prompt, p.category) for p in study.prompts.values()) == [
        ("a photo of blue", "t2i: colour"),
        ("a photo of red", "t2i: colour"),
        ("make it red", "edit: recolour"),
    ]
    edit = next(p for p in study.prompts.values() if p.source)
    assert np.asarray(Image.open(edit.source.path)).flat[0] == 7
    assert np.asarray(Image.open(edit.images["student"].path)).flat[0] == 80
    assert edit.metadata["source"] == [1, None] and edit.metadata["prompt"] == "make it red"


def test_other_models_are_there_too(pipeline, tmp_path):
    path = export(pipeline, tmp_path / "out", ["base", "t2i-teacher"])
    assert list(load_settings([str(path)], ArenaConfig).models) == ["base", "t2i-teacher"]
    assert "# student:" in path.read_text()
    with pytest.raises(ConfigError, match="is not empty"):
        export(pipeline, tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no 'techer'; there are base"):
        export(pipeline, tmp_path / "more", ["base", "techer"])
    assert not (tmp_path / "more").exists()


def test_what_is_no_pipeline(tmp_path, pipeline):
    with pytest.raises(ConfigError, match=r"holds no \.npz"):
        export(tmp_path, tmp_path / "out")
    (pipeline / "mixed-heldout.jsonl").write_text('{"prompt": "other"}\n')
    with pytest.raises(ConfigError, match=r"is not in mixed-heldout\.jsonl"):
        export(pipeline, tmp_path / "out")


def bright(images, rows):
    """Brighter is better; an edit needs its source; prompts of blue cannot be judged."""
    for row in rows:
        assert row["prompt"] != "make it red" or row[SOURCES][0].flat[0] == 7
    blue = ["blue" in row["prompt"] for row in rows]
    return np.ma.array(images.mean(axis=(1, 2, 3)) / 255, mask=blue)


class Positional:
    """Prefers the first picture, unless the second is much brighter."""

    def __call__(self, images, rows):
        raise AssertionError("is asked for pairs")

    def compare(self, first, second, rows):
        assert len(first) == len(rows)
        return np.where(second.mean(axis=(1, 2, 3)) > first.mean(axis=(1, 2, 3)) + 50, 0.0, 1.0)


positional = Positional()


def test_a_judge_votes_once_and_what_it_cannot_judge_is_said(pipeline, tmp_path, capsys):
    settings = str(export(pipeline, tmp_path / "out"))
    judge = [settings, "judge=arena_judges:bright"]
    sys.modules["arena_judges"] = sys.modules[__name__]
    try:
        assert main(["judge", *judge]) == 1
        assert "2 votes of the judge; 1 questions it could not judge" in capsys.readouterr().out
        assert main(["judge", *judge]) == 1  # nothing is asked twice
        assert "0 votes of the judge; 1 questions" in capsys.readouterr().out
        assert main(["judge", settings, "judge=arena_judges:positional"]) == 0
        base_and_teacher = ["models.other=" + str(tmp_path / "out" / "student")]
        assert main(["judge", *judge, *base_and_teacher]) == 2  # the same folder twice
    finally:
        del sys.modules["arena_judges"]
    store = Store(tmp_path / "out" / "votes.db")
    votes = store.votes("model")
    assert store.votes("person") == []
    store.close()
    assert [v.choice for v in votes if v.rater.endswith("bright")] == ["b", "b"]
    assert [v.choice for v in votes if v.rater.endswith("positional")] == ["b"] * 3
    capsys.readouterr()
    assert main(["results", settings]) == 0
    said = capsys.readouterr().out
    assert "No prompt of student against base is decided yet" in said
    assert "judge arena_judges:bright" in said and "100.0 % (" in said


def test_a_judge_that_goes_by_position_alone_is_a_tie(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(positional, "compare", lambda a, b, rows: np.ones(len(rows)), raising=False)
    monkeypatch.setitem(sys.modules, "arena_judges", sys.modules[__name__])
    settings = str(export(pipeline, tmp_path / "out"))
    assert main(["judge", settings, "judge=arena_judges:positional"]) == 0
    store = Store(tmp_path / "out" / "votes.db")
    assert [v.choice for v in store.votes("model")] == ["tie"] * 3
    store.close()


def test_no_judge_is_named(pipeline, tmp_path, capsys):
    assert main(["judge", str(export(pipeline, tmp_path / "out"))]) == 2
    assert "wanted judge=NAME" in capsys.readouterr().err
