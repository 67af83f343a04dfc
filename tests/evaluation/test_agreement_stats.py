"""Agreement statistics: against SciPy, loops over pairs, published and hand-made numbers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from qirl_fast.evaluation import agreement_stats
from qirl_fast.evaluation.agreement_stats import (
    Rows,
    bins_of,
    correlations,
    different_pairs,
    errors,
    repeat_agreement,
)
from qirl_fast.evaluation.bootstrap import percentiles, resamples

# Shrout and Fleiss 1979, table 2: six targets, four judges; table 4 gives ICC(1,1) = 0.17
SHROUT_FLEISS = [
    (9, 2, 5, 8),
    (6, 1, 3, 2),
    (8, 4, 6, 8),
    (7, 1, 2, 6),
    (10, 5, 6, 9),
    (6, 2, 4, 7),
]


def make_rows(n: int = 40, clusters: int = 12, seed: int = 0) -> Rows:
    """Rows with ties in both columns and clusters of unequal size."""
    generator = np.random.default_rng(seed)
    cluster = np.sort(np.concatenate([np.arange(clusters), generator.integers(0, clusters, n)]))
    truth = np.round(generator.uniform(1, 5, len(cluster)) * 2) / 2
    predicted = np.round((truth + generator.normal(size=len(cluster))) * 3) / 3
    return Rows(truth, predicted, cluster.astype(np.int64))


def make_counts(clusters: int, n_boot: int = 8) -> np.ndarray:
    return np.concatenate([np.ones((1, clusters)), *resamples(clusters, n_boot, 3)])


def drawn_rows(rows: Rows, count: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
    """The table of a resample: row numbers, each with the copy of the prompt it stands in."""
    return [
        (row, (int(cluster), copy))
        for row, cluster in enumerate(rows.cluster)
        for copy in range(int(count[cluster]))
    ]


def loop_accuracy(rows: Rows, drawn: list, *, within: bool) -> float:
    right = pairs = 0.0
    for (a, prompt_a), (b, prompt_b) in combinations(drawn, 2):
        if rows.truth[a] == rows.truth[b] or (within and prompt_a != prompt_b):
            continue
        pairs += 1
        if rows.predicted[a] == rows.predicted[b]:
            right += 0.5
        else:
            right += (rows.predicted[a] > rows.predicted[b]) == (rows.truth[a] > rows.truth[b])
    return right / pairs


def test_every_resample_agrees_with_scipy_and_with_loops() -> None:
    rows = make_rows()
    counts = make_counts(12)
    draws = correlations(rows, counts)
    for s, count in enumerate(counts):
        drawn = drawn_rows(rows, count)
        x, y = (column[[row for row, _ in drawn]] for column in (rows.truth, rows.predicted))
        wanted = {
            "pearson": stats.pearsonr(x, y).statistic,
            "spearman": stats.spearmanr(x, y).statistic,
            "kendall": stats.kendalltau(x, y).statistic,
            "pairwise_accuracy": loop_accuracy(rows, drawn, within=False),
            "pairwise_accuracy_within_prompt": loop_accuracy(rows, drawn, within=True),
        }
        for name, value in wanted.items():
            assert draws[name][s] == pytest.approx(value, abs=1e-12), (name, s)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    repeats = np.random.default_rng(0).uniform(1, 5, (len(rows.truth), 3)).round(1).tolist()
    counts = make_counts(12, 50)
    whole = correlations(rows, counts) | repeat_agreement(repeats, rows.cluster, counts)
    monkeypatch.setattr(agreement_stats, "BLOCK_ELEMENTS", 3 * len(rows.truth))
    parts = correlations(rows, counts) | repeat_agreement(repeats, rows.cluster, counts)
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)


def test_pairs_are_counted() -> None:
    rows = make_rows()
    pairs = list(combinations(range(len(rows.truth)), 2))
    different = [(a, b) for a, b in pairs if rows.truth[a] != rows.truth[b]]
    inside = sum(rows.cluster[a] == rows.cluster[b] for a, b in different)
    assert different_pairs(rows) == (len(different), inside)


def test_undefined_is_nan_and_not_a_number_that_looks_fine() -> None:
    cluster = np.arange(4)
    truth = np.array([0.1, 0.2, 0.3, 0.4])
    constant = np.full(4, 0.1 + 0.2)
    flat = correlations(Rows(truth, constant, cluster), np.ones((1, 4)))
    for name in ("pearson", "spearman", "kendall", "pairwise_accuracy_within_prompt"):
        assert np.isnan(flat[name][0]), name
    assert flat["pairwise_accuracy"][0] == 0.5
    flat = correlations(Rows(constant, truth, cluster), np.ones((1, 4)))
    assert all(np.isnan(draws[0]) for draws in flat.values())
    # resample of one prompt alone, drawn four times
    drawn = correlations(Rows(truth, truth, cluster), np.array([[0.0, 4.0, 0.0, 0.0]]))
    assert all(np.isnan(draws[0]) for draws in drawn.values())
    assert np.isnan(repeat_agreement([(3.3, 3.3)] * 4, cluster, np.ones((1, 4)))["icc"][0])


def test_hand_made_calibration() -> None:
    """Two bins of ten: predictions 2 and 4; truths 2.5 and half 3, half 5."""
    predicted = np.repeat([2.0, 4.0], 10)
    truth = np.concatenate([np.full(10, 2.5), np.tile([3.0, 5.0], 5)])
    draws, curve = errors(Rows(truth, predicted, np.arange(20)), np.ones((1, 20)))
    assert curve.n.tolist() == [10, 10]
    assert curve.predicted == pytest.approx([2.0, 4.0])
    assert curve.truth == pytest.approx([2.5, 4.0])
    assert draws["ece"][0] == pytest.approx(0.25)  # (10 * 0.5 + 10 * 0) / 20
    assert draws["mean_error"][0] == pytest.approx(-0.25)
    assert draws["rmse"][0] == pytest.approx(np.sqrt((10 * 0.25 + 10 * 1.0) / 20))


def test_calibration_of_resamples_agrees_with_loops() -> None:
    rows = make_rows(80)
    counts = make_counts(12)
    draws, curve = errors(rows, counts)
    bins = bins_of(rows.predicted)
    for s, count in enumerate(counts):
        picked = np.array([row for row, _ in drawn_rows(rows, count)])
        gap = rows.predicted[picked] - rows.truth[picked]
        parts = [gap[bins[picked] == b] for b in range(bins.max() + 1)]
        whole = [(rows.predicted - rows.truth)[bins == b].mean() for b in range(bins.max() + 1)]
        ece = sum(abs(part.sum()) for part in parts) / len(gap)
        noise = sum(abs((p - g).sum()) for p, g in zip(parts, whole, strict=True)) / len(gap)
        assert draws["ece"][s] == pytest.approx(ece, abs=1e-12)
        assert draws["ece_noise"][s] == pytest.approx(noise, abs=1e-12)
        assert draws["rmse"][s] == pytest.approx(np.sqrt((gap**2).mean()))
        if s:
            first = rows.truth[picked][bins[picked] == 0]
            assert curve.truth_draws[s - 1, 0] == pytest.approx(first.mean())


def test_bins_are_equally_full_and_keep_equal_values_together() -> None:
    assert np.bincount(bins_of(np.random.default_rng(0).random(1000))).tolist() == [100] * 10
    assert np.bincount(bins_of(np.arange(39.0))).tolist() == [13, 13, 13]
    assert bins_of(np.arange(5.0)).tolist() == [0] * 5
    integers = np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], 40)
    assert (bins_of(integers) == integers - 1).all()
    skewed = np.concatenate([np.full(900, 3.0), np.linspace(4, 5, 100)])
    assert len(np.unique(bins_of(skewed)[:900])) == 1


def test_published_icc() -> None:
    draws = repeat_agreement(SHROUT_FLEISS, np.arange(6), np.ones((1, 6)))
    assert draws["icc"][0] == pytest.approx(0.1657, abs=5e-5)
    inside = [np.var(row, ddof=1) for row in SHROUT_FLEISS]
    assert draws["within_sd"][0] == pytest.approx(np.sqrt(np.mean(inside)))


def test_hand_made_icc() -> None:
    """Rows (1, 2), (4, 5): MSB = 2 * (1.5^2 + 1.5^2) = 9, MSW = 0.5: 8.5 / 9.5."""
    draws = repeat_agreement([(1, 2), (4, 5)], np.arange(2), np.ones((1, 2)))
    assert draws["icc"][0] == pytest.approx(8.5 / 9.5)
    perfect = repeat_agreement([(1.1, 1.1, 1.1), (4.7, 4.7, 4.7)], np.arange(2), np.ones((1, 2)))
    found = [perfect[name][0] for name in ("icc", "within_sd", "flips")]
    assert found == pytest.approx([1, 0, 0], abs=1e-12)


def loop_repeats(repeats: list[list[float]], drawn: list) -> dict[str, float]:
    """One-way analysis of variance and flips, written out."""
    table = [(np.array(repeats[row]), prompt) for row, prompt in drawn]
    k = np.array([len(scores) for scores, _ in table])
    every = np.concatenate([scores for scores, _ in table])
    msb = sum(len(s) * (s.mean() - every.mean()) ** 2 for s, _ in table) / (len(k) - 1)
    msw = sum(((s - s.mean()) ** 2).sum() for s, _ in table) / (k.sum() - len(k))
    k0 = (k.sum() - (k**2).sum() / k.sum()) / (len(k) - 1)
    found = {"icc": (msb - msw) / (msb + (k0 - 1) * msw), "within_sd": np.sqrt(msw)}
    for name, within in (("flips", False), ("flips_within_prompt", True)):
        turned = ordered = 0.0
        for (first, prompt_a), (second, prompt_b) in combinations(table, 2):
            if within and prompt_a != prompt_b:
                continue
            both = min(len(first), len(second))
            signs = np.sign(first[:both] - second[:both])
            for a, b in combinations(signs, 2):
                if a or b:
                    ordered += 1
                    turned += 1.0 if a * b < 0 else 0.5 if a * b == 0 else 0.0
        found[name] = turned / ordered
    return found


def test_repeats_of_unequal_number_agree_with_loops() -> None:
    rows = make_rows(25, 8)
    generator = np.random.default_rng(5)
    repeats = [
        np.round(truth + 0.7 * generator.normal(size=k), 1).tolist()
        for truth, k in zip(rows.truth, generator.integers(2, 5, len(rows.truth)), strict=True)
    ]
    counts = make_counts(8)
    draws = repeat_agreement(repeats, rows.cluster, counts)
    for s, count in enumerate(counts):
        for name, value in loop_repeats(repeats, drawn_rows(rows, count)).items():
            assert draws[name][s] == pytest.approx(value, abs=1e-12), (name, s)


def simulate(seed: int, clusters: int = 60, per: int = 4) -> Rows:
    """A prompt's images share half of the variance of truth and of the judge's error."""
    generator = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(clusters), per)

    def noise() -> np.ndarray:
        shared = generator.normal(size=clusters)[cluster]
        return np.sqrt(0.5) * (shared + generator.normal(size=len(cluster)))

    predicted = 3 + 0.5 * noise()
    return Rows(predicted + 0.5 * noise(), predicted, cluster)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 experiments at 90 %: 180 hits expected, standard deviation 4.2; percentile intervals of
    60 prompts fall a little short of their level, hence the wider lower bound.

    Calibrated by construction (mean truth given the prediction is the prediction): mean error and
    calibration error are 0. Correlations are those of two normals of correlation sqrt(1/2).
    """
    pearson = np.sqrt(0.5)
    kendall = 2 / np.pi * np.arcsin(pearson)
    wanted = {
        "pearson": pearson,
        "spearman": 6 / np.pi * np.arcsin(pearson / 2),
        "kendall": kendall,
        "mean_error": 0.0,
        "rmse": 0.5,
    }
    hits, rows_alone, calibrated = dict.fromkeys(wanted, 0), 0, 0
    for seed in range(200):
        rows = simulate(seed)
        counts = np.concatenate([np.ones((1, 60)), *resamples(60, 400, seed)])
        found, _ = errors(rows, counts)
        calibrated += found["ece"][0] <= np.quantile(found["ece_noise"][1:], 0.9)
        found |= correlations(rows, counts)
        for name, value in wanted.items():
            low, high = percentiles(found[name][1:], 0.9)
            hits[name] += low <= value <= high
        alone = Rows(rows.truth, rows.predicted, np.arange(240))
        draws, _ = errors(alone, np.concatenate(list(resamples(240, 400, seed))))
        low, high = percentiles(draws["mean_error"], 0.9)
        rows_alone += low <= 0 <= high
    for name, count in hits.items():
        assert 180 - 6 * 4.2 <= count <= 180 + 4 * 4.2, (name, hits)
    assert calibrated >= 180 - 6 * 4.2
    assert rows_alone < 155  # resampling rows as if they were independent promises too much
