"""What comes of an evaluation's images: text read by a real OCR engine, a study for the arena."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from qirl_fast.arena.__main__ import main as arena
from qirl_fast.arena.store import Store
from qirl_fast.arena.study import load_study
from qirl_fast.config import load_settings
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.contest.kept_images import KeptImages
from qirl_fast.evaluate import main


def settings(tmp_path: Path, rows: list[dict[str, Any]], models: str, *more: str) -> list[str]:
    """Words of a small evaluation of the packaged model."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "evaluate.yaml"
    path.write_text(f"output: {tmp_path / 'out'}\nmodels: {models}\nprompts: {prompts}\n")
    return [str(path), "threads=1", "steps=2", *more]


def written(text: str) -> np.ndarray:
    """Dark text on white, uint8 [128, 128, 3]."""
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).text((8, 48), text, (20, 24, 30), ImageFont.load_default(24))
    return np.array(image)


def test_text_is_read_from_the_images(tmp_path: Path, capsys: Any) -> None:
    """The base's images are text that PIL wrote into its cache; the other model draws its own."""
    rows = [
        {"prompt": 'a sign that says "EXIT"'},
        {"prompt": "a poster", "text": "Open Now"},
        {"prompt": 'a board with "QUIET"'},
    ]
    more = ["height=128", "width=128", "samples_per_prompt=2", "max_rows=6", "ocr={judge: reads}"]
    more += ["judges.reads={kind: ocr}"]
    assert main(settings(tmp_path, rows, "{base: {}}", *more)) == 0
    (folder,) = (tmp_path / "out" / "images").iterdir()
    (index,) = folder.glob("*.json")
    texts = ["EXIT", "EXIT", "Open Now", "Open Cow", "HOTEL", "HOTEL"]
    KeptImages(folder).put(index.stem, np.stack([written(text) for text in texts]))
    capsys.readouterr()
    assert main(settings(tmp_path, rows, "{base: {}, other: {guidance: 2.0}}", *more)) == 0
    said = capsys.readouterr().out
    assert "base: 6 of 6 images are there, nothing is drawn" in said
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # EXIT is there; of "opennow" one of 7 letters is wrong; HOTEL is 4 substitutions from QUIET.
    means = [1.0, (1 + 6 / 7) / 2, 1 / 5]
    base, other = (told["ocr"]["models"][name] for name in ("base", "other"))
    assert base == {"accuracy": pytest.approx(np.mean(means), abs=1e-6), "exact": 0.5, "images": 6}
    assert other["exact"] == 0 and other["accuracy"] < 0.3, "the tiny model draws no letters"
    (found,) = told["comparisons"]
    assert (found["judge"], found["model"], found["other"]) == ("reads", "other", "base")
    assert "| base | 6 | 0.710 | 0.500 |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_the_arena_opens_an_evaluation(tmp_path: Path, capsys: Any) -> None:
    edited = np.full((64, 64, 3), (40, 90, 200), np.uint8)
    Image.fromarray(edited).save(tmp_path / "in.png")
    rows = [{"prompt": f"a photo of {c} circles", "tag": "colors"} for c in ("red", "blue")]
    rows += [{"prompt": "make it red", "image": "in.png", "mine": [1]}, rows[0]]
    more = ["height=64", "width=64", "samples_per_prompt=2", "max_rows=3", "score=[aesthetics]"]
    words = settings(tmp_path, rows, '{"a b": {}, base: {guidance: 2.0}, a/b: {steps: 3}}', *more)
    out = tmp_path / "out"
    assert main([*words, "baseline=base"]) == 0
    assert f"python -m qirl_fast.arena {out}" in capsys.readouterr().out
    cfg = load_settings([str(out / "arena" / "arena.yaml")], ArenaConfig)
    assert list(cfg.models) == ["base", "a-b", "a-b_"], "the baseline first"
    study = load_study(cfg.models)
    prompts = list(study.prompts.values())
    assert [p.prompt for p in prompts] == [row["prompt"] for row in rows[:3]], "a repeat once"
    assert [p.category for p in prompts] == ["t2i: colors", "t2i: colors", "edit"]
    assert prompts[2].metadata == {"mine": [1], "prompt": "make it red"}
    assert prompts[2].source is not None
    assert np.array_equal(np.asarray(Image.open(prompts[2].source.path)), edited)
    kept = {path.read_bytes() for path in (out / "images").rglob("*.png")}
    shown = [source.path.read_bytes() for p in prompts for source in p.images.values()]
    assert set(shown) <= kept and len(set(shown)) == 9

    assert arena(["judge", str(out), "judge=aesthetics"]) == 0
    assert "9 votes of the judge" in capsys.readouterr().out
    assert main([*words, "baseline=base"]) == 0
    store = Store(out / "arena" / "votes.db")
    assert len(store.votes("model")) == 9, "votes stay"
    store.close()
    assert arena(["results", str(out)]) == 0
    assert "No prompt of a-b against base is decided yet" in capsys.readouterr().out
    assert main([*words, "baseline=base", "seed=7"]) == 0
    assert arena(["results", str(out)]) == 2, "other pictures under the votes"
    assert "error: " in capsys.readouterr().err


def test_one_model_is_no_study(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle"}, {"prompt": "a blue circle"}]
    more = ["height=64", "width=64", "score=[aesthetics]"]
    assert main(settings(tmp_path, rows, "{base: {}}", *more)) == 0
    assert not (tmp_path / "out" / "arena").exists()
