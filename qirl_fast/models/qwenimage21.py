"""Qwen-Image-2.1: Qwen3-VL text, one single-stream block-causal DiT, RGBA autoencoder.

Tokens of text and condition images are modulated at t = 0 and attend causally, so their keys and
values depend neither on the timestep nor on the sample. `prefix` computes them once per prompt;
`velocity` runs the target image's tokens alone against them. Rollout and replay both use this path,
so at equal shapes they agree bit for bit, and gradients of every row flow into the shared prefix.

Shapes: B rows, R noise levels, P prompts, L tokens of a prefix, C text channels, N latent tokens,
Z latent channels.
Source: diffusers `pipeline_qwenimage21.py`, `transformer_qwenimage21.py`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from peft import LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

from qirl_fast import ops
from qirl_fast.models.fused import patch
from qirl_fast.models.fused.qwenimage21 import SharedPrefix
from qirl_fast.models.loading import check_class, load_component, load_part
from qirl_fast.models.modulation import ModulationCache
from qirl_fast.models.prefix import Conditioned, Layout, Prefix, join, spread, spread_rows
from qirl_fast.models.processor import QwenVLProcessor

PIXELS_PER_TOKEN = 16
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "img_mlp.proj",
    "img_mlp.gate_layer",
    "img_mlp.out",
)
COMPONENTS = ("processor", "scheduler", "text_encoder", "transformer", "vae")


def _load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    name = FlowMatchEulerDiscreteScheduler.__name__
    check_class(folder, "scheduler_config.json", "_class_name", name)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


class QwenImage21:
    """The adapter: encode, latent_shape, velocity (with prefix), decode, trainable."""

    family = "qwenimage21"
    lora_targets = LORA_TARGETS
    norm_rescaled_guidance = False
    pipeline_class = QwenImage21Pipeline

    def __init__(self, pipeline: QwenImage21Pipeline):
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.device = pipeline.transformer.device
        self.dtype = pipeline.transformer.dtype
        self.recompute_blocks = 0  # from the first: activations computed again in backward
        self._frozen: list[Tensor] | None = None
        self._decoding = threading.Lock()
        self._ropes: dict[tuple[Layout, tuple[int, int]], Tensor] = {}
        patch(self.transformer)
        t = self.transformer
        parts = (t.time_text_embed, t.modulation, t.norm_out.linear)
        self.modulations = ModulationCache(
            parts, lambda level: self._modulation(torch.full((1,), level, device=self.device))
        )
        for module in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype, device: str = "cpu") -> "QwenImage21":
        """Load a model folder in the stock pipeline's format; nothing is downloaded.

        Raises FileNotFoundError naming every missing component, ValueError for one that is there
        in part.
        """
        folder = Path(folder)
        missing = [
            c for c in COMPONENTS if not (folder / c).is_dir() or not any((folder / c).iterdir())
        ]
        if missing:
            raise FileNotFoundError(
                f"model folder {folder} lacks {', '.join(missing)}: a Qwen-Image-2.1 folder holds "
                f"{', '.join(COMPONENTS)} (a folder each) and model_index.json"
            )
        pipeline = QwenImage21Pipeline(
            scheduler=load_part(_load_scheduler, folder / "scheduler"),
            vae=load_component(AutoencoderKLQwenImage21, folder / "vae", torch_dtype=dtype),
            text_encoder=load_component(
                Qwen3VLForConditionalGeneration, folder / "text_encoder", dtype=dtype
            ),
            processor=load_part(QwenVLProcessor.from_pretrained, folder / "processor"),
            transformer=load_component(
                QwenImage21Transformer2DModel, folder / "transformer", torch_dtype=dtype
            ),
        )
        for p in pipeline.transformer.parameters():
            # The bits of a GEMM on a CPU may depend on where its weights lie: a file that is mapped
            # into memory puts them anywhere, a copy (the reference policy's, a resumed run's) not.
            if p.data_ptr() % 64:
                p.data = p.data.clone()
        return cls(pipeline.to(device))

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
        layouts = {p: Layout.of(prompts[p]) for p in sorted(set(owner))}
        order: list[int] = []
        runs: list[list[tuple[Tensor, Tensor]]] = []  # per layout, per layer, keys and values
        ropes = []
        for layout in sorted(set(layouts.values())):
            used = [p for p in layouts if layouts[p] == layout]
            rows = [r for r, p in enumerate(owner) if layouts[p] == layout]
            source = torch.tensor([used.index(owner[r]) for r in rows], device=self.device)
            rope, length = self._rope(layout, grid), len(layout.source)
            layers = self._prefix_forward([prompts[p] for p in used], layout, rope[:length])
            if len(used) == 1:  # such as the unconditional branch: held once, not per row
                runs.append([(spread(k, len(rows)), spread(v, len(rows))) for k, v in layers])
            else:
                chosen = [(k.index_select(0, source), v.index_select(0, source)) for k, v in layers]
                runs.append(chosen)
            ropes.append(rope[length:].expand(len(rows), -1, -1))
            order += rows
        shared = tuple(
            SharedPrefix(tuple(k for k, _ in layer), tuple(v for _, v in layer))
            for layer in zip(*runs, strict=True)
        )
        if len(runs) == 1:
            return Prefix(shared, ropes[0][0], None, None, len(owner))
        indices = torch.tensor(order, device=self.device)
        return Prefix(shared, torch.cat(ropes), indices, indices.argsort(), len(owner))

    def _rope(self, layout: Layout, grid: tuple[int, int]) -> Tensor:
        """Rotations complex64 [L + N, head_dim / 2] of a prefix's tokens and the target's."""
        if (layout, grid) not in self._ropes:
            image = torch.tensor([k >= 0 for k in layout.image] + [True] * (grid[0] * grid[1]))
            shapes = [(1, *size) for size in (*layout.grids, grid)]
            with torch.inference_mode(False):  # to be saved for a backward pass later
                rope = self.transformer.pos_embed(shapes, image, device=self.device)
            self._ropes[layout, grid] = rope
        return self._ropes[layout, grid]

    def use_rope(self, length: int, grid: tuple[int, int], rope: Tensor) -> None:
        """Take these rotations for `length` text tokens; of use where tensors have no values."""
        self._ropes[Layout((False,) * length), grid] = rope

    def _prefix_forward(
        self, prompts: Sequence[Tensor | Conditioned], layout: Layout, rope: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values [P, L, heads, head_dim] of P prompts of one layout."""
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
        cache = QwenImage21KVCache(len(transformer.transformer_blocks))
        modulation = spread(self.modulations.rows([0.0])[0], len(x))
        for block, layer in zip(transformer.transformer_blocks, cache.layer_caches, strict=True):
            x = block(
                x,
                modulation,
                rope,
                layer_cache=layer,
                kv_cache_mode="extract",
                cache_write_slice=slice(0, x.shape[1]),
                segments=layout.segments,
            )
        return [layer.get() for layer in cache.layer_caches]

    def join(self, first: Prefix, second: Prefix) -> Prefix:
        """What `velocity` needs of the rows of `first`, then those of `second`."""
        return join(first, second)

    def _modulation(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [R, 4 D] of the blocks and [R, D] of the last norm for noise levels [R]."""
        transformer = self.transformer
        sigma = sigma.to(self.dtype)
        temb = transformer.time_text_embed(sigma, sigma)  # the second lends its dtype alone
        norm = transformer.norm_out
        return transformer.modulation(temb), norm.linear(norm.silu(temb).to(self.dtype))

    def velocity(self, x: Tensor, sigma: Tensor | Sequence[float], prefix: Prefix) -> Tensor:
        """Velocity v = eps - x0, [B, N, Z] in the model's dtype.

        Args:
            x: latents [B, N, Z]; prefix: of the same B rows.
            sigma: R noise levels in [0, 1], each of a run of B / R rows. What depends on it alone
                is kept for levels that are host values, see models/modulation.py.
        """
        batch = len(x)
        if batch != prefix.batch:
            raise ValueError(f"{batch} latent rows but a prefix of {prefix.batch} rows")
        if not len(sigma) or batch % len(sigma):
            raise ValueError(f"{len(sigma)} noise levels for {batch} rows; wanted a divisor of it")
        transformer = self.transformer
        modulate = self._modulation if isinstance(sigma, Tensor) else self.modulations.rows
        modulation, scale = (
            spread_rows(rows, batch, prefix.order)
            for rows in modulate(sigma)  # type: ignore[arg-type]
        )
        x = x.to(self.dtype)
        if prefix.order is not None:
            x = x[prefix.order]
        x = transformer.img_in(x)
        again = self.recompute_blocks if torch.is_grad_enabled() else 0
        blocks = zip(transformer.transformer_blocks, prefix.layers, strict=True)
        for i, (block, layer) in enumerate(blocks):
            run = partial(block, layer_cache=layer)
            if i < again:
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            x = run(x, modulation, prefix.rope)
        x = ops.norm_modulate(x, scale, eps=transformer.norm_out.norm.eps)
        out: Tensor = transformer.proj_out(x)
        return out if prefix.inverse is None else out[prefix.inverse]

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, chunk: int = 64) -> np.ndarray:
        """Latents [B, N, Z] -> uint8 RGB images [B, H, W, 3], never tiled.

        The autoencoder is RGBA; RGB is the composite on white, as the stock pipeline documents.
        Threads take turns: the stock autoencoder keeps state on itself while it decodes.
        """
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

    def trainable(
        self, mode: str, rank: int, alpha: float, targets: Sequence[str] | None, seed: int
    ) -> dict[str, Tensor]:
        """Add a LoRA adapter "default" (mode "lora") or open all weights (mode "full").

        The LoRA starts as the identity (B = 0) and A is drawn from `seed` alone. Returns the
        trainable parameters by name, in a fixed order, in float32.
        ValueError for an unknown mode, LoRA targets that match nothing, or "full" in another dtype
        than float32: the weights would be float32, the activations not.
        """
        if mode == "full":
            if self.dtype != torch.float32:
                raise ValueError(
                    f"model.adapter full trains float32 weights and model.dtype is {self.dtype}; "
                    "set model.dtype=float32 or model.adapter=lora"
                )
            self.transformer.requires_grad_(True)
            self._frozen = [p.detach().clone() for p in self.transformer.parameters()]
        elif mode == "lora":
            self._add_lora(rank, alpha, list(targets or self.lora_targets), seed)
        else:
            raise ValueError(f"adapter mode {mode!r}: use 'lora' or 'full'")
        named = {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}
        for p in named.values():
            p.data = p.data.float()
        return named

    def _add_lora(self, rank: int, alpha: float, targets: list[str], seed: int) -> None:
        modules = [name for name, _ in self.transformer.named_modules()]
        unknown = [t for t in targets if not any(name.endswith(t) for name in modules)]
        if unknown:
            raise ValueError(
                f"LoRA targets {unknown} match no module of the transformer; "
                f"the family's own are {', '.join(self.lora_targets)}"
            )
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(config)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The untrained policy: LoRA off, or the weights as they were when training began."""
        if self._frozen is None:
            self.transformer.disable_adapters()
            try:
                yield
            finally:
                self.transformer.enable_adapters()
            return
        trained = [p.data for p in self.transformer.parameters()]
        for p, frozen in zip(self.transformer.parameters(), self._frozen, strict=True):
            p.data = frozen
        try:
            yield
        finally:
            for p, own in zip(self.transformer.parameters(), trained, strict=True):
                p.data = own
