"""Names, weights, and the three states of a reward: a score, failed, or missing."""

import logging
import sys
import types

import numpy as np
import pytest
import torch

from qirl_fast.rewards import alignment, composite
from qirl_fast.rewards.composite import (
    BadReward,
    judge_states,
    load_judge_states,
    resolve,
    score_all,
    weights_for,
)
from qirl_fast.tiny import scenes

IMAGES = np.zeros((3, 64, 64, 3), np.uint8)
ROWS = [{"include": [{"class": "circle", "count": 1}]}] * 3


@pytest.fixture
def judges(monkeypatch):
    """A module of judges, by dotted path "some_judges:name"; a fresh log memory."""
    module = types.ModuleType("some_judges")
    module.half = lambda images, rows: np.full(len(images), 0.5, np.float32)
    module.nan = lambda images, rows: np.array([0.1, np.nan, np.inf])
    module.masked = lambda images, rows: np.ma.masked_invalid([0.1, np.nan, 0.3])
    module.short = lambda images, rows: np.zeros(2)
    module.words = lambda images, rows: ["good"] * 3
    module.grad = lambda images, rows: torch.zeros(3, requires_grad=True)
    module.number = 3

    def broken(images, rows):
        raise RuntimeError("the server is away")

    module.broken = broken
    monkeypatch.setitem(sys.modules, "some_judges", module)
    monkeypatch.setattr(composite, "_logged", set())
    return module


def test_scores_of_named_judges_stand_in_their_columns(judges):
    rng = np.random.default_rng(0)
    rows = [row for row in scenes.all_rows() if row["tag"] == "colors"][:6]
    images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in rows])
    scores_BK, valid_BK = score_all(["some_judges:half", "alignment", "aesthetics"], images, rows)
    assert scores_BK.dtype == np.float32 and valid_BK.dtype == bool and valid_BK.all()
    assert (scores_BK[:, 0] == 0.5).all()
    assert np.array_equal(scores_BK[:, 1], alignment.score(images, rows))
    assert (scores_BK[:, 2] > 0.9).all()


def test_a_judge_that_raises_has_failed_and_the_others_stand(judges, caplog):
    names = ["some_judges:broken", "some_judges:half"]
    with caplog.at_level(logging.ERROR, logger=composite.__name__):
        for _ in range(2):
            scores_BK, valid_BK = score_all(names, IMAGES, ROWS)
    assert valid_BK.tolist() == [[False, True]] * 3
    assert np.isfinite(scores_BK).all()
    (record,) = caplog.records
    assert "some_judges:broken" in record.getMessage()
    assert "the server is away" in caplog.text


def test_another_failure_of_the_same_judge_is_logged_too(judges, caplog):
    with caplog.at_level(logging.ERROR, logger=composite.__name__):
        score_all(["some_judges:broken"], IMAGES, ROWS)
        score_all(["alignment"], IMAGES, [{}] * 3)
    assert len(caplog.records) == 2 and "include" in caplog.text


def test_a_non_finite_score_names_judge_and_row(judges):
    with pytest.raises(BadReward, match=r"'some_judges:nan', row 1: scored nan") as error:
        score_all(["some_judges:half", "some_judges:nan"], IMAGES, ROWS)
    assert (error.value.judge, error.value.row) == ("some_judges:nan", 1)
    assert np.array_equal(error.value.scores, np.float32([0.1, np.nan, np.inf]), equal_nan=True)


def test_masked_rows_are_missing_and_hold_no_nan(judges):
    scores_BK, valid_BK = score_all(["some_judges:masked"], IMAGES, ROWS)
    assert valid_BK[:, 0].tolist() == [True, False, True]
    assert scores_BK[:, 0].tolist() == pytest.approx([0.1, 0.0, 0.3])


def test_a_result_that_is_not_one_score_a_row_is_an_error(judges):
    with pytest.raises(BadReward, match=r"some_judges:short.*\(2,\).*\(3,\)"):
        score_all(["some_judges:short"], IMAGES, ROWS)
    with pytest.raises(BadReward, match=r"'some_judges:words', row 0: the result is of <U4"):
        score_all(["some_judges:words"], IMAGES, ROWS)
    with pytest.raises(BadReward, match=r"a Tensor is no numpy array of \(3,\): Can't call numpy"):
        score_all(["some_judges:grad"], IMAGES, ROWS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alignmnt", "did you mean 'alignment'"),
        ("beauty", "aesthetics"),
        ("no_such_module:score", "cannot import 'no_such_module'"),
        ("faulty_judge:score", "cannot import 'faulty_judge' .SyntaxError"),
        ("some_judges:absent", "no function 'absent'"),
        ("some_judges:number", "no function 'number'"),
    ],
)
def test_unknown_judges_are_named(judges, name, words, tmp_path, monkeypatch):
    (tmp_path / "faulty_judge.py").write_text("def score(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=words):
        score_all([name], IMAGES, ROWS)


def test_a_dotted_path_finds_a_real_function():
    assert resolve("qirl_fast.rewards.alignment:score") is composite.JUDGES["alignment"]


def test_the_state_of_a_judge_is_copied_out_and_back(judges):
    class Running:
        def __init__(self):
            self.means = [0.0]

        def __call__(self, images, rows):
            self.means.append(float(images.mean()))
            return np.full(len(images), len(self.means) / 10)

        def state_dict(self):
            return {"means": self.means}

        def load_state_dict(self, state):
            self.means = state["means"]

    judges.running = Running()
    names = ["some_judges:half", "some_judges:running"]
    held = judge_states(names)
    assert held == {"some_judges:running": {"means": [0.0]}}
    first, _ = score_all(names, IMAGES, ROWS)
    for _ in range(2):
        load_judge_states(held)
        np.testing.assert_array_equal(score_all(names, IMAGES, ROWS)[0], first)
    judges.running = judges.half
    with pytest.raises(ValueError, match=r"'some_judges:running' had a state"):
        load_judge_states(held)


def test_weights_follow_the_category_and_sum_to_one():
    weights_BK = weights_for(
        ["position", "colors", "position"],
        {"alignment": 3, "aesthetics": 1},
        {"position": {"alignment": 2.0}},
        ["aesthetics", "alignment"],
    )
    assert weights_BK.dtype == np.float32
    assert weights_BK.tolist() == [[0.0, 1.0], [0.25, 0.75], [0.0, 1.0]]


def test_weights_without_categories_are_one_row_for_all():
    assert weights_for(["a", "b"], {"x": 2}, None, ["x"]).tolist() == [[1.0], [1.0]]
    assert weights_for([], {"x": 2}, None, ["x"]).shape == (0, 1)


@pytest.mark.parametrize(
    ("weights", "categories", "words"),
    [
        ({"z": 1}, None, "weights weighs 'z'.*x, y"),
        ({"x": -1}, None, r"weights\['x'\] is -1"),
        ({"x": float("nan")}, None, "nan"),
        ({"x": 0}, None, "no positive weight"),
        ({"x": 1}, {"c": {"q": 1}}, r"category_weights\['c'\] weighs 'q'"),
        ({"x": 1}, {"c": {}}, r"category_weights\['c'\] has no positive"),
    ],
)
def test_bad_weights_are_named(weights, categories, words):
    with pytest.raises(ValueError, match=words):
        weights_for(["a"], weights, categories, ["x", "y"])
