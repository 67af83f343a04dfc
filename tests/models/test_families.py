"""The adapters of SD 3.5, FLUX.1, FLUX.2 (dev, Klein) and Z-Image against the stock transformers
and pipelines, on small random models in their own format. Tolerances as in test_qwenimage21.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline
from safetensors.torch import load_file
from small_families import PIPELINES, small_vae
from small_transformers import draw
from torch import Tensor

import qirl_fast
from qirl_fast.config import ConfigError, load_config
from qirl_fast.memory import plan
from qirl_fast.models import FAMILIES, adapter_of, load_model
from qirl_fast.models.compiled import CompiledForward
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.packed import Packed, split_pooled, with_pooled
from qirl_fast.models.zimage import ZImage
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, initial_noise, row_seeds, sample
from qirl_fast.rollout.schedule import make_sigmas
from qirl_fast.trainer import Trainer

SIZE = 64
GRID, TOKENS, CHANNELS = (4, 4), 16, 16
CLOSE, CLOSE_GRADIENT = 3e-6, 1e-5
TEXTS = ("a red circle", "two blue squares and a green triangle left of the yellow circle", "b")

Make = Callable[[str], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Callable[[str], Path]:
    """`folders(name)`: a model folder that the stock pipeline saves and loads."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            PIPELINES[name](weights).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def stocks(folders) -> Make:
    """`stocks(name)`: the folder through the stock pipeline's own loading."""
    found: dict[str, Any] = {}

    def stock(name: str) -> Any:
        if name not in found:
            found[name] = adapter_of(folders(name), name).pipeline_class.from_pretrained(
                folders(name)
            )
            found[name].set_progress_bar_config(disable=True)
        return found[name]

    return stock


@pytest.fixture
def make(folders) -> Make:
    """`make(name)`: the adapter of the folder, loaded anew."""

    def model(name: str) -> Any:
        loaded = load_model(folders(name), "auto", torch.float32, "cpu")
        assert type(loaded) is adapter_of(folders(name), name) and isinstance(loaded, Packed)
        return loaded

    return model


every = pytest.mark.parametrize("name", list(PIPELINES))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_each_adapter_and_its_pipeline(family, tmp_path):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{FAMILIES[family][2]}"}}')
    adapter = adapter_of(tmp_path, "auto")
    assert adapter.family == family and adapter.pipeline_class.__name__ == FAMILIES[family][2]


