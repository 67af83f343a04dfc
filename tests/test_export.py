"""A checkpoint as a model folder: what is drawn from it is what the trained policy draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from safetensors.torch import load_file

from qirl_fast import export
from qirl_fast.checkpoint import load_checkpoint, unpack
from qirl_fast.config import load_config
from qirl_fast.trainer import Trainer

# Learning rates at which two updates are seen in the images.
LORA = ("train.lr=0.05", "train.ema={decay: 0.5, every: 1}")
FULL = ("train.lr=0.005", "model.adapter=full")


def drawn(settings: tuple[str, ...], checkpoint: Path | None = None) -> list[np.ndarray]:
    """Held-out images under these settings, of a checkpoint's weights or of the model's own."""
    trainer = Trainer(load_config(list(settings)))
    try:
        if checkpoint is None:
            return trainer.evaluate_weights().images
        found = load_checkpoint(checkpoint)
        trainer.load_state(unpack(found.tensors, found.state["tree"]))
        return trainer.evaluate().images
    finally:
        trainer.close()


def furthest(a: list[np.ndarray], b: list[np.ndarray]) -> int:
    return max(int(abs(x.astype(int) - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("own", [LORA, FULL], ids=["lora", "full"])
def test_the_folder_draws_as_the_trained_policy(
    finished: Any, small: tuple[str, ...], weights: Path, tmp_path: Path, capsys: Any, own
) -> None:
    run = finished(f"exported-{len(own[1])}", *own)
    target = tmp_path / "mine"
    assert export.main([str(run), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert {p.name for p in target.iterdir()} == {p.name for p in weights.iterdir()}
    here = (*small, *own, f"output={tmp_path}")
    trained = drawn(here, run / "checkpoints" / "latest")
    exported = drawn((*here, f"model.path={target}"))
    assert furthest(trained, exported) <= 1  # a merged LoRA sums in another order
    assert furthest(trained, drawn(here)) > 20
    moved = tmp_path / "moved"
    shutil.copytree(weights, moved)
    again = [str(run / "checkpoints" / "latest"), str(tmp_path / "again"), "--model", str(moved)]
    assert export.main(again) == 0
    files = [tmp_path / name / "transformer" for name in ("mine", "again")]
    states = [QwenImage21Transformer2DModel.from_pretrained(f).state_dict() for f in files]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    finished: Any, weights: Path, tmp_path: Path, capsys: Any
) -> None:
    run = finished(f"exported-{len(LORA[1])}", *LORA)

    def said(*args: str) -> str:
        assert export.main([str(a) for a in args]) == 2
        return capsys.readouterr().err

    assert "is there already" in said(run, weights)
    target = tmp_path / "new"
    assert "manifest.json is missing" in said(tmp_path, target)
    assert "nowhere" in said(run, target, "--model", "nowhere")
    other = Path(shutil.copytree(run / "checkpoints" / "checkpoint-2", tmp_path / "other"))
    file = other / "pytorch_lora_weights.safetensors"
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-4])
    assert "is damaged" in said(other, target)
    assert export.main(["only-one"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
