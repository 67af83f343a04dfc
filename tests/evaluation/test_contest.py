"""Tables and comparisons of several models, and how they are written."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.contest import (
    ALL,
    accuracies,
    by_category,
    compared,
    pairs_of,
    prompt_means,
)
from qirl_fast.evaluation.contest_report import cell, csv_text, p_value, table
from qirl_fast.evaluation.paired import paired_bootstrap
from qirl_fast.evaluation.significance import holm, sign_test
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED

NAN = float("nan")
RNG = np.random.default_rng(11)


def test_prompts_weigh_alike_whatever_of_them_failed() -> None:
    scores = np.array([[1.0, 0.0], [1.0, NAN], [NAN, NAN]])
    assert prompt_means(scores)[:2].tolist() == [0.5, 1.0] and np.isnan(prompt_means(scores)[2])
    found = by_category(scores, ["a", "b", "b"])
    assert (found[ALL].value, found[ALL].prompts) == (0.75, 2)
    assert (found["b"].value, found["b"].prompts) == (1.0, 1)
    assert by_category(scores[2:], ["a"])["a"].value is None
    assert list(by_category(scores, [None] * 3)) == [ALL]
    assert list(by_category(scores, ["a", None, None])) == [ALL, "-", "a"]


def test_genevals_overall_is_the_mean_of_the_tags() -> None:
    scores = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, NAN], [1.0, 1.0]])
    found = accuracies(scores, ["a", "a", "a", "b", None], 1.0)
    assert (found["a"].right, found["a"].images) == (0.5, 6)
    assert (found["b"].right, found["b"].images) == (1.0, 1)
    assert found[ALL].right == 0.75 and found[ALL].images == 7
    assert accuracies(scores, [None] * 5, 1.0)[ALL].right is None
    assert accuracies(np.array([[0.9]]), ["a"], 0.9)["a"].right == 1.0


def test_a_comparison_is_made_of_known_parts() -> None:
    base = RNG.random((40, 2))
    scores = {
        "j": {"base": base, "up": base + RNG.normal(0.2, 0.3, base.shape)},
        "k": {"base": base, "up": base + RNG.normal(0.0, 0.3, base.shape)},
    }
    scores["k"]["up"][3] = NAN
    found = compared(scores, [("up", "base")], {"j": 0.02, "k": 2.0}, 0.05, 0.8)
    assert [(c.judge, c.prompts) for c in found] == [("j", 40), ("k", 39)]
    d = prompt_means(scores["j"]["up"]) - base.mean(1)
    known = paired_bootstrap(base.mean(1), prompt_means(scores["j"]["up"]))
    assert found[0].gain.value == pytest.approx(known.diff)
    assert (found[0].gain.low, found[0].gain.high) == pytest.approx((known.low, known.high))
    assert found[0].signs == sign_test(d)
    assert [c.adjusted for c in found] == holm([c.signs.p for c in found])
    assert found[0].needed is not None and found[0].needed > 40 > (found[1].needed or 0)


def test_nothing_in_common_is_nothing_to_compare() -> None:
    one, two = np.array([[1.0], [NAN], [2.0]]), np.array([[NAN], [1.0], [3.0]])
    scores = {"j": {"a": one, "b": two}}
    assert compared(scores, [("b", "a")], {"j": 0.02}, 0.05, 0.8) == []


def test_pairs() -> None:
    assert pairs_of(["a", "b", "c"], "b", False) == [("a", "b"), ("c", "b")]
    assert pairs_of(["a", "b", "c"], "b", True) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert pairs_of(["a"], "a", True) == pairs_of(["a"], "a", False) == []


def test_what_came_from_outside_stays_in_its_cell() -> None:
    nasty = 'a | b\n| c | <script>alert("x")</script> & `code` [link](http://x) *b* \\|'
    line = table(["prompt", "n"], [[nasty, 1]])[2]
    assert "\n" not in line and "<" not in line
    unescaped = line.replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == 3, "two cells"
    assert cell("x" * 500).endswith("...") and len(cell("x" * 500)) <= 100


def test_p_values_are_never_shown_as_0() -> None:
    assert p_value(0.04321) == "0.043" and p_value(1.0) == "1.000" and p_value(3e-8) == "3.0e-08"


def test_the_csv_has_a_line_for_each_score_and_reads_back() -> None:
    nasty = 'say "hi", | and\nbye'
    prompts = [Prompt("a" * 16, nasty, None, {}), Prompt("b" * 16, "x", "tag", {})]
    scores = {"j": {"m": np.array([[0.1, NAN], [1 / 3, NAN]])}}
    states = {"j": {"m": np.array([[SCORED, FAILED], [SCORED, MISSING]])}}
    rows = list(csv.DictReader(io.StringIO(csv_text(prompts, scores, states))))
    assert [r["state"] for r in rows] == ["scored", "failed", "scored", "missing"]
    assert rows[0]["prompt"] == nasty and rows[1]["score"] == ""
    assert float(rows[2]["score"]) == 1 / 3 and rows[2]["category"] == "tag"
    assert [r["row"] + r["sample"] for r in rows] == ["10", "11", "20", "21"]
