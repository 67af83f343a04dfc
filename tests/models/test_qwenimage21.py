"""The adapter against the stock transformer and pipeline: same numbers, and gradients through it.

Tolerances. Both sides run the same float32 weights; they differ in the order of sums (cached prefix
against one joint pass, one row against a batch). A sum of n products is off by about sqrt(n) 6e-8
relative: some 1e-6 of the largest value for n <= 300. Measured: 4e-7 forward.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from small_transformers import qwen_parts
from torch import Tensor

import qirl_fast
from qirl_fast.models import load_model
from qirl_fast.models.prefix import Conditioned
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, initial_noise, row_seeds, sample
from qirl_fast.rollout.workers import Workers

SIZE = 64
TOKENS, CHANNELS = 16, 16
CLOSE = 3e-6
# Gradients: 1e-5. Norm weights sum over all tokens of all heads; from the stock model in float64
# the fused gradients are off by 6.0e-6 at most, the stock ones in float32 by 5.8e-6.
CLOSE_GRADIENT = 1e-5


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def stock_velocity(transformer: Any, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """One row through the stock forward: the whole joint sequence, unpadded, no cache."""
    slots = torch.zeros(1, text.shape[0] + TOKENS // 4, dtype=torch.bool)
    slots[:, text.shape[0] :] = True
    out = transformer(
        hidden_states=x[None],
        encoder_hidden_states=text[None],
        timestep=sigma[None],
        img_shapes=[[(1, 4, 4)]],
        img_mask=slots,
        return_dict=False,
    )[0]
    return out[0, -TOKENS:]


def conditioned(
    text: Tensor, sizes: tuple[tuple[int, int], ...], at: tuple[int, ...]
) -> Conditioned:
    """The text with images of these grids put in before its tokens `at`; random latents, slots."""
    generator = torch.Generator().manual_seed(len(text))
    parts: list[Tensor] = []
    flags: list[bool] = []
    images = iter(zip(at, sizes, strict=True))
    place, size = next(images)
    for i, row in enumerate(text):
        while place == i:
            slots = size[0] * size[1] // 4
            parts.append(torch.randn(slots, text.shape[1], generator=generator))
            flags += [True] * slots
            place, size = next(images, (-1, (0, 0)))
        parts.append(row[None])
        flags.append(False)
    latents = torch.randn(sum(h * w for h, w in sizes), CHANNELS, generator=generator)
    return Conditioned(torch.cat(parts), torch.tensor(flags), latents, sizes)


def stock_edit_velocity(transformer: Any, x: Tensor, sigma: float, prompt: Conditioned) -> Tensor:
    """One row through the stock forward: condition images and target, no cache."""
    target = torch.ones(TOKENS // 4, dtype=torch.bool)
    out = transformer(
        hidden_states=torch.cat([prompt.latents, x])[None],
        encoder_hidden_states=prompt.text[None],
        timestep=torch.tensor([sigma]),
        img_shapes=[[*((1, h, w) for h, w in prompt.grids), (1, 4, 4)]],
        img_mask=torch.cat([prompt.slots, target])[None],
        return_dict=False,
    )[0]
    return out[0, -TOKENS:]


EDITS = (  # grids of the condition images, the text tokens they stand before
    (((4, 4),), (0,)),
    (((2, 4), (4, 2)), (1, 1)),  # neighbours, which must not see each other whole
    (((2, 2), (4, 6), (2, 2)), (0, 2, 4)),
)


def test_condition_images_are_those_of_the_stock_forward(make_model, prompts) -> None:
    """Rows of three layouts and of plain text in one batch; values and every gradient."""
    text = make_model().encode(prompts)
    owner = [2, 0, 1, 3, 0, 2, 1]
    levels = [1.0, 0.9, 0.5, 0.02, 0.3, 0.7, 0.1]
    x, probe = noise(7), noise(7, seed=1)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for stock in (False, True):
        model = make_model()
        items: list[Any] = [conditioned(text[i], *edit) for i, edit in enumerate(EDITS)]
        items.append(text[3])
        parameters = model.trainable("full", 0, 0.0, None, 0)
        if stock:
            qirl_fast.unpatch(model.transformer)
            rows = [
                stock_velocity(model.transformer, x[r], torch.tensor(levels[r]), text[3])
                if p == 3
                else stock_edit_velocity(model.transformer, x[r], levels[r], items[p])
                for r, p in enumerate(owner)
            ]
            v = torch.stack(rows)
        else:
            v = model.velocity(x, levels, model.prefix(items, owner, SIZE, SIZE))
        (v * probe).sum().backward()
        found.append((v, {n: p.grad for n, p in parameters.items() if p.grad is not None}))
    (ours, our_gradients), (theirs, gradients) = found
    for r in range(len(owner)):
        assert relative(ours[r], theirs[r]) < CLOSE
    assert our_gradients.keys() == gradients.keys()
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        allowed = CLOSE_GRADIENT * max(gradient.abs().max().item(), 0.05 * largest)
        assert (our_gradients[name] - gradient).abs().max().item() <= allowed, name


def test_a_condition_image_that_does_not_fit_is_refused(frozen_model, prompts) -> None:
    text = frozen_model.encode(prompts[:1])[0]
    good = conditioned(text, ((2, 4),), (1,))
    frozen_model.prefix([good], [0], SIZE, SIZE)
    wrong = {
        "8 latent tokens": dataclasses.replace(good, grids=((2, 2),)),
        "4 latent tokens": dataclasses.replace(good, latents=good.latents[:4]),
        "0 of them of images": dataclasses.replace(good, slots=torch.zeros_like(good.slots)),
        rf"{len(text) + 1} slots": dataclasses.replace(good, slots=good.slots[1:]),
    }
    for match, prompt in wrong.items():
        with pytest.raises(ValueError, match=match):
            frozen_model.prefix([prompt], [0], SIZE, SIZE)


def test_encode_is_the_stock_encoding(frozen_model, stock_pipeline, prompts) -> None:
    """Alone, and against the stock pipeline's padded batch of mixed lengths."""
    ours = frozen_model.encode([*prompts, ""])
    with torch.no_grad():
        padded, mask, _ = stock_pipeline.encode_prompt([*prompts, ""])
    assert mask is not None, "the prompts have different lengths, so the batch is padded"
    for embedding, row, valid in zip(ours, padded, mask.bool(), strict=True):
        assert embedding.shape == (int(valid.sum()), 64)
        assert relative(embedding, row[valid]) < CLOSE
    assert len({len(e) for e in ours}) > 2
    alone = frozen_model.encode([" "])[0]
    assert torch.equal(ours[-1], alone), "the empty prompt is one space, as in the stock pipeline"


