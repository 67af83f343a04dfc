"""`python -m qirl_fast.tiny build`: a whole model folder from a seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qirl_fast.models import load_model
from qirl_fast.tiny import edits, scenes


def build(output: Path, *flags: str, command: str = "build") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qirl_fast.tiny", command, "--quick", "--output", output, *flags],
        capture_output=True,
        text=True,
        cwd=output,
        env=os.environ,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


pytestmark = pytest.mark.slow  # the model is built once for all, in half a minute


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built")
    said = build(output)
    assert "autoencoder" in said and "MB" in said and "minutes on 1 threads" in said
    return output


def layout(model: Path) -> dict[str, Any]:
    """Every file of a model folder; what the configs hold, but for measured numbers."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        name = path.relative_to(model).as_posix()
        found[name] = None
        if name.endswith("config.json"):
            config = json.loads(path.read_text())
            found[name] = {
                k: v for k, v in config.items() if k not in ("latents_mean", "latents_std")
            }
    return found


def test_it_is_the_packaged_folder_but_for_the_numbers(built: Path, weights: Path) -> None:
    assert layout(built / "weights") == layout(weights)
    files = scenes.split_rows()
    for name, pairs in edits.split_edits().items():
        files[f"edit-{name}"] = [row for row, _ in pairs]
    for name, rows in files.items():
        lines = (built / "prompts" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
        assert all((built / "prompts" / row["image"]).is_file() for row in rows if "image" in row)


def test_it_loads_here_and_in_the_stock_pipeline(built: Path) -> None:
    from diffusers import QwenImage21Pipeline

    from qirl_fast.processor import QwenVLProcessor

    model = load_model(built / "weights", "auto", torch.float32, "cpu")
    processor = QwenVLProcessor.from_pretrained(built / "weights" / "processor")
    stock = QwenImage21Pipeline.from_pretrained(built / "weights", processor=processor)
    stock.set_progress_bar_config(disable=True)
    ours, theirs = model.transformer.state_dict(), stock.transformer.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["proj_out.weight"].any(), "pre-training has moved the output off zero"
    std = torch.tensor(model.vae.config.latents_std)
    assert (std > 0).all() and not torch.equal(std, torch.ones_like(std)), "measured on scenes"
    picture = stock("a photo of a red circle", height=64, width=64, num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


def test_it_can_be_trained(
    built: Path, small: tuple[str, ...], start: Callable[..., Any], tmp_path: Path
) -> None:
    run = start([*small, "train.steps=1", f"model.path={built}/weights", f"output={tmp_path}"])
    assert run.wait() == 0, run.output()


def test_the_editing_stage_continues_from_a_folder(built: Path, tmp_path: Path) -> None:
    """The autoencoder stays; text encoder and transformer move; the files are those of build."""
    said = build(tmp_path, "--base", str(built / "weights"), command="edits")
    assert f"from {built / 'weights'}" in said and "minutes on 1 threads" in said
    assert layout(tmp_path / "weights") == layout(built / "weights")
    assert not any(str(built) in file.read_text() for file in tmp_path.rglob("*config.json"))
    for name, stays in (
        ("vae/diffusion_pytorch_model.safetensors", True),
        ("transformer/diffusion_pytorch_model.safetensors", False),
        ("text_encoder/model.safetensors", False),
    ):
        old, new = ((path / "weights" / name).read_bytes() for path in (built, tmp_path))
        assert (old == new) == stays, name


def test_a_seed_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for output, flags in ((again, ()), (other, ("--seed", "1"))):
        output.mkdir()
        build(output, *flags)
    for name in ("transformer", "vae"):
        file = Path("weights", name, "diffusion_pytorch_model.safetensors")
        assert (built / file).read_bytes() == (again / file).read_bytes()
        assert (built / file).read_bytes() != (other / file).read_bytes()
