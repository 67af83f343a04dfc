"""Condition images in every editing family against the stock pipelines, on small random models.

The stock pipelines run whole, from PIL images of any size; an observer keeps what they hand to the
transformer. The areas they resize to are fixed in their code (1024 x 1024, 384 x 384) but for
Qwen-Image-2.1, so `small_areas` exchanges those numbers, here alone. Tolerances as in
test_qwenimage21.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from small_transformers import EDITORS, edit_folder
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models import load_model, qwenimage_edit
from qirl_fast.models.prefix import Conditioned
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from qirl_fast.processor import QwenVLProcessor
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import (
    Sampling,
    coefficient_tensors,
    initial_noise,
    row_seeds,
    sample,
)

SIZE, TOKENS, CHANNELS = 64, 16, 16
AREA, ENCODER_AREA = 96 * 96, 64 * 64
CLOSE = 3e-6
FAMILIES = (*EDITORS, "2.1")
PROMPT = "move the red circle"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, Path]:
    found = {n: edit_folder(n, weights, tmp_path_factory.mktemp("edit")) for n in EDITORS}
    return found | {"2.1": weights}


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    of_ratio = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: of_ratio(AREA, ratio)
    )
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", ENCODER_AREA)
    monkeypatch.setattr(qwenimage_edit, "ENCODER_PIXELS", ENCODER_AREA)


@pytest.fixture
def make(folders: dict[str, Path]) -> Callable[[str], Any]:
    return lambda name: load_model(folders[name], "auto", torch.float32, "cpu")


def picture(height: int, width: int, seed: int, channels: int = 3) -> Image.Image:
    """Coarse random patches: smooth enough that resizing leaves contrast."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pictures_of(name: str) -> list[Image.Image]:
    """One image where the family takes one, else three of other shapes; alpha where it is read."""
    if name == "edit":
        return [picture(70, 100, 0)]
    first = picture(100, 150, 1, channels=4 if name == "2.1" else 3)
    return [first, picture(61, 40, 2), picture(70, 100, 0)]


def versions(model: Any, image: Image.Image) -> list[np.ndarray]:
    """What the decoder gives: each size asked for, by PIL's Lanczos filter."""
    sizes = model.condition_sizes((image.height, image.width), AREA)
    resized = [image.resize((w, h), Image.Resampling.LANCZOS) for h, w in sizes]
    return [np.asarray(i) for i in resized]


def conditioned(model: Any, prompt: str, images: list[Image.Image]) -> Conditioned:
    found = model.condition(prompt, [versions(model, image) for image in images])
    assert isinstance(found, Conditioned)
    return found


class Stock:
    """A stock pipeline; `seen` keeps what its transformer was called with."""

    def __init__(self, name: str, folder: Path):
        kind = load_model(folder, "auto", torch.float32, "cpu").pipeline_class
        processor = QwenVLProcessor.from_pretrained(folder / "processor")
        self.name, self.pipeline = name, kind.from_pretrained(folder, processor=processor)
        self.pipeline.set_progress_bar_config(disable=True)
        self.seen: list[dict[str, Any]] = []
        self.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, given: self.seen.append(given), with_kwargs=True
        )

    def __call__(self, images: list[Image.Image], noise: Tensor, steps: int, **given: Any) -> Any:
        image = images[0] if self.name == "edit" else images
        if self.name == "2.1":
            given["output_resolution"] = round(AREA**0.5)
        given |= {"prompt": PROMPT, "negative_prompt": " ", "true_cfg_scale": 2.5}
        given |= {"height": SIZE, "width": SIZE, "latents": noise, "num_inference_steps": steps}
        return self.pipeline(image=image, **given).images


@pytest.fixture
def stock(folders: dict[str, Path]) -> Callable[[str], Stock]:
    return lambda name: Stock(name, folders[name])


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def condition_part(name: str, hidden: Tensor) -> Tensor:
    """The condition tokens of a stock transformer's input of one row."""
    return hidden[0, :-TOKENS] if name == "2.1" else hidden[0, TOKENS:]


