"""The score of an edit as a rule on columns."""

import numpy as np
import pytest
from pydantic import ValidationError

from qirl_fast.rewards.edits import EditRule, check_rule, edit_columns, edit_score
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED

NAMES = ["follows", "looks", "keeps"]
RULE = EditRule(instruction="follows", preservation="keeps")


def columns(follows, keeps, status=((SCORED, SCORED, SCORED),), rule=RULE):
    values = np.array([[follows, 0.5, keeps]], np.float32)
    return edit_columns(values, np.array(status, np.int8), NAMES, rule)


@pytest.mark.parametrize(
    ("i", "p", "want"),
    [(1, 1, 1.0), (0, 1, 0.3), (1, 0, 0.0), (0, 0, 0.0), (0.5, 1, 0.65), (1, 0.5, 0.5)],
)
def test_corners(i, p, want):
    assert edit_score(np.array(i), np.array(p), 0.3) == pytest.approx(want)
    values, status = columns(1 + 4 * i, p)
    assert values.dtype == np.float32 and status.tolist() == [[SCORED] * 3]
    np.testing.assert_allclose(values, [[1 + 4 * want, 0.5, p]], rtol=1e-6)


def test_it_rises_in_both_also_where_every_attempt_fails():
    grid = np.linspace(0, 1, 21)
    s = edit_score(grid[:, None], grid[None, :], 0.3)
    assert (np.diff(s, axis=1) > 0).all(), "with keeping, at i = 0 too"
    assert (np.diff(s[:, 1:], axis=0) > 0).all()
    np.testing.assert_allclose(edit_score(grid, grid, 0.0), grid * grid)
    np.testing.assert_allclose(edit_score(grid, grid[::-1], 1.0), grid[::-1])


@pytest.mark.parametrize(("middle", "p"), [(0.3, 0.9), (0.3, 0.6), (0.5, 0.9)])
def test_from_where_on_an_attempt_beats_doing_nothing(middle, p):
    threshold = middle * (1 - p) / ((1 - middle) * p)
    for i in (threshold - 0.01, threshold + 0.01):
        attempt = edit_score(np.array(i), np.array(p), middle)
        assert (attempt > middle) == (i > threshold)


@pytest.mark.parametrize(
    ("states", "want", "score"),
    [
        ((SCORED, SCORED, MISSING), (SCORED, SCORED, MISSING), 4.0),
        ((SCORED, SCORED, FAILED), (FAILED, SCORED, FAILED), None),
        ((FAILED, SCORED, SCORED), (FAILED, SCORED, SCORED), None),
        ((MISSING, SCORED, FAILED), (MISSING, SCORED, FAILED), None),
    ],
)
def test_states(states, want, score):
    values, status = columns(4.0, 0.5, [states])
    assert status.tolist() == [list(want)]
    assert score is None or values[0, 0] == score


def test_nothing_is_changed_in_place_and_without_a_rule_nothing_at_all():
    values = np.array([[5.0, 0.5, 0.5]], np.float32)
    status = np.full((1, 3), SCORED, np.int8)
    found, _ = edit_columns(values, status, NAMES, RULE)
    assert found[0, 0] == 3.0 and values[0, 0] == 5.0
    same, states = edit_columns(values, status, NAMES, None)
    assert (same == values).all() and (states == status).all()
    empty, _ = edit_columns(values[:0], status[:0], NAMES, RULE)
    assert empty.shape == (0, 3)


def test_rounding_is_mended_and_another_range_refused():
    assert columns(5.0004, 1.0)[0][0, 0] == 5.0
    with pytest.raises(ValueError, match=r"'follows' scored 0\.5; the edit rule wants 1\.\.5"):
        columns(0.5, 1.0)
    with pytest.raises(ValueError, match=r"'keeps' scored 2; the edit rule wants 0\.\.1"):
        columns(3.0, 2.0)
    unit = RULE.model_copy(update={"lowest": 0.0, "highest": 1.0})
    assert columns(0.5, 1.0, rule=unit)[0][0, 0] == pytest.approx(0.65)
    # of a row that failed nothing is read
    assert columns(99.0, 1.0, [(FAILED, SCORED, SCORED)])[1][0, 0] == FAILED


def test_bad_rules_and_numbers():
    with pytest.raises(ValueError, match="'keeps' is not among 'follows', 'looks'"):
        check_rule(RULE, NAMES[:2])
    with pytest.raises(ValueError, match="name two"):
        check_rule(EditRule(instruction="looks", preservation="looks"), NAMES)
    with pytest.raises(ValueError, match=r"lowest 5\.0 is not below highest 5\.0"):
        check_rule(RULE.model_copy(update={"lowest": 5.0}), NAMES)
    with pytest.raises(ValidationError):
        EditRule(instruction="a", preservation="b", middle=1.5)
    for i, p, m in ((1.1, 0.5, 0.3), (np.nan, 0.5, 0.3), (0.5, -0.1, 0.3), (0.5, 0.5, 2.0)):
        with pytest.raises(ValueError, match=r"wanted (numbers|a number) in 0\.\.1"):
            edit_score(np.array([i]), np.array([p]), m)
    assert all(field.description for field in EditRule.model_fields.values())
