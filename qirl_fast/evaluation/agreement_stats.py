"""Agreement of a judge with people, for many bootstrap resamples at once.

A resample is the counts m_c of its drawn prompts (clusters); a row weighs w_i = m_c(i), as if it
stood w_i times in the table, and every formula below equals SciPy's on that longer table. Sums over
i, j run over ordered pairs of rows, s = sign, x the truth, y the prediction:

- pearson, spearman: moments weighted by w; ranks are midranks of the longer table.
- kendall (tau-b): K / sqrt(P_x P_y), K = sum w_i w_j s(x_i - x_j) s(y_i - y_j),
  P_x = sum w_i w_j [x_i != x_j] = N^2 - sum_g t_g^2 over groups of equal x, N = sum w.
- pairwise accuracy: share of the pairs of different truth that y puts in the right order, a tie of
  y counts 1/2: (1 + K / P_x) / 2. Within prompts: the same over pairs of rows of one prompt.
- calibration: bins of equally many predictions; equal ones share a bin, and bins are the same in
  every resample. Expected calibration error: sum_b n_b / N |mean y - mean x| in b.
- repeats, k_i scores of row i: ICC(1,1) = (MSB - MSW) / (MSB + (k_0 - 1) MSW) (Shrout and Fleiss
  1979; k_0 for unequal k_i as in Donner 1986). The one-way form, as repeat 2 of one row has nothing
  in common with repeat 2 of another: ICC(2,1) would take out a rater effect that is not there.
- flips: sum of |a - b| / 2 by sum of max(|a|, |b|) over pairs of rows and pairs of repeats, where
  a, b are the rows' order (-1, 0, 1) in either: 1 if turned round, 1/2 if tied in one alone.

K is a quadratic form in m whose matrix holds sums of signs: n^2 work once, not per resample.

Shapes: n rows sorted by cluster, C clusters, S = 1 + R counts (a first row of ones gives the
statistic itself, then R resamples), B bins. Undefined is NaN here, and null with a reason in files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Draws = dict[str, Floats]  # name -> float64 [S]

BLOCK_ELEMENTS = 1 << 22
MAX_BINS = 10
BIN_ROWS = 10  # a bin of fewer rows tells little
SAME = 1e-6  # repeats that spread less than this, in score units, are one number rounded


@dataclass(frozen=True)
class Rows:
    """truth, predicted: float64 [n]. cluster: int64 [n], ascending, holding each of 0..C-1."""

    truth: Floats
    predicted: Floats
    cluster: Ints

    def by_cluster(self, values: Floats) -> Floats:
        """Sums [C, ...] of values [n, ...]."""
        starts = np.searchsorted(self.cluster, np.arange(self.cluster[-1] + 1))
        sums: Floats = np.add.reduceat(values, starts, axis=0)
        return sums


@dataclass(frozen=True)
class Calibration:
    """The curve: n, mean predicted, mean truth [B], and draws [R, B] of the latter, NaN where a
    resample has no row of the bin. by_chance: the expected calibration error that drawing rows
    alone would give a judge without any.
    """

    n: Ints
    predicted: Floats
    truth: Floats
    truth_draws: Floats
    by_chance: float


def ratio(above: Floats, below: Floats, defined: NDArray[np.bool_] | bool = True) -> Floats:
    """above / below, NaN where below is 0 or it is not defined."""
    out = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.divide(above, below, out=out, where=(below > 0) & defined)


def correlations(rows: Rows, counts: Floats) -> Draws:
    """pearson, spearman, kendall, pairwise_accuracy, pairwise_accuracy_within_prompt.

    counts: float64 [S, C].
    """
    signs, _, within = pair_sums(lambda part: _orders(rows, part), rows, counts)
    blocks = max(1, len(counts) * len(rows.truth) // BLOCK_ELEMENTS)
    parts = [_moments(rows, part) for part in np.array_split(counts, blocks)]
    pearson, spearman, truth_pairs, both = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {
        "pearson": pearson,
        "spearman": spearman,
        "kendall": ratio(signs, np.sqrt(both)),
        "pairwise_accuracy": (1 + ratio(signs, truth_pairs)) / 2,
        "pairwise_accuracy_within_prompt": (1 + ratio(*(counts @ within).T)) / 2,
    }


def _orders(rows: Rows, part: slice) -> tuple[Floats, Floats]:
    """Sign products, and whether truths differ: [b, n] each, of a part's rows with all."""
    truth = np.sign(rows.truth[part, None] - rows.truth)
    return truth * np.sign(rows.predicted[part, None] - rows.predicted), np.abs(truth)


