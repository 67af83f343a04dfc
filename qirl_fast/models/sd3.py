"""Stable Diffusion 3.5 (Medium, Large): two CLIP encoders and T5, joint blocks, no rotation.

A prompt is 77 tokens of both CLIP encoders side by side, 256 of T5 behind them, and a pooled vector
of both CLIP encoders, which modulates every block beside the noise level. The last block gives no
text. The transformer's first layer is a convolution over 2 x 2 latents: here a matrix product with
the packed tokens. Skip-layer guidance of the pipeline is not served.

Shapes: as in packed.py; a token of latents holds (channel, row, column).
Source: diffusers `pipeline_stable_diffusion_3.py`, `transformer_sd3.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from qirl_fast import ops
from qirl_fast.models.flux import LORA_TARGETS
from qirl_fast.models.loading import load_part
from qirl_fast.models.lora import linear
from qirl_fast.models.packed import (
    PIXELS_PER_LATENT,
    Packed,
    Text,
    pooled_rows,
    scheduler_with,
    split_pooled,
    with_pooled,
)

T5_TOKENS = 256  # every prompt is padded or cut to; the transformer sees the padding


class StableDiffusion3(Packed):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "sd3"
    lora_targets = fp8_layers = LORA_TARGETS  # its joint blocks have the names of FLUX.1's
    pipeline_class = StableDiffusion3Pipeline
    parts: ClassVar[dict[str, Any]] = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": scheduler_with(ramp="training"),
        "tokenizer": CLIPTokenizer.from_pretrained,
        "tokenizer_2": CLIPTokenizer.from_pretrained,
        "tokenizer_3": T5TokenizerFast.from_pretrained,
    }

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        for processor in self.transformer.attn_processors.values():
            processor._attention_backend = None  # where diffusers' set_attention_backend writes

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        return [self.transformer.time_text_embed.timestep_embedder]

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """Z, of the transformer's config."""
        return 4 * int(config.in_channels)

    def most_tokens(self) -> int:
        """The side of the square of positions that the transformer has learned."""
        return int(self.transformer.config.pos_embed_max_size)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Of each prompt the tokens [77 + 256, C], and behind them the pooled vector."""
        embeddings = []
        for prompt in prompts:
            text, _, pooled, _ = self.pipeline.encode_prompt(
                prompt, None, None, device=self.device, do_classifier_free_guidance=False
            )
            embeddings.append(with_pooled(text[0], pooled[0]))
        return embeddings

    @classmethod
    def prompt_tokens(
        cls, folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Rows of the prompt's embedding, from the files of a model folder.

        sizes: of condition images, of which this family takes none.
        """
        cls.no_images(sizes)
        config = SD3Transformer2DModel.load_config(folder / "transformer")
        clip = load_part(CLIPTokenizer.from_pretrained, folder / "tokenizer").model_max_length
        pooled, width = config["pooled_projection_dim"], config["joint_attention_dim"]
        return int(clip) + T5_TOKENS + pooled_rows(pooled, width)

    def prefix(
        self, prompts: Sequence[Tensor], owner: Sequence[int], height: int, width: int
    ) -> Text:
        """The prompts of B rows, projected once each.

        Args:
            prompts: P embeddings as `encode` gives them; owner: B prompt indices, `owner[r]` the
                prompt of row r.
            height, width: image size in pixels, multiples of 16.
        """
        self.latent_shape(height, width)
        t, used = self.transformer, sorted(set(owner))
        parts = [split_pooled(prompts[p], t.config.pooled_projection_dim) for p in used]
        tokens = t.context_embedder(self.stacked([text for text, _ in parts]))
        pooled = t.time_text_embed.text_embedder(
            torch.stack([pooled for _, pooled in parts]).to(self.device, self.dtype)
        )
        place = t.pos_embed.cropped_pos_embed(
            height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        )
        return Text.of(tokens, pooled, place, [used.index(p) for p in owner])

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The embedding [R, D] of noise levels [R]."""
        embed = self.transformer.time_text_embed
        return (embed.timestep_embedder(embed.time_proj(sigma.float() * 1000).to(self.dtype)),)

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Text) -> Tensor:
        """`velocity` of rows [R, D] as `modulation` gives them."""
        t, text = self.transformer, prefix.tokens
        temb = prefix.modulated_by(rows[0])
        first = t.pos_embed.proj
        x = F.linear(x.to(self.dtype), first.weight.flatten(1), first.bias)
        x = (x + prefix.place).to(self.dtype)
        for i, block in enumerate(t.transformer_blocks):
            text, x = self.runner(i, block)(x, text, temb)
        scale, shift = linear(t.norm_out.linear, F.silu(temb)).chunk(2, dim=1)
        out = t.proj_out(ops.norm_modulate(x, scale, shift, eps=t.norm_out.norm.eps))
        # It gives (row, column, channel).
        return out.unflatten(2, (2, 2, -1)).permute(0, 1, 4, 2, 3).flatten(2)
