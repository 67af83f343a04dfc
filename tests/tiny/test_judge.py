"""The tiny judge: pictures and what is said of them, the rating set, the packaged weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from transformers import Qwen3VLForConditionalGeneration

from qirl_fast.processor import QwenVLProcessor
from qirl_fast.rewards import alignment
from qirl_fast.rewards.vlm.data import load_rows
from qirl_fast.rewards.vlm.local import Settings, Vlm
from qirl_fast.tiny import packaged, pictures, ratings, scenes, seeing
from qirl_fast.tiny.scenes import CELLS, Shape

BASE, JUDGE = packaged("tiny-judge"), packaged("tiny-judge:alignment")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "reward_tiny.yaml"
RED_LEFT = {
    "tag": "position",
    "include": [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "prompt": "a photo of a red circle left of a blue square",
}
TWO_RED = {
    "tag": "counting",
    "include": [{"class": "circle", "count": 2, "color": "red"}],
    "exclude": [{"class": "circle", "count": 3, "color": "red"}],
    "prompt": "a photo of two red circles",
}


def quiet(*_: Any) -> None:
    """A reporter that says nothing."""


def place(*things: tuple[int, str, str]) -> np.ndarray:
    """A clean picture of (quarter, colour, shape)."""
    return scenes.render([Shape(s, c, *CELLS[cell], 11.0) for cell, c, s in things])


def greedy(model: Any, processor: Any, images: list[np.ndarray], text: str) -> list[str]:
    """The stock class's own generation."""
    talk = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n"
    inputs = processor(
        text=[talk + "<|im_start|>assistant\n"] * len(images), images=images, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return list(processor.batch_decode(new, skip_special_tokens=True))


# ------- pictures


def test_of_a_clean_scene_the_words_are_those_it_was_drawn_from() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        shapes = pictures.random_scene(rng)
        expected: list[pictures.Quarter] = [None] * 4
        for s in shapes:
            expected[int(s.x > 32) + 2 * int(s.y > 32)] = (s.color, s.kind)
        assert pictures.look(pictures.spoil(shapes, 0.0, rng)) == expected
    said = pictures.words([("red", "circle"), None, None, ("odd", "shape")])
    assert said == "red circle, none, none, odd shape."


def test_a_colour_between_two_and_a_faded_object_are_called_so() -> None:
    half = (place((0, "red", "circle")).astype(int) + place((0, "green", "circle"))) // 2
    assert pictures.look(half.astype(np.uint8))[0] == ("odd", "circle")
    ghost = (place((0, "red", "circle")) * 0.15 + place() * 0.85).astype(np.uint8)
    assert pictures.look(ghost) == [None] * 4


def test_spoiling_goes_by_its_generator_and_its_strength() -> None:
    shapes = [pictures.random_shape(cell, np.random.default_rng(cell)) for cell in range(4)]
    clean = scenes.render(shapes).astype(float)

    def error(strength: float) -> float:
        images = [pictures.spoil(shapes, strength, np.random.default_rng(i)) for i in range(20)]
        return float(np.abs(np.stack(images) - clean).mean())

    assert error(0.0) == 0.0 < error(0.3) < error(1.0)
    first, again = (pictures.spoil(shapes, 1.0, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)


# ------- questions of pre-training


@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_relations_hold_where_the_scenes_own_geometry_says_so(relation: str) -> None:
    for a in range(4):
        for b in set(range(4)) - {a}:
            quarters: list[pictures.Quarter] = [None] * 4
            quarters[a], quarters[b] = ("red", "circle"), ("blue", "square")
            first, second = (Shape("circle", "red", *CELLS[cell], 11.0) for cell in (a, b))
            expected = scenes._related(first, second, relation)
            assert seeing.stands(quarters, ("red", "circle"), relation, ("", "square")) == expected
            assert not seeing.stands(quarters, ("blue", "circle"), relation, ("", "square"))


def test_questions_have_every_answer_and_true_counts() -> None:
    rng = np.random.default_rng(0)
    here = [("red", "circle"), ("red", "circle"), ("blue", "square"), ("odd", "square")]
    told = {seeing.question(list(here), rng) for _ in range(1500)}
    answers = dict(told)
    assert len(answers) == len(told), "one question, one answer"
    assert answers["How many red circles?"] == answers["How many circles?"] == "two"
    assert answers["How many squares?"] == "two" and answers["How many blue squares?"] == "one"
    assert answers["How many green circles?"] == "none"
    assert answers["Is there a circle left of a circle?"] == "yes"
    assert answers["Is there a circle above a square?"] == "yes"
    assert answers["Is there a circle below a circle?"] == "no"


def test_words_to_say_hold_the_judge_s_whole_vocabulary_and_say_nothing_of_a_picture() -> None:
    rng = np.random.default_rng(0)
    pairs = [seeing.phrase(rng) for _ in range(600)]
    assert all(asked == f"Say: {answer}" for asked, answer in pairs)
    said = set(re.findall(r"\w+", " ".join(answer for _, answer in pairs)))
    judged = (
        "two yes, red partly, circle no, left of no, above yes, below no, extra many. Score 12345"
    )
    assert set(re.findall(r"[a-zA-Z]+|\d", judged)) <= said


def test_only_answers_are_learnt() -> None:
    processor = QwenVLProcessor.from_pretrained(BASE)
    data = seeing.Sequences(processor, seeing.Recipe(pictures=3), quiet)
    turns = data.turns(0, 2, np.random.default_rng(0))
    ids, labels = data.encode(turns)
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != seeing.IGNORED]
    answers = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert processor.tokenizer.decode(learnt) == answers
    assert processor.tokenizer.decode(ids).startswith("<|im_start|>user\n<|vision_start|>")
    assert turns[0] == (seeing.DESCRIBE, pictures.words(pictures.look(data.images[0])))
    # As the chat template and the processor have it: what is trained is what is asked later.
    content = [{"type": "image"}, {"type": "text", "text": seeing.DESCRIBE}]
    talk = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    asked = processor(text=talk, images=[data.images[0]], return_tensors="pt")["input_ids"][0]
    assert ids[: len(asked)] == asked.tolist()


# ------- ratings


@pytest.mark.parametrize(
    ("picture", "row", "truth", "rationale"),
    [
        (
            place((0, "red", "circle"), (1, "blue", "square")),
            RED_LEFT,
            5.0,
            "red circle, blue square, none, none. "
            "red yes, circle yes, left of yes, blue yes, square yes, extra none.",
        ),
        (
            place((0, "green", "circle"), (2, "blue", "square"), (3, "red", "triangle")),
            RED_LEFT,
            None,
            "green circle, none, blue square, red triangle. "
            "red no, circle yes, left of no, blue yes, square yes, extra one.",
        ),
        (
            place((0, "red", "circle"), (1, "red", "circle"), (3, "red", "circle")),
            TWO_RED,
            None,
            "red circle, red circle, none, red circle. two partly, red yes, circle yes, extra one.",
        ),
        (place(), TWO_RED, 1.0, "none, none, none, none. two no, red no, circle no, extra none."),
    ],
)
def test_the_rationale_says_what_is_true(
    picture: np.ndarray, row: scenes.Row, truth: float | None, rationale: str
) -> None:
    found, said = ratings.judge(picture, row)
    assert said == rationale
    assert found == pytest.approx(1 + 4 * alignment.score(picture[None], [row])[0], abs=1e-6)
    assert truth is None or found == pytest.approx(truth, abs=1e-3)


def test_ratings_are_whole_and_scatter_about_the_truth_as_stated() -> None:
    rng = np.random.default_rng(0)
    got = np.array([ratings.rate(3.0, np.array([0.4, -0.4]), rng) for _ in range(4000)])
    assert set(got.flat) <= {1, 2, 3, 4, 5}
    assert got.mean(0) == pytest.approx([3.4, 2.6], abs=0.06)
    # Rounding adds a twelfth.
    assert got.std(0) == pytest.approx(np.sqrt(ratings.NOISE**2 + 1 / 12), abs=0.05)
    assert max(ratings.rate(5.0, np.full(500, 0.0), rng)) == 5


@pytest.fixture(scope="module")
def recipe() -> ratings.Recipe:
    return ratings.Recipe(seed=5, train=48, heldout=24)


@pytest.fixture(scope="module")
def items(recipe: ratings.Recipe) -> list[ratings.Rated]:
    return ratings.rated(recipe, quiet)


def test_the_set_is_a_function_of_its_seed(
    recipe: ratings.Recipe, items: list[ratings.Rated]
) -> None:
    again = ratings.rated(recipe, quiet)
    assert [i.ratings for i in items] == [i.ratings for i in again]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(items, again, strict=True))
    other = ratings.rated(replace(recipe, seed=6), quiet)
    assert [i.row for i in items] != [i.row for i in other]


