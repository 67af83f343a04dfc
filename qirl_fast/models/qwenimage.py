"""Qwen-Image (1.x, text to image): Qwen2.5-VL text, a two-stream DiT, a 16-channel autoencoder.

The text stream is modulated at the sample's noise level, so a prompt has no keys and values to
share over steps; its projection into the transformer is made once. Rows whose texts differ in
length, the two guidance branches among them, run packed: no padding, no mask.

Shapes: B rows, R noise levels, P prompts, L text tokens, C text channels, N latent tokens of 2 x 2
latents, Z = 4 x latent channels.
Source: diffusers `pipeline_qwenimage.py`, `transformer_qwenimage.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from qirl_fast import ops
from qirl_fast.models.adapter import Adapter, load_scheduler, require_finite
from qirl_fast.models.fused.qwenimage import Packed
from qirl_fast.models.graphs import hold
from qirl_fast.models.loading import load_part
from qirl_fast.models.prefix import (
    Conditioned,
    by_layout,
    joined_order,
    row_order,
    spread_rows,
    to_rows,
)

PIXELS_PER_TOKEN = 16
DROPPED = 34  # tokens of the template before the prompt, which the pipeline drops
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)


Grids = tuple[tuple[int, int], ...]  # tokens (height, width) of the target, then of conditions


@dataclass(frozen=True)
class Texts:
    """What `velocity` needs to know of the prompts of B rows, which run sorted by text length.

    `order` sorts the rows, `inverse` undoes it; None where there is one length.
    """

    runs: tuple[Tensor, ...]  # [b_i, L_i, D], projected into the transformer
    ropes: tuple[Tensor, ...]  # complex64 [L_i, head_dim / 2]
    image_rope: Tensor  # complex64 [N, head_dim / 2]; [N + M, ...] with M tokens of condition
    order: Tensor | None
    inverse: Tensor | None
    batch: int
    condition: Tensor | None = None  # [B, M, D], projected, in `order`
    at_t0: Tensor | None = None  # bool [N + M], the tokens that take the modulation of t = 0
    rows_t0: tuple[Tensor, ...] = ()  # of each block's image, [1, 6 D], where there are such tokens

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(rows, image tokens beside the target's, text tokens) of each run of rows."""
        beside = 0 if self.condition is None else self.condition.shape[1]
        return [(len(text), beside, text.shape[1]) for text in self.runs]

    @property
    def tensors(self) -> list[Tensor]:
        """What is held of the prompts."""
        return [*self.runs, *([] if self.condition is None else [self.condition])]


hold(Texts)


