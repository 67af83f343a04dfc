"""`python -m qirl_fast.calibrate` on the folder of a curation whose scores are made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qirl_fast.calibrate import main
from qirl_fast.config import load_config, save_resolved
from qirl_fast.evaluation.scores import Record, ScoreFile

SAMPLES = 6
TAGS = ("position", "colors", "flat")
NAMES = ("alignment", "aesthetics", "json:dumps")


def scored(tag: str | None, rng: np.random.Generator) -> dict[str, list[float | None]]:
    """alignment varies where it is asked for, aesthetics a little everywhere but in flat."""
    a = rng.normal(0.5, {"position": 0.3, "colors": 0.1}.get(tag or "position", 0.0), SAMPLES)
    b = rng.normal(0.5, 0.0 if tag == "flat" else 0.2, SAMPLES)
    return dict(zip(NAMES, ([float(v) for v in x] for x in (a, b, np.ones(SAMPLES))), strict=True))


@pytest.fixture
def curation(tmp_path: Path) -> Callable[..., Path]:
    """`curation(*tags, rows=20)`: the folder of one, `rows` prompts of each tag."""

    def make(*tags: str | None, rows: int = 20) -> Path:
        folder = tmp_path / "run-curation"
        folder.mkdir()
        settings = (f"curation.samples={SAMPLES}", "watch=['json:dumps']", "seed=5", "run=run")
        save_resolved(load_config(settings), folder / "config.resolved.yaml")
        file = ScoreFile(folder / "scores.jsonl", NAMES, SAMPLES)
        rng = np.random.default_rng(0)
        for row in range(rows * len(tags)):
            tag = tags[row % len(tags)]
            file.append(Record(row, f"{row}", tag, f"prompt {row}", scored(tag, rng)))
        file.finish()
        return folder

    return make


def test_train_takes_the_proposal_as_it_is(curation) -> None:
    folder = curation(*TAGS)
    assert main([str(folder)]) == 0
    cfg = load_config([str(folder / "weights.yaml")])
    was = load_config([str(folder / "config.resolved.yaml")])
    found = cfg.category_weights
    assert set(found) == {"position", "colors"}, "the flat category keeps the recipe's weights"
    for table in found.values():
        assert sum(table.values()) == pytest.approx(1) and set(table) == set(was.rewards)
    assert found["position"]["alignment"] > 0.55 > 0.45 > found["colors"]["alignment"]
    changed = {"category_weights", "run"}
    assert cfg.model_dump(exclude=changed) == was.model_dump(exclude=changed)
    assert cfg.run == "weights-seed5", "a run of its own"
    text = (folder / "weights.yaml").read_text()
    assert "# 'flat', 20 prompts: the recipe's stay; alignment out: its in-group std 0" in text
    assert "No ratings came" in text and text.count("# in-group std") == 4
    (folder / "edited.yaml").write_text(text.replace("position", "counting"))
    assert "counting" in load_config([str(folder / "edited.yaml")]).category_weights


def test_what_is_undefined_is_null(curation) -> None:
    folder = curation(*TAGS)
    assert main([str(folder)]) == 0
    report = json.loads((folder / "calibration.json").read_text(), parse_constant=pytest.fail)
    assert report["judges"] == list(NAMES)
    table = report["correlations"]["position"]
    assert table[2] == [None] * 3 and table[0][0] == pytest.approx(1) == table[1][1]
    assert set(report["correlations"]) == {"all", *TAGS}
    (flat,) = [c for c in report["categories"] if c["category"] == "flat"]
    assert [w["weight"] for w in flat["weights"]] == [0, 0] and flat["kept"]
    assert (folder / "correlation.png").read_bytes()[:4] == b"\x89PNG"


def test_ratings_move_the_weights(curation, tmp_path: Path) -> None:
    folder = curation("position", "colors")
    scores = ScoreFile(folder / "scores.jsonl", NAMES, SAMPLES)
    rng = np.random.default_rng(1)
    rows = [
        {"id": f"{row}-{i}", "score": scores.records[row].scores["aesthetics"][i], "prompt": text}
        for row, text in ((r.row, r.prompt) for r in scores.ordered()[:16])
        for i in rng.permutation(SAMPLES)[:3]
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main([str(folder)]) == 0
    before = load_config([str(folder / "weights.yaml")]).category_weights
    assert main([str(folder), f"labels={labels}", "min_labels=30"]) == 0
    after = load_config([str(folder / "weights.yaml")]).category_weights
    for name in ("position", "colors"):
        assert after[name]["aesthetics"] > before[name]["aesthetics"] + 0.1
    text = (folder / "weights.yaml").read_text()
    assert "agrees +1.00 with 48 ratings inside groups of all categories" in text
    assert "No ratings came" not in text


def test_prompts_without_a_category_get_the_rewards(curation) -> None:
    folder = curation(None, "colors")
    assert main([str(folder)]) == 0
    cfg = load_config([str(folder / "weights.yaml")])
    assert set(cfg.category_weights) == {"colors"}
    assert cfg.rewards["alignment"] == pytest.approx(0.5, abs=0.15) != 0.7
    assert list(cfg.rewards) == ["alignment", "aesthetics"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{tmp}"], "no curation; wanted a folder that"),
        ([], "got 0 folders"),
        (["a", "b"], "got 2 folders"),
        (["{cur}", "labels={tmp}/none"], "cannot be read"),
        (["{cur}", "flor=0.1"], "flor: unknown key; did you mean floor?"),
        (["{cur}", "floor=2"], "floor: got 2"),
        (["{cur}", "min_labels=x"], "min_labels: got 'x'"),
    ],
)
def test_what_cannot_be_is_said(curation, tmp_path, capsys, args, words) -> None:
    folder = curation("colors", rows=3)
    assert main([a.format(tmp=tmp_path, cur=folder) for a in args]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "weights.yaml").exists()


def test_a_curation_of_other_judges_is_refused(curation, capsys) -> None:
    folder = curation("colors", rows=2)
    save_resolved(load_config(["curation.samples=5"]), folder / "config.resolved.yaml")
    assert main([str(folder)]) == 2
    assert "scores.jsonl:1: no record of 5 samples" in capsys.readouterr().err
