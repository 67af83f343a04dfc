"""Models of random weights at the block shapes of the true ones, behind this package's adapters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from qirl_fast.models import Model
from qirl_fast.models.qwenimage import QwenImage
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.tiny import packaged

HEAD_DIM = 128
TEXT_WIDTH = 64


@dataclass(frozen=True)
class Scale:
    """Depth and width of the transformer."""

    layers: int
    heads: int


MODELS = {
    "qwen-image-2.1": {"cpu": Scale(8, 6), "half": Scale(16, 32), "full": Scale(32, 32)},
    "qwen-image": {"cpu": Scale(3, 6), "half": Scale(30, 24), "full": Scale(60, 24)},
}


Encode = Callable[[Sequence[str]], list[Tensor]]


def build(name: str, scale: Scale, device: str, dtype: torch.dtype) -> tuple[Model, Encode]:
    """The adapter of a random model, and what encodes its prompts: the packaged tiny encoder.

    The autoencoder is a small one too.
    """
    source = QwenImage21.load(packaged("tiny"), torch.float32)
    tiny = source.pipeline

    def encode(prompts: Sequence[str]) -> list[Tensor]:
        with torch.no_grad():
            return [text.to(device, dtype) for text in source.encode(prompts)]

    sizes: dict[str, Any] = {
        "num_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "attention_head_dim": HEAD_DIM,
    }
    with torch.device(device):
        if name == "qwen-image-2.1":
            channels = tiny.vae.config.z_dim
            tiny.transformer = QwenImage21Transformer2DModel(
                in_channels=channels, out_channels=channels, context_in_dim=TEXT_WIDTH, **sizes
            ).to(dtype)
            tiny.vae.to(device, dtype)
            return QwenImage21(tiny), encode
        transformer = QwenImageTransformer2DModel(joint_attention_dim=TEXT_WIDTH, **sizes)
        vae = AutoencoderKLQwenImage(base_dim=16, z_dim=16, num_res_blocks=1)
    parts = {"vae": vae.to(dtype), "transformer": transformer.to(dtype)}
    others = {"scheduler": tiny.scheduler, "text_encoder": tiny.text_encoder, "tokenizer": None}
    return QwenImage(QwenImagePipeline(**parts, **others)), encode
