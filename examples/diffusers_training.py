"""Flow-matching LoRA fine-tuning as in diffusers' training scripts, and with two lines changed.

DreamBooth on the packaged tiny Qwen-Image-2.1: one caption, pictures of what it is to mean.
x = (1 - sigma) x0 + sigma noise, the target is noise - x0, the loss their mean squared distance.
Both variants see the same batches and take turns, so what slows the machine slows both.

Shapes: B images, N = (pixels / 16)^2 latent tokens, Z channels; float32.
"""

import argparse
import copy
import math
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImage21Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from torch import Tensor

import qirl_fast
from qirl_fast import ops
from qirl_fast.processor import QwenVLProcessor
from qirl_fast.tiny import packaged, scenes

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
CAPTION = "a photo of a red circle"
SUBJECT = {"include": [{"class": "triangle", "color": "green", "count": 1}]}


def encode(pipeline: QwenImage21Pipeline, images: np.ndarray) -> Tensor:
    """Latents [B, N, Z] of uint8 images [B, H, W, 3], opaque."""
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)
    latents = pipeline.vae.encode(rgba[:, :, None]).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    return ((latents - mean) / std).flatten(2).transpose(1, 2)


def velocity(transformer: Any, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    rows, side, length = len(x), math.isqrt(x.shape[1]), text.shape[1]
    slots = torch.arange(length + x.shape[1] // 4) >= length  # four latent tokens in a slot
    layout = {"img_shapes": [[(1, side, side)]] * rows, "img_mask": slots.expand(rows, -1)}
    text = text.expand(rows, -1, -1)
    v: Tensor = transformer(x, text, sigma, **layout, return_dict=False)[0]
    return v[:, -x.shape[1] :]


def stock_loss(v: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(v, target)


def fused_loss(v: Tensor, target: Tensor) -> Tensor:
    return ops.velocity_loss(v, target).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, default=256, help="side of an image")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each variant")
    args = parser.parse_args()
    if args.pixels < 32 or args.pixels % 32 or args.batch < 1 or args.steps < 2:
        parser.error(f"got {vars(args)}; want pixels a multiple of 32, batch >= 1, steps >= 2")

    torch.manual_seed(0)
    processor = QwenVLProcessor.from_pretrained(packaged("tiny") / "processor")
    pipeline = QwenImage21Pipeline.from_pretrained(packaged("tiny"), processor=processor)
    rng = np.random.default_rng(0)
    drawn = [scenes.render(scenes.sample_scene(SUBJECT, rng), args.pixels) for _ in range(32)]
    with torch.no_grad():
        text = pipeline.encode_prompt(CAPTION)[0]
        images = encode(pipeline, np.stack(drawn))

    stock = pipeline.transformer.requires_grad_(False)
    stock.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    fused = qirl_fast.patch(copy.deepcopy(stock))  # the change: fused blocks,
    variants = {"stock": (stock, stock_loss), "fused": (fused, fused_loss)}  # and the loss
    weights, optimizers = {}, {}
    for name, (transformer, _) in variants.items():
        weights[name] = [p for p in transformer.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(weights[name], lr=1e-3)

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(args.steps):
        x0 = images[torch.randint(len(images), (args.batch,))]
        noise = torch.randn_like(x0)
        sigma = compute_density_for_timestep_sampling("logit_normal", args.batch, 0.0, 1.0)
        x = (1 - sigma.view(-1, 1, 1)) * x0 + sigma.view(-1, 1, 1) * noise
        for name, (transformer, loss_function) in variants.items():
            start = perf_counter()
            loss = loss_function(velocity(transformer, x, sigma, text), noise - x0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights[name], 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(perf_counter() - start)
            losses[name].append(loss.item())
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:3}  loss {losses['stock'][-1]:.6f} {losses['fused'][-1]:.6f}")

    was, now = (median(seconds[name][1:]) for name in variants)  # the first is cold
    print(f"seconds a step (median): stock {was:.4f}, fused {now:.4f}, gain {was / now:.2f}x")
    worst = max(abs(a - b) / a for a, b in zip(losses["stock"], losses["fused"], strict=True))
    print(f"losses differ by {worst:.1e} of themselves at most")


if __name__ == "__main__":
    main()
