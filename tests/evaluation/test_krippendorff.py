"""Agreement of raters, against worked examples that were published."""

import numpy as np
import pytest

from qirl_fast.evaluation.krippendorff import alpha

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). B: two observers, binary, no
# data missing. C: four observers, twelve units, five labels, data missing.
TWO = ["0100000010", "1110010000"]
FOUR = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def counts(rows):
    labels = sorted({c for row in rows for c in row if c != "."})
    return np.array([[sum(r[u] == c for r in rows) for c in labels] for u in range(len(rows[0]))])


def of(rows, **how):
    table = counts(rows).astype(float)
    return alpha(table, [str(u) for u in range(len(table))], **how)


@pytest.mark.parametrize(("rows", "value", "units"), [(TWO, 0.095, 10), (FOUR, 0.743, 11)])
def test_published_examples(rows, value, units):
    found = of(rows)
    assert round(found.value, 3) == value
    assert found.units == units
    assert found.low < found.value < found.high


def test_perfect_and_opposed():
    assert of(["0101", "0101"]).value == 1
    assert of(["01" * 20, "10" * 20]).value < -0.9


def test_raters_who_guess_agree_as_by_chance():
    rng = np.random.default_rng(0)
    rows = ["".join(map(str, rng.integers(0, 4, 3000))) for _ in range(3)]
    assert abs(of(rows, n_boot=100).value) < 0.03


def test_what_has_no_agreement_says_why():
    assert of(["01", ".."]).reason == "no pair was judged by two raters"
    assert of(["000", "000"]).reason == "only one label was ever given"
    lonely = alpha(np.array([[1.0, 1.0], [2.0, 0.0]]), ["p", "p"])
    assert np.isfinite(lonely.value) and np.isnan(lonely.low) and "too few" in lonely.reason


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten copies of every prompt tell no more: the interval stays as wide as without them."""
    table = counts(FOUR).astype(float)
    names = [str(u) for u in range(12)]
    alone = alpha(table, names)
    copies = alpha(np.tile(table, (10, 1)), names * 10)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, abs=0.1)
    independent = alpha(np.tile(table, (10, 1)), [str(i) for i in range(120)])
    assert independent.high - independent.low < 0.6 * (alone.high - alone.low)


def test_malformed():
    with pytest.raises(ValueError, match="a prompt for each unit"):
        alpha(np.ones((2, 2)), ["p"])
