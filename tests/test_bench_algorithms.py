"""`python -m bench algorithms`: what it reads of a run, where it stops, what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import algorithms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four updates of 10 s, the second with 5 s of evaluation, and half a fifth line."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.resolved.yaml").write_text("rewards: {a: 0.75, b: 0.25}\n")
    scores = {"score_a": np.array([0.2, 0.4]), "score_b": np.array([0.7, np.nan])}
    np.savez(tmp_path / "samples" / "before.npz", prompts=np.arange(2), **scores)
    timings, metrics = [], []
    for k in range(4):
        spent = {"rollout": 10.0} | ({"evaluate": 5.0} if k == 1 else {})
        timings.append({"seconds": sum(spent.values()), "phases_s": spent})
        heldout = {"heldout/a": 0.4, "heldout/b": 0.8} if k == 1 else {}
        metrics.append({"reward": 0.3 + k / 10} | heldout)
    for name, found in (("timings", timings), ("metrics", metrics)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(text + '{"seconds": 1')
    return tmp_path


def test_the_clock_leaves_evaluations_out(folder: Path) -> None:
    assert algorithms.clock(folder) == [10.0, 20.0, 30.0, 40.0]
    assert algorithms.clock(folder / "nothing") == []


def test_a_run_is_cut_at_the_seconds(folder: Path) -> None:
    found = algorithms.measured(folder, 30.0)
    assert found["updates"] == 3 and found["seconds"] == [10.0, 20.0, 30.0]
    assert found["reward"] == pytest.approx([0.3, 0.4, 0.5])
    (start, base), (at, last) = found["heldout"]
    assert (start, at) == (0.0, 20.0)
    assert base == pytest.approx(0.75 * 0.3 + 0.25 * 0.7) and last == pytest.approx(0.5)
    assert algorithms.measured(folder, 1.0)["updates"] == 1, "the first is kept, however slow"


def test_table_and_picture(folder: Path, tmp_path: Path) -> None:
    result = {
        "commit": "0" * 40,
        "date": "today",
        "machine": {"cpu": "one"},
        "load": 0.0,
        "seconds": 40.0,
        "side_by_side": 2,
        "runs": {"nft": algorithms.measured(folder, 40.0)},
    }
    text = algorithms.markdown(result)
    assert "| nft | 4 | 10.0 | 0.400 | 0.500 | 20 | 0.600 |" in text
    algorithms.plot(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_run_that_ends_by_itself_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"nft.yaml ended by itself; its output is in .*nft.log"):
        algorithms.train(Path("nft.yaml"), tmp_path / "nft", algorithms.Options())


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="no recipe 'ppo' in configs/algorithms; there are awm, "):
        list(algorithms.recipes(["ppo"]))
    assert [path.stem for path in algorithms.recipes(["nft"])] == ["nft"]