@pytest.mark.parametrize("name", FAMILIES)
def test_condition_is_what_the_stock_pipeline_hands_over(make, stock, name: str) -> None:
    """Embeddings and latents of both branches, bit for bit, from images of any size."""
    model, reference, images = make(name), stock(name), pictures_of(name)
    reference(images, torch.zeros(1, TOKENS, CHANNELS), 2, output_type="latent")
    for prompt, call in zip((PROMPT, ""), reference.seen[:2], strict=True):
        ours = conditioned(model, prompt, images)
        assert torch.equal(ours.text, call["encoder_hidden_states"][0])
        assert torch.equal(ours.latents, condition_part(name, call["hidden_states"]))
        shapes = [(1, *grid) for grid in ours.grids]
        both = [*shapes, (1, 4, 4)] if name == "2.1" else [(1, 4, 4), *shapes]
        assert call["img_shapes"] == [both]
        if name == "2.1":
            assert torch.equal(ours.slots, call["img_mask"][0, : len(ours.slots)])
        else:
            assert not ours.slots.any() and len(ours.slots) == len(ours.text)


@pytest.mark.parametrize("name", EDITORS)
def test_alpha_is_put_over_white(make, name: str) -> None:
    """Where the stock pipeline fails on it; that of 2.1 reads it, and is compared above."""
    model = make(name)
    clear = versions(model, picture(70, 100, 3, channels=4))
    white = [a[..., :3] * (a[..., 3:] / 255) + 255 - a[..., 3:] for a in clear]
    flat = [np.rint(w).astype(np.uint8) for w in white]
    ours, expected = (model.condition(PROMPT, [images]) for images in (clear, flat))
    assert torch.equal(ours.text, expected.text) and torch.equal(ours.latents, expected.latents)
    opaque = model.condition(PROMPT, [[a[..., :3] for a in clear]])
    assert relative(ours.latents, opaque.latents) > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_the_stock_pipelines(make, stock, name: str) -> None:
    """Guided sampling from the same noise: latents, and the image they decode to."""
    model, images = make(name), pictures_of(name)
    how = Sampling(SIZE, SIZE, 6, Guidance(2.5, model.norm_rescaled_guidance))
    prompts = [conditioned(model, PROMPT, images)]
    null = conditioned(model, "", images)
    scheduler = model.pipeline.scheduler.config
    (chunk,) = sample(model, prompts, null, how, scheduler, group_size=1, seed=0, update=0)
    start = initial_noise(row_seeds(0, 0, range(1), stream=0), (TOKENS, CHANNELS), model.device)
    reference = stock(name)
    theirs = reference(images, start, 6, output_type="latent")
    # Six guided steps, each as off as one forward, whose errors guidance multiplies.
    assert relative(chunk.latents, theirs) < 10 * CLOSE
    drawn = model.decode(theirs, SIZE, SIZE)
    expected = reference(images, start, 6, output_type="np")
    if name == "2.1":
        expected = expected[..., :3] * expected[..., 3:] + (1 - expected[..., 3:])
    assert drawn.shape == (1, SIZE, SIZE, 3) and drawn.std() > 5
    assert np.abs(drawn - np.rint(expected * 255)).max() <= 1  # on the edge of two values


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_tokens_are_those_of_the_embedding(make, folders, name: str) -> None:
    model, images = make(name), pictures_of(name)
    for count in range(1, len(images) + 1):
        sizes = [model.condition_sizes((i.height, i.width), AREA) for i in images[:count]]
        for prompt in (PROMPT, "a photo of a yellow triangle right of a square"):
            found = conditioned(model, prompt, images[:count])
            assert len(found.text) == model.prompt_tokens(folders[name], prompt, sizes)


def test_images_positions_that_get_lost_are_warned_of(make, caplog) -> None:
    for name in EDITORS:
        caplog.clear()
        kind = type(make(name)).pipeline_class
        forwarded = "mm_token_type_ids" in inspect.getsource(kind._get_qwen_prompt_embeds)
        warned = [r for r in caplog.records if "diffusers issue 14194" in r.message]
        assert len(warned) == (not forwarded)
    caplog.clear()
    make("2.1")
    assert "14194" not in caplog.text


