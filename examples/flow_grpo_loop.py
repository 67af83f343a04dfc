"""A loop in the style of flow_grpo (arXiv 2505.05470), in plain PyTorch and with exchanged ops.

Trains a LoRA of the packaged tiny Qwen-Image-2.1 by the clipped ratio. `Plain` is stock diffusers
and PyTorch, `Fused` what changes. They take turns, so what slows the machine slows both.

Shapes: P prompts, B samples of each, N = (pixels / 16)^2 latent tokens, Z channels; float32.
"""

import argparse
import copy
import math
from collections import defaultdict
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import QwenImage21Pipeline
from peft import LoraConfig
from torch import Tensor

import qirl_fast
from qirl_fast import ops
from qirl_fast.compat.flow_grpo import sde_step_with_logprob
from qirl_fast.processor import QwenVLProcessor
from qirl_fast.tiny import packaged

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
PROMPTS = ("a photo of a red circle", "a photo of a blue square")
GROUP, STEPS, TRAINED, ETA, CLIP = 8, 6, 3, 0.7, 1e-3  # the first 3 of 6 steps are trained


class Plain:
    def __init__(self, transformer: Any, scheduler: Any, texts: list[Tensor]):
        self.transformer, self.scheduler, self.texts = transformer, scheduler, texts
        self.weights = [p for p in transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3)
        self.seconds: list[dict[str, float]] = []  # of each iteration, by part

    def step(self, v: Tensor, t: Tensor, x: Tensor, x_next: Tensor | None = None) -> Any:
        """x' ~ N(mean, s^2) and its log-probability [B], averaged over N and Z."""
        sigmas, i = self.scheduler.sigmas, self.scheduler.index_for_timestep(t)
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        g = ETA * torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        drift, s = g**2 / (2 * sigma), g * torch.sqrt(-dt)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
        x_next = mean + s * torch.randn_like(x) if x_next is None else x_next
        logp = -((x_next - mean) ** 2) / (2 * s**2) - s.log() - math.log(2 * math.pi) / 2
        return x_next, logp.mean(dim=(1, 2))

    def advantage(self, rewards: Tensor) -> Tensor:
        groups = rewards.view(-1, GROUP)
        std, mean = torch.std_mean(groups, dim=1, correction=0, keepdim=True)
        return ((groups - mean) / (std + 1e-4)).clamp(-5, 5).flatten()

    def loss(self, logp: Tensor, logp_old: Tensor, advantage: Tensor) -> Tensor:
        ratio = torch.exp(logp - logp_old)
        return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        rows, side, length = len(x), math.isqrt(x.shape[1]), text.shape[1]
        slots = torch.arange(length + x.shape[1] // 4) >= length  # four latent tokens in a slot
        text, time = text.expand(rows, -1, -1), (t / 1000).expand(rows)
        layout = {"img_shapes": [[(1, side, side)]] * rows, "img_mask": slots.expand(rows, -1)}
        v: Tensor = self.transformer(x, text, time, **layout, return_dict=False)[0]
        return v[:, -x.shape[1] :]

    def timed(self, part: str, function: Any, *args: Any) -> Any:
        start = perf_counter()
        result = function(*args)
        self.seconds[-1][part] += perf_counter() - start
        return result

    @torch.no_grad()
    def sample(self, noise: Tensor) -> list[Any]:
        """Of each prompt the states [B, N, Z] and the log-probabilities [B] of the steps."""
        rollout: list[Any] = []
        for text in self.texts:
            x, logp = [noise], list[Tensor]()
            for t in self.scheduler.timesteps:
                v = self.timed("sample: velocity", self.velocity, x[-1], t, text)
                x_next, new = self.timed("sample: step", self.step, v, t, x[-1])
                x, logp = [*x, x_next], [*logp, new]
            rollout.append((x, logp))
        return rollout

    def train(self, rollout: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """An update; the log-probabilities [P TRAINED B], loss and gradient it was made of."""
        rewards = torch.cat([-x[-1].square().mean(dim=(1, 2)) for x, _ in rollout])  # for a judge
        advantages = self.timed("advantage", self.advantage, rewards).split(GROUP)
        logps, losses = list[Tensor](), list[Tensor]()
        for (x, old), text, advantage in zip(rollout, self.texts, advantages, strict=True):
            for i, t in enumerate(self.scheduler.timesteps[:TRAINED]):
                v = self.timed("train: velocity", self.velocity, x[i], t, text)
                _, logp = self.timed("train: score", self.step, v, t, x[i], x[i + 1])
                loss = self.timed("train: loss", self.loss, logp, old[i], advantage)
                self.timed("train: backward", loss.backward)
                logps, losses = [*logps, logp.detach()], [*losses, loss.detach()]
        gradient = torch.cat([p.grad.flatten() for p in self.weights])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat(logps), torch.stack(losses).mean(), gradient


class Fused(Plain):  # what changes, beside qirl_fast.patch(transformer)
    def step(self, v: Tensor, t: Tensor, x: Tensor, x_next: Tensor | None = None) -> Any:
        return sde_step_with_logprob(self.scheduler, v, t, x, ETA, prev_sample=x_next)[:2]

    def advantage(self, rewards: Tensor) -> Tensor:
        group = torch.arange(len(rewards)) // GROUP  # in any order
        return ops.group_advantage(rewards[:, None], group, torch.ones(1)).advantage

    def loss(self, logp: Tensor, logp_old: Tensor, advantage: Tensor) -> Tensor:
        return ops.policy_loss(logp, logp_old, advantage, clip_low=CLIP, clip_high=CLIP).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, default=256, help="side of an image")
    parser.add_argument("--repeats", type=int, default=3, help="timed iterations of each")
    args = parser.parse_args()
    if args.pixels < 32 or args.pixels % 32 or args.repeats < 1:
        parser.error(f"got {vars(args)}; want pixels a multiple of 32 and repeats at least 1")

    torch.manual_seed(0)
    processor = QwenVLProcessor.from_pretrained(packaged("tiny") / "processor")
    pipeline = QwenImage21Pipeline.from_pretrained(packaged("tiny"), processor=processor)
    transformer, scheduler = pipeline.transformer.requires_grad_(False), pipeline.scheduler
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.5)
    with torch.no_grad():
        texts = [pipeline.encode_prompt(prompt)[0] for prompt in PROMPTS]
    plain = Plain(transformer, scheduler, texts)
    fused = Fused(qirl_fast.patch(copy.deepcopy(transformer)), scheduler, texts)

    noise = torch.randn(GROUP, (args.pixels // 16) ** 2, transformer.config.in_channels)
    for _ in range(1 + args.repeats):  # the first is cold
        for loop in (plain, fused):
            loop.seconds.append(defaultdict(float))
            loop.train(loop.sample(noise))
            loop.seconds[-1]["total"] = sum(loop.seconds[-1].values())
    print(f"{'seconds (median)':20} {'plain':>9} {'fused':>9} {'gain':>6}")
    for part in plain.seconds[0]:
        was, now = (median(s[part] for s in loop.seconds[1:]) for loop in (plain, fused))
        print(f"{part:20} {was:9.4f} {now:9.4f} {was / now:5.2f}x")

    rollout = plain.sample(noise)
    old, *_ = [plain.train(rollout)[0] for _ in range(2)]  # after two updates the ratio is not 1
    fused.transformer.load_state_dict(plain.transformer.state_dict())
    (logp, loss, grad), (logp_f, loss_f, grad_f) = plain.train(rollout), fused.train(rollout)
    print(f"ratios up to {(logp - old).exp().max():.4f}, losses {loss:.6f} and {loss_f:.6f}")
    print(f"log-probabilities differ by {(logp - logp_f).abs().max():.1e} at most, ", end="")
    print(f"gradients by {(grad - grad_f).norm() / grad.norm():.1e} of their norm")


if __name__ == "__main__":
    main()