def test_train_reward_reads_the_set_and_no_scene_is_on_both_sides(
    items: list[ratings.Rated], tmp_path: Path
) -> None:
    known = ratings.write(items, tmp_path)
    assert known["train"]["rows"] == 48 and 0.5 < known["train"]["spearman_truth_score"] < 1.0
    rows = load_rows(tmp_path / "ratings.jsonl", 0.5)  # raises for a leak or a bad field
    assert Counter(row.split for row in rows) == {"train": 48, "heldout": 24}
    assert [row.score for row in rows] == [np.mean(item.ratings) for item in items]
    assert [row.rationale for row in rows] == [item.rationale for item in items]
    truths = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [t["truth"] for t in truths] == [item.truth for item in items]
    splits = scenes.split_rows()
    barred = {scenes.scene_key(r) for name in ("heldout", "validation") for r in splits[name]}
    possible = ratings.prompts()
    assert not barred & {scenes.scene_key(row) for row in possible["train"]}
    assert possible["heldout"] == splits["heldout"]
    for item in items:
        assert item.row in possible[item.split]


# ------- the packaged weights


def test_packaged_files_are_small() -> None:
    def size(folder: Path) -> int:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

    assert size(BASE) < 6e6 and size(JUDGE) < 1e6


def test_the_base_sees_fresh_scenes_through_the_stock_class() -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(BASE).eval()
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    processor = QwenVLProcessor.from_pretrained(BASE)
    rng = np.random.default_rng(12345)
    images = [scenes.render(pictures.random_scene(rng)) for _ in range(96)]
    said = greedy(model, processor, images, seeing.DESCRIBE)
    truth = [pictures.words(pictures.look(image)) for image in images]
    right = np.mean([a == b for a, b in zip(said, truth, strict=True)])
    assert right >= 0.9, f"{right:.0%} of the scenes described right, quarter by quarter"


