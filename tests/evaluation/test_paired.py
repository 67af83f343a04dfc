"""The paired bootstrap: against SciPy's, its coverage, and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qirl_fast.evaluation import PairedResult, paired_bootstrap


def make_scores(n: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    before = generator.beta(2, 3, n)
    return before, before + shift + 0.2 * generator.standard_normal(n)


def test_agrees_with_scipy() -> None:
    before, after = make_scores(96, 0.1)
    ours = paired_bootstrap(before, after, n_boot=20_000, seed=1)
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    # a quantile of 20,000 draws has standard error sqrt(p (1-p) / R) / density: 0.0019 at the 2.5 %
    # point of a normal of this spread (0.02) means 0.019 sigma; two independent runs, 4 sigma
    sigma = 0.2 / np.sqrt(96)
    assert abs(ours.low - theirs.low) < 0.11 * sigma
    assert abs(ours.high - theirs.high) < 0.11 * sigma
    assert (ours.before, ours.after, ours.n) == (before.mean(), after.mean(), 96)
    assert ours.diff == (after - before).mean()


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 experiments at 80 %: 320 hits expected, with standard deviation 8."""
    hits = 0
    for seed in range(400):
        result = paired_bootstrap(*make_scores(60, 0.1, seed), n_boot=500, seed=seed, level=0.8)
        hits += result.low <= 0.1 <= result.high
    assert 320 - 4 * 8 <= hits <= 320 + 4 * 8


def test_pairs_are_kept_together() -> None:
    """Scores that vary widely over prompts but change by the same amount give a tight interval."""
    before = np.linspace(0, 1, 50)
    result = paired_bootstrap(before, before + 0.01)
    assert result.low == pytest.approx(0.01, abs=1e-12) == result.high
    shuffled = np.random.default_rng(0).permutation(before + 0.01)
    assert paired_bootstrap(before, shuffled).low < -0.05


def test_same_seed_same_result_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = make_scores(40, 0.0)
    whole = paired_bootstrap(before, after, n_boot=1000, seed=7)
    assert whole == paired_bootstrap(before.tolist(), after.tolist(), n_boot=1000, seed=7)
    assert whole != paired_bootstrap(before, after, n_boot=1000, seed=8)
    monkeypatch.setattr("qirl_fast.evaluation.bootstrap.BLOCK_ELEMENTS", 40 * 7)
    assert whole == paired_bootstrap(before, after, n_boot=1000, seed=7)


def test_no_change_gives_a_point_at_zero() -> None:
    result = paired_bootstrap([0.5, 0.7, 0.2], [0.5, 0.7, 0.2])
    mean = float(np.mean([0.5, 0.7, 0.2]))
    assert result == PairedResult(mean, mean, 0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        ([1.0, 2.0], [1.0], r"got shapes \[2\] and \[1\]"),
        ([1.0], [1.0], r"got shapes \[1\] and \[1\]; wanted two equal"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"got shapes \[1, 2\]"),
        ([], [], r"got shapes \[0\]"),
        ([1.0, float("nan")], [1.0, 2.0], "NaN or infinity"),
        ([1.0, 2.0], [1.0, float("inf")], "NaN or infinity"),
    ],
)
def test_bad_scores(before: list[float], after: list[float], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        paired_bootstrap(before, after)
    with pytest.raises(ValueError, match="got n_boot 99"):
        paired_bootstrap([1, 2], [1, 2], n_boot=99)
    with pytest.raises(ValueError, match="level 1"):
        paired_bootstrap([1, 2], [1, 2], level=1)
