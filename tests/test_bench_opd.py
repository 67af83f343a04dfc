"""python -m bench opd: the plain step and this package's compute the same loss."""

from __future__ import annotations

import json

import pytest

from bench import models, opd, step


@pytest.mark.parametrize("model", list(models.MODELS))
def test_all_rows_have_the_same_loss(model: str, tmp_path, monkeypatch) -> None:
    """Four guided steps in float32: to 1e-5, the blocks' agreement with stock."""
    small = {"cpu": models.Scale(2, 1)}
    monkeypatch.setattr(step, "MODELS", dict.fromkeys(models.MODELS, small))
    out = tmp_path / "opd.json"
    options = step.Options(model=model, px=64, steps=4, group=3, text_tokens=12, out=out)
    result = opd.run(options, say=lambda text: None)
    plain, *ours = result["rows"]
    assert plain["loss"] > 1e-6
    for row in ours:
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for row in result["rows"]:
        assert set(row["phases_s"]) == set(opd.PHASES)
        assert all(seconds > 0 for seconds in row["phases_s"].values())
    assert json.loads(out.read_text()) == result
    assert "| all states at once |" in out.with_suffix(".md").read_text()
