"""An interval that may be looked at after every vote: what it says, and that it covers."""

import numpy as np
import pytest

from qirl_fast.evaluation.paired import paired_bootstrap
from qirl_fast.evaluation.win_share import first_exclusion, needed, win_share


@pytest.mark.parametrize(
    ("share", "ties"), [(0.5, 0.0), (0.5, 0.6), (0.7, 0.2), (0.97, 0.0)], ids=str
)
def test_the_truth_is_left_out_at_some_look_in_at_most_five_percent(share, ties):
    """At any of 1500 looks, in 2000 simulated studies. 5 % + 3 standard deviations of a count."""
    y = votes(2000, 1500, share, ties)
    wrong = np.isfinite(first_exclusion(y, share)).mean()
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_raters_who_share_a_prompt_are_averaged_and_still_cover():
    rng = np.random.default_rng(1)
    of_prompt = rng.beta(0.5, 0.5, (1000, 400))  # prompts differ a lot; their mean is 1/2
    y = (rng.random((3, 1000, 400)) < of_prompt).mean(0)
    assert np.isfinite(first_exclusion(y, 0.5)).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_an_interval_for_one_look_is_wrong_at_some_look_far_more_often():
    """Why this file is there: the usual one, looked at every 10 prompts up to 300: 29 % here."""
    y = votes(150, 300, 0.5, 0.0, seed=2)
    looks = range(20, 301, 10)
    half = np.zeros(300)

    def wrong(row):
        found = (paired_bootstrap(half[:n], row[:n] - 0.5, n_boot=200) for n in looks)
        return any(r.low > 0 or r.high < 0 for r in found)

    assert np.mean([wrong(row) for row in y]) > 0.15
    assert np.isfinite(first_exclusion(y, 0.5)).mean() <= 0.05


def votes(studies, n, share, ties, seed=0):
    u = np.random.default_rng(seed).random((studies, n))
    win = share - ties / 2
    return np.where(u < win, 1.0, np.where(u < win + ties, 0.5, 0.0))


def test_the_interval_and_the_look_at_which_it_excludes_agree():
    y = votes(1, 300, 0.75, 0.1)[0]
    stop = int(first_exclusion(y[None], 0.5)[0])
    assert 1 < stop <= 300
    assert not win_share(y[: stop - 1]).excludes_no_difference
    assert win_share(y[:stop]).excludes_no_difference


def test_turning_the_votes_round_turns_the_interval_round():
    y = votes(1, 80, 0.7, 0.3)[0]
    one, other = win_share(y), win_share(1 - y)
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-12)


def test_it_narrows_and_the_level_widens_it():
    y = votes(1, 2000, 0.7, 0.0)[0]
    widths = [(s := win_share(y[:n])).high - s.low for n in (20, 200, 2000)]
    assert widths == sorted(widths, reverse=True) and widths[2] < 0.1
    strict = win_share(y[:200], 0.99)
    assert strict.high - strict.low > widths[1]


def test_no_votes_say_nothing_and_one_vote_nearly_nothing():
    none = win_share([])
    assert (none.value, none.low, none.high, none.n) == (0.5, 0, 1, 0)
    assert not none.excludes_no_difference
    assert not win_share([1.0]).excludes_no_difference


def test_only_ties_never_exclude_and_only_wins_soon_do():
    assert not win_share([0.5] * 3000).excludes_no_difference
    assert win_share([1.0] * 20).excludes_no_difference


def test_planning():
    """A larger difference needs fewer prompts, none at all cannot be shown."""
    sizes = [needed(share, 0.2, studies=200, most=1500) for share in (0.6, 0.7, 0.8)]
    assert sizes == sorted(sizes, reverse=True) and np.isfinite(sizes).all()
    assert needed(0.5, 0.2, studies=200, most=500) == np.inf
    with pytest.raises(ValueError, match="no votes have both"):
        needed(0.9, 0.5)


@pytest.mark.parametrize("outcomes", [[2.0], [-0.1], [float("nan")], [[0.5]]])
def test_what_is_no_outcome_is_refused(outcomes):
    with pytest.raises(ValueError, match="wanted"):
        win_share(outcomes)
