"""Qwen-Image-2.1: Qwen3-VL text, one single-stream block-causal DiT, RGBA autoencoder.

Tokens of text and condition images are modulated at t = 0 and attend causally, so their keys and
values depend neither on the timestep nor on the sample. `prefix` computes them once per prompt;
`velocity` runs the target image's tokens alone against them. Rollout and replay both use this path,
so at equal shapes they agree bit for bit, and gradients of every row flow into the shared prefix.

Shapes: B rows, R noise levels, P prompts, L tokens of a prefix, C text channels, N latent tokens,
Z latent channels.
Source: diffusers `pipeline_qwenimage21.py`, `transformer_qwenimage21.py`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVLayerCache
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from qirl_fast import ops
from qirl_fast.models.adapter import Adapter, load_scheduler, require_finite
from qirl_fast.models.condition import condition_size, image_slots, latent_tokens, pictures
from qirl_fast.models.flops import Pass
from qirl_fast.models.fused.attention import Segments
from qirl_fast.models.fused.qwenimage21 import SharedPrefix
from qirl_fast.models.graphs import hold
from qirl_fast.models.loading import load_part
from qirl_fast.models.prefix import (
    Conditioned,
    Layout,
    Prefix,
    by_layout,
    join,
    row_order,
    spread,
    spread_rows,
    to_rows,
)
from qirl_fast.processor import QwenVLProcessor

PIXELS_PER_TOKEN = 16
TEMPLATE = 10  # tokens of the chat template that stay around a prompt
SLOT = "<image{}><|vision_start|><|image_pad|><|vision_end|>"  # before it, of each condition image
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "img_mlp.proj",
    "img_mlp.gate_layer",
    "img_mlp.out",
)


hold(Prefix, SharedPrefix)


class QwenImage21(Adapter):
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "qwenimage21"
    lora_targets = fp8_layers = LORA_TARGETS
    norm_rescaled_guidance = False
    shards = splits = True
    pipeline_class = QwenImage21Pipeline
    parts: ClassVar[dict[str, Any]] = {
        "transformer": QwenImage21Transformer2DModel,
        "vae": AutoencoderKLQwenImage21,
        "text_encoder": Qwen3VLForConditionalGeneration,
    }
    reads: ClassVar[dict[str, Any]] = {
        "scheduler": load_scheduler,
        "processor": QwenVLProcessor.from_pretrained,
    }

    def __init__(self, pipeline: QwenImage21Pipeline):
        super().__init__(pipeline)
        if not self.transformer.config.causal_condition:
            raise ValueError(
                "this transformer has causal_condition off: its text is modulated at the noise "
                "level of the sample, and a prompt's keys and values cannot be shared"
            )

    def passes(self, image: int, text: int) -> list[Pass]:
        """The target's tokens look at a prefix's keys and values; or the prefix by itself."""
        own = image or text
        return [Pass(block, own, 0, image + text) for block in self.blocks]

    def modulating(self) -> list[nn.Module]:
        """The modules whose weights `modulation` reads."""
        t = self.transformer
        return [t.time_text_embed, t.modulation, t.norm_out]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L_i, C] of each prompt, unpadded: what the stock pipeline gives for one.

        The empty prompt (the unconditional branch) is encoded as one space, as there.
        """
        embeddings = []
        for prompt in prompts:
            embedding, mask, _ = self.pipeline.encode_prompt(prompt, device=self.device)
            assert mask is None
            embeddings.append(embedding[0])
        return embeddings

    @classmethod
    def takes_images(cls) -> bool:
        """Whether prompts may come with condition images."""
        return True

    @classmethod
    def condition_sizes(cls, image: tuple[int, int], pixels: int) -> tuple[tuple[int, int], ...]:
        """One size: text encoder and autoencoder see the same pixels."""
        return (condition_size(image, pixels),)

    @torch.no_grad()
    def condition(self, prompt: str, images: Sequence[Sequence[np.ndarray]]) -> Conditioned:
        """Embeddings and latents of a prompt with its condition images: see `Adapter.condition`.

        The autoencoder reads alpha, the text encoder sees the image over white.
        ValueError, beyond those, where the processor resizes an image once more: its slots would
        not be those of the latents.
        """
        shown = [image for (image,) in pictures(images, 1, "RGBA")]
        text, _, slots = self.pipeline.encode_prompt(prompt, image=shown, device=self.device)
        latents = latent_tokens(self.pipeline, shown, self._decoding)
        if 4 * int(slots.sum()) != len(latents):
            size = self.pipeline.processor.image_processor.size
            raise ValueError(
                f"condition images of {[(i.height, i.width) for i in shown]} (height, width) are "
                f"{len(latents)} latent tokens, but the processor, which takes "
                f"{size['shortest_edge']} to {size['longest_edge']} pixels, made "
                f"{int(slots.sum())} slots of 4 tokens of them; choose an area it takes"
            )
        grids = [(i.height // PIXELS_PER_TOKEN, i.width // PIXELS_PER_TOKEN) for i in shown]
        return Conditioned(text[0], slots[0], latents, tuple(grids))

    @staticmethod
    def prompt_tokens(
        folder: Path, prompt: str, sizes: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> int:
        """Tokens of the prompt's embedding, from the files of a model folder.

        sizes: of each condition image its versions, as `condition_sizes` gives them. A slot of an
        image counts as one token here; in the prefix four latent tokens stand in its place.
        """
        processor = load_part(QwenVLProcessor.from_pretrained, folder / "processor")
        images = " ".join(SLOT.format(i + 1) for i in range(len(sizes)))
        more = sum(image_slots(processor, size) - 1 for (size,) in sizes)
        return len(processor.tokenizer(images + prompt)["input_ids"]) + TEMPLATE + more

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, Z) of a height x width image; ValueError unless both are multiples of 32."""
        if height % 32 or width % 32 or height <= 0 or width <= 0:
            raise ValueError(
                f"image size {height} x {width}: Qwen-Image-2.1 draws multiples of 32 pixels; "
                f"try {max(32, round(height / 32) * 32)} x {max(32, round(width / 32) * 32)}"
            )
        return (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN), self.vae.config.z_dim

    def prefix(
        self,
        prompts: Sequence[Tensor | Conditioned],
        owner: Sequence[int],
        height: int,
        width: int,
    ) -> Prefix:
        """Keys and values of each prompt's tokens, spread over the rows that share the prompt.

        Args:
            prompts: P embeddings [L_p, C], or prompts with condition images; layouts may differ.
            owner: B prompt indices, `owner[r]` the prompt of row r.
            height, width: size of the target in pixels, multiples of 32.
        """
        self.latent_shape(height, width)
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        return self.whole(partial(self._prefix, prompts, owner, grid))

    def _prefix(
        self,
        prompts: Sequence[Tensor | Conditioned],
        owner: Sequence[int],
        grid: tuple[int, int],
    ) -> Prefix:
        layouts = {p: Layout.of(prompts[p]) for p in sorted(set(owner))}
        runs, passes, ropes = [], [], []  # by layout
        for layout, used, rows in by_layout(owner, layouts):
            rope, length = self._rope(layout, grid), len(layout.source)
            x = self._tokens([prompts[p] for p in used], layout)
            passes.append((x, rope[:length], layout.segments))
            ropes.append(rope[length:].expand(len(rows), -1, -1))
            self.count(len(used), 0, length)
            runs.append((used, rows))
        keys, values = [], []  # by layout, then by layer
        for (used, rows), layers in zip(runs, self._prefix_forward(passes), strict=True):
            places = [used.index(owner[r]) for r in rows]
            keys.append(to_rows([k for k, _ in layers], places))
            values.append(to_rows([v for _, v in layers], places))
        layers_of_runs = zip(zip(*keys, strict=True), zip(*values, strict=True), strict=True)
        whole = (self.sequence, grid[0] * grid[1])
        shared = tuple(SharedPrefix(k, v, *whole) for k, v in layers_of_runs)
        rope = ropes[0][0] if len(runs) == 1 else torch.cat(ropes)
        order = row_order([rows for _, rows in runs], self.device)
        return Prefix(shared, rope, *order, len(owner))

    def _rope(self, layout: Layout, grid: tuple[int, int]) -> Tensor:
        """Rotations complex64 [L + N, head_dim / 2] of a prefix's tokens and the target's."""
        if (layout, grid) in self.ropes:
            return self.ropes[layout, grid]
        image = torch.tensor([k >= 0 for k in layout.image] + [True] * (grid[0] * grid[1]))
        shapes = [(1, *size) for size in (*layout.grids, grid)]
        with torch.inference_mode(False):  # to be saved for a backward pass later
            rope = self.transformer.pos_embed(shapes, image, device=self.device)
        return self.keep_rope((layout, grid), rope)

    def use_rope(self, prompt: int | Conditioned, grid: tuple[int, int], rope: Tensor) -> None:
        """Take these rotations [tokens of the prefix + N, ...], of a text of that many tokens or a
        prompt with condition images; of use where tensors have no values.
        """
        text = Layout((False,) * prompt) if isinstance(prompt, int) else Layout.of(prompt)
        self.keep_rope((text, grid), rope)

    def _tokens(self, prompts: Sequence[Tensor | Conditioned], layout: Layout) -> Tensor:
        """[P, L, D] of P prompts of one layout, as they enter the first block."""
        transformer = self.transformer
        texts = [p if isinstance(p, Tensor) else p.text for p in prompts]
        x = transformer.txt_in(torch.stack(texts).to(self.device, self.dtype))
        images = [p.latents for p in prompts if isinstance(p, Conditioned)]
        if images:
            at = [i for i, k in enumerate(layout.image) if k >= 0]
            latents = transformer.img_in(torch.stack(images).to(self.device, self.dtype))
            source = torch.tensor(layout.source, device=self.device)
            x = x.index_select(1, source).index_copy(
                1, torch.tensor(at, device=self.device), latents
            )
        return x

    def _prefix_forward(
        self, passes: Sequence[tuple[Tensor, Tensor, Segments]]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each pass, its layers' keys and values [P, L, heads, head_dim], of the own heads.

        passes: tokens [P, L, D] of prompts of one layout, their rotations and segments. All go
        through a block before any goes on: it is entered as often whatever the layouts.
        """
        one, apart = self.modulations.rows([0.0])[0], self.units is None
        xs = [x for x, _, _ in passes]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in passes]
        for block in self.transformer.transformer_blocks:

            def extract(one: Tensor, *xs: Tensor, block: Any = block) -> list[Tensor]:
                run = block if apart else block.forward  # its hooks `inside` has called
                out: list[Tensor] = []
                for x, (_, rope, segments) in zip(xs, passes, strict=True):
                    layer = QwenImage21KVLayerCache()
                    y = run(
                        x,
                        spread(one, len(x)),
                        rope,
                        layer_cache=layer,
                        kv_cache_mode="extract",
                        cache_write_slice=slice(0, x.shape[1]),
                        segments=segments,
                    )
                    kept = layer.get()  # FSDP's hooks are on what comes out, and v is a view
                    out += [y, *(kept if apart else (t.clone() for t in kept))]
                return out

            out = self.inside(block, extract, one, *xs)
            xs = out[::3]
            heads = self.sequence.own_heads if self.sequence else lambda t: t
            for own, k, v in zip(found, out[1::3], out[2::3], strict=True):
                own.append((heads(k), heads(v)))
        return found

    def join(self, first: Prefix, second: Prefix) -> Prefix:
        """What `velocity` needs of the rows of `first`, then those of `second`."""
        return join(first, second)

    def modulation(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """Rows [R, 4 D] of the blocks and [R, D] of the last norm for noise levels [R]."""
        transformer = self.transformer
        sigma = sigma.to(self.dtype)
        temb = transformer.time_text_embed(sigma, sigma)  # the second lends its dtype alone
        norm = transformer.norm_out
        return transformer.modulation(temb), norm.linear(norm.silu(temb).to(self.dtype))

    def forward(self, x: Tensor, rows: Sequence[Tensor], prefix: Prefix) -> Tensor:
        """`velocity` of rows [R, 4 D] and [R, D] of modulation."""
        transformer = self.transformer
        modulation, scale = (spread_rows(row, len(x), prefix.order) for row in rows)
        x = x.to(self.dtype)
        if prefix.order is not None:
            x = x[prefix.order]
        rope, tokens = prefix.rope, x.shape[1]
        if self.sequence is not None:
            x, rope = self.sequence.own(x), self.sequence.own(rope, -2)
        x = transformer.img_in(x)
        blocks = zip(transformer.transformer_blocks, prefix.layers, strict=True)
        for i, (block, layer) in enumerate(blocks):
            x = self.runner(i, block)(x, modulation, rope, layer_cache=layer)
        x = ops.norm_modulate(x, scale, eps=transformer.norm_out.norm.eps)
        out: Tensor = transformer.proj_out(x)
        if self.sequence is not None:
            out = self.sequence.whole(out, tokens)
        return out if prefix.inverse is None else out[prefix.inverse]

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, chunk: int = 64) -> np.ndarray:
        """Latents [B, N, Z] -> uint8 RGB images [B, H, W, 3], never tiled.

        The autoencoder is RGBA; RGB is the composite on white, as the stock pipeline documents.
        Threads take turns: the stock autoencoder keeps state on itself while it decodes.
        """
        require_finite(latents)
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        config = self.vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=self.device, dtype=self.vae.dtype).view(
            shape
        )
        std = torch.tensor(config.latents_std, device=self.device, dtype=self.vae.dtype).view(shape)
        images = []
        for part in latents.split(chunk):
            z = part.transpose(1, 2).unflatten(2, (1, *grid)).to(self.vae.dtype)
            with self._decoding:
                rgba = self.vae.decode(z * std + mean, return_dict=False)[0][:, :, 0].float()
            rgba = (rgba / 2 + 0.5).clamp(0, 1)
            rgb = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
            images.append((rgb.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(images).numpy()
