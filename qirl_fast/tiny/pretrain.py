"""Pre-training of the tiny model: autoencoder first, then text encoder and DiT together.

Editing is learnt afterwards, in a stage of its own (`pretrain_edits.py`).

The DiT first learns from right captions, then from captions of which a share is wrong, word by
word, as web captions are (`scenes.misread`). That leaves a model that draws clean scenes and knows
every word, but follows a prompt only part of the time: the room reinforcement learning then takes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21
from torch import Tensor, nn

from qirl_fast.models.prefix import Prefix
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.tiny import scenes

Report = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes of one run; the last `wrong_steps` misread a share `wrong_words` of all attributes."""

    seed: int = 0
    vae_steps: int = 1600
    vae_batch: int = 32
    vae_scenes: int = 6000
    dit_steps: int = 7000
    wrong_steps: int = 600
    captions_per_step: int = 32
    scenes_per_caption: int = 4
    dit_scenes: int = 16384
    wrong_words: float = 0.5
    drop_text: float = 0.1


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 RGBA [B, 4, 1, H, W] in [-1, 1], opaque."""
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([rgb, torch.ones_like(rgb[:, :1])], 1).unsqueeze(2)


def _rows_by_tag() -> dict[str, list[scenes.Row]]:
    rows = scenes.all_rows()
    return {tag: [row for row in rows if row["tag"] == tag] for tag in scenes.TAGS}


def train_vae(vae: AutoencoderKLQwenImage21, recipe: Recipe, report: Report) -> float:
    """Train in place on rendered scenes; sets latents_mean and latents_std. Returns PSNR in dB."""
    rng = np.random.default_rng(recipe.seed)
    by_tag = _rows_by_tag()
    pool = np.stack(
        [
            scenes.render(scenes.sample_scene(scenes.sample_row(by_tag, rng), rng))
            for _ in range(recipe.vae_scenes)
        ]
    )
    pixels = _pixels(pool)
    train, held = pixels[:-256], pixels[-256:]
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.5e-3, total_steps=recipe.vae_steps, pct_start=0.05
    )
    vae.requires_grad_(True).train()
    for step in range(recipe.vae_steps):
        x = train[torch.randint(0, len(train), (recipe.vae_batch,))]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(), return_dict=False)[0] - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 5e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("autoencoder", step + 1, recipe.vae_steps, {"loss": loss.item()})
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        z = vae.encode(held).latent_dist.mean
        mse = (vae.decode(z, return_dict=False)[0] - held)[:, :3].square().mean().item()
        z = vae.encode(train[:1024]).latent_dist.mean
    vae.register_to_config(
        latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist()
    )
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def latents_of(vae: AutoencoderKLQwenImage21, images: np.ndarray) -> Tensor:
    """uint8 images -> normalised latents [B, N, Z]."""
    z = torch.cat([vae.encode(part).latent_dist.mean for part in _pixels(images).split(64)])
    shape = (1, -1, 1, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return ((z - mean.view(shape)) / std.view(shape)).flatten(2).transpose(1, 2).contiguous()


class Pool:
    """Latents of scenes, filed under the caption they claim, captions filed by token count."""

    def __init__(self, model: QwenImage21, recipe: Recipe, wrong_words: float, report: Report):
        rng = np.random.default_rng([recipe.seed, int(1000 * wrong_words)])
        by_tag = _rows_by_tag()
        self.captions: list[str] = []
        latents = []
        for start in range(0, recipe.dit_scenes, 256):
            rows = [scenes.sample_row(by_tag, rng) for _ in range(256)]
            drawn = [scenes.misread(row, wrong_words, rng) for row in rows]
            images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in drawn])
            latents.append(latents_of(model.vae, images))
            self.captions += [row["prompt"] for row in rows]
            report(f"scenes, {wrong_words:.0%} wrong", start + 256, recipe.dit_scenes, {})
        self.latents = torch.cat(latents)
        self.members: dict[str, list[int]] = {}
        for i, caption in enumerate(self.captions):
            self.members.setdefault(caption, []).append(i)
        self.lengths: dict[int, list[int]] = {}
        tokenize = model.pipeline.processor.tokenizer.tokenize
        counts = {caption: len(tokenize(caption)) for caption in self.members}
        for i, caption in enumerate(self.captions):
            self.lengths.setdefault(counts[caption], []).append(i)

    def draw(self, recipe: Recipe, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Captions of one token count [P] and latents [P * scenes_per_caption, N, Z]."""
        first = self.captions[rng.integers(len(self.captions))]
        same = next(ids for ids in self.lengths.values() if self.members[first][0] in ids)
        picks = rng.choice(same, recipe.captions_per_step)
        captions = [self.captions[i] for i in picks]
        ids = [rng.choice(self.members[c], recipe.scenes_per_caption) for c in captions]
        return captions, self.latents[np.concatenate(ids)]

    def batch(
        self, model: QwenImage21, recipe: Recipe, rng: np.random.Generator
    ) -> tuple[Prefix, Tensor]:
        """Differentiable prefix and latents of one step; all captions are dropped at a chance."""
        captions, x0 = self.draw(recipe, rng)
        if rng.random() < recipe.drop_text:
            captions = [" "] * len(captions)
        owner = np.repeat(np.arange(len(captions)), recipe.scenes_per_caption).tolist()
        text, mask, _ = model.pipeline.encode_prompt(captions, device=model.device)
        assert mask is None, "captions of equal token count"
        return model.prefix(list(text), owner, scenes.SIZE, scenes.SIZE), x0


