"""What the adapters of SD 3.5, FLUX.1, FLUX.2 and Z-Image share: text to image, latents of 8 x 8
pixels, packed into tokens of 2 x 2 of them.

A prompt is one tensor, as the embedding cache keeps it. Where a pipeline gives a pooled vector
beside the tokens, it lies behind them, in as many rows as it fills, the last one padded with zeros.

Shapes: B rows, P prompts, L text tokens, C text channels, D channels of the transformer, N latent
tokens, Z = 4 x latent channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from qirl_fast.models.adapter import Adapter, load_scheduler, require_finite
from qirl_fast.models.graphs import hold
from qirl_fast.models.prefix import spread_rows, to_rows

PIXELS_PER_LATENT = 8
PIXELS_PER_TOKEN = 16


def scheduler_with(**rules: str) -> Callable[[Path], FlowMatchEulerDiscreteScheduler]:
    """`load_scheduler`, with what the pipeline does before it calls the scheduler in its config:
    see rollout/schedule.py.
    """

    def load(folder: Path) -> FlowMatchEulerDiscreteScheduler:
        scheduler = load_scheduler(folder)
        scheduler.register_to_config(**rules)
        return scheduler

    return load


def pooled_rows(pooled: int, width: int) -> int:
    """Rows of `width` channels that a pooled vector fills."""
    return -(-pooled // width)


def with_pooled(text: Tensor, pooled: Tensor) -> Tensor:
    """[L + rows, C] of text [L, C] and the pooled vector [any]."""
    width = text.shape[1]
    rows = pooled_rows(len(pooled), width)
    return torch.cat([text, F.pad(pooled, (0, rows * width - len(pooled))).view(rows, width)])


def split_pooled(embedding: Tensor, pooled: int) -> tuple[Tensor, Tensor]:
    """Text [L, C] and the pooled vector [pooled] that `with_pooled` put together."""
    tokens = len(embedding) - pooled_rows(pooled, embedding.shape[1])
    return embedding[:tokens], embedding[tokens:].flatten()[:pooled]


@dataclass(frozen=True)
class Text:
    """What `velocity` needs to know of the prompts of B rows, whose texts are of one length.

    place: of the tokens, rotations complex64 [L + N, Dh / 2] or what is added to the image's
    [1, N, D].
    """

    tokens: Tensor  # [B, L, D], projected
    pooled: Tensor | None  # [B, D], projected
    place: Tensor
    batch: int

    @classmethod
    def of(cls, tokens: Tensor, pooled: Tensor | None, place: Tensor, owner: Sequence[int]) -> Self:
        """The rows of prompts with projections tokens [P, L, D] and pooled [P, D]."""
        parts = to_rows([tokens] if pooled is None else [tokens, pooled], owner)
        return cls(parts[0], parts[1] if len(parts) > 1 else None, place, len(owner))

    def modulated_by(self, rows: Tensor) -> Tensor:
        """[B, D] of what is embedded of noise levels [R, D] and of the prompts' pooled vectors."""
        spread = spread_rows(rows, self.batch, None)
        return spread if self.pooled is None else spread + self.pooled

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(rows, image tokens beside the target's, text tokens) of each run of rows."""
        return [(self.batch, 0, self.tokens.shape[1])]

    @property
    def tensors(self) -> list[Tensor]:
        """What is held of the prompts."""
        return [self.tokens, *([] if self.pooled is None else [self.pooled])]


hold(Text)


class Packed(Adapter):
    """Adds to `Adapter` what the families share; a family adds encode, prefix, `unpacked`, ..."""

    norm_rescaled_guidance = False
    text_stream = True

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype, device: str = "cpu", spread: bool = False
    ) -> Self:
        """As `Adapter.load`; ValueError for an autoencoder of another scale."""
        model = super().load(folder, dtype, device, spread)
        scale = model.pipeline.vae_scale_factor
        if scale != PIXELS_PER_LATENT:
            raise ValueError(
                f"{folder}: its autoencoder makes one latent of {scale} x {scale} pixels; the "
                f"adapter of {cls.pipeline_class.__name__} wants {PIXELS_PER_LATENT}"
            )
        return model

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, Z) of a height x width image; ValueError unless both are multiples of 16, or where
        the image has more tokens on a side than the transformer knows places.
        """
        step, name = PIXELS_PER_TOKEN, self.pipeline_class.__name__
        if height % step or width % step or height <= 0 or width <= 0:
            tried = (max(step, round(side / step) * step) for side in (height, width))
            raise ValueError(
                f"image size {height} x {width}: {name} draws multiples of {step} pixels; "
                "try {} x {}".format(*tried)
            )
        grid, most = (height // step, width // step), self.most_tokens()
        if most is not None and max(grid) > most:
            raise ValueError(
                f"image size {height} x {width}: this transformer has places for {most} tokens on "
                f"a side; wanted at most {most * step} pixels"
            )
        return grid[0] * grid[1], self.latent_channels(self.transformer.config)

    def most_tokens(self) -> int | None:
        """The most image tokens on a side; None: any number."""
        return None

    @classmethod
    def no_images(cls, sizes: Sequence[Sequence[tuple[int, int]]]) -> None:
        """ValueError where there are condition images, which no family here takes."""
        for image in sizes:
            cls.condition_sizes(image[0], 1)

    def stacked(self, parts: Sequence[Tensor]) -> Tensor:
        """[P, L, C] in the model's dtype; ValueError for texts of several lengths, which these
        transformers, that take no mask, were not trained on.
        """
        lengths = sorted({len(part) for part in parts})
        if len(lengths) != 1:
            raise ValueError(
                f"embeddings of {lengths} tokens in one batch; {self.pipeline_class.__name__} pads "
                "all prompts to one length: pass what encode returns"
            )
        return torch.stack(list(parts)).to(self.device, self.dtype)

    def join(self, first: Any, second: Any) -> Any:
        """What `velocity` needs of the rows of `first`, then those of `second`."""
        pooled = None if first.pooled is None else torch.cat([first.pooled, second.pooled])
        tokens = torch.cat([first.tokens, second.tokens])
        return Text(tokens, pooled, first.place, first.batch + second.batch)

    def unpacked(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the autoencoder decodes, [b, C, 2 h, 2 w], of latents [b, h w, Z].

        Tokens hold (channel, row, column); the scale is the autoencoder's own.
        """
        z = latents.unflatten(2, (-1, 2, 2)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
        return self.scaled(z.flatten(4, 5).flatten(2, 3))

    def scaled(self, z: Tensor) -> Tensor:
        """Latents as the autoencoder makes them, of those that the transformer draws."""
        config = self.vae.config
        scaled: Tensor = z / config.scaling_factor + config.shift_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, chunk: int = 64) -> np.ndarray:
        """Latents [B, N, Z] -> uint8 RGB images [B, H, W, 3], never tiled."""
        require_finite(latents)
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        images = []
        for part in latents.split(chunk):
            z = self.unpacked(part.to(self.vae.dtype), grid)
            with self._decoding:
                rgb = self.vae.decode(z, return_dict=False)[0]
            rgb = (rgb.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            images.append((rgb * 255).round().to(torch.uint8).cpu())
        return torch.cat(images).numpy()
