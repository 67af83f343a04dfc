"""Curation's arithmetic against brute force and known success rates, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qirl_fast.data.prompts import load_prompts
from qirl_fast.evaluation.curation import (
    ALL_FAIL,
    ALL_PASS,
    FAILED,
    KEPT,
    NARROW,
    Rules,
    annotated,
    decide,
    source_rows,
    statistics,
)
from qirl_fast.evaluation.scores import Record, ScoreFile, judged
from qirl_fast.evaluation.strips import Strip, examples, histogram, strips
from qirl_fast.rewards.judge import FAILED as JUDGE_FAILED
from qirl_fast.rewards.judge import MISSING, SCORED
from qirl_fast.rewards.tiers import Tier
from qirl_fast.rewards.verdict import Verdict

ANY = Rules(threshold=0.0, quantile=None)


def scores(*prompts: list[float]) -> np.ndarray:
    """[P, n, 1] of one judge."""
    return np.array(prompts, np.float64)[:, :, None]


def ones(count: int, judges: int = 1) -> np.ndarray:
    return np.full((count, judges), 1 / judges)


def test_ranges_and_verdicts_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    s_PnK = rng.normal(0.5, [0.2, 3.0, 0.01], (40, 8, 3))
    s_PnK[:20, :, 1] = s_PnK[:20, :1, 1]  # the second judge is flat in half of the groups
    w_PK = rng.dirichlet([1, 1, 1], 40)
    rules = Rules(0.9, None, drop_failed=0.3, drop_passed=1.0)
    found = decide(s_PnK, w_PK, rules)
    std = [np.std(s_PnK[:, :, k]) for k in range(3)]
    for p in range(40):
        r = [sum(w_PK[p, k] * s_PnK[p, i, k] for k in range(3)) for i in range(8)]
        composite = [sum(w_PK[p, k] * s_PnK[p, i, k] / std[k] for k in range(3)) for i in range(8)]
        width = max(composite) - min(composite)
        wanted = KEPT if width > 0.9 else NARROW
        wanted = ALL_PASS if min(r) > 1.0 else wanted
        wanted = ALL_FAIL if max(r) < 0.3 else wanted
        assert found.verdicts[p] == wanted
        np.testing.assert_allclose(found.range[p], width, rtol=1e-12)
        np.testing.assert_allclose(found.reward[p], r, rtol=1e-12)
    assert {*found.verdicts} == {KEPT, NARROW, ALL_FAIL, ALL_PASS}


def test_the_band_of_known_success_rates_is_kept() -> None:
    """Success is Bernoulli(p): with threshold 0 a group is kept unless all of n agree, so with
    probability 1 - p^n - (1 - p)^n; the rates 0 and 1 never are.
    """
    n, each = 8, 4000
    rates = (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0)
    rng = np.random.default_rng(1)
    s_PnK = (rng.random((len(rates), each, n)) < np.array(rates)[:, None, None]).astype(float)
    rules = Rules(0.0, None, drop_failed=0.5, drop_passed=0.5)
    found = decide(s_PnK.reshape(-1, n, 1), ones(len(rates) * each), rules)
    verdicts = np.array(found.verdicts).reshape(len(rates), each)
    for p, own in zip(rates, verdicts, strict=True):
        for verdict, share in (
            (KEPT, 1 - p**n - (1 - p) ** n),
            (ALL_FAIL, (1 - p) ** n),
            (ALL_PASS, p**n),
        ):
            noise = 4 * np.sqrt(share * (1 - share) / each)
            assert abs(np.mean(own == verdict) - share) <= noise, (p, verdict)
    assert not (verdicts == NARROW).any()


def test_a_quantile_drops_that_share_of_known_spreads() -> None:
    """Rewards of prompt p spread by p / P: the narrowest are dropped, in their order."""
    rng = np.random.default_rng(2)
    count = 2000
    spread = np.arange(1, count + 1) / count
    base = rng.random((count, 8, 1))
    base = (base - base.min(1, keepdims=True)) / np.ptp(base, axis=1, keepdims=True)  # range 1
    found = decide(base * spread[:, None, None], ones(count), Rules(None, 0.25))
    kept = np.array([v == KEPT for v in found.verdicts])
    assert kept.sum() == 1500 and kept[500:].all()
    assert found.threshold == np.quantile(found.range, 0.25)


def test_each_reward_counts_in_its_own_standard_deviations() -> None:
    rng = np.random.default_rng(3)
    s_PnK = rng.normal(size=(50, 8, 2))
    scaled = s_PnK * [1.0, 1e4]
    before, after = (decide(s, ones(50, 2), Rules(2.0, None)) for s in (s_PnK, scaled))
    np.testing.assert_allclose(before.range, after.range, rtol=1e-9)
    assert before.verdicts == after.verdicts


def test_equal_rewards_have_no_range_whatever_their_value() -> None:
    found = decide(scores([0.1] * 8, [0.7] * 8, [0.1, 0.3] * 4), ones(3), ANY)
    assert found.verdicts == [NARROW, NARROW, KEPT] and found.range[0] == 0 == found.range[1]


def test_a_constant_judge_adds_nothing() -> None:
    s_PnK = np.concatenate([np.full((5, 4, 1), 0.3), np.random.default_rng(0).random((5, 4, 1))], 2)
    found = decide(s_PnK, ones(5, 2), ANY)
    assert found.std[0] == 0 and np.isfinite(found.range).all()
    assert decide(s_PnK[:, :, :1], ones(5), ANY).verdicts == [NARROW] * 5


def test_a_group_without_a_needed_score_has_failed_and_is_not_in_the_quantile() -> None:
    whole = scores([0.0, 0.2], [0.0, 0.4], [0.0, 0.6])
    holed = np.concatenate([scores([np.nan, 9.0]), whole])
    found = decide(holed, ones(4), Rules(None, 0.5, drop_failed=0.3))
    assert found.verdicts == [FAILED, ALL_FAIL, NARROW, KEPT]
    assert np.isnan(found.range[0]) and found.threshold == np.median(found.range[1:])
    unneeded = np.concatenate([holed, np.ones((4, 2, 1))], 2)
    assert decide(unneeded, np.array([[0.0, 1.0]] * 4), ANY).verdicts == [NARROW] * 4
    with pytest.raises(ValueError, match="not one prompt"):
        decide(holed[:1], ones(1), ANY)


def test_statistics_are_plain_json_even_of_a_failed_group() -> None:
    s_PnK = np.concatenate([scores([np.nan, 0.5], [0.25, 0.5]), np.full((2, 2, 1), np.nan)], 2)
    found = decide(s_PnK, np.array([[1.0, 0.0]] * 2), ANY)
    failed, kept = (statistics(found, s_PnK, ("a", "b"), p) for p in (0, 1))
    assert json.loads(json.dumps(failed, allow_nan=False))["range"] is None
    assert failed["judges"]["a"] == {"mean": 0.5, "std": 0.0, "scored": 1}
    assert (kept["reason"], kept["max"], kept["min"], kept["mean"]) == (KEPT, 0.5, 0.25, 0.375)
    assert kept["judges"]["b"] == {"mean": None, "std": None, "scored": 0}


ROWS = (
    '{"prompt": "a \\u00e9 b",  "tag":"x", "big": 12345678901234567890, "f": 1.10}',
    '{"tag": "y", "note": {"a": [1, null, "\u2028"]}, "prompt": "caf\u00e9 {}"} ',
)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_rows_come_back_byte_for_byte_with_one_key_more(tmp_path: Path, ending: str) -> None:
    source = tmp_path / "p.jsonl"
    source.write_bytes(("\ufeff" + ending.join([*ROWS, ""])).encode())
    rows = source_rows(source)
    assert tuple(rows) == ROWS
    out = tmp_path / "kept.jsonl"
    out.write_text("".join(annotated(row, {"range": 1.5}) + "\n" for row in rows), "utf-8")
    for was, line, old, new in zip(
        ROWS, source_rows(out), load_prompts(source), load_prompts(out), strict=True
    ):
        assert line.startswith(was.rstrip()[:-1]), "the row itself is unchanged"
        assert new.metadata["curation"] == {"range": 1.5}
        rest = {key: value for key, value in new.metadata.items() if key != "curation"}
        assert rest == old.metadata and (new.prompt, new.category) == (old.prompt, old.category)


def test_a_row_curated_twice_has_one_verdict(tmp_path: Path) -> None:
    twice = annotated(annotated(ROWS[1], {"range": 1}), {"range": 2})
    assert twice.count('"curation"') == 1
    assert json.loads(twice) == json.loads(ROWS[1]) | {"curation": {"range": 2}}


def test_plain_text_becomes_jsonl(tmp_path: Path) -> None:
    source = tmp_path / "p.txt"
    source.write_text(' a "red" dot \nblau\n', "utf-8")
    assert [json.loads(row) for row in source_rows(source)] == [
        p.metadata for p in load_prompts(source)
    ]


def record(row: int, value: float = 0.1) -> Record:
    return Record(row, f"id{row}", None, "text \u2028", {"a": [value, None]}, {"a": {"1": "late"}})


def test_scores_survive_a_torn_line_and_the_last_record_of_a_row_stands(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    file = ScoreFile(path, ["a"], 2)
    third = float(np.float32(1 / 3))
    for one in (record(1), record(0), record(1, third)):
        file.append(one)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 2, "id"')
    again = ScoreFile(path, ["a"], 2)
    assert path.read_bytes() == whole and sorted(again.records) == [0, 1]
    assert again.records[1] == record(1, third) and again.records[1].failed
    again.finish()
    assert len(path.read_bytes().splitlines()) == 2
    array = ScoreFile(path, ["a"], 2).array()
    assert array[1, 0, 0] == third and np.isnan(array[:, 1]).all()


def test_states_come_back(tmp_path: Path) -> None:
    verdict = Verdict(
        np.zeros((4, 1), np.float32),
        np.array([[SCORED], [SCORED], [MISSING], [JUDGE_FAILED]], np.int8),
        {(3, "a"): "slow"},
    )
    file = ScoreFile(tmp_path / "s.jsonl", ["a"], 2)
    for row, own in enumerate((range(2), range(2, 4))):
        file.append(Record(row, "", None, "", **judged(["a"], verdict, own)))
    assert file.records[1].failures == {"a": {"1": "slow"}}
    np.testing.assert_array_equal(file.status().reshape(-1, 1), verdict.status)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"row": 0}', '{"row": 0, "id": "", "category": null, "prompt": "", "x": 1}']
    + [
        json.dumps({"row": 0, "id": "", "category": None, "prompt": "", "scores": {"a": values}})
        for values in ([0.1], [0.1, 0.2, 0.3], 5)
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    ScoreFile(path, ["a"], 2).append(record(0))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"scores.jsonl:2: no record of 2 samples scored by a"):
        ScoreFile(path, ["a"], 2)


def test_pictures_show_each_verdict(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    s_PnK = np.concatenate(
        [rng.random((30, 12)) * 0.2, rng.random((30, 12)), 0.9 + np.zeros((2, 12))]
    )
    found = decide(s_PnK[:, :, None], ones(62), Rules(None, 0.3, 0.15, 0.85))
    chosen = examples(found)
    assert list(chosen)[:3] == ["kept, widest range", "kept, least range", "dropped: narrow"]
    assert "dropped: all pass" in chosen
    for heading, prompts in chosen.items():
        verdict = heading.removeprefix("dropped: ") if "dropped" in heading else KEPT
        assert prompts and all(found.verdicts[p] == verdict for p in prompts)
    assert not {*chosen["kept, widest range"]} & {*chosen["kept, least range"]}
    images = rng.integers(0, 255, (12, 40, 64, 3), np.uint8)
    groups = {
        heading: [Strip("a text", images, found.reward[p].tolist()) for p in prompts]
        for heading, prompts in chosen.items()
    }
    for path in (strips(groups, tmp_path / "s.png"), histogram(found, tmp_path / "h.png")):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_single_kept_prompt_is_shown_once() -> None:
    found = decide(scores([0.0, 1.0]), ones(1), ANY)
    assert examples(found) == {"kept, widest range": [0]}


def test_curation_sees_scores_as_training_caps_them(tmp_path: Path) -> None:
    """Alignment fails everywhere and caps aesthetics: flat for training, however wide it came."""
    tiers = [
        Tier(judge="alignment", fails_below=0.5, cap={"aesthetics": 0.0}),
        Tier(judge="aesthetics", fails_below=0.0),
    ]
    file = ScoreFile(tmp_path / "scores.jsonl", ["alignment", "aesthetics"], 4)
    own = {"alignment": [0.1] * 4, "aesthetics": [0.1, 0.9, 0.3, 0.5]}
    file.append(Record(0, "a", None, "a", dict(own)))
    weights = np.array([[0.5, 0.5]])
    assert decide(file.array(), weights, ANY).verdicts == [KEPT]
    assert np.array_equal(file.array(tiers)[0, :, 1], np.zeros(4))
    assert decide(file.array(tiers), weights, ANY).verdicts == [NARROW]
