"""The GRPO step the field runs on Qwen-Image and 2.1, on stock diffusers modules and PEFT.

Both guidance branches at every denoising step for the whole group, in rollout and, with gradient,
in training; the SDE step and its log-probability in eager PyTorch; one recorded step at a time;
advantages and the clipped loss in eager PyTorch. Written after flow_grpo's `train_qwenimage.py` and
`qwenimage_pipeline_with_logprob.py`, and diffusers' QwenImage21Pipeline without its cache.

Shapes: B samples, N latent tokens, Z channels, L text tokens, C text channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Recorded:
    """A stochastic step: states before and after it, its noise levels, log-prob [B]."""

    x: Tensor
    x_next: Tensor
    sigma: float
    sigma_next: float
    logp: Tensor


@dataclass
class Loop:
    """One prompt's group on a stock transformer with an adapter.

    text, null: embeddings [L, C] of the prompt and [L0, C] of the empty one, L0 <= L.
    condition: latents [M, Z] of a square condition image, or None; the first M / 4 embeddings of
    both prompts are then its slots.
    """

    transformer: Any
    text: Tensor
    null: Tensor
    grid: tuple[int, int]
    group: int
    sigmas: Sequence[float]
    window: range
    scale: float
    eta: float
    condition: Tensor | None = None
    clip: float = 1e-3
    recorded: list[Recorded] = field(default_factory=list)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """[B, N, Z]. For 2.1 the branches are two calls, as in diffusers' pipeline: their texts
        differ in length, and padding would move the image's positions."""
        if isinstance(self.transformer, QwenImageTransformer2DModel):
            return self.padded(x, sigma)
        v_cond = self.branch(x, sigma, self.text)
        v_uncond = self.branch(x, sigma, self.null)
        return v_uncond + self.scale * (v_cond - v_uncond)

    def padded(self, x: Tensor, sigma: float) -> Tensor:
        """Qwen-Image: one call for both branches, the shorter text padded and masked; the guided
        velocity keeps the conditional one's norm."""
        lengths = (len(self.text), len(self.null))
        null = F.pad(self.null, (0, 0, 0, lengths[0] - lengths[1]))
        text = torch.stack([self.text, null]).repeat_interleave(len(x), dim=0)
        valid = torch.arange(lengths[0], device=x.device) < text.new_tensor(lengths)[:, None]
        out: Tensor = self.transformer(
            hidden_states=torch.cat([x, x]),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=valid.repeat_interleave(len(x), dim=0),
            timestep=torch.full((2 * len(x),), sigma, device=x.device, dtype=x.dtype),
            img_shapes=[[(1, *self.grid)]] * (2 * len(x)),
            return_dict=False,
        )[0]
        v_cond, v_uncond = out.chunk(2)
        v = v_uncond + self.scale * (v_cond - v_uncond)
        norm = torch.norm(v_cond, dim=-1, keepdim=True) / torch.norm(v, dim=-1, keepdim=True)
        return v * norm

    def branch(self, x: Tensor, sigma: float, text: Tensor) -> Tensor:
        """The joint sequence of text and image through every block."""
        slots = torch.zeros(len(x), len(text) + x.shape[1] // 4, dtype=torch.bool, device=x.device)
        slots[:, len(text) :] = True
        images, shapes = x, [(1, *self.grid)]
        if self.condition is not None:
            tokens = len(self.condition)
            slots[:, : tokens // 4] = True
            images = torch.cat([self.condition.expand(len(x), -1, -1), x], dim=1)
            shapes = [(1, math.isqrt(tokens), math.isqrt(tokens)), *shapes]
        out: Tensor = self.transformer(
            hidden_states=images,
            encoder_hidden_states=text.expand(len(x), -1, -1),
            timestep=torch.full((len(x),), sigma, device=x.device, dtype=x.dtype),
            img_shapes=[shapes] * len(x),
            img_mask=slots,
            return_dict=False,
        )[0]
        return out[:, -x.shape[1] :]

    def step(
        self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, x_next: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state after a stochastic step (drawn, unless given) and its log-prob [B]."""
        x, v, dt = x.float(), v.float(), sigma_next - sigma
        below = self.sigmas[1] if sigma == 1 else sigma
        std = math.sqrt(sigma / (1 - below)) * self.eta
        mean = x * (1 + std**2 / (2 * sigma) * dt)
        mean = mean + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        spread = std * math.sqrt(-dt)
        if x_next is None:
            x_next = mean + spread * torch.randn_like(mean)
        logp = -((x_next.detach().float() - mean) ** 2) / (2 * spread**2)
        logp = logp - math.log(spread) - math.log(math.sqrt(2 * math.pi))
        return x_next, logp.mean(dim=(1, 2))

    @torch.no_grad()
    def rollout(self) -> Tensor:
        """Final latents [B, N, Z]; the steps of the window are recorded."""
        tokens = self.grid[0] * self.grid[1]
        channels = self.transformer.config.in_channels
        device, dtype = self.text.device, self.transformer.dtype
        x = torch.randn(self.group, tokens, channels, device=device, dtype=dtype)
        self.recorded.clear()
        for i, (sigma, below) in enumerate(zip(self.sigmas, self.sigmas[1:], strict=False)):
            v = self.velocity(x, sigma)
            if i in self.window:
                x_next, logp = self.step(x, v, sigma, below)
                x_next = x_next.to(dtype)
                self.recorded.append(Recorded(x, x_next, sigma, below, logp))
                x = x_next
            else:
                x = x + (below - sigma) * v
        return x

    def advantages(self, rewards: Tensor) -> Tensor:
        """[B] of rewards [B] of one group."""
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    def loss(self, step: Recorded, advantage: Tensor) -> Tensor:
        """The clipped loss of one recorded step, with graph."""
        v = self.velocity(step.x, step.sigma)
        _, logp = self.step(step.x, v, step.sigma, step.sigma_next, step.x_next)
        ratio = torch.exp(logp - step.logp)
        clipped = torch.clamp(ratio, 1 - self.clip, 1 + self.clip)
        worst = torch.maximum(-advantage * ratio, -advantage * clipped)
        return worst.mean() / len(self.recorded)