def test_sizes_are_those_of_the_stock_pipelines() -> None:
    for h, w in ((100, 150), (1080, 1920), (3000, 31), (512, 512)):
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(1024**2, w / h)
        (own,) = QwenImageEdit.condition_sizes((h, w), 1024**2)
        assert own == (height, width)
    assert QwenImageEditPlus.condition_sizes((100, 100), 1024**2) == ((1024, 1024), (64, 64))
    assert QwenImageEditPlus.condition_sizes((100, 100), 32**2) == ((32, 32), (32, 32))
    with pytest.raises(ValueError, match="short side rounds to 0"):
        QwenImageEdit.condition_sizes((10000, 10), 96 * 96)
    with pytest.raises(ValueError, match="wanted positive"):
        QwenImageEdit.condition_sizes((0, 10), 96 * 96)


def test_what_cannot_be_served_is_refused(make) -> None:
    edit, plus, model21 = make("edit"), make("plus"), make("2.1")
    assert edit.takes_images() and plus.takes_images() and model21.takes_images()
    image = np.zeros((64, 64, 3), np.uint8)
    wrong = {
        "takes one condition image and got 2": (edit, [[image], [image]]),
        "no condition images": (edit, []),
        "came in 1 sizes; wanted 2": (plus, [[image]]),
        r"60 x 64 pixels; wanted multiples of 32": (edit, [[image[:60]]]),
        r"float64 \[64, 64, 3\]; wanted uint8": (edit, [[image / 255]]),
        r"uint8 \[64, 64\]; wanted": (model21, [[image[..., 0]]]),
        "makes? of them|slots of 4 tokens": (model21, [[np.zeros((1024, 1024, 3), np.uint8)]]),
    }
    for match, (model, images) in wrong.items():
        with pytest.raises(ValueError, match=match):
            model.condition("a", images)
    with pytest.raises(ValueError, match="edits images, and these prompts have none"):
        edit.encode(["a prompt"])
    with pytest.raises(ValueError, match="a prompt without condition images"):
        edit.prefix([torch.zeros(4, 32)], [0], SIZE, SIZE)
    short = Conditioned(torch.zeros(4, 32), torch.zeros(4).bool(), torch.zeros(3, 16), ((2, 2),))
    with pytest.raises(ValueError, match="3 latent tokens and grids"):
        edit.prefix([short], [0], SIZE, SIZE)
    assert not QwenImage.takes_images()
    with pytest.raises(ValueError, match="draws from text alone"):
        QwenImage.condition_sizes((64, 64), 64 * 64)


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_target_tokens_enter_the_likelihood(make, name: str, mode: str) -> None:
    """Recorded states and log-probs are of the target's tokens; the condition acts through v alone.

    Two rows of a prompt, LoRA off its start; before an update the ratio is 1, bit for bit.
    """
    model, images = make(name), pictures_of(name)
    with torch.no_grad():
        for p in model.trainable("lora", 4, 8, None, 0).values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    prompt, null = (conditioned(model, text, images) for text in (PROMPT, ""))
    prompt.latents.requires_grad_()
    guidance = Guidance(2.0, model.norm_rescaled_guidance, mode)
    how = Sampling(SIZE, SIZE, 4, guidance, "flow_sde")
    settings = {"group_size": 2, "seed": 0, "update": 1, "recorded": (0, 1)}
    config = model.pipeline.scheduler.config
    (chunk,) = sample(model, [prompt], null, how, config, **settings)
    assert {x.shape for x in (*chunk.x, *chunk.x_next, chunk.latents)} == {(2, TOKENS, CHANNELS)}
    for i, step in enumerate(replay(model, chunk, how)):
        assert torch.equal(step.logp, step.logp_old)
        a, c, _, w, b = coefficient_tensors(step.coefficients, 2, model.device)
        x, x_next, v = chunk.x[i], chunk.x_next[i], step.velocity
        cut = v.detach().requires_grad_()
        logp = ops.flow_logp(x, x_next, cut, a, c, w, b, delta=chunk.delta[i])
        assert v.shape == (2, TOKENS, CHANNELS) and torch.equal(logp, step.logp)
        (through,) = torch.autograd.grad(logp.sum(), cut)
        whole = torch.autograd.grad(step.logp.sum(), prompt.latents, retain_graph=True)[0]
        chained = torch.autograd.grad(v, prompt.latents, through, retain_graph=True)[0]
        assert whole.abs().max() > 0 and torch.equal(whole, chained)
    model.velocity = lambda x, sigma, prefix: 0.5 * x  # it does not look at the condition
    scored = [step.logp for step in replay(model, chunk, how)]
    assert len(scored) == 2 and not any(logp.requires_grad for logp in scored)