class QwenImage(Adapter):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "qwenimage"
    lora_targets = LORA_TARGETS
    fp8_layers = tuple(name for name in LORA_TARGETS if name != "img_mlp.net.2")
    norm_rescaled_guidance = True
    text_stream = True
    shards = splits = True
    pipeline_class = QwenImagePipeline
    parts: ClassVar[dict[str, Any]] = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": load_scheduler,
        "tokenizer": Qwen2Tokenizer.from_pretrained,
    }

    refused: ClassVar[tuple[str, ...]] = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond")

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        for setting in self.refused:
            if getattr(self.transformer.config, setting, False):
                raise ValueError(
                    f"this transformer has {setting}: it is a distilled, editing or layered "
                    f"variant, which the adapter of {self.pipeline_class.__name__} does not serve"
                )

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        t = self.transformer
        rows = [m for b in t.transformer_blocks for m in (b.img_mod, b.txt_mod)]
        return [t.time_text_embed, *rows, t.norm_out]

    @property
    def sharded_parts(self) -> list[nn.Module]:
        """Blocks, and by themselves their parts that `modulation` reads, before any block runs."""
        blocks: Any = self.blocks
        return [m for b in blocks for m in (b.img_mod, b.txt_mod, b)]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L_i, C] of each prompt, unpadded: what the stock pipeline gives for one.

        The empty prompt (the unconditional branch) is encoded as one space, the pipeline's habit.
        """
        return [
            self.pipeline.encode_prompt(prompt or " ", device=self.device)[0][0]
            for prompt in prompts
        ]

    @classmethod
    def prompt_tokens(
        cls, folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Tokens of the prompt's embedding, from the files of a model folder.

        sizes: of condition images, of which this family takes none.
        """
        for image in sizes:
            cls.condition_sizes(image[0], 1)
        tokenizer = load_part(Qwen2Tokenizer.from_pretrained, folder / "tokenizer")
        whole = tokenizer(TEMPLATE.format(prompt), max_length=1024 + DROPPED, truncation=True)
        return len(whole["input_ids"]) - DROPPED

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, Z) of a height x width image; ValueError unless both are multiples of 16."""
        if height % 16 or width % 16 or height <= 0 or width <= 0:
            raise ValueError(
                f"image size {height} x {width}: Qwen-Image draws multiples of 16 pixels; "
                f"try {max(16, round(height / 16) * 16)} x {max(16, round(width / 16) * 16)}"
            )
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        return tokens, self.transformer.config.in_channels

    def prefix(
        self, prompts: Sequence[Tensor], owner: Sequence[int], height: int, width: int
    ) -> Texts:
        """The prompts of B rows, projected once each.

        Args:
            prompts: P embeddings [L_p, C]; owner: B prompt indices, `owner[r]` the prompt of row r.
            height, width: image size in pixels, multiples of 16.
        """
        self.latent_shape(height, width)
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        return self.whole(partial(self._texts, prompts, owner, (grid,)))

    def _texts(self, prompts: Sequence[Tensor], owner: Sequence[int], grids: Grids) -> Texts:
        t, lengths = self.transformer, {p: len(prompts[p]) for p in sorted(set(owner))}
        runs, texts, ropes = [], [], []
        for length, used, rows in by_layout(owner, lengths):
            text = torch.stack([prompts[p] for p in used]).to(self.device, self.dtype)
            text = t.txt_in(t.txt_norm(text))
            texts += to_rows([text], [used.index(owner[r]) for r in rows])
            image_rope, rope = self._rope(length, grids)
            ropes.append(rope)
            runs.append(rows)
        order, inverse = row_order(runs, self.device)
        return Texts(tuple(texts), tuple(ropes), image_rope, order, inverse, len(owner))

    def join(self, first: Texts, second: Texts) -> Texts:
        """What `velocity` needs of the rows of `first`, then those of `second`."""
        order, inverse = joined_order(first, second)
        condition = first.condition
        if condition is not None and second.condition is not None:
            condition = torch.cat([condition, second.condition])
        return replace(
            first,
            runs=first.runs + second.runs,
            ropes=first.ropes + second.ropes,
            order=order,
            inverse=inverse,
            batch=first.batch + second.batch,
            condition=condition,
        )

    def _rope(self, length: int, grids: Grids) -> tuple[Tensor, Tensor]:
        """Rotations complex64 of the images [N, head_dim / 2] and of the text [L, head_dim / 2]."""
        if (length, grids) in self.ropes:
            return self.ropes[length, grids]
        with torch.inference_mode(False):  # to be saved for a backward pass later
            rope = self.transformer.pos_embed(
                [[(1, *grid) for grid in grids]], max_txt_seq_len=length, device=self.device
            )
        return self.keep_rope((length, grids), rope)

    def use_rope(self, prompt: int | Conditioned, grid: tuple[int, int], rope: Tensor) -> None:
        """Take these rotations [L + N + M, ...], of a text of L tokens or a prompt with condition
        images; of use where tensors have no values.
        """
        length = prompt if isinstance(prompt, int) else len(prompt.text)
        condition = () if isinstance(prompt, int) else prompt.grids
        self.keep_rope((length, (grid, *condition)), (rope[length:], rope[:length]))

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """Rows of noise levels [R]: of each block's image and text [R, 6 D], of the last norm."""
        t, sigma = self.transformer, sigma.to(self.dtype)
        temb = t.time_text_embed(sigma, sigma)  # the second lends its dtype alone
        rows = [mod(temb) for b in t.transformer_blocks for mod in (b.img_mod, b.txt_mod)]
        return *rows, t.norm_out.linear(t.norm_out.silu(temb).to(self.dtype))

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Texts) -> Tensor:
        """`velocity` of rows of modulation as `modulation` gives them."""
        t = self.transformer
        *rows, out_rows = (spread_rows(row, len(x), prefix.order) for row in rows)
        x, texts, whole = x.to(self.dtype), prefix.runs, x.shape[1]
        if prefix.order is not None:
            x = x[prefix.order]
        among = self.sequence
        if among is not None:
            x, texts = among.own(x), tuple(among.own(text) for text in texts)
        x = t.img_in(x)
        tokens, end = x.shape[1], len(t.transformer_blocks) - 1
        if prefix.condition is not None:
            x = torch.cat([x, prefix.condition], dim=1)
        for i, block in enumerate(t.transformer_blocks):
            last = tokens if i == end else None
            t0 = None if prefix.at_t0 is None else (prefix.at_t0, prefix.rows_t0[i])
            own = (rows[2 * i], rows[2 * i + 1], prefix.image_rope, prefix.ropes)
            x, texts = self.runner(i, block)(x, Packed(texts, *own, t0, last, among))
        scale, shift = out_rows.chunk(2, dim=1)
        x = ops.norm_modulate(x, scale, shift=shift, eps=t.norm_out.norm.eps)
        out: Tensor = t.proj_out(x)
        if among is not None:
            out = among.whole(out, whole)
        return out if prefix.inverse is None else out[prefix.inverse]

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, chunk: int = 64) -> np.ndarray:
        """Latents [B, N, Z] -> uint8 RGB images [B, H, W, 3], never tiled.

        Threads take turns: the stock autoencoder keeps state on itself while it decodes.
        """
        require_finite(latents)
        config, like = self.vae.config, {"device": self.device, "dtype": self.vae.dtype}
        shape = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, **like).view(shape)
        std = torch.tensor(config.latents_std, **like).view(shape)
        images = []
        for part in latents.split(chunk):
            z = self.pipeline._unpack_latents(part, height, width, self.pipeline.vae_scale_factor)
            with self._decoding:
                rgb = self.vae.decode(z.to(self.vae.dtype) * std + mean, return_dict=False)[0]
            rgb = (rgb[:, :, 0].float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            images.append((rgb * 255).round().to(torch.uint8).cpu())
        return torch.cat(images).numpy()
