"""From log-probabilities and texts to scores: hand-computed, and against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qirl_fast.rewards.vlm.score import Unreadable, read_text, read_tokens


def logs(**p: float) -> dict[str, float]:
    return {name.lstrip("_"): math.log(value) for name, value in p.items()}


def test_the_expected_score_is_the_mean_over_the_five_renormalised() -> None:
    found = read_tokens(
        "expected", logs(_1=0.1, _2=0.0625, _3=0.0625, _4=0.2, _5=0.075, x=0.5), None
    )
    by_hand = (0.1 + 2 * 0.0625 + 3 * 0.0625 + 4 * 0.2 + 5 * 0.075) / 0.5
    assert found.value == pytest.approx(by_hand, abs=1e-12)
    assert found.outside == pytest.approx(0.5, abs=1e-12)
    assert found.spread == 0.0
    assert found.p == pytest.approx((0.2, 0.125, 0.125, 0.4, 0.15), abs=1e-12)


@given(st.lists(st.floats(-700, 0), min_size=5, max_size=5))
def test_it_stays_on_the_scale(logits: list[float]) -> None:
    total = math.log(math.fsum(math.exp(v) for v in logits))
    found = read_tokens("expected", {str(i + 1): v - total for i, v in enumerate(logits)}, None)
    assert 1.0 <= found.value <= 5.0 and 0.0 <= found.outside <= 1.0


@pytest.mark.parametrize("listed", [("4", "5"), ("3",), ("1", "5"), ("2", "3", "4")])
def test_the_spread_is_that_of_the_worst_the_missing_ones_could_do(listed) -> None:
    p = dict(zip(listed, (0.5, 0.3, 0.1), strict=False))
    least = 0.02
    found = read_tokens(
        "expected", {t: math.log(v) for t, v in p.items()} | logs(x=least), math.log(least)
    )
    outside = 1 - sum(p.values())
    steps = [least * i / 8 for i in range(9)]
    missing = [t for t in "12345" if t not in p]
    values = []
    for extra in itertools.product(steps, repeat=len(missing)):
        if sum(extra) <= outside + 1e-12:
            full = p | dict(zip(missing, extra, strict=True))
            values.append(sum(float(t) * v for t, v in full.items()) / sum(full.values()))
    assert found.spread == pytest.approx(max(values) - min(values), abs=1e-9)
    assert min(values) <= found.value <= max(values)
    plain = sum(float(t) * v for t, v in p.items()) / sum(p.values())
    assert found.value == pytest.approx(plain)


def test_yes_and_no_in_all_their_spellings() -> None:
    found = read_tokens("yes_no", logs(Yes=0.3, yes=0.1, No=0.1, maybe=0.5), None)
    assert found.value == pytest.approx(1 + 4 * 0.8)
    assert found.outside == pytest.approx(0.5)
    assert read_tokens("yes_no", logs(No=0.9), None).value == 1.0


def test_no_candidate_and_nan_are_no_score() -> None:
    with pytest.raises(Unreadable, match=r"none of 1, 2, 3, 4, 5 .* 'Hello', 'x'"):
        read_tokens("expected", logs(Hello=0.6, x=0.2), math.log(0.2))
    with pytest.raises(Unreadable, match="'3' is nan"):
        read_tokens("expected", {"3": float("nan")}, None)
    with pytest.raises(Unreadable, match=r"'3' is 2\.0; wanted 0 or less"):
        read_tokens("expected", {"3": 2.0}, None)
    with pytest.raises(Unreadable, match="none of"):  # all of them impossible
        read_tokens("expected", {"3": -math.inf}, None)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("it is fine.\nScore: 4", 4.0),
        ("Score: 2 ... on reflection\nScore: 3.5", 3.5),
        ("**Score:** 5", 5.0),
        ('{"reason": "x", "score": 4}', 4.0),
        ('```json\n{"score": 2.5}\n```', 2.5),
        ('Score: 1 {not json} {"score": 3}', 3.0),
    ],
)
def test_written_scores(text: str, score: float) -> None:
    assert read_text(text).value == score


@pytest.mark.parametrize(
    "text", ["", "it is a 4", "Score: high", "Score: 7", "Score: 0", "Score: -3", '{"score": true}',
             '{"score": NaN}', '{"score": "4"}']
)  # fmt: skip
def test_no_written_score_is_no_score(text: str) -> None:
    with pytest.raises(Unreadable):
        read_text(text)


def test_a_word_without_any_spelling_listed_is_missing() -> None:
    found = read_tokens("yes_no", logs(yes=0.5, x=0.1), math.log(0.1))
    assert found.value == 5.0
    assert found.spread == pytest.approx(5 - (5 * 0.5 + 0.1) / 0.6)
    assert read_tokens("yes_no", logs(Yes=0.5, no=0.2, x=0.1), math.log(0.1)).spread == 0.0