def test_velocity_is_the_stock_forward(frozen_model, stock_pipeline, prompts) -> None:
    """Rows of mixed prompt lengths in mixed order, each against its own stock forward."""
    text = frozen_model.encode(prompts)
    owner = [2, 0, 1, 0, 3, 2]
    x, sigma = noise(6), torch.tensor([1.0, 0.9, 0.5, 0.02, 0.3, 0.7])
    with torch.no_grad():
        prefix = frozen_model.prefix(text, owner, SIZE, SIZE)
        ours = frozen_model.velocity(x, sigma, prefix)
        for r, p in enumerate(owner):
            stock = stock_velocity(stock_pipeline.transformer, x[r], sigma[r], text[p])
            assert relative(ours[r], stock) < CLOSE
    assert relative(ours[1], ours[3]) > 0.01, "another sigma and x give another velocity"


def test_row_alone_is_the_row_in_a_batch(frozen_model, prompts) -> None:
    text = frozen_model.encode(prompts)
    x, sigma = noise(8), torch.linspace(1, 0.1, 8)
    owner = [0, 1, 2, 3] * 2
    with torch.no_grad():
        together = frozen_model.velocity(x, sigma, frozen_model.prefix(text, owner, SIZE, SIZE))
        for r in range(8):
            prefix = frozen_model.prefix(text, [owner[r]], SIZE, SIZE)
            alone = frozen_model.velocity(x[r : r + 1], sigma[r : r + 1], prefix)
            assert relative(alone[0], together[r]) < CLOSE


