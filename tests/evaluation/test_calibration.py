"""Calibration's arithmetic against loops and hand-made cases, and its ratings files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from qirl_fast.evaluation.calibration import (
    Agreement,
    Limits,
    agreement,
    centred,
    correlations,
    pooled_std,
    propose,
)
from qirl_fast.evaluation.curation import global_std
from qirl_fast.evaluation.proposal import Proposal, heat_map, recipe_yaml, rounded
from qirl_fast.evaluation.ratings import OVERALL, RatingError, load_ratings

P, N = 60, 8
NONE = Agreement(None, 0, "no ratings came")


def proposed(s_PnK: np.ndarray, people: list[Agreement] | None = None, **limits: float) -> list:
    names = [f"j{k}" for k in range(s_PnK.shape[2])]
    return propose(s_PnK, global_std(s_PnK), people or [NONE] * len(names), names, Limits(**limits))


def weights(*args, **limits) -> list[float]:
    return [w.weight for w in proposed(*args, **limits)]


@pytest.fixture
def noise() -> np.ndarray:
    """Three independent judges of equal spread."""
    return np.random.default_rng(0).normal(size=(P, N, 3))


def test_statistics_are_those_of_a_loop(noise) -> None:
    noise[3, 2, 0] = noise[5, :7, 1] = noise[6, :, 2] = np.nan
    x = centred(noise)
    assert np.isnan(x[5, 7, 1]), "a score alone in its group says nothing"
    for k in range(3):
        squares, free = 0.0, 0
        for p in range(P):
            own = [v for v in noise[p, :, k] if not np.isnan(v)]
            if len(own) > 1:
                squares += sum((v - np.mean(own)) ** 2 for v in own)
                free += len(own) - 1
        np.testing.assert_allclose(pooled_std(x)[k], np.sqrt(squares / free), rtol=1e-12)
    pairs = [(x[p, i, 0], x[p, i, 1]) for p in range(P) for i in range(N)]
    a, b = np.array([pair for pair in pairs if not np.isnan(pair).any()]).T
    wanted = (a @ b) / np.sqrt((a @ a) * (b @ b))
    np.testing.assert_allclose(correlations(x)[0, 1], wanted, rtol=1e-12)
    np.testing.assert_allclose(np.diag(correlations(x)), 1.0)


def test_differences_between_prompts_are_no_signal(noise) -> None:
    """Judge 1 tells prompts apart and hardly the samples of one."""
    noise[:, :, 1] = 0.5 * noise[:, :, 1] + 10 * np.random.default_rng(1).normal(size=(P, 1))
    w = weights(noise)
    assert w[1] < 0.1 < 0.4 < min(w[0], w[2])
    assert proposed(noise)[1].signal == pytest.approx(0.05, abs=0.01)
    (out,) = [x for x in proposed(noise, floor=0.2) if not x.weight]
    assert out.reason.startswith("out: its in-group std") and "below 20%" in out.reason


def test_two_that_say_the_same_share_one_weight(noise) -> None:
    noise[:, :, 1] = 3 * noise[:, :, 0] + 7
    first, second, other = proposed(noise)
    assert first.shared == pytest.approx(2.0, abs=0.01) == second.shared
    assert first.weight == pytest.approx(second.weight)
    assert other.weight == pytest.approx(0.5, abs=0.03)
    assert "says much the same as j1 (correlation 1.00)" in first.reason


def test_one_that_contradicts_loses_nothing(noise) -> None:
    noise[:, :, 1] = -noise[:, :, 0]
    assert weights(noise) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_agreement_weighs_and_a_judge_against_people_weighs_nothing(noise) -> None:
    people = [Agreement(0.6, 50, "inside groups"), Agreement(0.2, 50, ""), Agreement(-0.3, 50, "")]
    w = proposed(noise, people)
    assert w[0].weight == pytest.approx(0.75, abs=0.02) and w[2].weight == 0
    assert sum(x.weight for x in w) == pytest.approx(1)
    assert "agrees -0.30 with 50 ratings" in w[2].reason and "weighs nothing" in w[2].reason
    unrated = proposed(noise, [people[0], NONE, people[1]])
    assert unrated[1].weight == pytest.approx(0.4 / 1.2, abs=0.02), "the mean of the others"
    assert "taken as the others' mean 0.40" in unrated[1].reason
    assert weights(noise, [people[2]] * 3) == [0.0] * 3


def test_a_constant_judge_is_out_and_no_number_is_nan(noise) -> None:
    noise[:, :, 0] = 0.1
    noise[:, :, 1] = np.random.default_rng(2).normal(size=(P, 1))  # flat in every group
    found = proposed(noise)
    assert [w.weight for w in found] == [0, 0, 1]
    assert found[0].reason == "out: the judge is constant" and found[0].signal is None
    table = correlations(centred(noise))
    assert np.isnan(table[:2]).all() and table[2, 2] == 1, "undefined, and said to be"
    noise[:, 1:, 2] = np.nan
    assert proposed(noise)[2].reason == "out: no group has two scores"
    assert weights(noise) == [0.0] * 3


def test_a_std_floor_of_the_recipe_counts(noise) -> None:
    noise[:, :, 0] *= 1e-3
    assert weights(noise)[0] == pytest.approx(1 / 3, abs=0.02)
    assert weights(noise, least=0.01)[0] == 0


def test_agreement_inside_groups_forgets_the_prompts() -> None:
    """Ratings follow the score inside each prompt, and run against it from prompt to prompt."""
    rng = np.random.default_rng(3)
    score = rng.normal(size=(P, N)) + 10 * np.arange(P)[:, None]
    rating = score - 20 * np.arange(P)[:, None]
    inside = agreement(score, rating, 20)
    assert inside == Agreement(1.0, P * N, "inside groups")
    alone = np.full((P, N), np.nan)
    alone[:, 0] = rating[:, 0]
    across = agreement(score, alone, 20)
    assert across.how == "across prompts" and across.count == P
    assert across.value == pytest.approx(spearmanr(score[:, 0], rating[:, 0]).statistic)
    assert across.value < -0.9


def test_one_group_is_spearman_with_ties() -> None:
    rng = np.random.default_rng(4)
    score, rating = rng.normal(size=(1, 40)), rng.integers(1, 6, (1, 40)).astype(float)
    wanted = spearmanr(score[0], rating[0]).statistic
    assert agreement(score, rating, 20).value == pytest.approx(wanted, rel=1e-12)


def test_undefined_agreement_says_why() -> None:
    score, rating = np.full((5, 8), 0.3), np.arange(40.0).reshape(5, 8)
    assert agreement(score, rating, 20).value is None
    assert "the judge rated all alike" in agreement(score, rating, 20).how
    assert "people rated all alike" in agreement(rating, score, 20).how
    few = agreement(rating[:1], rating[:1], 20)
    assert few == Agreement(None, 8, "8 ratings, of 20 wanted")


def test_weights_are_rounded_to_one() -> None:
    for seed in range(50):
        w = np.random.default_rng(seed).dirichlet([0.3] * 6).tolist()
        short = rounded(w)
        assert sum(short) == pytest.approx(1, abs=1e-12) and min(short) >= 0
        assert np.abs(np.subtract(short, w)).max() < 4e-4


def test_an_odd_category_is_yaml_still(noise) -> None:
    import yaml

    made = proposed(noise)
    names = ["a:b", 'say "so"', "c"]
    odd = "yes: no #1\n\u00e9"
    text = recipe_yaml(
        {"rewards": {"a:b": 1.0}, "seed": 3},
        [Proposal(odd, 4, made), Proposal(None, 2, made), Proposal("k", 1, made, "all\nout")],
        names,
        "# head",
    )
    plain = yaml.safe_load(text)
    assert plain["seed"] == 3 and list(plain["category_weights"]) == [odd]
    for table in (plain["category_weights"][odd], plain["rewards"]):
        assert list(table) == names and sum(table.values()) == pytest.approx(1)
    assert "# 'k', 1 prompts: all out" in text


def test_the_heat_map_draws_what_is_undefined(tmp_path: Path) -> None:
    table = np.array([[1, np.nan], [np.nan, np.nan]])
    path = heat_map({str(i): table for i in range(6)}, ["a", "b"], tmp_path / "c.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


PROMPTS = {0: "a", 2: "b"}


def ratings_file(folder: Path, *rows: object) -> Path:
    path = folder / "labels.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_ratings_find_their_samples(tmp_path: Path) -> None:
    path = ratings_file(
        tmp_path,
        {"id": "2-1", "score": 4, "judge": "x"},
        {"image": "images/2-1.png", "score": 2, "dimension": "x", "prompt": "b"},
        {"id": "0-0", "score": 1.5},
    )
    found = load_ratings(path, PROMPTS, 3, ["x", "y"])
    assert set(found) == {"x", OVERALL}
    assert found["x"][1, 1] == 3 and np.isnan(found["x"]).sum() == 5
    assert found[OVERALL][0, 0] == 1.5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "malformed JSON"),
        ("{", "malformed JSON"),
        ("[1]", "wanted an object"),
        ({"id": "1-0", "score": 1}, "no sample 1-0"),
        ({"id": "0-3", "score": 1}, "no sample 0-3"),
        ({"id": "0--1", "score": 1}, "wanted row-sample"),
        ({"id": 3, "score": 1}, "got id or image 3"),
        ({"score": 1}, "got id or image None"),
        ({"id": "0-0"}, "got score None"),
        ({"id": "0-0", "score": True}, "got score True"),
        ({"id": "0-0", "score": "4"}, "got score '4'"),
        ('{"id": "0-0", "score": NaN}', "got score nan"),
        ({"id": "0-0", "score": 1, "judge": "z"}, "got judge 'z'; the curation's are x, y"),
        ({"id": "0-0", "score": 1, "prompt": "b"}, "ratings are of another curation"),
        ({"id": "0-0", "score": 1, "scale": 5}, "unknown key 'scale'"),
    ],
)
def test_a_rating_that_cannot_be_used_is_named(tmp_path: Path, row: object, words: str) -> None:
    path = ratings_file(tmp_path, {"id": "0-0", "score": 1}, row, {"id": "0-1", "score": 1})
    with pytest.raises(RatingError) as error:
        load_ratings(path, PROMPTS, 3, ["x", "y"])
    assert "labels.jsonl:2: " in str(error.value) and words in str(error.value)


def test_ratings_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "none", ratings_file(tmp_path)):
        with pytest.raises(RatingError):
            load_ratings(path, PROMPTS, 3, ["x"])
