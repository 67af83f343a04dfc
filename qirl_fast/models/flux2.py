"""FLUX.2 (dev, Klein), text to image: hidden states of a language model, shared modulation.

The text is three layers of Mistral 3 (dev) or Qwen3 (Klein) side by side, padded to 512 tokens. All
blocks of a kind are modulated by the same rows, which depend on the noise level alone and are kept.
FLUX.2-dev is distilled from guidance and takes its scale as an input: here always
4, the pipeline's default; `rollout.guidance` is classifier-free guidance beside
it, against the empty prompt, as Klein's pipeline has it. Reference images are not served.

Latents are normalised channel by channel with the autoencoder's batch statistics.

Shapes: as in packed.py; Dh channels of a head.
Source: diffusers `pipeline_flux2.py`, `pipeline_flux2_klein.py`, `transformer_flux2.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)

from qirl_fast import ops
from qirl_fast.models.fused.joint import rotations
from qirl_fast.models.packed import PIXELS_PER_TOKEN, Packed, Text, scheduler_with
from qirl_fast.models.prefix import spread_rows

TOKENS = 512  # every prompt is padded or cut to; the transformer sees the padding
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
    "attn.to_qkv_mlp_proj",
)


class Flux2(Packed):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "flux2"
    lora_targets = fp8_layers = LORA_TARGETS
    pipeline_class = Flux2Pipeline
    embedded_guidance: ClassVar[float | None] = 4.0
    parts: ClassVar[dict[str, Any]] = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Mistral3ForConditionalGeneration,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": scheduler_with(mu="flux2"),
        # The tokenizer of the folder's processor, which without images does nothing else.
        "tokenizer": AutoTokenizer.from_pretrained,
    }

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that `runner` counts, in order."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        t = self.transformer
        double = [t.double_stream_modulation_img, t.double_stream_modulation_txt]
        return [t.time_guidance_embed, *double, t.single_stream_modulation, t.norm_out]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Of each prompt [512, C]."""
        return [self.pipeline.encode_prompt(p, device=self.device)[0][0] for p in prompts]

    @classmethod
    def prompt_tokens(
        cls, folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Rows of the prompt's embedding. sizes: of condition images, which are not served."""
        cls.no_images(sizes)
        return TOKENS

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
        used = sorted(set(owner))
        tokens = self.transformer.context_embedder(self.stacked([prompts[p] for p in used]))
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        rope = self._rope(tokens.shape[1], grid)
        return Text.of(tokens, None, rope, [used.index(p) for p in owner])

    def _rope(self, length: int, grid: tuple[int, int]) -> Tensor:
        """Rotations complex64 [L + N, Dh / 2]: text by its place, the image by row and column."""
        if (length, grid) in self.ropes:
            return self.ropes[length, grid]
        ids = self.pipeline_class
        with torch.inference_mode(False):  # to be saved for a backward pass later
            text = ids._prepare_text_ids(torch.empty(1, length, 1))[0]
            image = ids._prepare_latent_ids(torch.empty(1, 1, *grid))[0]
            rope = rotations(self.transformer.pos_embed(torch.cat([text, image]).to(self.device)))
        return self.keep_rope((length, grid), rope)

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """Rows of noise levels [R]: of double blocks' image and text [R, 6 D], of single blocks
        [R, 3 D], of the last norm [R, 2 D].
        """
        t, sigma = self.transformer, sigma.to(self.dtype)
        scale = self.embedded_guidance
        guidance = None if scale is None else torch.full_like(sigma, scale) * 1000
        temb = t.time_guidance_embed(sigma * 1000, guidance)
        double = t.double_stream_modulation_img(temb), t.double_stream_modulation_txt(temb)
        out = t.norm_out.linear(t.norm_out.silu(temb).to(self.dtype))
        return *double, t.single_stream_modulation(temb), out

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Text) -> Tensor:
        """`velocity` of rows of modulation as `modulation` gives them."""
        t, text, rope = self.transformer, prefix.tokens, prefix.place
        image_rows, text_rows, rows_of_single, out_rows = (
            spread_rows(row, len(x), None) for row in rows
        )
        x = t.x_embedder(x.to(self.dtype))
        for i, block in enumerate(t.transformer_blocks):
            text, x = self.runner(i, block)(x, text, image_rows, text_rows, rope)
        x = torch.cat([text, x], dim=1)
        for i, block in enumerate(t.single_transformer_blocks, start=len(t.transformer_blocks)):
            x = self.runner(i, block)(x, None, rows_of_single, rope)
        scale, shift = out_rows.chunk(2, dim=1)
        x = ops.norm_modulate(x[:, text.shape[1] :], scale, shift, eps=t.norm_out.norm.eps)
        out: Tensor = t.proj_out(x)
        return out

    def unpacked(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the autoencoder decodes, [b, C, 2 h, 2 w], of latents [b, h w, Z]."""
        z = latents.transpose(1, 2).unflatten(2, grid)
        statistics = self.vae.bn
        std = torch.sqrt(statistics.running_var + self.vae.config.batch_norm_eps).to(z.dtype)
        mean = statistics.running_mean.to(z.dtype)
        z = z * std[:, None, None] + mean[:, None, None]
        unpacked: Tensor = self.pipeline_class._unpatchify_latents(z)
        return unpacked


class Flux2Klein(Flux2):
    """The adapter of FLUX.2-Klein: Qwen3 in place of Mistral 3, no embedded guidance."""

    family = "flux2_klein"
    pipeline_class = Flux2KleinPipeline
    embedded_guidance = None
    parts: ClassVar[dict[str, Any]] = {**Flux2.parts, "text_encoder": Qwen3ForCausalLM}
    reads: ClassVar[dict[str, Any]] = {
        **Flux2.reads,
        "tokenizer": Qwen2Tokenizer.from_pretrained,
    }
