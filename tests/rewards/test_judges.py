"""Judges by name on one batch, and the three states of a reward: scored, failed, missing."""

import logging
import sys
import threading
import types

import numpy as np
import pytest
import torch

from qirl_fast.rewards import alignment, judges
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Scored
from qirl_fast.rewards.judges import Judges, resolve
from qirl_fast.rewards.kinds import PythonSettings
from qirl_fast.rewards.verdict import BadReward, Verdict, covered
from qirl_fast.tiny import scenes

IMAGES = np.zeros((3, 64, 64, 3), np.uint8)
ROWS = [{"include": [{"class": "circle", "count": 1}]}] * 3


@pytest.fixture
def some(monkeypatch):
    """A module of judges, by dotted path "some_judges:name"; a fresh log memory."""
    module = types.ModuleType("some_judges")
    module.half = lambda images, rows: np.full(len(images), 0.5, np.float32)
    module.nan = lambda images, rows: np.array([0.1, np.nan, np.inf])
    module.masked = lambda images, rows: np.ma.masked_invalid([0.1, np.nan, 0.3])
    module.short = lambda images, rows: np.zeros(2)
    module.words = lambda images, rows: ["good"] * 3
    module.grad = lambda images, rows: torch.zeros(3, requires_grad=True)
    module.number = 3

    def broken(images, rows):
        raise RuntimeError("the server is away")

    module.broken = broken
    monkeypatch.setitem(sys.modules, "some_judges", module)
    monkeypatch.setattr(judges, "_logged", set())
    return module


def score(names, images=IMAGES, rows=ROWS, **how):
    found = Judges(names, **how)
    try:
        return found.score(images, rows)
    finally:
        found.close()


def test_scores_of_named_judges_stand_in_their_columns(some):
    rng = np.random.default_rng(0)
    rows = [row for row in scenes.all_rows() if row["tag"] == "colors"][:6]
    images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in rows])
    found = score(["some_judges:half", "alignment", "aesthetics"], images, rows)
    assert found.scores.dtype == np.float32 and found.status.dtype == np.int8
    assert found.valid.all() and not found.reasons
    assert (found.scores[:, 0] == 0.5).all()
    assert np.array_equal(found.scores[:, 1], alignment.score(images, rows))
    assert (found.scores[:, 2] > 0.9).all()


def test_a_judge_that_raises_has_failed_and_the_others_stand(some, caplog):
    names = ["some_judges:broken", "some_judges:half"]
    with caplog.at_level(logging.ERROR, logger=judges.__name__):
        for _ in range(2):
            found = score(names)
    assert found.status.tolist() == [[FAILED, SCORED]] * 3
    assert found.reasons[0, "some_judges:broken"] == "RuntimeError('the server is away')"
    assert np.isfinite(found.scores).all()
    (record,) = caplog.records
    assert "some_judges:broken" in record.getMessage()
    assert "the server is away" in caplog.text


def test_another_failure_of_the_same_judge_is_logged_too(some, caplog):
    with caplog.at_level(logging.ERROR, logger=judges.__name__):
        score(["some_judges:broken"])
        score(["alignment"], IMAGES, [{"include": []}] * 3)
    assert len(caplog.records) == 2 and "include" in caplog.text


def test_failed_rows_are_asked_again_one_by_one(some):
    calls = []

    def flaky(images, rows):
        calls.append([row["n"] for row in rows])
        if len(calls) == 1 or rows[0]["n"] == 2:
            raise RuntimeError(f"call {len(calls)}")
        return np.array([row["n"] / 10 for row in rows])

    some.flaky = flaky
    rows = [{"n": n} for n in range(3)]
    found = score(["some_judges:flaky"], IMAGES, rows, reask=2)
    assert calls == [[0, 1, 2], [0], [1], [2], [2]]
    assert found.status[:, 0].tolist() == [SCORED, SCORED, FAILED]
    np.testing.assert_allclose(found.scores[:, 0], [0.0, 0.1, 0.0], rtol=1e-6)
    assert found.reasons == {(2, "some_judges:flaky"): "RuntimeError('call 5')"}


def test_a_judge_that_waits_is_not_asked_again(some):
    """It has tried until its deadline; asked row by row it would wait for as many deadlines."""

    class Away:
        waits, calls = True, 0

        def __call__(self, images, rows):
            self.calls += 1
            failed = np.full(len(rows), FAILED)
            return Scored(np.zeros(len(rows)), failed, dict.fromkeys(range(len(rows)), "away"))

    some.away = Away()
    found = score(["some_judges:away"], reask=3)
    assert some.away.calls == 1 and (found.status == FAILED).all()


