"""The doctor: what it says of this machine, of a broken package, of a recipe that cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qirl_fast import doctor, ops


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`said(*args)` is the exit status and what was printed, without line breaks in cells."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*args: str) -> tuple[int, str]:
        status = doctor.main(list(args))
        out, err = capsys.readouterr()
        return status, out + err

    return run


def row(text: str, what: str) -> str:
    (line,) = [line for line in text.splitlines() if line[6:].startswith(f"{what} ")]
    return line


def test_this_machine_is_ready(said):
    status, text = said()
    assert status == 0 and text.endswith("ready\n")
    assert row(text, "torch").split()[2] == torch.__version__
    assert "agree with the reference" in row(text, "ops on cpu")
    assert "qirl_fast" in text and "cores" in row(text, "machine")


def test_a_recipe_is_looked_at_as_a_whole(said, tmp_path: Path):
    status, text = said(f"output={tmp_path}/runs")
    assert status == 0 and list(tmp_path.iterdir()) == []
    assert "GiB planned of" in row(text, "memory") and "GiB free" in row(text, "disk")
    status, text = said("model.path=nowhere")
    assert status == 2 and "nowhere" in text and "the recipe is wrong\n" in text
    status, text = said("train.stepz=3")
    assert status == 2 and "train.stepz" in text


def test_what_does_not_fit_is_to_be_mended(said, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(doctor, "plan", lambda cfg: {"adapter": 1 << 50})
    status, text = said(f"output={tmp_path}")
    assert status == 1 and text.endswith("2 to mend\n")
    assert row(text, "memory").startswith("mend") and row(text, "disk").startswith("mend")
    assert "tracking.keep_checkpoints" in row(text, "disk")
    file = tmp_path / "file"
    file.write_text("no folder")
    status, text = said(f"output={file}")
    assert "output=PATH" in row(text, "output")


def test_a_package_that_is_half_there_and_an_op_that_is_wrong(said, monkeypatch, tmp_path: Path):
    (tmp_path / "wandb.py").write_text("raise OSError('libcudart.so is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    own = ops.flow_logp
    monkeypatch.setattr(ops, "flow_logp", lambda *a, **k: own(*a, **k) + 1)
    status, text = said()
    assert status == 1 and text.endswith("2 to mend\n")
    assert "libcudart.so is not there" in row(text, "wandb")
    assert "qirl-fast[wandb]" in row(text, "wandb")
    assert row(text, "ops on cpu").startswith("mend")
