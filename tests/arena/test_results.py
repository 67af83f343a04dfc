"""What votes become: shares, ratings by category, agreement; people and judges apart."""

import numpy as np
import pytest

from qirl_fast.arena.report import Part, as_html, as_text, report
from qirl_fast.arena.results import agreement, judged, majority, outcomes, ratings, verdict
from qirl_fast.arena.store import Vote
from qirl_fast.arena.study import Item
from qirl_fast.config.arena import ArenaConfig

PROMPTS = [f"p{i}" for i in range(6)]


def cast(text, rater="anna", looked=False):
    """One letter a prompt: r(l), b(ase), t(ie), x (bad), - none. base < rl."""
    choice = {"r": "b", "b": "a", "t": "tie", "x": "bad"}
    return [
        Vote(rater, Item(f"p{i}", "base", "rl"), choice[c], looked)
        for i, c in enumerate(text)
        if c != "-"
    ]


def test_outcomes_are_of_the_model_whichever_comes_first():
    votes = cast("rbtx")
    assert outcomes(votes, "rl", "base", 1) == [1, 0, 0.5, 0.5]
    assert outcomes(votes, "base", "rl", 1) == [0, 1, 0.5, 0.5]


def test_a_prompt_counts_once_it_has_its_votes_in_that_order():
    votes = cast("rrr") + cast("-bt", "ben") + cast("r--", "ben") + cast("bbb", "carl")
    assert outcomes(votes, "rl", "base", 2) == [0.5, 0.75, 1.0]  # p1, p2, p0; Carl comes too late
    assert outcomes(votes, "rl", "base", 3) == pytest.approx([2 / 3, 1 / 3, 0.5])
    assert outcomes(votes, "rl", "base", 4) == []


def test_the_verdict_counts_everything_there_is(study):
    votes = cast("rrtx-b") + cast("rb", "ben", looked=True)
    found = verdict(study, votes, "rl", "base", 2, 0.95)
    assert found.counts == (3, 2, 1, 1)
    assert (found.share.n, found.waiting, found.looked, found.raters) == (2, 3, 2, 2)
    assert found.share.value == 0.75 and not found.share.excludes_no_difference
    assert found.strict.low == found.share.low  # one pair alone


def test_ratings_stand_by_category_and_judge_nothing_twice(study):
    votes = cast("rbrbrb") + cast("rbrbrb", "ben")
    found = ratings(study, votes, 0.95, 200)
    assert {name: of.prompts for name, of in found.items()} == {"all": 6, "even": 3, "odd": 3}
    assert found["all"].elo == pytest.approx([1000, 1000])
    assert found["even"].elo[1] > 1200 and found["odd"].elo[1] < 800
    assert np.isnan(found["even"].low[1])  # every prompt went one way
    assert ratings(study, [], 0.95, 200) == {}


def test_people_agree_or_not():
    assert agreement(cast("rbrbrb") + cast("rbrbrb", "ben"), 0.95, 200).value == 1
    assert agreement(cast("rbrbrb") + cast("brbrbr", "ben"), 0.95, 200).value < -0.5
    assert agreement(cast("rbrbrb"), 0.95, 200).units == 0


def test_a_judge_is_compared_with_the_majority_of_people():
    people = cast("rbrb") + cast("rbbt", "ben") + cast("rb", "carl")
    (found,) = judged(people, cast("rrrrrr", "judge x"), "rl", "base", 0.95, 200)
    assert found.share.value == 1 and found.share.n == 6
    assert (found.same, found.n) == (1, 2)  # p0 and p1; people are divided on p2 and p3
    assert [majority([(0, v) for v in cast("rr")]), majority([(0, v) for v in cast("rb")])] == [
        "b",
        None,
    ]


@pytest.fixture
def cfg(folders, tmp_path):
    return ArenaConfig(models=folders, database=str(tmp_path / "votes.db"), resamples=100)


def test_the_report_says_whether_no_difference_is_excluded(cfg, study, store):
    text = as_text(report(cfg, study, store, "rl", "base"))
    assert 'does not exclude "no difference"' in text and "No judge has voted" in text
    for rater in "abcd":
        store.rater(rater)
    store.rater("judge x", "model")
    for prompt in PROMPTS:
        store.cast("judge x", Item(prompt, "base", "rl"), "a")
    text = as_text(report(cfg, study, store, "rl", "base"))
    assert "No prompt of rl against base is decided yet" in text  # judges are not people
    assert "prefers rl to base" in text and "0.0 % (" in text


def test_a_clear_gain_is_shown(cfg, study, monkeypatch):
    many = [Vote("anna", Item(f"q{i}", "base", "rl"), "b", False) for i in range(30)]

    class Kept:
        def votes(self, kind):
            return many if kind == "person" else []

        def changes(self):
            return 0

    parts = report(cfg, study, Kept(), "rl", "base")
    assert parts[0].kind == "shown"
    assert "100.0 % of 30 prompts" in parts[0].sentences[0]
    assert 'The interval excludes "no difference"' in parts[0].sentences[0]
    assert report(cfg, study, Kept(), "base", "rl")[0].kind == "shown"


def test_several_pairs_are_corrected_for(cfg, study):
    from dataclasses import replace

    three = replace(study, models=("base", "rl", "other"))
    found = verdict(three, cast("rrrrrr"), "rl", "base", 1, 0.95)
    assert found.strict.low < found.share.low


def test_texts_of_others_are_escaped():
    page = as_html([Part("<b>", ["<script>x</script>"], [["<i>"], ["&"]])])
    assert "<b>" not in page and "<script>" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page and "<td>&amp;</td>" in page
