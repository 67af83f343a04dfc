"""GRPO (arXiv 2505.05470) in an accelerate script, on the packaged tiny Qwen-Image-2.1.

    accelerate launch --cpu --num_processes 1 examples/accelerate_grpo.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_grpo.py

Every process draws its share of every prompt's group. Rewards are gathered, advantages are those of
whole groups, gradients are averaged by accelerate. The noise of a sample depends on its number
alone, so any number of processes trains on the same samples.

Shapes: B samples of one prompt in this process, N = 16 latent tokens, Z channels; float32.
"""

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import QwenImage21Pipeline
from peft import LoraConfig
from torch import Tensor

import qirl_fast
from qirl_fast import ops
from qirl_fast.processor import QwenVLProcessor
from qirl_fast.rewards import alignment
from qirl_fast.rollout.dynamics import step_coefficients
from qirl_fast.tiny import packaged

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
ROWS = [  # prompts, as the judge reads them
    {"prompt": f"a photo of a {color} {kind}", "include": [{"class": kind, "color": color}]}
    for color, kind in (("red", "square"), ("blue", "triangle"), ("green", "circle"))
]
PIXELS, TOKENS, STEPS, TRAINED, ETA, CLIP = 64, 16, 6, 3, 0.9, 1e-3


def velocity(transformer: Any, x: Tensor, sigma: float, text: Tensor) -> Tensor:
    rows, side, length = len(x), math.isqrt(TOKENS), text.shape[1]
    slots = torch.arange(length + TOKENS // 4, device=x.device) >= length  # 4 tokens in a slot
    layout = {"img_shapes": [[(1, side, side)]] * rows, "img_mask": slots.expand(rows, -1)}
    level = torch.full((rows,), sigma, device=x.device)
    v: Tensor = transformer(x, text.expand(rows, -1, -1), level, **layout, return_dict=False)[0]
    return v[:, -TOKENS:]


def coefficients(sigmas: list[float], i: int, like: Tensor) -> list[Tensor]:
    """(a, c, s, w, b) of step i, [B] each: what every dynamics comes down to."""
    k = step_coefficients("flow_sde", sigmas[i], sigmas[i + 1], eta=ETA, sigma_max=sigmas[1])
    return [torch.full((len(like),), z, device=like.device) for z in (k.a, k.c, k.s, k.w, k.b)]


def decode(pipeline: QwenImage21Pipeline, latents: Tensor) -> np.ndarray:
    """uint8 images [B, H, W, 3], over white."""
    vae, side = pipeline.vae, math.isqrt(TOKENS)
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    z = latents.transpose(1, 2).unflatten(2, (1, side, side))
    rgba = (vae.decode(z * std + mean, return_dict=False)[0][:, :, 0] / 2 + 0.5).clamp(0, 1)
    rgb = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
    return (rgb.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


@torch.no_grad()
def sample(
    transformer: Any, text: Tensor, seeds: Tensor, sigmas: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """The states of every step [B, N, Z] and their log-probabilities [B]."""
    zero = torch.zeros(len(seeds), TOKENS, text.shape[-1] // 4, device=text.device)
