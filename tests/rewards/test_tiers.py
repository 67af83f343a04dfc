"""Tiers against a plain loop, and what they refuse."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from qirl_fast.rewards.tiers import Tier, cap, check_tiers

T2I = (
    Tier(judge="alignment", fails_below=3.0, cap={"aesthetics": 2.5, "portrait": 2.0}),
    Tier(judge="aesthetics", fails_below=2.0, cap={"portrait": 1.5}),
    Tier(judge="portrait", fails_below=2.0),
)


def plain(values, valid, tiers):
    out = [list(row) for row in values]
    for b, row in enumerate(values):
        for t, lower in enumerate(tiers):
            for s in range(t):
                failed = valid[b][s] and row[s] < tiers[s].fails_below
                if failed and valid[b][t] and lower.judge in tiers[s].cap:
                    out[b][t] = min(out[b][t], tiers[s].cap[lower.judge])
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_plain_loop(dtype):
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 5, (400, 3)).astype(dtype)
    valid = rng.random((400, 3)) < 0.8
    before = values.copy()
    capped = cap(values, valid, T2I)
    assert capped.dtype == dtype
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(capped, np.array(plain(values, valid, T2I), dtype))
    assert (capped < values).any() and (capped == values).any()


def test_each_sentence_of_the_rule():
    yes = np.ones((1, 3), bool)
    # aligned: nothing is capped, not even by a score exactly at the threshold
    assert cap(np.array([[3.0, 5.0, 5.0]]), yes, T2I).tolist() == [[3.0, 5.0, 5.0]]
    # misaligned: the rest is capped, and a lower score stays
    assert cap(np.array([[2.0, 5.0, 1.0]]), yes, T2I).tolist() == [[2.0, 2.5, 1.0]]
    # the tightest of two caps holds
    assert cap(np.array([[2.0, 1.0, 5.0]]), yes, T2I).tolist() == [[2.0, 1.0, 1.5]]
    # a capped score does not itself become a failure: 2.5 would, were it below its threshold
    strict = (T2I[0], T2I[1].model_copy(update={"fails_below": 4.0}), T2I[2])
    assert cap(np.array([[2.0, 5.0, 5.0]]), yes, strict).tolist() == [[2.0, 2.5, 2.0]]


def test_an_invalid_tier_caps_nothing_and_is_left_alone():
    valid = np.array([[False, True, True], [True, False, True]])
    values = np.array([[0.0, 5.0, 5.0], [1.0, math.nan, 5.0]])
    capped = cap(values, valid, T2I)
    np.testing.assert_array_equal(capped, [[0.0, 5.0, 5.0], [1.0, math.nan, 2.0]])


def test_no_rows_and_no_tiers():
    assert cap(np.zeros((0, 3)), np.zeros((0, 3), bool), T2I).shape == (0, 3)
    assert cap(np.zeros((2, 0)), np.zeros((2, 0), bool), ()).shape == (2, 0)


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ((Tier(judge="a", fails_below=1.0, cap={"b": 1.0}),), "'a' caps 'b'.*below it: none"),
        (
            (Tier(judge="b", fails_below=1.0), Tier(judge="a", fails_below=1.0, cap={"b": 1.0})),
            "from the highest to the lowest",
        ),
        ((Tier(judge="a", fails_below=1.0, cap={"a": 1.0}),), "'a' caps 'a'"),
        ((Tier(judge="a", fails_below=1.0), Tier(judge="a", fails_below=2.0)), "tier 2: 'a'"),
    ],
)
def test_impossible_orders(tiers, words):
    with pytest.raises(ValueError, match=words):
        check_tiers(tiers)


@pytest.mark.parametrize(
    ("values", "valid", "words"),
    [
        (np.zeros((2, 2)), np.ones((2, 3), bool), r"wanted .* of \(2, 3\)"),
        (np.zeros((2, 3)), np.ones((2, 3)), "valid float64"),
        (np.full((1, 3), np.nan), np.ones((1, 3), bool), "row 0: 'alignment' scored nan"),
    ],
)
def test_bad_scores(values, valid, words):
    with pytest.raises(ValueError, match=words):
        cap(values, valid, T2I)


def test_a_tier_is_a_section():
    with pytest.raises(ValidationError):
        Tier(judge="a", fails_below=math.nan)
    with pytest.raises(ValidationError):
        Tier.model_validate({"judge": "a", "fails_below": 1.0, "caps": {}})
    tier = Tier.model_validate({"judge": "a", "fails_below": 3, "cap": {"b": 2}})
    assert tier.cap["b"] == 2
