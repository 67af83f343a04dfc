"""What a rater is asked next, and where each model stands."""

from collections import Counter

import pytest

from qirl_fast.arena import store as module
from qirl_fast.arena.schedule import next_item, question, side
from qirl_fast.arena.study import Item

ITEMS = [Item(f"p{i}", "base", "rl") for i in range(40)]


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(module, "TOO_FAST_S", 0.0)


def ask(store, rater, place=None, usable=lambda item: True, items=ITEMS):
    return question(store, items, 0, rater, place, usable)


def answer_all(store, rater, most=100):
    store.rater(rater)
    asked = []
    while (shown := ask(store, rater)) and len(asked) < most:
        asked.append(shown.item)
        store.cast(rater, shown.item, "a")
    return asked


def test_everything_is_asked_once_in_an_order_of_ones_own(store):
    anna, ben = answer_all(store, "anna"), answer_all(store, "ben")
    assert sorted(anna) == sorted(ben) == sorted(ITEMS)
    assert anna != ben and anna != ITEMS
    assert ask(store, "anna") is None


def test_the_fewest_votes_come_first(store):
    first = answer_all(store, "anna", most=25)
    second = answer_all(store, "ben", most=15)
    assert not set(first) & set(second)


def test_the_order_is_that_of_the_seed():
    assert next_item(ITEMS, Counter(), [], 3, "anna") == next_item(ITEMS, Counter(), [], 3, "anna")
    assert len({next_item(ITEMS, Counter(), [], seed, "anna") for seed in range(20)}) > 10


def test_sides_are_even_and_differ_between_raters():
    sides = Counter(side(s, "anna", item) for s in range(50) for item in ITEMS)
    assert abs(sides["a"] - 1000) < 3 * 500**0.5  # 2000 coins
    same = sum(side(0, "anna", item) == side(0, "ben", item) for item in ITEMS)
    assert 8 < same < 32


def test_a_question_without_a_vote_comes_again_after_a_reload(store):
    store.rater("anna")
    first = ask(store, "anna")
    assert ask(store, "anna") == first
    store.cast("anna", first.item, "a")
    assert ask(store, "anna").place == 2
    assert ask(store, "anna", place=1).choice == "a"
    assert ask(store, "anna", place=99).place == 2


def test_what_cannot_be_shown_is_passed_over(store):
    store.rater("anna")
    first = ask(store, "anna")
    second = ask(store, "anna", usable=lambda item: item != first.item)
    assert second.item != first.item and second.place == 2
    assert ask(store, "anna") == first  # it is back
    assert ask(store, "anna", usable=lambda item: False) is None


def test_questions_of_models_that_are_not_compared_any_more_are_not_open(store):
    store.rater("anna")
    gone = Item("p0", "base", "old")
    store.show("anna", gone, "a")
    assert ask(store, "anna").item in ITEMS