@pytest.fixture(scope="module")
def judge() -> Vlm:
    settings = {"kind": "vlm", "path": str(JUDGE), "dimension": "alignment"}
    return Vlm(Settings.model_validate(settings | {"max_new_tokens": 48, "rows": 64}))


def test_the_judge_agrees_with_the_truth_on_fresh_pictures_of_held_out_prompts(judge: Vlm) -> None:
    fresh = ratings.rated(ratings.Recipe(seed=77, train=0, heldout=192), quiet)
    scored = judge(np.stack([i.picture for i in fresh]), [i.row for i in fresh])
    assert not scored.reasons and judge.last["closed"] == 0
    assert spearmanr(scored.values, [i.truth for i in fresh]).statistic >= 0.6
    assert spearmanr(scored.values, [i.score for i in fresh]).statistic >= 0.5


def test_the_judge_reasons_before_it_scores_and_the_reasons_are_those_of_the_picture(
    judge: Vlm,
) -> None:
    picture = place((0, "red", "circle"), (1, "blue", "square"))
    ((answer,),) = judge.engine.ask([judge._ask(picture, RED_LEFT)])
    assert answer.text.startswith("red circle, blue square, none, none. ")
    assert not answer.closed and answer.text.endswith(".\nScore:")


def test_the_judge_reads_prompt_and_picture_and_a_row_alone_scores_the_same(judge: Vlm) -> None:
    right, wrong = place((0, "red", "circle"), (1, "blue", "square")), place((2, "green", "square"))
    images = np.stack([right, wrong, right, wrong])
    rows = [RED_LEFT, RED_LEFT, {"prompt": "a photo of a yellow triangle"}, TWO_RED]
    values = judge(images, rows).values
    assert values[0] > 4.0 and (values[1:] < 3.0).all()
    alone = [judge(images[i : i + 1], rows[i : i + 1]).values[0] for i in range(4)]
    assert values == pytest.approx(alone, abs=1e-3)


# ------- making them anew


def run(*argv: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_makes_the_packaged_folder_but_for_the_numbers(tmp_path: Path) -> None:
    said = run("qirl_fast.tiny", "judge", "--quick", "--output", "base", cwd=tmp_path)
    assert "MB" in said and "of the CPU" in said
    names = {p.name for p in (tmp_path / "base").iterdir()}
    assert names == {p.name for p in BASE.iterdir()}
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "base" / name).read_text() == (BASE / name).read_text()


@pytest.mark.slow
def test_a_short_fine_tune_improves(tmp_path: Path) -> None:
    out = run(
        *("qirl_fast.tiny", "ratings", "--output", "set", "--train", "400", "--heldout", "40"),
        cwd=tmp_path,
    )
    assert "train: 400 ratings" in out
    run(
        *("qirl_fast.train_reward", str(CONFIG), "data.file=set/ratings.jsonl"),
        *(f"model.path={BASE}", "train={steps: 40, batch: 32, micro_batch: 32, warmup: 5}"),
        *("validation={every: 20, rows: 40, bootstrap: 100}",),
        cwd=tmp_path,
    )
    folder = tmp_path / "outputs" / "reward_tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [m for m in metrics if "heldout/mse" in m]
    first = metrics[0]
    assert held[-1]["heldout/text"] < 0.5 * first["text"]
    assert held[-1]["heldout/mse"] < first["mse"]
    assert (folder / "judge" / "validation.json").is_file()