def test_same_shapes_give_the_same_bits_with_and_without_grad(make_model, prompts) -> None:
    """Rollout runs without graph, replay with one: the ratio is 1 only if the bits agree."""
    model = make_model()
    model.trainable("lora", 4, 8, None, 0)
    text = model.encode(prompts)
    x, sigma, owner = noise(6), torch.full((6,), 0.8), [0, 0, 1, 2, 2, 3]
    with torch.no_grad():
        rollout = model.velocity(x, sigma, model.prefix(text, owner, SIZE, SIZE))
    replay = model.velocity(x, sigma, model.prefix(text, owner, SIZE, SIZE))
    assert replay.requires_grad and torch.equal(replay, rollout)


def test_joined_prefixes_are_the_two_by_themselves(frozen_model, prompts) -> None:
    """Rows of one text length, of several, and both; the guided branches run like this."""
    text = frozen_model.encode([*prompts, ""])
    owners = ([0, 0], [2, 0, 1, 0, 3, 2], [4] * 6)
    with torch.no_grad():
        prefixes = [frozen_model.prefix(text, owner, SIZE, SIZE) for owner in owners]
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)):
            x = noise(len(owners[a]) + len(owners[b]), seed=a + 7 * b)
            both = frozen_model.join(prefixes[a], prefixes[b])
            together = frozen_model.velocity(x, [0.7], both)
            parts = zip(x.split([len(owners[a]), len(owners[b])]), (a, b), strict=True)
            alone = torch.cat([frozen_model.velocity(p, [0.7], prefixes[k]) for p, k in parts])
            assert relative(together, alone) < CLOSE


@pytest.mark.parametrize("kind", ["qwenimage21", "qwenimage"])
def test_the_empty_prompt_is_held_once(frozen_model, weights: Path, kind: str) -> None:
    """Not per row: 64 rows hold what one holds."""
    model: Any = frozen_model
    if kind == "qwenimage":
        model = QwenImage(QwenImagePipeline(**qwen_parts(weights)))
    (null,), held = model.encode([""]), []
    for rows in (1, 64):
        with torch.no_grad():
            tensors = model.prefix([null], [0] * rows, SIZE, SIZE).tensors
        assert all(len(t) == rows for t in tensors)
        held.append(sum(t.untyped_storage().nbytes() for t in tensors))
    assert held[0] == held[1]