def test_a_driver_imports_without_a_word():
    """Pipelines of families that are not used may warn of packages that are not there."""
    done = subprocess.run(
        [sys.executable, "-c", "import qirl_fast.train, qirl_fast.trainer, qirl_fast.curate"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def noise(rows: int, seed: int = 0) -> Tensor:
    return draw(rows, TOKENS, CHANNELS, seed=seed)


def embeddings(model: Any) -> list[Tensor]:
    """Of four prompts, shorter than `encode` pads them: the transformer is as good as with 512."""
    config = model.transformer.config
    width = config.get("cap_feat_dim") or config.joint_attention_dim
    lengths = (7, 40, 9, 30) if model.family == "zimage" else (7,) * 4
    return [draw(length, width, seed=10 + i) for i, length in enumerate(lengths)]


def pictures(name: str, x: Tensor) -> Tensor:
    """Tokens [b, 16, 16] as the latents that the stock pipeline takes, of what `tokens` takes."""
    if name == "flux":
        return x
    if name.startswith("flux2"):
        return x.transpose(1, 2).unflatten(2, GRID)
    order = (0, 5, 1, 3, 2, 4) if name == "zimage" else (0, 3, 1, 4, 2, 5)
    parts = (2, 2, 4) if name == "zimage" else (4, 2, 2)
    return x.unflatten(2, parts).unflatten(1, GRID).permute(order).reshape(len(x), 4, 8, 8)


def tokens(name: str, z: Tensor) -> Tensor:
    """Latents of the stock pipeline as tokens [b, 16, 16]."""
    if name.startswith("flux"):
        return z
    order = (0, 2, 4, 3, 5, 1) if name == "zimage" else (0, 2, 4, 1, 3, 5)
    return z.reshape(len(z), 4, 4, 2, 4, 2).permute(order).reshape(len(z), TOKENS, CHANNELS)


def stock_velocity(name: str, transformer: Any, x: Tensor, sigma: float, text: Tensor) -> Tensor:
    """One row through the stock forward, called as the pipeline calls it."""
    z, level = pictures(name, x[None]), torch.tensor([sigma])
    given: dict[str, Any] = {"return_dict": False}
    if name == "zimage":
        (v,) = transformer([z[0, :, None]], (1000 - level * 1000) / 1000, [text], **given)[0]
        return -tokens(name, v[:, 0][None])[0]
    given |= {"encoder_hidden_states": text[None]}
    if name in ("sd3", "flux"):
        tokens_, pooled = split_pooled(text, transformer.config.pooled_projection_dim)
        given |= {"encoder_hidden_states": tokens_[None], "pooled_projections": pooled[None]}
    if name == "sd3":
        return tokens(name, transformer(z, timestep=level * 1000, **given)[0])[0]
    if name == "flux":
        ids = FluxPipeline._prepare_latent_image_ids(1, *GRID, "cpu", torch.float32)
        given |= {"img_ids": ids, "guidance": torch.tensor([3.5])}
        given |= {"txt_ids": torch.zeros(len(tokens_), 3)}
    else:
        guidance = torch.tensor([4.0]) if name == "flux2" else None
        image = Flux2Pipeline._prepare_latent_ids(torch.empty(1, 1, *GRID))
        given |= {"img_ids": image, "txt_ids": Flux2Pipeline._prepare_text_ids(text[None])}
        given |= {"guidance": guidance}
    return transformer(x[None], timestep=level, **given)[0][0]


@every
def test_encode_is_the_stock_encoding(make, stocks, folders, name: str) -> None:
    model, stock = make(name), stocks(name)
    ours = model.encode([*TEXTS, ""])
    for prompt, embedding in zip([*TEXTS, ""], ours, strict=True):
        assert len(embedding) == model.prompt_tokens(folders(name), prompt)
        with torch.no_grad():
            if name == "sd3":
                text, _, pooled, _ = stock.encode_prompt(prompt, None, None)
                theirs = [text[0], pooled[0]]
            elif name == "flux":
                theirs = [part[0] for part in stock.encode_prompt(prompt)[:2]]
            else:
                theirs = [stock.encode_prompt(prompt)[0][0]]
        found = [embedding] if len(theirs) == 1 else split_pooled(embedding, len(theirs[1]))
        assert all(map(torch.equal, found, theirs))
    assert len({tuple(e.flatten().tolist()) for e in ours}) == 4  # prompts are told apart


@pytest.mark.parametrize(("width", "pooled"), [(8, 5), (8, 8), (8, 20)])
def test_a_pooled_vector_of_any_size_lies_behind_the_tokens(width: int, pooled: int) -> None:
    text, vector = torch.randn(3, width), torch.randn(pooled)
    together = with_pooled(text, vector)
    assert together.shape == (3 + -(-pooled // width), width)
    assert all(map(torch.equal, split_pooled(together, pooled), (text, vector)))


@pytest.mark.parametrize("mode", ["full", "lora"])
@every
def test_velocity_and_gradients_are_those_of_the_stock_forward(make, name: str, mode) -> None:
    """Rows of mixed prompts and levels, each against its own stock forward; every parameter."""
    owner, levels = [2, 0, 1, 0], [1.0, 0.9, 0.5, 0.02]
    x, probe = noise(4), noise(4, seed=1)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for fused in (True, False):
        model = make(name)
        text = embeddings(model)
        with torch.no_grad():
            parameters = model.trainable(mode, 4, 8, None, 0)
            if mode == "lora":
                for p in parameters.values():
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        if fused:
            v = model.velocity(x, levels, model.prefix(text, owner, SIZE, SIZE))
        else:
            qirl_fast.unpatch(model.transformer)
            rows = zip(x, levels, owner, strict=True)
            v = torch.stack(
                [stock_velocity(name, model.transformer, r, s, text[p]) for r, s, p in rows]
            )
        (v * probe).sum().backward()
        found.append((v, {n: p.grad for n, p in parameters.items() if p.grad is not None}))
    (ours, our_gradients), (theirs, gradients) = found
    for r in range(4):
        assert relative(ours[r], theirs[r]) < CLOSE
    largest = max(g.abs().max().item() for g in gradients.values())
    for n, gradient in gradients.items():
        allowed = CLOSE_GRADIENT * max(gradient.abs().max().item(), 0.05 * largest)
        mine = our_gradients.get(n, torch.zeros_like(gradient))
        assert (mine - gradient).abs().max().item() <= allowed, n
    assert gradients.keys() <= our_gradients.keys() and len(gradients) > 20


@every
def test_joined_branches_are_the_two_by_themselves(make, name: str) -> None:
    model = make(name)
    with torch.no_grad():
        text = embeddings(model)
        owners = ([0, 0], [2, 0, 1], [3] * 3)
        prefixes = [model.prefix(text, owner, SIZE, SIZE) for owner in owners]
        for a, b in ((0, 1), (1, 0), (1, 1), (1, 2)):
            x = noise(len(owners[a]) + len(owners[b]), seed=a + 7 * b)
            together = model.velocity(x, [0.7], model.join(prefixes[a], prefixes[b]))
            parts = zip(x.split([len(owners[a]), len(owners[b])]), (a, b), strict=True)
            alone = torch.cat([model.velocity(p, [0.7], prefixes[k]) for p, k in parts])
            assert relative(together, alone) < CLOSE


@every
def test_images_are_the_stock_pipelines(make, stocks, name: str) -> None:
    """Guided ODE sampling from the same noise; FLUX.2-dev has no guidance but the embedded one."""
    model, stock = make(name), stocks(name)
    scale = 1.0 if name == "flux2" else 2.5
    with torch.no_grad():
        text, null = model.encode(TEXTS[:1]), model.encode([""])[0]
    how = Sampling(SIZE, SIZE, 4, Guidance(scale, model.norm_rescaled_guidance))
    config = model.pipeline.scheduler.config
    (chunk,) = sample(model, text, null, how, config, group_size=2, seed=0, update=0)
    start = initial_noise(row_seeds(0, 0, range(2), stream=0), (TOKENS, CHANNELS), model.device)
    given = {"prompt": [TEXTS[0]] * 2, "num_inference_steps": 4, "height": SIZE, "width": SIZE}
    given |= {"latents": pictures(name, start)}
    if name == "flux":
        given |= {"true_cfg_scale": scale, "negative_prompt": [""] * 2}
    elif name == "zimage":
        given |= {"guidance_scale": scale - 1}
    elif name != "flux2":
        given |= {"guidance_scale": scale}
    seen = []
    given |= {"callback_on_step_end": lambda *step: seen.append(step[-1]["latents"]) or {}}
    expected = np.rint(stock(**given, output_type="np").images * 255)
    theirs = tokens(name, seen[-1])
    assert relative(chunk.latents, theirs) < 10 * CLOSE  # four guided steps, each as off as above
    images = model.decode(theirs, SIZE, SIZE)
    assert images.shape == (2, SIZE, SIZE, 3) and images.std() > 5
    assert np.abs(images - expected).max() <= 1  # a pixel on the edge of two values
    sigmas = make_sigmas(4, TOKENS, config)
    np.testing.assert_array_equal(sigmas, stock.scheduler.sigmas.double().numpy())


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
@every
def test_the_ratio_is_one_before_an_update(make, name: str, mode: str) -> None:
    """Several prompts, LoRA off its start, graph on; bit for bit. All of the LoRA has a gradient
    but what the last block of text alone sees.
    """
    model = make(name)
    with torch.no_grad():
        parameters = model.trainable("lora", 4, 8, None, 0)
        for p in parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        *text, null = embeddings(model)[:3]
    how = Sampling(SIZE, SIZE, 4, Guidance(2.0, False, mode), "flow_sde", 0.7, max_rows=3)
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
        assert all(name == "sd3" and "blocks.2.attn.add_q_proj" in n for n in unused), unused


@every
def test_recomputed_blocks_give_the_same_bits(make, name: str) -> None:
    model = make(name)
    parameters = list(model.trainable("lora", 4, 8, None, 0).values())
    text, found = embeddings(model), []
    for blocks in (0, 1, 99):
        model.recompute_blocks = blocks
        v = model.velocity(noise(4), [0.7, 0.3], model.prefix(text, [0, 1, 2, 0], SIZE, SIZE))
        grads = torch.autograd.grad(v.square().sum(), parameters, allow_unused=True)
        found.append((v, *(g for g in grads if g is not None)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@every
def test_levels_are_kept_and_forwards_can_be_recorded(make, name: str) -> None:
    """A stand-in for CUDA graphs runs the forward on fixed tensors: it finds all inputs there."""
    model = make(name)
    model.trainable("lora", 4, 8, None, 0)
    text = embeddings(model)
    with torch.no_grad():
        prefixes = [model.prefix(text, [p, p], SIZE, SIZE) for p in (0, 2)]
        computed = [model.velocity(noise(2), [0.7], prefix) for prefix in prefixes]
        assert model.modulations.computed == 1
        assert not torch.equal(*computed)
        model.denoiser = ForwardGraphs(
            model.transformer, model.forward, lambda run: ((lambda: out.copy_(run())), out := run())
        )
        for prefix, expected in zip(prefixes, computed, strict=True):
            assert torch.equal(model.velocity(noise(2), [0.7], prefix), expected)


@every
def test_blocks_can_be_compiled(make, name: str) -> None:
    """Once for each kind of block and layout; to rounding (the backend aot_eager reorders none)."""
    model, traced = make(name), []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    model.trainable("lora", 4, 8, None, 0)
    text, kinds = embeddings(model), len({type(b) for b in model.blocks})
    model.denoiser = CompiledForward(model.transformer, model.forward, backend)
    traced.clear()
    with torch.no_grad():
        for p in (0, 2):
            prefix = model.prefix(text, [p, p], SIZE, SIZE)
            quick, eager = (
                model.velocity(noise(2), [0.7], prefix, exact) for exact in (False, True)
            )
            assert relative(quick, eager) < CLOSE
    # SD 3.5's blocks with a second attention and its last, without text, are of their own kind.
    assert kinds <= len(traced) <= 3 * model.denoiser.compiled


@every
def test_a_run_trains_it(start, small, folders, tmp_path, read_jsonl, name: str) -> None:
    """The trainer, its plan of memory and its checkpoints; the LoRA loads into the pipeline."""
    own = [f"output={tmp_path}", "run=one", f"model.path={folders(name)}", "train.steps=1"]
    argv = [*small, *own, "evaluation.prompts=2", "evaluation.steps=2", "rollout.steps=3"]
    argv.append("rollout.group_size=2")
    run = start(argv)
    assert run.wait() == 0, run.output()
    (row,) = [r for r in read_jsonl(tmp_path / "one/metrics.jsonl") if "grad_norm" in r]
    assert row["pre_update_ratio_error"] == 0 and row["grad_norm"] > 0
    (lora,) = (tmp_path / "one/checkpoints").glob("checkpoint-1/pytorch_lora_weights.*")
    folder = folders(name)
    pipeline = adapter_of(folder, name).pipeline_class.from_pretrained(folder)
    pipeline.load_lora_weights(lora.parent)
    loaded = dict(pipeline.transformer.named_parameters())
    for key, value in load_file(lora).items():
        module, matrix = key.removeprefix("transformer.").rsplit(".lora_", 1)
        adapter = f"{module}.lora_{matrix[0]}.default_0.weight"
        assert torch.equal(loaded[adapter], value), adapter
    (layer,) = {m.scaling["default_0"] for m in pipeline.transformer.modules() if scaled(m)}
    assert layer == 2.0  # alpha 16, rank 8
    purposes = ("weights of vae", "weights of text_encoder", "activations of replay")
    planned = plan(load_config(argv))
    assert all(planned[purpose] > 0 for purpose in purposes)
    again = plan(load_config([*argv, "train.recompute_blocks=99"]))
    assert again["activations of replay"] < planned["activations of replay"]
    steps, samples = 2, 4
    state = TOKENS * CHANNELS * (2 * 4 + 4)  # x and x', and the offset of guidance
    assert planned["recorded states"] == steps * samples * state


def scaled(module: Any) -> bool:
    return "default_0" in getattr(module, "scaling", {})


@every
def test_condition_images_and_wrong_sizes_are_refused(make, small, folders, tmp_path, name):
    model = make(name)
    picture = np.zeros((64, 64, 3), np.uint8)
    kind = type(model).pipeline_class.__name__
    with pytest.raises(ValueError, match=f"{kind} draws from text alone and takes no condition"):
        model.condition("a circle", [[picture]])
    with pytest.raises(ValueError, match=f"{kind} draws from text alone"):
        model.prompt_tokens(folders(name), "a circle", [[(64, 64)]])
    with pytest.raises(ValueError, match=rf"{kind} draws multiples of 16 pixels; try 48 x 64"):
        model.latent_shape(50, 64)
    rows = tmp_path / "edits.jsonl"
    rows.write_text(json.dumps({"prompt": "a circle", "image": "a.png"}) + "\n")
    argv = [*small, f"model.path={folders(name)}", f"data.train={rows}", f"output={tmp_path}"]
    with pytest.raises(ConfigError, match=r"row 1 has a condition image.*from text alone"):
        Trainer(load_config(argv))


def stock_with_small_vae(folder: Path, path: Path) -> Path:
    """A copy of the model folder whose autoencoder has one level less."""
    shutil.copytree(folder, path)
    small_vae(levels=3).save_pretrained(path / "vae")
    return path


def test_what_an_adapter_does_not_serve_is_refused(make, folders, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"places for 8 tokens on a side; wanted at most 128"):
        make("sd3").latent_shape(144, 64)
    with pytest.raises(ValueError, match=r"places for 16 tokens on a side; wanted at most 256"):
        make("zimage").latent_shape(64, 272)
    model = make("flux")
    short = [draw(20, 32), draw(30, 32)]
    with pytest.raises(ValueError, match=r"embeddings of \[19, 29\] tokens in one batch"):
        model.prefix(short, [0, 1], SIZE, SIZE)
    model = make("zimage")
    model.transformer.register_to_config(siglip_feat_dim=8)
    with pytest.raises(ValueError, match=r"siglip_feat_dim 8; .*without the omni variant's"):
        ZImage(model.pipeline)
    two = stock_with_small_vae(folders("sd3"), tmp_path / "vae")
    with pytest.raises(ValueError, match=r"one latent of 4 x 4 pixels; .*Pipeline wants 8"):
        load_model(two, "auto", torch.float32, "cpu")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline"}))
    with pytest.raises(FileNotFoundError, match="lacks scheduler, text_encoder, tokenizer, tran"):
        load_model(tmp_path, "auto", torch.float32, "cpu")
