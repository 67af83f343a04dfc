"""The planner against simulated evaluations, and against textbook values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from qirl_fast.evaluation.planner import MOST, least_effect, power, prompts_needed


def simulated(n: int, effect: float, sd: float, alpha: float, runs: int = 4000) -> float:
    """The share of evaluations of n prompts whose t-test sees the effect."""
    d = np.random.default_rng(n).normal(effect, sd, (runs, n))
    found = ttest_1samp(d, 0.0, axis=1)
    return float((found.pvalue < alpha).mean())


@pytest.mark.parametrize(("effect", "sd", "alpha"), [(0.02, 0.1, 0.05), (0.1, 0.23, 0.01)])
def test_so_many_prompts_show_the_effect_as_often_as_said(
    effect: float, sd: float, alpha: float
) -> None:
    n = prompts_needed(effect, sd, alpha, 0.8)
    assert n is not None
    # The standard error of a share of 0.8 in 4000 runs is 0.0063; three of them.
    assert simulated(n, effect, sd, alpha) == pytest.approx(power(n, effect, sd, alpha), abs=0.019)
    assert power(n, effect, sd, alpha) >= 0.8 > power(n - 1, effect, sd, alpha)


def test_scores_that_are_not_normal_need_as_many() -> None:
    """Differences of pass or fail, -1, 0, 1: the t-test of their mean has the power planned."""
    values, chances = np.array([-1.0, 0.0, 1.0]), np.array([0.1, 0.7, 0.2])
    mean = float(values @ chances)
    sd = float(np.sqrt(values**2 @ chances - mean**2))
    n = prompts_needed(mean, sd)
    assert n is not None
    d = np.random.default_rng(1).choice(values, (4000, n), p=chances)
    seen = float((ttest_1samp(d, 0.0, axis=1).pvalue < 0.05).mean())
    assert seen == pytest.approx(0.8, abs=0.025)  # 0.019 as above, and a mean of n = 220 such


def test_textbook_values() -> None:
    """Cohen 1988 and G*Power 3.1 for a matched pair: d_z 0.5 needs 34 pairs, 0.2 needs 199."""
    assert prompts_needed(0.5, 1.0) == 34
    assert prompts_needed(0.2, 1.0) == 199
    assert prompts_needed(0.8, 1.0) == 15


def test_the_least_effect_is_the_other_way_round() -> None:
    for n in (2, 6, 96, 5000):
        d = least_effect(n, 0.3)
        assert power(n, d, 0.3) == pytest.approx(0.8, abs=1e-6)
        assert (prompts_needed(d * 1.001, 0.3) or 0) <= n < (prompts_needed(d * 0.98, 0.3) or 0) + 1
    assert MOST < 7.85e12 and prompts_needed(1e-6, 1.0) is None
    assert prompts_needed(1e-3, 1.0) == pytest.approx((1.95996 + 0.84162) ** 2 * 1e6, rel=1e-4)


@pytest.mark.parametrize(
    ("effect", "sd", "alpha", "wanted"),
    [(0, 1, 0.05, 0.8), (1, 0, 0.05, 0.8), (1, 1, 0.0, 0.8), (1, 1, 0.9, 0.8), (1, 1, 0.05, 1.0)],
)
def test_what_cannot_be_planned_is_refused(
    effect: float, sd: float, alpha: float, wanted: float
) -> None:
    with pytest.raises(ValueError, match="wanted"):
        prompts_needed(effect, sd, alpha, wanted)
    with pytest.raises(ValueError, match="wanted 2 or more"):
        power(1, 1.0, 1.0)
