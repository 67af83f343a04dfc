"""Z-Image (Base, Turbo): Qwen3 text, one stream of image and text tokens, sandwich norms.

The transformer's time runs from noise at 0 to the image at 1, and it predicts x0 - eps: here
t = 1 - sigma and v = -output. Image and text are padded with learned tokens to multiples of 32.
Text tokens pass a refiner that sees neither noise level nor image: once per prompt, in `prefix`,
for all steps. Rows whose padded texts differ in length run one group after the other, without
masks.

The pipeline's guidance_scale g is p + g (p - n): `rollout.guidance` is 1 + g.

Shapes: as in packed.py, N' and L image and text tokens with padding; a token of latents holds
(row, column, channel).
Source: diffusers `pipeline_z_image.py`, `transformer_z_image.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3Model

from qirl_fast.models.flops import Pass
from qirl_fast.models.fused.zimage import PATCH, refined, run_blocks
from qirl_fast.models.graphs import hold
from qirl_fast.models.loading import load_part
from qirl_fast.models.packed import PIXELS_PER_TOKEN, Packed, scheduler_with
from qirl_fast.models.prefix import by_layout, joined_order, row_order, spread_rows, to_rows

MAX_TOKENS = 512
LORA_TARGETS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def padded(tokens: int) -> int:
    """The next multiple of 32."""
    return tokens + -tokens % SEQ_MULTI_OF


@dataclass(frozen=True)
class Captions:
    """What `velocity` needs to know of the prompts of B rows, which run sorted by padded length.

    `order` sorts the rows, `inverse` undoes it; None where there is one length.
    """

    runs: tuple[Tensor, ...]  # refined, [b_i, L_i, D]
    ropes: tuple[Tensor, ...]  # complex64 [N' + L_i, Dh / 2], the image's tokens first
    order: Tensor | None
    inverse: Tensor | None
    batch: int

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(rows, image tokens beside the target's, text tokens) of each run of rows."""
        return [(len(text), 0, text.shape[1]) for text in self.runs]

    @property
    def tensors(self) -> list[Tensor]:
        """What is held of the prompts."""
        return list(self.runs)


hold(Captions)


class ZImage(Packed):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "zimage"
    lora_targets = fp8_layers = LORA_TARGETS
    pipeline_class = ZImagePipeline
    parts: ClassVar[dict[str, Any]] = {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": scheduler_with(ramp="float32"),
        "tokenizer": Qwen2Tokenizer.from_pretrained,
    }

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        config = self.transformer.config
        if PATCH not in self.transformer.all_x_embedder or config.siglip_feat_dim is not None:
            raise ValueError(
                f"this transformer has patches {list(self.transformer.all_x_embedder)} and "
                f"siglip_feat_dim {config.siglip_feat_dim}; the adapter of ZImagePipeline serves "
                f"patches {PATCH}, without the omni variant's image encoder"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that `runner` counts, in order."""
        return [*self.transformer.noise_refiner, *self.transformer.layers]

    def passes(self, image: int, text: int) -> list[Pass]:
        """Refiners see the image alone; both with their padding."""
        image, t = padded(image), self.transformer
        refiners = [Pass(block, image, 0, image) for block in t.noise_refiner]
        both = image + text
        return refiners + [Pass(block, both, 0, both) for block in t.layers]

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        return [self.transformer.t_embedder]

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """Z, of the transformer's config."""
        return 4 * int(config.in_channels)

    def most_tokens(self) -> int:
        """Of the rotations that the transformer has."""
        return int(min(self.transformer.config.axes_lens[1:]))

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L_i, C] of each prompt, unpadded."""
        return [
            self.pipeline.encode_prompt(p, self.device, do_classifier_free_guidance=False)[0][0]
            for p in prompts
        ]

    @classmethod
    def prompt_tokens(
        cls, folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Tokens of the prompt's embedding. sizes: of condition images, which are not served."""
        cls.no_images(sizes)
        tokenizer = load_part(Qwen2Tokenizer.from_pretrained, folder / "tokenizer")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return len(tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"])

    def prefix(
        self, prompts: Sequence[Tensor], owner: Sequence[int], height: int, width: int
    ) -> Captions:
        """The prompts of B rows, refined once each.

        Args:
            prompts: P embeddings [L_p, C]; owner: B prompt indices, `owner[r]` the prompt of row r.
            height, width: image size in pixels, multiples of 16.
        """
        self.latent_shape(height, width)
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        lengths = {p: padded(len(prompts[p])) for p in sorted(set(owner))}
        runs, texts, ropes = [], [], []
        for length, used, rows in by_layout(owner, lengths):
            rope = self._rope(length, grid)
            own = [prompts[p].to(self.device, self.dtype) for p in used]
            text = refined(self.transformer, own, length, rope[-length:])
            texts += to_rows([text], [used.index(owner[r]) for r in rows])
            ropes.append(rope)
            runs.append(rows)
        order, inverse = row_order(runs, self.device)
        return Captions(tuple(texts), tuple(ropes), order, inverse, len(owner))

    def _rope(self, length: int, grid: tuple[int, int]) -> Tensor:
        """Rotations complex64 [N' + L, Dh / 2]: text by its place, the image behind it by row and
        column, its padding at the origin.
        """
        if (length, grid) in self.ropes:
            return self.ropes[length, grid]
        coordinates = self.transformer.create_coordinate_grid
        with torch.inference_mode(False):  # to be saved for a backward pass later
            text = coordinates((length, 1, 1), (1, 0, 0)).flatten(0, 2)
            image = coordinates((1, *grid), (length + 1, 0, 0)).flatten(0, 2)
            image = F.pad(image, (0, 0, 0, padded(len(image)) - len(image)))
            rope = self.transformer.rope_embedder(torch.cat([image, text]).to(self.device))
        return self.keep_rope((length, grid), rope)

    def join(self, first: Captions, second: Captions) -> Captions:
        """What `velocity` needs of the rows of `first`, then those of `second`."""
        order, inverse = joined_order(first, second)
        runs, ropes = first.runs + second.runs, first.ropes + second.ropes
        return Captions(runs, ropes, order, inverse, first.batch + second.batch)

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The embedding [R, min(D, 256)] of noise levels [R], by the pipeline's arithmetic."""
        t = (1000 - sigma.float() * 1000) / 1000
        return (self.transformer.t_embedder(t * self.transformer.t_scale).to(self.dtype),)

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Captions) -> Tensor:
        """`velocity` of rows [R, min(D, 256)] as `modulation` gives them."""
        temb = spread_rows(rows[0], len(x), prefix.order)
        x = x.to(self.dtype)
        if prefix.order is not None:
            x = x[prefix.order]
        runs = [len(text) for text in prefix.runs]
        parts = zip(x.split(runs), prefix.runs, temb.split(runs), prefix.ropes, strict=True)
        out = -torch.cat([run_blocks(self.transformer, *part, self.runner) for part in parts])
        return out if prefix.inverse is None else out[prefix.inverse]

    def unpacked(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the autoencoder decodes, [b, C, 2 h, 2 w], of latents [b, h w, Z]."""
        z = latents.unflatten(2, (2, 2, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
        return self.scaled(z.flatten(4, 5).flatten(2, 3))
