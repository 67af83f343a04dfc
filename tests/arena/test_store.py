"""Votes on the disk: never doubled, never lost, never of other pictures."""

import sqlite3
import subprocess
import sys
import time

import pytest

from qirl_fast.arena import store as module
from qirl_fast.arena.store import Store, StoreError
from qirl_fast.arena.study import Item

ITEM = Item("p1", "base", "rl")


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Votes of these tests come at once."""
    monkeypatch.setattr(module, "TOO_FAST_S", 0.0)


def votes(store):
    return [(v.rater, v.item.prompt, v.choice) for v in store.votes()]


def test_a_second_click_changes_nothing_and_another_vote_replaces_the_first(store):
    store.rater("anna")
    store.show("anna", ITEM, "a")
    assert [store.cast("anna", ITEM, "a") for _ in range(3)] == ["new", "same", "same"]
    assert votes(store) == [("anna", "p1", "a")] and store.changes() == 0
    assert store.cast("anna", ITEM, "tie") == "changed"
    assert votes(store) == [("anna", "p1", "tie")] and store.changes() == 1


def test_a_changed_vote_keeps_its_place_in_the_order(store):
    store.rater("anna")
    for prompt in ("p1", "p2"):
        store.show("anna", Item(prompt, "base", "rl"), "a")
        store.cast("anna", Item(prompt, "base", "rl"), "a")
    store.cast("anna", ITEM, "b")
    assert [v.item.prompt for v in store.votes()] == ["p1", "p2"]


def test_what_comes_at_once_after_a_question_is_the_end_of_a_double_click(store, monkeypatch):
    monkeypatch.setattr(module, "TOO_FAST_S", 0.5)
    store.rater("anna")
    store.show("anna", ITEM, "a")
    assert store.cast("anna", ITEM, "a") == "too fast" and votes(store) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 0.6)
    assert store.cast("anna", ITEM, "a") == "new"


def test_nobody_votes_on_what_they_were_not_shown(store):
    store.rater("anna")
    with pytest.raises(StoreError, match="was not shown this pair"):
        store.cast("anna", ITEM, "a")
    with pytest.raises(StoreError, match="wanted one of a, b, tie, bad"):
        store.cast("anna", ITEM, "left")


def test_a_question_keeps_its_place_and_side(store):
    store.rater("anna")
    first = store.show("anna", ITEM, "b")
    assert (first.place, first.left, first.choice) == (1, "b", None)
    assert store.show("anna", ITEM, "a") == first
    assert store.show("anna", Item("p2", "base", "rl"), "a").place == 2


def test_votes_outlive_the_process_and_the_history_stays(tmp_path, store):
    store.rater("anna")
    store.show("anna", ITEM, "a")
    store.cast("anna", ITEM, "a")
    store.cast("anna", ITEM, "b")
    store.close()
    again = Store(store.path)
    assert votes(again) == [("anna", "p1", "b")]
    for query in ("DELETE FROM history", "UPDATE history SET choice = 'a'"):
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            again._db.execute(query)
    again.close()


def test_two_processes_write_at_once_and_nothing_is_lost_or_doubled(store):
    """Both vote on the same 40 questions as the same rater, and on 40 as one each."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom qirl_fast.arena import store as m\n"
        "m.TOO_FAST_S = 0.0\ns = m.Store(Path(sys.argv[1]))\n"
        "for name in ('both', sys.argv[2]):\n"
        "    s.rater(name)\n"
        "    for i in range(40):\n"
        "        item = m.Item(f'p{i}', 'base', 'rl')\n"
        "        s.show(name, item, 'a')\n"
        "        s.cast(name, item, 'a')\n"
    )
    command = [sys.executable, "-c", code, str(store.path)]
    running = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    assert [p.wait(300) for p in running] == [0, 0]
    found = votes(store)
    assert len(found) == len(set(found)) == 120
    assert [s.place for s in store.shown("both")] == list(range(1, 41))
    assert store.changes() == 0


def test_people_and_judges_never_share_a_name_or_a_count(store):
    store.rater("judge x", "model")
    store.rater("anna")
    with pytest.raises(StoreError, match="is the name of a model"):
        store.rater("judge x")
    store.cast("judge x", ITEM, "a")  # a judge needs no page
    assert store.votes("person") == [] and len(store.votes("model")) == 1


@pytest.mark.parametrize("name", ["", "   ", "x" * 41, "a\0b", "a\x1bb"])
def test_names_that_are_none(store, name):
    with pytest.raises(StoreError, match="wanted 1 to 40"):
        store.rater(name)


def test_a_name_is_tidied(store):
    assert store.rater("  Ann   <b>Lee</b> ") == "Ann <b>Lee</b>"


def test_votes_after_a_look_at_the_results_are_marked(store):
    store.rater("anna")
    for prompt in ("p1", "p2"):
        store.show("anna", Item(prompt, "base", "rl"), "a")
        store.cast("anna", Item(prompt, "base", "rl"), "a")
        store.look("anna")
    assert [v.looked for v in store.votes()] == [False, True]


def test_other_pictures_or_settings_are_another_study(store):
    store.know({("p1", "base"): "11", ("p1", "rl"): "22"})
    store.know({("p1", "base"): "11", ("p2", "base"): "33"})  # more, or fewer, is the same study
    with pytest.raises(StoreError, match=r"1 pictures are not those .* rl's of 'p1'"):
        store.know({("p1", "rl"): "other"})
    store.agree("votes_per_prompt", "1")
    with pytest.raises(StoreError, match="begun with votes_per_prompt=1, not 2"):
        store.agree("votes_per_prompt", "2")


def test_a_damaged_database_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "votes.db"
    path.write_bytes(b"this is no database, " * 500)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="cannot be used as a database of votes"):
        Store(path)
    assert path.read_bytes() == before


def test_a_database_with_a_torn_page_is_refused(tmp_path):
    store = Store(tmp_path / "votes.db")
    store.rater("anna")
    for i in range(200):
        store.show("anna", Item(f"p{i}", "base", "rl"), "a")
    store.close()
    data = bytearray(store.path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = bytes(200)
    store.path.write_bytes(data)
    with pytest.raises(StoreError, match="cannot be used as a database of votes"):
        Store(store.path)


def test_another_programs_database_is_refused(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(StoreError, match="is another program's database"):
        Store(path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file" / "votes.db")