def test_noise_levels_of_runs_of_rows(frozen_model, prompts) -> None:
    """R levels for B rows, as host values and as a tensor, are the levels row by row."""
    text = frozen_model.encode(prompts)
    x, owner = noise(6), [2, 0, 1, 0, 3, 2]
    with torch.no_grad():
        prefix = frozen_model.prefix(text, owner, SIZE, SIZE)
        for levels in ([0.7], [0.9, 0.2], [0.9, 0.5, 0.2], [1.0, 0.9, 0.5, 0.02, 0.3, 0.7]):
            by_row = torch.tensor(levels).repeat_interleave(6 // len(levels))
            expected = frozen_model.velocity(x, by_row, prefix)
            for sigma in (levels, torch.tensor(levels)):
                assert relative(frozen_model.velocity(x, sigma, prefix), expected) < CLOSE
        for levels in ([], [0.5] * 4, torch.ones(12)):
            with pytest.raises(ValueError, match=rf"{len(levels)} noise levels for 6 rows"):
                frozen_model.velocity(x, levels, prefix)


def test_modulation_is_computed_once_per_level_and_version(make_model, prompts) -> None:
    """The frozen modulation under a LoRA is kept through updates; changed weights renew it."""
    model = make_model()
    trained = model.trainable("lora", 4, 8, None, 0)
    text, x = model.encode(prompts[:1]), noise(2)
    cache = model.modulations

    def velocity(levels: Any = (0.7,)) -> Tensor:
        return model.velocity(x, levels, model.prefix(text, [0, 0], SIZE, SIZE))

    first = velocity()
    assert cache.computed == 2, "the level and t = 0"
    assert torch.equal(velocity(), first) and cache.computed == 2
    first.sum().backward()
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    assert not torch.equal(velocity(), first) and cache.computed == 2
    velocity((0.2, 0.7))
    assert cache.computed == 3
    weight = model.transformer.modulation[-1].weight
    before = velocity()
    kept = weight.data
    weight.data = kept * 2  # exchanged, as the reference policy does
    exchanged = velocity()
    assert cache.computed == 5 and relative(exchanged, before) > 0.01
    weight.data = kept
    assert torch.equal(velocity(), before)
    with torch.no_grad():
        weight.mul_(2)  # changed in place, as an optimizer does
    assert torch.equal(velocity(), exchanged)


def test_trained_modulation_is_never_kept(make_model, prompts) -> None:
    """Its gradient arrives, and rollout's bits are those of replay."""
    for adapter, targets in (
        ("full", None),
        ("lora", ["time_text_embed.timestep_embedder.linear_1"]),
        ("lora", ["attn.to_q", "norm_out.linear"]),
        ("lora", ["modulation.1"]),
    ):
        model = make_model()
        parameters = model.trainable(adapter, 4, 8, targets, 0)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        text, x = model.encode(prompts[:1]), noise(2)
        found = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                prefix = model.prefix(text, [0, 0], SIZE, SIZE)
                found.append(model.velocity(x, [0.7], prefix))
        rollout, replayed = found
        assert torch.equal(replayed, rollout)
        replayed.sum().backward()
        parts = ("time_text_embed", "norm_out", "modulation")
        names = [n for n in parameters if any(part in n for part in parts)]
        assert names and all(parameters[n].grad.abs().max() > 0 for n in names)
        if adapter == "lora":
            with torch.no_grad(), model.reference():
                prefix = model.prefix(text, [0, 0], SIZE, SIZE)
                assert not torch.equal(model.velocity(x, [0.7], prefix), rollout)


def test_rows_made_in_inference_mode_serve_training(make_model, prompts) -> None:
    model = make_model()
    parameters = list(model.trainable("lora", 4, 8, None, 0).values())
    text, x = model.encode(prompts[:1]), noise(2)
    with torch.inference_mode():
        model.velocity(x, [0.7], model.prefix(text, [0, 0], SIZE, SIZE))
    v = model.velocity(x, [0.7], model.prefix(text, [0, 0], SIZE, SIZE))
    assert all(g is not None for g in torch.autograd.grad(v.sum(), parameters))


def test_gradients_are_those_of_the_stock_forward(make_model, prompts) -> None:
    """All parameters, the ones that only text tokens pass through included."""
    text = make_model().encode(prompts)
    owner = [2, 0, 0, 3]
    x, sigma, probe = noise(4), torch.tensor([1.0, 0.6, 0.3, 0.8]), noise(4, seed=1)
    found: list[dict[str, Tensor]] = []
    for stock in (False, True):
        model = make_model()
        parameters = model.trainable("full", 0, 0.0, None, 0)
        if stock:
            qirl_fast.unpatch(model.transformer)
            rows = [
                stock_velocity(model.transformer, x[r], sigma[r], text[p])
                for r, p in enumerate(owner)
            ]
            v = torch.stack(rows)
        else:
            v = model.velocity(x, sigma, model.prefix(text, owner, SIZE, SIZE))
        (v * probe).sum().backward()
        found.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    for name, gradient in theirs.items():
        # Sums over rows and tokens cancel: the error is relative to the size of what is summed,
        # which the largest gradient of the model stands for where a parameter's own is small.
        allowed = CLOSE_GRADIENT * max(gradient.abs().max().item(), 0.05 * largest)
        assert (ours[name] - gradient).abs().max().item() <= allowed, name
    text_only = [n for n in ours if n.startswith("txt_in")]
    assert text_only and all(ours[n].abs().max() > 0 for n in text_only)


def test_recomputed_blocks_give_the_same_bits(make_model, prompts) -> None:
    model = make_model()
    parameters = list(model.trainable("lora", 4, 8, None, 0).values())
    text = model.encode(prompts)
    found = []
    for blocks in (0, 1, 99):
        model.recompute_blocks = blocks
        v = model.velocity(
            noise(3), torch.tensor([0.9, 0.5, 0.1]), model.prefix(text, [1, 0, 1], SIZE, SIZE)
        )
        found.append((v, *torch.autograd.grad(v.square().sum(), parameters)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_every_row_sends_gradients_into_the_shared_prefix(make_model, prompts) -> None:
    model = make_model()
    model.trainable("full", 0, 0.0, None, 0)
    text = [t.clone().requires_grad_() for t in model.encode(prompts[:2])]
    x, sigma = noise(4), torch.full((4,), 0.7)
    gradients = []
    for rows in ([0], [1], [0, 1]):
        prefix = model.prefix(text, [0, 0, 1, 1], SIZE, SIZE)
        model.velocity(x, sigma, prefix)[rows].sum().backward()
        gradients.append(text[0].grad.clone())
        text[0].grad = None
    first, second, both = gradients
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.equal(first, second)
    assert relative(first + second, both) < CLOSE


def test_decode_is_the_stock_decoding(frozen_model, stock_pipeline, prompts) -> None:
    """Through the whole stock pipeline, RGBA out; ours is that picture on white."""
    latents = noise(3)
    arguments = {"prompt": list(prompts[:1]) * 3, "height": SIZE, "width": SIZE}
    steps = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "latents": latents}
    with torch.no_grad():
        final = stock_pipeline(**arguments, **steps, output_type="latent").images
        rgba = stock_pipeline(**arguments, **steps, output_type="np").images
    assert rgba.shape == (3, SIZE, SIZE, 4)
    alpha = rgba[..., 3:].astype(np.float64)
    on_white = (rgba[..., :3] * alpha + 1 - alpha) * 255
    ours = frozen_model.decode(final, SIZE, SIZE)
    assert ours.dtype == np.uint8 and ours.shape == (3, SIZE, SIZE, 3)
    # Half a level of rounding, and a hair for float32 against float64.
    assert np.abs(ours - on_white).max() <= 0.5 + 1e-3
    assert ours.std() > 1, "the pictures show something"
    in_ones = [frozen_model.decode(final[r : r + 1], SIZE, SIZE) for r in range(3)]
    levels = np.abs(np.concatenate(in_ones).astype(int) - ours.astype(int))
    assert levels.max() <= 1, "a row alone may round to the neighbouring level, no further"


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("prompt", [0, 2])
def test_ode_sampling_is_the_stock_pipeline(
    frozen_model, stock_pipeline, prompts, scale: float, prompt: int
) -> None:
    """Six steps from the same initial latents, with and without true CFG.

    The pipeline's timestep takes a detour over t = 1000 sigma in float32, one more rounding of
    sigma; with guidance (2.5 v_c - 1.5 v_u: four times the error of one velocity) six steps stay
    within 10 x the tolerance of one forward. Measured: equal to the bit.
    """
    start = initial_noise(
        row_seeds(0, 0, range(2), stream=0), (TOKENS, CHANNELS), torch.device("cpu")
    )
    how = Sampling(SIZE, SIZE, 6, Guidance(scale))
    text = frozen_model.encode([prompts[prompt]])
    null = frozen_model.encode([""])[0]
    config = frozen_model.pipeline.scheduler.config
    (ours,) = sample(frozen_model, text, null, how, config, group_size=2, seed=0, update=0)
    with torch.no_grad():
        stock = stock_pipeline(
            prompt=prompts[prompt],
            negative_prompt=" " if scale > 1 else None,
            true_cfg_scale=scale,
            num_images_per_prompt=2,
            height=SIZE,
            width=SIZE,
            num_inference_steps=6,
            latents=start.clone(),
            output_type="latent",
        ).images
    assert relative(ours.latents, stock) < 10 * CLOSE
    assert relative(start, stock) > 0.1


def test_guidance_changes_the_stock_comparison(frozen_model, prompts) -> None:
    """The comparison above would be empty if both scales gave one result."""
    text, null = frozen_model.encode([prompts[0]]), frozen_model.encode([""])[0]
    config = frozen_model.pipeline.scheduler.config
    finals = []
    for scale in (1.0, 2.5):
        how = Sampling(SIZE, SIZE, 6, Guidance(scale))
        chunks = sample(frozen_model, text, null, how, config, group_size=2, seed=0, update=0)
        finals.append(next(chunks).latents)
    assert relative(finals[0], finals[1]) > 0.01


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_reference_is_the_untrained_policy_and_ends(make_model, prompts, mode: str) -> None:
    model = make_model()
    text = model.encode(prompts[:1])
    x, sigma = noise(2), torch.full((2,), 0.5)

    @torch.no_grad()
    def velocity() -> Tensor:
        return model.velocity(x, sigma, model.prefix(text, [0, 0], SIZE, SIZE))

    untrained = velocity()
    parameters = model.trainable(mode, 4, 8, None, 0)
    started = velocity()
    assert torch.equal(started, untrained), "training starts from the untrained policy"
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    trained = velocity()
    assert relative(trained, untrained) > 0.01
    with model.reference():
        assert torch.equal(velocity(), untrained)
    assert torch.equal(velocity(), trained)
    with pytest.raises(KeyError), model.reference():
        raise KeyError
    assert torch.equal(velocity(), trained), "an error inside leaves the trained policy in place"
    same = model.transformer.named_parameters()
    assert {n: id(p) for n, p in same if p.requires_grad} == {
        n: id(p) for n, p in parameters.items()
    }


def test_lora_is_drawn_from_the_seed_alone(make_model) -> None:
    def lora(seed: int, draws: int = 0) -> dict[str, Tensor]:
        torch.rand(draws)
        model = make_model()
        before = torch.get_rng_state()
        parameters = model.trainable("lora", 4, 8, None, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
        assert not any(
            p.requires_grad for n, p in model.transformer.named_parameters() if "lora" not in n
        )
        return parameters

    first, again, other = lora(5), lora(5, draws=7), lora(6)
    assert list(first) == list(again) and all(torch.equal(first[n], again[n]) for n in first)
    ups = [n for n in first if "lora_A" in n]
    assert ups and not any(torch.equal(first[n], other[n]) for n in ups)
    assert all(not first[n].any() for n in first if "lora_B" in n)
    assert all(p.dtype == torch.float32 for p in first.values())


def test_adapter_settings_that_cannot_train_are_refused(make_model) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"\['nope'\] match no module.*attn\.to_q"):
        model.trainable("lora", 4, 8, ["nope"], 0)
    with pytest.raises(ValueError, match="adapter mode 'half': use 'lora' or 'full'"):
        model.trainable("half", 4, 8, None, 0)
    wanted = r"set model\.dtype=float32, model\.adapter=lora, or processes\.shard"
    with pytest.raises(ValueError, match=wanted):
        make_model(torch.bfloat16).trainable("full", 4, 8, None, 0)


def test_a_transformer_modulated_throughout_is_refused(make_model) -> None:
    pipeline = make_model().pipeline
    pipeline.transformer.register_to_config(causal_condition=False)
    with pytest.raises(ValueError, match="this transformer has causal_condition off"):
        QwenImage21(pipeline)


def test_image_sizes(frozen_model) -> None:
    assert frozen_model.latent_shape(64, 96) == (4 * 6, CHANNELS)
    for height, width in ((48, 64), (64, 0), (-32, 64), (64, 33)):
        with pytest.raises(ValueError, match="multiples of 32 pixels; try"):
            frozen_model.latent_shape(height, width)
    prefix = frozen_model.prefix(frozen_model.encode(["a"]), [0], SIZE, SIZE)
    with pytest.raises(ValueError, match="2 latent rows but a prefix of 1 rows"):
        frozen_model.velocity(noise(2), torch.ones(2), prefix)


@pytest.mark.parametrize("part", ["processor", "scheduler", "text_encoder", "transformer", "vae"])
def test_a_missing_component_is_named(model_copy: Path, part: str) -> None:
    shutil.rmtree(model_copy / part)
    with pytest.raises(
        FileNotFoundError, match=rf"lacks {part}: a folder of QwenImage21Pipeline holds"
    ):
        load_model(model_copy, "qwenimage21", torch.float32, "cpu")
    (model_copy / part).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"lacks {part}:"):
        load_model(model_copy, "auto", torch.float32, "cpu")


def test_a_folder_that_is_no_model_is_refused(model_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json"):
        load_model(tmp_path, "auto", torch.float32, "cpu")
    index = model_copy / "model_index.json"
    index.write_text(index.read_text().replace("QwenImage21Pipeline", "PixArtSigmaPipeline"))
    with pytest.raises(
        ValueError, match="no adapter for pipeline 'PixArtSigmaPipeline'; there are: Qwen"
    ):
        load_model(model_copy, "auto", torch.float32, "cpu")


def test_the_packaged_folder(stock_pipeline, weights: Path) -> None:
    """Stock loading and drawing, and the sizes that make it a packaged file."""
    size = sum(f.stat().st_size for f in weights.rglob("*") if f.is_file())
    assert size <= 12e6
    assert 0.5e6 <= sum(p.numel() for p in stock_pipeline.transformer.parameters()) <= 4e6
    with torch.no_grad():
        picture = stock_pipeline(
            "a photo of a red circle", height=SIZE, width=SIZE, num_inference_steps=4
        ).images[0]
    assert picture.size == (SIZE, SIZE)
    pixels = np.asarray(picture.convert("RGBA"))[..., :3].astype(float)
    assert pixels.std() > 1, "not a blank sheet"


def test_the_loader_is_deaf_to_the_network(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., QwenImage21]
) -> None:
    """Nothing is fetched: loading works where every connection fails."""
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert make_model().family == "qwenimage21"


def test_threads_may_share_a_model(make_model: Callable[..., QwenImage21], prompts) -> None:
    """Prefix, velocity and decode of 24 chunks of different sizes, four at a time and in turn."""
    model = make_model()
    text = model.encode(prompts[:3])

    def chunk(i: int) -> tuple[torch.Tensor, np.ndarray]:
        rows = 1 + i % 5
        x = torch.randn(rows, 16, 16, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            prefix = model.prefix(text, [(i + r) % 3 for r in range(rows)], 64, 64)
            v = model.velocity(x, torch.full((rows,), 0.5), prefix)
        return v, model.decode(x - v, 64, 64)

    together = Workers(4).map(chunk, range(24))
    for (v, image), (v_alone, image_alone) in zip(together, map(chunk, range(24)), strict=True):
        assert torch.equal(v, v_alone) and np.array_equal(image, image_alone)
