"""Tests of paired differences against scipy, closed forms and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from qirl_fast.evaluation.significance import cohen_dz, holm, rank_biserial, sign_test

RNG = np.random.default_rng(5)


def test_the_sign_test_is_that_of_all_sign_patterns() -> None:
    """p of k of m: the share of the 2^m equally likely patterns that are at least as uneven."""
    for m in range(1, 9):
        counts = [sum(signs) for signs in itertools.product((0, 1), repeat=m)]
        for k in range(m + 1):
            diff = [1.0] * k + [-2.0] * (m - k) + [0.0, 0.0]
            found = sign_test(diff)
            uneven = [abs(c - m / 2) >= abs(k - m / 2) for c in counts]
            assert (found.better, found.worse, found.same) == (k, m - k, 2)
            assert found.p == pytest.approx(sum(uneven) / 2**m, rel=1e-12)  # exact, but for sums
    assert sign_test([0.0, 0.0]).p == 1.0


def test_the_sign_test_rejects_as_often_as_it_says() -> None:
    """Of 40 pairs without a difference at most 5 % are below 0.05: exact tests are conservative."""
    diffs = RNG.standard_normal((4000, 40))
    below = np.mean([sign_test(d).p < 0.05 for d in diffs])
    # The exact size is P(|k - 20| >= 7) = 0.0385; 4000 draws have a standard error of 0.003.
    assert below == pytest.approx(0.0385, abs=0.012)


def test_holm_is_the_step_down_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]
    for _ in range(50):
        p = RNG.random(6) ** 3
        adjusted = holm(p.tolist())
        for alpha in (0.01, 0.05, 0.2):
            order, rejected = np.argsort(p), set()
            for place, i in enumerate(order):  # Holm 1979, as he states it
                if p[i] > alpha / (6 - place):
                    break
                rejected.add(int(i))
            assert rejected == {i for i, a in enumerate(adjusted) if a <= alpha}


def test_holm_bounds_the_chance_of_any_false_rejection() -> None:
    """Five true hypotheses, tests that share half their data: at most alpha."""
    shared = RNG.standard_normal((2000, 1, 30))
    diffs = shared + RNG.standard_normal((2000, 5, 30))
    any_ = np.mean([min(holm([sign_test(d).p for d in ds])) < 0.1 for ds in diffs])
    assert any_ < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 2000)


def test_effect_sizes() -> None:
    d = RNG.normal(0.3, 1.0, 25)
    assert cohen_dz(d) == pytest.approx(d.mean() / d.std(ddof=1))
    assert cohen_dz([1.0, 1.0]) is None and cohen_dz([2.0]) is None
    assert rank_biserial([1.0, 2.0, 0.0]) == 1.0 and rank_biserial([-3.0]) == -1.0
    assert rank_biserial([0.0, 0.0]) is None
    assert rank_biserial([1.0, -1.0]) == 0.0
    total = 25 * 26 / 2
    smaller = wilcoxon(d).statistic  # the lesser of W+ and W-
    assert abs(rank_biserial(d) or 0) == pytest.approx(1 - 2 * smaller / total)


@pytest.mark.parametrize("bad", [[], [[1.0]], [float("nan"), 1.0], [float("inf")]])
def test_what_is_no_sample_is_refused(bad: list[float]) -> None:
    for function in (sign_test, cohen_dz, rank_biserial):
        with pytest.raises(ValueError, match="wanted finite"):
            function(bad)


def test_what_is_no_probability_is_refused() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="wanted numbers from 0 to 1"):
            holm([0.5, bad])
