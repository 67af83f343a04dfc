"""Small stock transformers of both families with random weights, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from qirl_fast.processor import QwenVLProcessor


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


TEXT_WIDTH = 32


def qwen_parts(weights: Path, **changes: Any) -> dict[str, Any]:
    """The components of a QwenImagePipeline, 0.2 million random weights; those named anew.

    weights: the packaged model folder, whose tokenizer and scheduler serve.
    """
    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer.from_pretrained(weights / "processor")
    names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(t) for k, t in names.items()}
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(weights / "scheduler"),
        "vae": vae,
        "text_encoder": _qwen25_vl(tokenizer, ids),
        "tokenizer": tokenizer,
        "transformer": qwen(num_layers=3, joint_attention_dim=TEXT_WIDTH, **changes),
    }


def _qwen25_vl(tokenizer: Any, ids: dict[str, int]) -> Any:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 512,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
                **ids,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT_WIDTH,
                "fullatt_block_indexes": [0],
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        )
    )


EDITORS: dict[str, tuple[Any, bool]] = {  # pipeline class, zero_cond_t
    "edit": (QwenImageEditPipeline, False),
    "plus": (QwenImageEditPlusPipeline, False),
    "plus 2511": (QwenImageEditPlusPipeline, True),
}


def edit_folder(name: str, weights: Path, path: Path) -> Path:
    """Write the model folder of one of EDITORS; its processor takes 28^2 to 224^2 pixels."""
    kind, zero_cond_t = EDITORS[name]
    parts = qwen_parts(weights, zero_cond_t=zero_cond_t)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 224**2})
    tokenizer = QwenVLProcessor.from_pretrained(weights / "processor").tokenizer
    kind(**parts, processor=QwenVLProcessor(tokenizer, images)).save_pretrained(path)
    return path
