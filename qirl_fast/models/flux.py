"""FLUX.1 (dev, schnell): T5 tokens and a pooled CLIP vector, double and single stream blocks.

A block's modulation is of the noise level and of the prompt's pooled vector; what depends on the
level alone is kept. FLUX.1-dev is distilled from guidance and takes its scale as an input: here
always `EMBEDDED_GUIDANCE`, the pipeline's default, in rollout, replay and evaluation;
`rollout.guidance` is classifier-free guidance beside it, the pipeline's true_cfg_scale.

Shapes: as in packed.py; Dh channels of a head.
Source: diffusers `pipeline_flux.py`, `transformer_flux.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from qirl_fast import ops
from qirl_fast.models.adapter import load_scheduler
from qirl_fast.models.fused.joint import rotations
from qirl_fast.models.lora import linear
from qirl_fast.models.packed import (
    PIXELS_PER_TOKEN,
    Packed,
    Text,
    pooled_rows,
    split_pooled,
    with_pooled,
)

EMBEDDED_GUIDANCE = 3.5
T5_TOKENS = 512  # every prompt is padded or cut to; the transformer sees the padding
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


class Flux(Packed):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "flux"
    lora_targets = fp8_layers = LORA_TARGETS
    pipeline_class = FluxPipeline
    parts: ClassVar[dict[str, Any]] = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": load_scheduler,
        "tokenizer": CLIPTokenizer.from_pretrained,
        "tokenizer_2": T5TokenizerFast.from_pretrained,
    }

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that `runner` counts, in order."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        embed = self.transformer.time_text_embed
        guided = self.transformer.config.guidance_embeds
        return [embed.timestep_embedder, *([embed.guidance_embedder] if guided else [])]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Of each prompt the T5 tokens [512, C], and behind them the pooled CLIP vector."""
        embeddings = []
        for prompt in prompts:
            text, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device)
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
        config = FluxTransformer2DModel.load_config(folder / "transformer")
        pooled, width = config["pooled_projection_dim"], config["joint_attention_dim"]
        return T5_TOKENS + pooled_rows(pooled, width)

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
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        rope = self._rope(tokens.shape[1], grid)
        return Text.of(tokens, pooled, rope, [used.index(p) for p in owner])

    def _rope(self, length: int, grid: tuple[int, int]) -> Tensor:
        """Rotations complex64 [L + N, Dh / 2]: text at the origin, the image by row and column."""
        if (length, grid) in self.ropes:
            return self.ropes[length, grid]
        with torch.inference_mode(False):  # to be saved for a backward pass later
            image = self.pipeline_class._prepare_latent_image_ids(
                1, *grid, self.device, torch.float32
            )
            ids = torch.cat([image.new_zeros(length, 3), image])
            rope = rotations(self.transformer.pos_embed(ids))
        return self.keep_rope((length, grid), rope)

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The embedding [R, D] of noise levels [R], and of the guidance scale."""
        embed, sigma = self.transformer.time_text_embed, sigma.to(self.dtype)
        rows = embed.timestep_embedder(embed.time_proj(sigma * 1000).to(self.dtype))
        if self.transformer.config.guidance_embeds:
            scale = torch.full_like(sigma, EMBEDDED_GUIDANCE) * 1000
            rows = rows + embed.guidance_embedder(embed.time_proj(scale).to(self.dtype))
        return (rows,)

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Text) -> Tensor:
        """`velocity` of rows [R, D] as `modulation` gives them."""
        t, text = self.transformer, prefix.tokens
        temb = prefix.modulated_by(rows[0])
        x = t.x_embedder(x.to(self.dtype))
        for i, block in enumerate(t.transformer_blocks):
            text, x = self.runner(i, block)(x, text, temb, prefix.place)
        x = torch.cat([text, x], dim=1)
        for i, block in enumerate(t.single_transformer_blocks, start=len(t.transformer_blocks)):
            x = self.runner(i, block)(x, None, temb, prefix.place)
        x, norm = x[:, text.shape[1] :], t.norm_out
        scale, shift = linear(norm.linear, F.silu(temb)).chunk(2, dim=1)
        out: Tensor = t.proj_out(ops.norm_modulate(x, scale, shift, eps=norm.norm.eps))
        return out
