"""python -m bench scaling: the sum, the link between two processes, a run by one and two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import scaling

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def test_the_parts_of_an_update_by_hand() -> None:
    machine = scaling.Machine(chunk_s=2.0, rest_s=0.5, latency_s=0.01, bytes_per_s=1e6)
    alone = scaling.predicted(machine, chunks=5, trained=1000, processes=1)
    assert alone == {"chunks": 10.0, "rest": 0.5, "gathers": 0.0, "gradient": 0.0}
    four = scaling.predicted(machine, chunks=5, trained=1000, processes=4)
    assert four["chunks"] == 4.0  # the fullest has two chunks of five
    assert four["gathers"] == pytest.approx(scaling.GATHERS * 3 * 0.01)
    assert four["gradient"] == pytest.approx(2 * 3 / 4 * 4000 / 1e6)


def test_the_page_shows_the_plan() -> None:
    shown = PAGE.read_text(encoding="utf-8")
    for row in scaling.plan():
        start = f"| {row['gpus']} | {row['sent_bytes'] / 1e9:.1f} GB |"
        assert start in shown
        line = shown[shown.index(start) :].splitlines()[0]
        assert f"{row['update_s']:.1f} s" in line and f"{row['efficiency']:.1%}" in line.replace(
            " %", "%"
        )


def test_two_processes_measure_what_lies_between_them() -> None:
    link = json.loads(scaling.together(2, [sys.executable, "-c", scaling.LINK]))
    assert 0 < link["latency_s"] < 1 and link["bytes_per_s"] > 0


def test_a_process_that_fails_stops_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        scaling.together(2, [sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
def test_one_and_two_processes_are_run_and_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "UPDATES", 4)
    monkeypatch.setattr(scaling, "CHUNKS", 2)
    out = tmp_path / "scaling.json"
    result = scaling.run(out, say=lambda text: None)
    one, two = result["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for row in (one, two):
        assert row["predicted_s"] == pytest.approx(sum(row["parts_s"].values()))
        assert row["measured_s"] >= row["phases_s"]["rollout"] > 0
    assert one["parts_s"]["gradient"] == 0 < two["parts_s"]["gradient"]
    assert json.loads(out.read_text()) == result
    assert "| 2 |" in out.with_suffix(".md").read_text()