def train_dit(model: QwenImage21, recipe: Recipe, report: Report) -> None:
    """Flow matching, text encoder included, right captions then wrong; ends on averaged weights."""
    right = Pool(model, recipe, 0.0, report)
    wrong = Pool(model, recipe, recipe.wrong_words, report)
    right_steps = recipe.dit_steps - recipe.wrong_steps

    def draw(step: int, rng: np.random.Generator) -> tuple[Prefix, Tensor]:
        return (right if step < right_steps else wrong).batch(model, recipe, rng)

    modules = [model.transformer, model.pipeline.text_encoder.model.language_model]
    fit = Fit("flow matching", recipe.dit_steps, recipe.wrong_steps)
    match_flow(model, modules, draw, fit, np.random.default_rng(recipe.seed + 2), report)


@dataclass(frozen=True)
class Fit:
    """One training run; the learning rate falls to nothing over the last `decay` steps."""

    name: str
    steps: int
    decay: int
    lr: float = 1.5e-3


def match_flow(
    model: QwenImage21,
    modules: Sequence[nn.Module],
    draw: Callable[[int, np.random.Generator], tuple[Prefix, Tensor]],
    fit: Fit,
    rng: np.random.Generator,
    report: Report,
) -> None:
    """Train `modules` in place on what draw(step, rng) gives: a prefix of B rows, x0 [B, N, Z].

    Noise levels lean to the high end (median 0.83): what is drawn where is settled there, and at
    the usual middle the text is learnt several times more slowly.
    """
    for module in modules:
        module.requires_grad_(True).train()
    parameters: list[Tensor] = [p for module in modules for p in module.parameters()]
    averaged = copy.deepcopy([p.detach() for p in parameters])
    optimizer = torch.optim.AdamW(parameters, fit.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 150, (fit.steps - step) / fit.decay)
    )
    for step in range(fit.steps):
        prefix, x0 = draw(step, rng)
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(len(x0)) * 1.2 + 1.6)
        x = torch.lerp(x0, noise, sigma[:, None, None])
        loss = (model.velocity(x, sigma, prefix) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        report(fit.name, step + 1, fit.steps, {"loss": loss.item()})
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in parameters], averaged)
    for module in modules:
        module.requires_grad_(False).eval()
