"""What a run exports acts in the stock pipeline as it does here.

`QIRL_TRAINED_RUN` may name the folder of a finished run of the packaged recipe; without it the
slow test trains one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qirl_fast.checkpoint import load_checkpoint, unpack
from qirl_fast.config import Config, load_config
from qirl_fast.data.prompts import load_prompts
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rewards import alignment
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, initial_noise, row_seeds, sample
from qirl_fast.tiny import packaged

LORA = Path("checkpoints", "latest", "pytorch_lora_weights.safetensors")


def new_stock_pipeline(weights: Path) -> Any:
    from diffusers import QwenImage21Pipeline

    from qirl_fast.processor import QwenVLProcessor

    processor = QwenVLProcessor.from_pretrained(weights / "processor")
    pipeline = QwenImage21Pipeline.from_pretrained(weights, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(pipeline: Any, prompt: str, latents: torch.Tensor, scale: float, **how: Any) -> Any:
    """The stock pipeline from given initial latents [B, N, Z]."""
    return pipeline(
        prompt=prompt,
        negative_prompt=" " if scale > 1 else None,
        true_cfg_scale=scale,
        num_images_per_prompt=len(latents),
        latents=latents.clone(),
        **how,
    ).images


def trained_model(run: Path, weights: Path) -> QwenImage21:
    """Our model with the weights in the run's training state, not in its export."""
    cfg = load_config([str(run / "config.resolved.yaml")])
    model = QwenImage21.load(weights, torch.float32)
    lora = cfg.model.lora
    parameters = model.trainable("lora", lora.rank, lora.alpha, lora.targets, cfg.seed)
    found = load_checkpoint(run / "checkpoints" / "latest")
    saved = unpack(found.tensors, found.state["tree"])["learner"]["weights"]
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    return model


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_stock_pipeline_draws_the_same(
    finished: Callable[..., Path], weights: Path, prompts, scale: float
) -> None:
    """Float32, same initial latents; tolerance as for the untrained model (test_qwenimage21.py).

    The adapter is applied as x A B either way, so it adds two short sums to each layer.
    """
    run = finished("plain")
    model = trained_model(run, weights)
    text, null = model.encode(prompts[:1]), model.encode([""])[0]
    how = Sampling(64, 64, 5, Guidance(scale))
    config = model.pipeline.scheduler.config
    (ours,) = sample(model, text, null, how, config, group_size=2, seed=0, update=0)
    start = initial_noise(row_seeds(0, 0, range(2), stream=0), (16, 16), torch.device("cpu"))
    pipeline = new_stock_pipeline(weights)
    settings = {"num_inference_steps": 5, "height": 64, "width": 64, "output_type": "latent"}
    untrained = draw(pipeline, prompts[0], start, scale, **settings)
    pipeline.load_lora_weights(run / LORA)
    stock = draw(pipeline, prompts[0], start, scale, **settings)
    largest = stock.abs().max()
    assert (ours.latents - stock).abs().max() < 3e-5 * largest
    assert (untrained - stock).abs().max() > 1e-3 * largest, "the adapter does something"


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the packaged recipe."""
    if os.environ.get("QIRL_TRAINED_RUN"):
        return Path(os.environ["QIRL_TRAINED_RUN"])
    output = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "qirl_fast.train", f"output={output}", "run=r"]
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    subprocess.run(command, check=True, env=env, cwd=output)
    return output / "r"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_by_the_recipe_raises_alignment(trained_run: Path) -> None:
    """The README's table has +0.25 and more for three seeds, the second judge level.

    Another processor rounds otherwise and so takes another course, hence the distance to that.
    """
    cfg = load_config([str(trained_run / "config.resolved.yaml")])
    packaged_recipe = load_config([])
    assert cfg.train.steps == packaged_recipe.train.steps and cfg.model.path == "tiny"
    summary = json.loads((trained_run / "summary.json").read_text())
    aligned = summary["judges"]["alignment"]
    assert aligned["n"] >= 96
    assert aligned["diff"] > 0.2 and aligned["low"] > 0.1
    assert summary["judges"]["aesthetics"]["diff"] > -0.02
    assert summary["pre_update_clip_fraction"] == summary["pre_update_ratio_error"] == 0


def stock_alignment(pipeline: Any, cfg: Config) -> float:
    """Mean alignment on the held-out prompts, from the initial latents of our own evaluation."""
    e = cfg.evaluation
    rows = load_prompts(packaged(cfg.data.heldout))[: e.prompts]
    seeds = row_seeds(e.seed, 0, range(len(rows) * e.samples_per_prompt), stream=0)
    tokens = cfg.rollout.height // 16 * (cfg.rollout.width // 16)
    start = initial_noise(seeds, (tokens, 16), torch.device("cpu"))
    scores = []
    for row, latents in zip(rows, start.split(e.samples_per_prompt), strict=True):
        pictures = draw(
            pipeline,
            row.prompt,
            latents,
            e.guidance,
            height=cfg.rollout.height,
            width=cfg.rollout.width,
            num_inference_steps=e.steps,
        )
        rgba = np.stack([np.asarray(p.convert("RGBA")) for p in pictures]).astype(np.float64)
        alpha = rgba[..., 3:] / 255
        on_white = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        scores += alignment.score(on_white, [row.metadata] * len(pictures)).tolist()
    return float(np.mean(scores))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_improvement_is_there_in_the_stock_pipeline(trained_run: Path, weights: Path) -> None:
    """Means within 0.05 of ours: same latents, so only 8-bit rounding and its judging differ."""
    cfg = load_config([str(trained_run / "config.resolved.yaml")])
    ours = json.loads((trained_run / "summary.json").read_text())["judges"]["alignment"]
    pipeline = new_stock_pipeline(weights)
    before = stock_alignment(pipeline, cfg)
    pipeline.load_lora_weights(trained_run / LORA)
    after = stock_alignment(pipeline, cfg)
    assert abs(before - ours["before"]) < 0.05 and abs(after - ours["after"]) < 0.05
    assert after - before > ours["diff"] / 2 > 0
