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
PIXELS, TOKENS, STEPS, TRAINED, ETA = 64, 16, 6, 3, 0.9
CLIP = {"clip_low": 1e-3, "clip_high": 1e-3}


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
    transformer: Any, text: Tensor, x: Tensor, seeds: Tensor, sigmas: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """The states [B, N, Z] from x on and the log-probabilities [B] of each step."""
    states, logps = [x], []
    for i in range(STEPS):
        v = velocity(transformer, states[-1], sigmas[i], text)
        step = coefficients(sigmas, i, x)
        x_next, logp = ops.flow_step(states[-1], v, *step, seed=seeds, offset=i)
        states.append(x_next)
        logps.append(logp)
    return states, logps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=20, help="updates, a rollout each")
    parser.add_argument("--group", type=int, default=16, help="samples of a prompt, all processes")
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=len(ROWS) * TRAINED)
    processes, device = accelerator.num_processes, accelerator.device
    if args.updates < 1 or args.group < 2 or args.group % processes:
        parser.error(
            f"got {vars(args)}, {processes} processes; want updates >= 1 and a group of 2 or more "
            "that divides by the processes"
        )
    share = args.group // processes

    torch.manual_seed(0)
    processor = QwenVLProcessor.from_pretrained(packaged("tiny") / "processor")
    pipeline = QwenImage21Pipeline.from_pretrained(packaged("tiny"), processor=processor).to(device)
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.5)
    sigmas = pipeline.scheduler.sigmas.tolist()
    with torch.no_grad():
        texts = [pipeline.encode_prompt(row["prompt"])[0] for row in ROWS]
    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    qirl_fast.patch(transformer)  # before accelerate wraps it
    weights = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.95))
    transformer, optimizer = accelerator.prepare(transformer, optimizer)

    for update in range(args.updates):
        start = time.perf_counter()
        noise = torch.Generator().manual_seed(update)
        x = torch.randn(1, TOKENS, 16, generator=noise).to(device).expand(share, -1, -1)
        rollout, scores = [], []
        for p, (row, text) in enumerate(zip(ROWS, texts, strict=True)):
            first = (update * len(ROWS) + p) * args.group + accelerator.process_index * share
            seeds = torch.arange(first, first + share, device=device)  # the numbers of the samples
            rollout.append(sample(transformer, text, x, seeds, sigmas))
            with torch.no_grad():
                images = decode(pipeline, rollout[-1][0][-1])
            scores.append(torch.from_numpy(alignment.score(images, [row] * share)))

        rewards = accelerator.gather(torch.cat(scores).to(device))  # of one process after another
        group = torch.arange(len(ROWS), device=device).repeat_interleave(share).repeat(processes)
        one = torch.ones(1, device=device)
        everyone = ops.group_advantage(rewards[:, None], group, one).advantage
        own = everyone.chunk(processes)[accelerator.process_index].split(share)

        drift = 0.0
        for text, (states, logps), advantage in zip(texts, rollout, own, strict=True):
            for i in range(TRAINED):
                with accelerator.accumulate(transformer):
                    v = velocity(transformer, states[i], sigmas[i], text)
                    a, c, _, w, b = coefficients(sigmas, i, x)
                    logp = ops.flow_logp(states[i], states[i + 1], v, a, c, w, b)
                    result = ops.policy_loss(logp, logps[i], advantage, **CLIP)
                    accelerator.backward(result.loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    drift = max(drift, float((result.ratio - 1).abs().max()))
        accelerator.print(
            f"update {update:3}  reward {rewards.mean():.6f}  ratio off 1 by {drift:.1e}  "
            f"seconds {time.perf_counter() - start:.2f}",
            flush=True,
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
