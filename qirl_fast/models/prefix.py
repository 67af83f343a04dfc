"""What rows see before their own tokens: text and condition images, laid out and shared.

Shapes: B rows, P prompts, L tokens of a prefix, C text channels, M latent tokens of condition
images, N of the target, Z channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qirl_fast.models.fused.attention import Segments
from qirl_fast.models.fused.qwenimage21 import SharedPrefix


@dataclass(frozen=True)
class Conditioned:
    """A prompt with condition images, as the text encoder and the autoencoder give them.

    slots: bool [L]; True where an embedding stands for 2 x 2 latent tokens of an image. None does
    where the latents have a stream of their own (Qwen-Image-Edit).
    latents: normalised, [M, Z], of all images in the order of their slots; grids: the tokens
    (height, width) of each.
    """

    text: Tensor  # [L, C]
    slots: Tensor
    latents: Tensor
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True, order=True)
class Layout:
    """Where text and condition images lie in a prefix; prompts of one layout run together."""

    slots: tuple[bool, ...]
    grids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, prompt: Tensor | Conditioned) -> "Layout":
        """The layout of an embedding or a conditioned prompt.

        ValueError where a prompt's parts do not fit together.
        """
        if isinstance(prompt, Tensor):
            return cls((False,) * len(prompt))
        slots = tuple(map(bool, prompt.slots.tolist()))
        tokens = sum(h * w for h, w in prompt.grids)
        if len(slots) != len(prompt.text) or not 4 * sum(slots) == tokens == len(prompt.latents):
            raise ValueError(
                f"a prompt of {len(prompt.text)} embeddings and {len(slots)} slots, {sum(slots)} "
                f"of them of images, with {len(prompt.latents)} latent tokens and grids "
                f"{list(prompt.grids)}, which hold {tokens}; wanted as many slots as embeddings, "
                "and 4 latent tokens for each slot of an image"
            )
        return cls(slots, prompt.grids)

    @property
    def source(self) -> list[int]:
        """Of each token the embedding it stands on: a slot of an image is four tokens."""
        return [i for i, slot in enumerate(self.slots) for _ in range(4 if slot else 1)]

    @property
    def image(self) -> list[int]:
        """Of each token the image it belongs to; -1: text. Neighbouring images stay apart."""
        images = iter([k for k, (h, w) in enumerate(self.grids) for _ in range(h * w)])
        return [next(images) if self.slots[i] else -1 for i in self.source]

    @property
    def segments(self) -> Segments:
        """Runs (start, end, is text) of tokens that belong together."""
        found, start = [], 0
        for image, run in groupby(self.image):
            end = start + len(list(run))
            found.append((start, end, image < 0))
            start = end
        return found


@dataclass(frozen=True)
class Prefix:
    """What `velocity` needs to know of the prompts of B rows.

    The blocks run on the rows sorted by layout: `order` sorts, `inverse` undoes it; None where
    there is one.
    """

    layers: tuple[SharedPrefix, ...]
    rope: Tensor  # complex64 [N, head_dim / 2] of the target's tokens, or [B, N, head_dim / 2]
    order: Tensor | None
    inverse: Tensor | None
    batch: int

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """(rows, image tokens beside the target's, text tokens) of each run of rows."""
        return [(len(k), 0, k.shape[1]) for k in self.layers[0].k]

    @property
    def tensors(self) -> list[Tensor]:
        """What is held for every layer."""
        return [t for layer in self.layers for t in (*layer.k, *layer.v)]


def join(first: Prefix, second: Prefix) -> Prefix:
    """What `velocity` needs of the rows of `first`, then those of `second`; nothing is copied
    but rotations.
    """
    layers = tuple(
        replace(a, k=a.k + b.k, v=a.v + b.v)
        for a, b in zip(first.layers, second.layers, strict=True)
    )
    both = (first, second)
    rope = torch.cat([p.rope.expand(p.batch, *p.rope.shape[-2:]) for p in both])
    batch = first.batch + second.batch
    return Prefix(layers, rope, *joined_order(first, second), batch)


def by_layout(
    owner: Sequence[int], layouts: Mapping[int, Any]
) -> Iterator[tuple[Any, list[int], list[int]]]:
    """(layout, its prompts, the rows they own) for each layout, in the order of layouts.

    owner: the prompt of each row; layouts: of each prompt that owns rows.
    """
    for layout in sorted(set(layouts.values())):
        used = [p for p in layouts if layouts[p] == layout]
        yield layout, used, [r for r, p in enumerate(owner) if layouts[p] == layout]


def to_rows(parts: Sequence[Tensor], owner: Sequence[int]) -> list[Tensor]:
    """Each part [P, ...] as [rows, ...]; owner[r] is the place in P that row r takes.

    A single prompt's, such as the unconditional branch's, is held once and not per row.
    """
    if len(parts[0]) == 1:
        return [spread(part, len(owner)) for part in parts]
    source = torch.tensor(owner, device=parts[0].device)
    return [part.index_select(0, source) for part in parts]


def row_order(
    runs: Sequence[list[int]], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """`order` and `inverse` of rows that run by layout; None where there is one."""
    if len(runs) == 1:
        return None, None
    order = torch.tensor([row for rows in runs for row in rows], device=device)
    return order, order.argsort()


def joined_order(first: Any, second: Any) -> tuple[Tensor | None, Tensor | None]:
    """`order` and `inverse` of the rows of two prefixes, one after the other."""
    if first.order is None and second.order is None:
        return None, None
    device = (second.order if first.order is None else first.order).device
    own = [
        torch.arange(p.batch, device=device) if p.order is None else p.order
        for p in (first, second)
    ]
    order = torch.cat([own[0], own[1] + first.batch])
    return order, order.argsort()


def spread(one: Tensor, rows: int) -> Tensor:
    """[1, ...] seen as [rows, ...], without a copy."""
    return one.expand(rows, *one.shape[1:])


def spread_rows(rows: Tensor, batch: int, order: Tensor | None) -> Tensor:
    """Rows [R, D] of runs of batch / R samples as [batch, D], in `order`."""
    if len(rows) == 1:
        return spread(rows, batch)
    by_row = rows.repeat_interleave(batch // len(rows), dim=0) if len(rows) < batch else rows
    return by_row if order is None else by_row[order]
