"""Weights of several rewards by category, and where a group lacks one."""

import numpy as np
import pytest

from qirl_fast.rewards.composite import weights_for, without_missing
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED


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


def test_what_a_whole_group_lacks_is_shared_out_among_its_others():
    weights = np.tile(np.float32([0.5, 0.3, 0.2]), (6, 1))
    status = np.full((6, 3), SCORED, np.int8)
    status[:2, 0] = MISSING  # all of the first group
    status[2, 1] = MISSING  # one of the second: it is dropped as a failed one would be
    status[4:, 2] = FAILED
    found = without_missing(weights, status, 2)
    np.testing.assert_allclose(found[:2], [[0.0, 0.6, 0.4]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(found[2:], weights[2:])


def test_a_group_that_lacks_everything_keeps_its_weights_and_is_dropped():
    weights = np.float32([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).repeat(2, 0)
    status = np.full((4, 3), MISSING, np.int8)
    status[:, 2] = SCORED  # weighs nothing
    np.testing.assert_array_equal(without_missing(weights, status, 2), weights)
