"""Small stock transformers of both families with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: norms and the adapters' B are not left at 1 and 0."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            if p.ndim == 1:
                p.copy_(("norm" in name) + 0.2 * noise)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)
    return model.eval()


def qwen21(**changes: Any) -> Any:
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "context_in_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    return randomised(QwenImage21Transformer2DModel(**(config | changes)))


def qwen(**changes: Any) -> Any:
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    return randomised(QwenImageTransformer2DModel(**(config | changes)))


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def inputs21(condition: bool = False, padded: bool = False) -> dict[str, Any]:
    """Text, with `condition` a 2 x 4 image amid it, and a 4 x 4 target."""
    shapes = [(1, 2, 4), (1, 4, 4)] if condition else [(1, 4, 4)]
    text = 7
    slots = [False] * 5 + [True, True] * condition + [False] * 2 + [True] * 4
    given = {
        "hidden_states": draw(3, 8 * condition + 16, 8),
        "encoder_hidden_states": draw(3, text + 2 * condition, 24, seed=2),
        "timestep": torch.tensor([0.9, 0.4, 0.05]),
        "img_shapes": [shapes] * 3,
        "img_mask": torch.tensor([slots] * 3),
    }
    if padded:
        valid = torch.ones(3, text + 2 * condition, dtype=torch.bool)
        valid[1, -2:] = False
        given["encoder_hidden_states_mask"] = valid
    return given


def inputs(condition: bool = False, padded: bool = False) -> dict[str, Any]:
    shapes = [(1, 4, 4), (1, 2, 4)] if condition else [(1, 4, 4)]
    given = {
        "hidden_states": draw(3, 16 + 8 * condition, 16),
        "encoder_hidden_states": draw(3, 7, 24, seed=2),
        "timestep": torch.tensor([0.9, 0.4, 0.05]),
        "img_shapes": [shapes] * 3,
    }
    if padded:
        valid = torch.ones(3, 7, dtype=torch.bool)
        valid[1, -2:] = False
        given["encoder_hidden_states_mask"] = valid
    return given