def test_a_judge_may_say_which_rows_failed(some):
    some.partly = lambda images, rows: Scored(
        np.array([0.2, np.nan, 7.0]), np.array([SCORED, FAILED, MISSING]), {1: "no face"}
    )
    found = score(["some_judges:partly"])
    assert found.status[:, 0].tolist() == [SCORED, FAILED, MISSING]
    assert found.reasons == {(1, "some_judges:partly"): "no face"}
    np.testing.assert_allclose(found.scores[:, 0], [0.2, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("status", [[0, 1], [0, 0, 3], [[0], [0], [0]]])
def test_states_that_are_none_are_an_error(some, status):
    some.odd = lambda images, rows: Scored(np.zeros(3), np.array(status))
    with pytest.raises(BadReward, match="the states are"):
        score(["some_judges:odd"])


def test_a_non_finite_score_names_judge_and_row(some):
    with pytest.raises(BadReward, match=r"'some_judges:nan', row 1: scored nan") as error:
        score(["some_judges:half", "some_judges:nan"])
    assert (error.value.judge, error.value.row) == ("some_judges:nan", 1)
    assert np.array_equal(error.value.scores, np.float32([0.1, np.nan, np.inf]), equal_nan=True)


def test_masked_rows_are_missing_and_hold_no_nan(some):
    found = score(["some_judges:masked"], reask=3)
    assert found.status[:, 0].tolist() == [SCORED, MISSING, SCORED]
    assert found.scores[:, 0].tolist() == pytest.approx([0.1, 0.0, 0.3])


def test_a_result_that_is_not_one_score_a_row_is_an_error(some):
    with pytest.raises(BadReward, match=r"some_judges:short.*\(2,\).*\(3,\)"):
        score(["some_judges:short"])
    with pytest.raises(BadReward, match=r"'some_judges:words', row 0: the result is of <U4"):
        score(["some_judges:words"])
    with pytest.raises(BadReward, match=r"a Tensor is no numpy array of \(3,\): Can't call numpy"):
        score(["some_judges:grad"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alignmnt", "did you mean 'alignment'"),
        ("beauty", "aesthetics"),
        ("no_such_module:score", "cannot import 'no_such_module'"),
        ("faulty_judge:score", "cannot import 'faulty_judge' .SyntaxError"),
        ("some_judges:absent", "no function 'absent'"),
        ("some_judges:number", "no function 'number'"),
    ],
)
def test_unknown_judges_are_named(some, name, words, tmp_path, monkeypatch):
    (tmp_path / "faulty_judge.py").write_text("def score(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=words):
        Judges([name])


def test_a_dotted_path_finds_a_real_function():
    assert resolve("qirl_fast.rewards.alignment:score") is judges.JUDGES["alignment"].score


def test_a_judge_of_the_recipe_is_built_from_its_settings(some):
    some.scaled = lambda by: lambda images, rows: np.full(len(images), by)
    specs = {"mine": PythonSettings(kind="python", path="some_judges:scaled", arguments={"by": 2})}
    assert score(["mine"], specs=specs).scores.tolist() == [[2.0]] * 3
    specs["mine"] = PythonSettings(kind="python", path="some_judges:number")
    with pytest.raises(ValueError, match=r"'some_judges:number'.*not callable"):
        Judges(["mine"], specs)


def test_a_judge_that_only_waits_does_not_hold_up_the_others(some):
    gate = threading.Event()

    class Waiting:
        waits = True

        def __call__(self, images, rows):
            assert gate.wait(20), "the other judge never ran"
            return np.zeros(len(images))

    def opens(images, rows):
        gate.set()
        return np.ones(len(images))

    some.waiting, some.opens = Waiting(), opens
    found = score(["some_judges:waiting", "some_judges:opens"])
    assert found.scores.tolist() == [[0.0, 1.0]] * 3 and found.valid.all()


def test_chunks_are_judged_in_the_order_they_came(some):
    seen = []
    some.notes = lambda images, rows: seen.append(rows[0]["n"]) or np.zeros(1)
    found = Judges(["some_judges:notes", "alignment"])
    pending = [found.submit(IMAGES[:1], [ROWS[0] | {"n": n}]) for n in range(8)]
    for one in reversed(pending):
        one.result()
    found.close()
    assert seen == list(range(8))


def test_what_is_given_up_is_not_begun_and_what_runs_has_ended(some):
    began, gate, ended = threading.Event(), threading.Event(), []

    def slow(images, rows):
        began.set()
        assert gate.wait(20)
        ended.append(rows[0]["n"])
        return np.zeros(len(images))

    some.slow = slow
    found = Judges(["some_judges:slow"])
    for n in range(4):
        found.submit(IMAGES[:1], [{"n": n}])
    began.wait(20)
    threading.Timer(0.1, gate.set).start()
    found.abandon()
    assert ended == [0]
    assert found.score(IMAGES[:1], [{"n": 9}]).valid.all(), "it still works"
    found.close()
    assert ended == [0, 9]


def test_closing_ends_what_waits_for_a_server(some):
    class Waiting:
        waits = True

        def __init__(self):
            self.gate = threading.Event()

        def __call__(self, images, rows):
            self.gate.wait(60)
            raise RuntimeError("closed")

        def close(self):
            self.gate.set()

    some.waiting = Waiting()
    found = Judges(["some_judges:waiting", "alignment"])
    pending = [found.submit(IMAGES, ROWS) for _ in range(3)]
    found.close()
    assert all(one.futures[0].done() for one in pending)


def test_reasons_of_single_failures_are_logged_once(some, caplog):
    reasons = {0: "no face", 2: "no face"}
    some.partly = lambda images, rows: Scored(
        np.zeros(3), np.int8([FAILED, SCORED, FAILED]), reasons
    )
    with caplog.at_level(logging.ERROR, logger=judges.__name__):
        score(["some_judges:partly"])
    assert [record.getMessage() for record in caplog.records] == [
        "judge 'some_judges:partly' failed on an image: no face"
    ]


def test_covered_counts_a_second_once():
    spans = [(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.5)]
    assert covered(spans) == pytest.approx(4.0)
    assert covered(spans, [(2.5, 5.25), (5.1, 9.0)]) == pytest.approx(0.5 + 1.0)
    assert covered([]) == covered(spans, []) == 0.0


def test_verdicts_of_chunks_are_one(some):
    some.first = lambda images, rows: Scored(
        np.ones(len(images)), np.int8([FAILED] + [SCORED] * (len(images) - 1)), {0: "first"}
    )
    parts = [score(["some_judges:first"], IMAGES[:n], ROWS[:n]) for n in (2, 3)]
    whole = Verdict.of(parts)
    assert whole.status[:, 0].tolist() == [FAILED, SCORED, FAILED, SCORED, SCORED]
    assert sorted(row for row, _ in whole.reasons) == [0, 2]


def test_warnings_and_rows_a_judge_can_never_score_are_gathered(some):
    class Picky:
        warnings = ("agreement is 0.2",)

        def check_row(self, row):
            if "text" not in row:
                raise ValueError("no text")

        def __call__(self, images, rows):
            return np.zeros(len(images))

    some.picky = Picky()
    found = Judges(["some_judges:picky", "alignment"])
    assert found.warnings() == ["judge 'some_judges:picky': agreement is 0.2"]
    assert [name for name, _ in found.check_row({"text": "x"}, {"alignment": 1})] == ["alignment"]
    assert not list(found.check_row({"text": "x"}, {})), "it has nothing to judge there"
    assert [name for name, _ in found.useless([{"text": "x"}] * 2)] == ["alignment"]
    assert not list(found.useless([ROWS[0] | {"text": "x"}, {}]))
    assert dict(found.check_row(ROWS[0], {})) == {"some_judges:picky": "no text"}
    Picky.masks = True  # then a row it cannot score matters where it weighs something
    assert dict(found.check_row(ROWS[0], {"alignment": 1.0})) == {}
    weighs = {"some_judges:picky": 0.1}
    assert dict(found.check_row(ROWS[0], weighs)) == {"some_judges:picky": "no text"}


def test_the_state_of_a_judge_is_copied_out_and_back(some):
    class Running:
        def __init__(self):
            self.means = [0.0]

        def __call__(self, images, rows):
            self.means.append(float(images.mean()))
            return np.full(len(images), len(self.means) / 10)

        def state_dict(self):
            return {"means": self.means}

        def load_state_dict(self, state):
            self.means = state["means"]

    some.running = Running()
    found = Judges(["some_judges:half", "some_judges:running"])
    held = found.state_dict()
    assert held == {"some_judges:running": {"means": [0.0]}}
    first = found.score(IMAGES, ROWS).scores
    for _ in range(2):
        found.load_state_dict(held)
        np.testing.assert_array_equal(found.score(IMAGES, ROWS).scores, first)
    with pytest.raises(ValueError, match=r"'some_judges:running' had a state"):
        Judges(["some_judges:half"]).load_state_dict(held)


def test_the_queue_before_a_slow_judge_and_how_long_each_worked(some):
    """Three chunks are handed over while the first is held; the fourth finds nothing waiting."""
    may_go, started = threading.Event(), threading.Event()

    def slow(images, rows):
        started.set()
        assert may_go.wait(20)
        return np.zeros(len(images), np.float32)

    some.slow = slow
    found = Judges(["some_judges:slow", "some_judges:half"])
    pending = [found.submit(IMAGES, ROWS) for _ in range(3)]
    assert started.wait(20) and found.queue == [0, 1, 2]
    may_go.set()
    for one in pending:
        one.result()
    found.score(IMAGES, ROWS)
    assert found.queue == [0, 1, 2, 0]
    assert set(found.seconds) == {"some_judges:slow", "some_judges:half"}
    assert sum(found.seconds.values()) == pytest.approx(covered(found.busy))
    found.begin()
    assert not found.queue and not found.seconds and not found.busy
    found.close()
