"""The planned memory against what a run holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.timing import peak_bytes
from qirl_fast.algorithms import Policy, make_algorithm
from qirl_fast.config import derived, load_config
from qirl_fast.memory import describe_plan, plan
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.rollout.workers import Workers

ONE_CHUNK = (
    "threads=1",
    "data.prompts_per_step=2",
    "rollout.group_size=8",
    "rollout.max_rows=16",
    "rollout.window={start: 0, size: 2}",
)


def replayed(weights: Path, *settings: str):
    """A function that runs the replay of one chunk of the longest prompt and keeps its graph."""
    cfg = load_config([*ONE_CHUNK, *settings])
    model = QwenImage21.load(weights, torch.float32)
    lora = cfg.model.lora
    trainable = model.trainable("lora", lora.rank, lora.alpha, lora.targets, 0)
    prompts = ["a photo of a yellow triangle right of a purple square"] * 2
    r = cfg.rollout
    how = Sampling(
        height=r.height,
        width=r.width,
        steps=r.steps,
        guidance=Guidance(r.guidance, False, r.ratio_mode),
        dynamics=r.dynamics,
        eta=r.eta,
        max_rows=derived(cfg).chunk_rows,
    )
    (chunk,) = sample(
        model,
        model.encode(prompts),
        model.encode([""])[0],
        how,
        dict(model.pipeline.scheduler.config),
        group_size=r.group_size,
        seed=0,
        update=1,
        recorded=(0, 1),
    )
    algorithm = make_algorithm(cfg.algorithm, Policy(model, trainable, how, Workers(1)))
    (prepared,) = algorithm.prepare([chunk], ["t2i"] * 16)
    advantage = torch.randn(16)
    return lambda: [s.loss for s in algorithm.loss(chunk, advantage, prepared)]


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
def test_activations_are_those_that_autograd_saves(weights: Path, mode: str) -> None:
    """To a fifth: the loss's own tensors and the allocator's losses are not planned."""
    setting = f"rollout.ratio_mode={mode}"
    planned = plan(load_config([*ONE_CHUNK, setting]))
    activations = planned["activations of replay"]
    prefix = planned["keys and values of the prompts"]
    kept = []
    run = replayed(weights, setting)
    peak = peak_bytes(lambda: kept.extend(run()), "cpu")
    assert 0.8 * (activations + prefix) <= peak <= 1.2 * (activations + prefix)


def test_it_follows_the_recipe(weights: Path) -> None:
    base = plan(load_config(list(ONE_CHUNK)))
    rows = {"rollout.group_size=16", "rollout.max_rows=32"}
    twice = plan(load_config([*ONE_CHUNK, *rows]))
    assert twice["activations of replay"] == pytest.approx(
        2 * base["activations of replay"], rel=0.1
    )
    assert twice["recorded states"] == 2 * base["recorded states"]
    half = plan(load_config([*ONE_CHUNK, "model.dtype=bfloat16"]))
    assert 2 * half["weights of transformer"] == base["weights of transformer"]
    assert half["activations of replay"] < 0.7 * base["activations of replay"]
    again = plan(load_config([*ONE_CHUNK, "train.recompute_blocks=4"]))
    assert again["activations of replay"] < 0.3 * base["activations of replay"]
    full = plan(load_config([*ONE_CHUNK, "model.adapter=full"]))
    assert full["gradients"] == full["weights of the reference"] == base["weights of transformer"]
    several = plan(load_config([*ONE_CHUNK, "rollout.max_rows=8"]))
    assert several["gradients"] == 2 * base["gradients"], "a sum, and the next chunk's"
    text = describe_plan(base)
    total = sum(base.values()) / 2**20
    assert text.startswith("# planned memory\n") and f"{total:,.1f} MiB" in text.splitlines()[-1]


def test_no_weight_is_read(model_copy: Path) -> None:
    base = plan(load_config(list(ONE_CHUNK)))
    for file in model_copy.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    assert plan(load_config([*ONE_CHUNK, f"model.path={model_copy}"])) == base


def test_the_template_is_counted_as_the_encoder_sees_it(weights: Path) -> None:
    model = QwenImage21.load(weights, torch.float32)
    for prompt in ("a photo of a red circle", "a photo of a yellow triangle right of a square"):
        (embedding,) = model.encode([prompt])
        assert len(embedding) == QwenImage21.prompt_tokens(weights, prompt)