def different_pairs(rows: Rows) -> tuple[int, int]:
    """Unordered pairs of different truth: all of them, and those within a cluster."""
    _, same = np.unique(rows.truth, return_counts=True)
    _, inside = np.unique(rows.cluster, return_counts=True)
    cells = np.stack([rows.cluster, rows.truth], axis=1)
    _, same_inside = np.unique(cells, axis=0, return_counts=True)
    all_pairs = len(rows.truth) ** 2 - (same**2).sum()
    return int(all_pairs) // 2, int((inside**2).sum() - (same_inside**2).sum()) // 2


def pair_sums(
    kernel: Callable[[slice], tuple[Floats, Floats]], rows: Rows, counts: Floats
) -> tuple[Floats, Floats, Floats]:
    """Sums over ordered pairs of rows, weighted by counts [S, C], of a pair of kernels.

    kernel(part) gives both, [b, n] each. Returns a sum [S] of each, and the sums within clusters of
    both [C, 2].
    """
    n = len(rows.cluster)
    columns = np.searchsorted(rows.cluster, np.arange(counts.shape[1]))
    totals, within = np.zeros((2, len(counts))), np.zeros((counts.shape[1], 2))
    step = max(1, BLOCK_ELEMENTS // n)
    for first in range(0, n, step):
        part = slice(first, first + step)
        ids, starts = np.unique(rows.cluster[part], return_index=True)
        for k, values in enumerate(kernel(part)):
            sums = np.add.reduceat(np.add.reduceat(values, columns, axis=1), starts, axis=0)
            totals[k] += ((counts @ sums.T) * counts[:, ids]).sum(axis=1)
            within[ids, k] += sums[np.arange(len(ids)), ids]
    return totals[0], totals[1], within


def _moments(rows: Rows, counts: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """pearson, spearman, P_x and P_x P_y of each resample."""
    weights = counts[:, rows.cluster]
    size = weights.sum(axis=1)
    pairs, ranks, rank_squares, values = [], [], [], []
    for column in (rows.truth, rows.predicted):
        tied, group = _tied(column, weights)
        pairs.append(size**2 - (tied**2).sum(axis=1))
        rank = np.cumsum(tied, axis=1) - tied / 2 - size[:, None] / 2  # midranks less their mean
        rank_squares.append((tied * rank**2).sum(axis=1))
        ranks.append(rank[:, group])
        values.append(column - column.mean())
    x, y = values
    # einsum and sums along rows: a product's rounding would depend on the block
    sx, sy, sxx, syy, sxy = (np.einsum("sn,n->s", weights, v) for v in (x, y, x * x, y * y, x * y))
    defined = (pairs[0] > 0) & (pairs[1] > 0)
    spread = (size * sxx - sx**2).clip(0) * (size * syy - sy**2).clip(0)
    return (
        ratio(size * sxy - sx * sy, np.sqrt(spread), defined),
        ratio(
            np.einsum("sn,sn,sn->s", weights, *ranks),
            np.sqrt(rank_squares[0] * rank_squares[1]),
            defined,
        ),
        pairs[0],
        pairs[0] * pairs[1],
    )


def _tied(values: Floats, weights: Floats) -> tuple[Floats, Ints]:
    """Weights [S, G] of the groups of equal values, ascending, and each row's group [n]."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    return np.add.reduceat(weights[:, order], starts, axis=1), group


def bins_of(values: Floats) -> Ints:
    """Bin [n] of each value: as equally filled as equal values allow, none empty."""
    n, ordered = len(values), np.sort(values)
    middle = np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right") - 1
    count = min(MAX_BINS, max(1, n // BIN_ROWS))
    return np.unique(middle * count // (2 * n), return_inverse=True)[1].astype(np.int64)


def errors(rows: Rows, counts: Floats) -> tuple[Draws, Calibration]:
    """mean_error (predicted less truth), rmse and ece, score units, and the calibration curve."""
    gap = rows.predicted - rows.truth
    size = counts @ rows.by_cluster(np.ones_like(gap))
    draws = {
        "mean_error": ratio(counts @ rows.by_cluster(gap), size),
        "rmse": np.sqrt(ratio(counts @ rows.by_cluster(gap**2), size)),
    }
    bins = bins_of(rows.predicted)
    member = (bins[:, None] == np.arange(bins.max() + 1)).astype(np.float64)
    n, truth, gaps = (
        counts @ rows.by_cluster(member * v[:, None]) for v in (np.ones_like(gap), rows.truth, gap)
    )
    draws["ece"] = ratio(np.abs(gaps).sum(axis=1), size)
    noise = ratio(np.abs(gaps - n * (gaps[0] / n[0])).sum(axis=1), size)[1:]
    means = ratio(truth, n)
    curve = Calibration(
        n=n[0].astype(np.int64),
        predicted=means[0] + gaps[0] / n[0],
        truth=means[0],
        truth_draws=means[1:],
        by_chance=float(np.nanmean(noise)) if np.isfinite(noise).any() else float("nan"),
    )
    return draws, curve


def repeat_agreement(repeats: Sequence[Sequence[float]], cluster: Ints, counts: Floats) -> Draws:
    """icc, within_sd (pooled, score units), flips, flips_within_prompt.

    repeats: k_i >= 2 scores of each row. cluster: as in Rows. counts: [S, C]. The flips of two rows
    of unequal k_i are those of the repeats that both have.
    """
    k = np.array([len(scores) for scores in repeats])
    scores = np.full((len(k), k.max()), np.nan)
    scores[np.arange(k.max()) < k[:, None]] = np.concatenate([np.asarray(r) for r in repeats])
    centre = np.nanmean(scores)
    means = np.nanmean(scores - centre, axis=1)
    inside = np.nansum((scores - centre - means[:, None]) ** 2, axis=1)
    rows = Rows(means, means, cluster)
    columns = np.stack([np.ones(len(k)), k, k**2, k * means, k * means**2, inside], axis=1)
    n, sum_k, sum_k2, sum_m, sum_m2, ssw = (counts @ rows.by_cluster(columns)).T
    msw = ratio(ssw, sum_k - n)
    msb = ratio(sum_m2 - ratio(sum_m**2, sum_k), n - 1)
    k0 = ratio(sum_k - ratio(sum_k2, sum_k), n - 1)
    below = msb + (k0 - 1) * msw
    turned, ordered, within = pair_sums(lambda part: _turned(scores, part), rows, counts)
    return {
        "icc": ratio(msb - msw, below, below > SAME**2),
        "within_sd": np.sqrt(msw),
        "flips": ratio(turned, ordered),
        "flips_within_prompt": ratio(*(counts @ within).T),
    }


def _turned(scores: Floats, part: slice) -> tuple[Floats, Floats]:
    """Flips and orders between a part's rows and all, summed over pairs of repeats: [b, n] each."""
    signs = [np.sign(column[part, None] - column) for column in scores.T]
    turned, ordered = np.zeros_like(signs[0]), np.zeros_like(signs[0])
    for second, b in enumerate(signs):
        for a in signs[:second]:
            # NaN where either row lacks one of the repeats
            turned += np.nan_to_num(np.abs(a - b) / 2)
            ordered += np.nan_to_num(np.maximum(np.abs(a), np.abs(b)))
    return turned, ordered
