"""`python -m bench fp8` on the tiny model and small layers: every row, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import fp8


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("bench") / "fp8.json"
    options = fp8.Options(rounds=1, seconds=0.1, out=out)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fp8, "MODELS", {})
        patched.setattr(fp8, "SHAPES", {"small": (128, 256)})
        return fp8.run(options, say=lambda text: None), out


def test_errors_are_those_of_fp8_and_its_replay_is_exact(result) -> None:
    rows = result[0]["errors"]
    assert {row["model"] for row in rows} == {"tiny"}
    assert {(r["recipe"], r["layers"]) for r in rows} >= {
        (recipe, chosen)
        for recipe in ("row", "tensor")
        for chosen in ("every linear layer", "the family's", "attention alone")
    }
    for row in rows:
        assert row["replay"] == 0
        assert 1e-4 < row["velocity"] < 0.2 and 1e-6 < row["logp_mean"] < 0.1
        assert len(row["velocity_by_step"]) == 5 and len(row["drift_by_step"]) == 6
        assert row["drift_by_step"][0] == 0
    share = {row["layers"]: row["share"] for row in rows if row["recipe"] == "row"}
    assert share["every linear layer"] == 1 > share["the family's"] > share["attention alone"]


def test_linear_layers_are_compared_with_the_plain_one(result) -> None:
    rows = result[0]["linear"]
    assert [row["kind"] for row in rows][:3] == ["high", "row", "row, x given in fp8"]
    assert all(row["ms_p50"] > 0 for row in rows) and rows[0]["speedup_vs_high"] == 1


def test_the_file_the_table_and_the_plot(result, tmp_path: Path) -> None:
    found, out = result
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    table = fp8.markdown(found)
    assert table.count("| tiny |") == len(found["errors"])
    fp8.plot(found, tmp_path / "fp8.png")
    assert (tmp_path / "fp8.png").stat().st_size > 10_000
