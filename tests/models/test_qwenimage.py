"""The adapter of Qwen-Image 1.x against the stock transformer and pipeline, on a small random model
in their own format. Tolerances as in test_qwenimage21.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from small_transformers import qwen_parts
from torch import Tensor
from worlds import ended

import qirl_fast
from qirl_fast.config import load_config
from qirl_fast.memory import plan
from qirl_fast.models import load_model, qwenimage
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, initial_noise, row_seeds, sample

SIZE = 64
TOKENS, CHANNELS = 16, 16
CLOSE, CLOSE_GRADIENT = 3e-6, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A model folder of 0.2 million random weights that the stock pipeline saves and loads."""
    path = tmp_path_factory.mktemp("qwenimage")
    QwenImagePipeline(**qwen_parts(weights)).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> QwenImage:
    found = load_model(folder, "auto", torch.float32, "cpu")
    assert isinstance(found, QwenImage)
    return found


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def stock_velocity(transformer: Any, x: Tensor, sigma: float, text: Tensor) -> Tensor:
    """One row through the stock forward, unpadded."""
    return transformer(
        hidden_states=x[None],
        encoder_hidden_states=text[None],
        timestep=torch.tensor([sigma]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0][0]


@pytest.mark.parametrize("own", [(), ("model.adapter=full",)], ids=["lora", "full"])
def test_spread_over_two_processes_it_trains_as_in_one(
    processes, folder, tmp_path, read_jsonl, own
) -> None:
    """A LoRA to the bit. All weights to rounding: see test_sharding.py."""
    more = ["rollout.max_rows=4", "evaluation.prompts=2", "train.lr=0.0005", *own]
    settings = [f"model.path={folder}", *more, f"output={tmp_path}"]
    for count, shard in ((1, 1), (2, 0)):
        runs = processes(count, [*settings, f"processes.shard={shard}", f"run=by{count}"])
        assert ended(runs) == [0] * count, runs[0].output()
    files = [tmp_path / f"by{count}/metrics.jsonl" for count in (1, 2)]
    if not own:
        assert files[0].read_bytes() == files[1].read_bytes()
    for one, two in zip(*map(read_jsonl, files), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_encode_is_the_stock_encoding(model, stock, folder, prompts) -> None:
    ours = model.encode([*prompts, ""])
    with torch.no_grad():
        padded, mask = stock.encode_prompt([*prompts, " "])
    for embedding, row, valid in zip(ours, padded, mask.bool(), strict=True):
        assert relative(embedding, row[valid]) < CLOSE
    for prompt, embedding in zip(prompts, ours, strict=False):
        assert len(embedding) == QwenImage.prompt_tokens(folder, prompt)
    assert len({len(e) for e in ours}) > 2
    assert stock.prompt_template_encode == qwenimage.TEMPLATE
    assert stock.prompt_template_encode_start_idx == qwenimage.DROPPED


@pytest.mark.parametrize("mode", ["host levels", "tensor"])
def test_velocity_and_gradients_are_those_of_the_stock_forward(folder, prompts, mode: str) -> None:
    """Rows of mixed text lengths, packed, each against its own stock forward; every parameter."""
    owner, levels = [2, 0, 1, 0, 3, 2], [1.0, 0.9, 0.5, 0.02, 0.3, 0.7]
    x, probe = noise(6), noise(6, seed=1)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for fused in (True, False):
        model = QwenImage.load(folder, torch.float32)
        text = model.encode(prompts)
        parameters = model.trainable("full", 0, 0.0, None, 0)
        if fused:
            sigma = levels if mode == "host levels" else torch.tensor(levels)
            v = model.velocity(x, sigma, model.prefix(text, owner, SIZE, SIZE))
        else:
            qirl_fast.unpatch(model.transformer)
            rows = [
                stock_velocity(model.transformer, x[r], levels[r], text[p])
                for r, p in enumerate(owner)
            ]
            v = torch.stack(rows)
        (v * probe).sum().backward()
        found.append((v, {n: p.grad for n, p in parameters.items() if p.grad is not None}))
    (ours, our_gradients), (theirs, gradients) = found
    for r in range(6):
        assert relative(ours[r], theirs[r]) < CLOSE
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        mine = our_gradients.get(name, torch.zeros_like(gradient))
        allowed = CLOSE_GRADIENT * max(gradient.abs().max().item(), 0.05 * largest)
        assert (mine - gradient).abs().max().item() <= allowed, name
    missing = gradients.keys() - our_gradients.keys()
    assert not missing, missing


def test_joined_branches_are_the_two_by_themselves(model, prompts) -> None:
    text = model.encode([*prompts, ""])
    owners = ([0, 0], [2, 0, 1, 0, 3, 2], [4] * 6)
    with torch.no_grad():
        prefixes = [model.prefix(text, owner, SIZE, SIZE) for owner in owners]
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            x = noise(len(owners[a]) + len(owners[b]), seed=a + 7 * b)
            together = model.velocity(x, [0.7], model.join(prefixes[a], prefixes[b]))
            parts = zip(x.split([len(owners[a]), len(owners[b])]), (a, b), strict=True)
            alone = torch.cat([model.velocity(p, [0.7], prefixes[k]) for p, k in parts])
            assert relative(together, alone) < CLOSE


def test_images_are_the_stock_pipelines(model, stock, prompts) -> None:
    """Guided ODE sampling from the same noise, with the pipeline's norm-rescaled guidance."""
    text, null = model.encode(prompts[:1]), model.encode([""])[0]
    config = model.pipeline.scheduler.config
    how = Sampling(SIZE, SIZE, 6, Guidance(2.5, model.norm_rescaled_guidance))
    (chunk,) = sample(model, text, null, how, config, group_size=2, seed=0, update=0)
    start = initial_noise(row_seeds(0, 0, range(2), stream=0), (TOKENS, CHANNELS), model.device)
    given = {
        "prompt": [prompts[0]] * 2,
        "negative_prompt": [" "] * 2,
        "true_cfg_scale": 2.5,
        "num_inference_steps": 6,
        "height": SIZE,
        "width": SIZE,
        "latents": start,
    }
    theirs = stock(**given, output_type="latent").images
    assert relative(chunk.latents, theirs) < 10 * CLOSE  # six guided steps, each as off as above
    images = model.decode(theirs, SIZE, SIZE)
    expected = np.rint(stock(**given, output_type="np").images * 255)
    assert images.shape == (2, SIZE, SIZE, 3) and images.std() > 5
    assert np.abs(images - expected).max() <= 1  # a pixel on the edge of two values


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
def test_the_ratio_is_one_before_an_update(model, prompts, mode: str) -> None:
    """Prompts of two lengths, LoRA off its start, graph on; bit for bit."""
    parameters = model.trainable("lora", 4, 8, None, 0)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        text, null = model.encode(prompts[:2]), model.encode([""])[0]
    how = Sampling(SIZE, SIZE, 4, Guidance(2.0, True, mode), "flow_sde", 0.7, max_rows=3)
    settings = {"group_size": 2, "seed": 0, "update": 1, "recorded": (0, 1)}
    for chunk in sample(model, text, null, how, model.pipeline.scheduler.config, **settings):
        scored = list(replay(model, chunk, how))
        assert len(scored) == 2
        for step in scored:
            assert step.logp.requires_grad and torch.equal(step.logp, step.logp_old)
        grads = torch.autograd.grad(
            sum(s.logp.sum() for s in scored), list(parameters.values()), allow_unused=True
        )
        unused = [n for n, g in zip(parameters, grads, strict=True) if g is None]
        last = ("add_q_proj", "to_add_out", "txt_mlp")
        assert all("blocks.2." in n and any(part in n for part in last) for n in unused)


def test_recomputed_blocks_give_the_same_bits(model, prompts) -> None:
    parameters = list(model.trainable("lora", 4, 8, ["attn.to_q", "img_mlp.net.2"], 0).values())
    text = model.encode(prompts)
    found = []
    for blocks in (0, 2, 99):
        model.recompute_blocks = blocks
        v = model.velocity(noise(4), [0.7, 0.3], model.prefix(text, [0, 1, 2, 0], SIZE, SIZE))
        found.append((v, *torch.autograd.grad(v.square().sum(), parameters)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_modulation_is_kept_under_a_lora(model, prompts) -> None:
    model.trainable("lora", 4, 8, None, 0)
    prefix = model.prefix(model.encode(prompts[:1]), [0, 0], SIZE, SIZE)
    first = model.velocity(noise(2), [0.7], prefix)
    assert torch.equal(model.velocity(noise(2), [0.7], prefix), first)
    assert model.modulations.computed == 1


def test_variants_are_refused(folder: Path, tmp_path: Path) -> None:
    for setting in ("guidance_embeds", "zero_cond_t"):
        model = QwenImage.load(folder, torch.float32)
        model.transformer.register_to_config(**{setting: True})
        with pytest.raises(ValueError, match=f"this transformer has {setting}"):
            QwenImage(model.pipeline)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    with pytest.raises(FileNotFoundError, match="lacks scheduler, text_encoder, tokenizer, transf"):
        load_model(tmp_path, "auto", torch.float32, "cpu")
    with pytest.raises(ValueError, match="multiples of 16 pixels; try 48 x 64"):
        QwenImage.load(folder, torch.float32).latent_shape(50, 64)


def test_a_run_trains_it(start, small, folder: Path, tmp_path: Path, read_jsonl) -> None:
    """The trainer, its plan of memory and its checkpoints on this family."""
    argv = [*small, f"output={tmp_path}", "run=one", f"model.path={folder}", "train.steps=2"]
    run = start(argv)
    assert run.wait() == 0, run.output()
    rows = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    trained = [row for row in rows if "pre_update_ratio_error" in row]
    assert len(trained) == 2 and all(row["pre_update_ratio_error"] == 0 for row in trained)
    assert all(row["grad_norm"] > 0 for row in trained)
    (lora,) = (tmp_path / "one" / "checkpoints").glob("checkpoint-2/pytorch_lora_weights.*")
    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.load_lora_weights(lora.parent)
    planned = plan(load_config(argv))
    assert planned["activations of replay"] > 0 and planned["weights of vae"] > 0
