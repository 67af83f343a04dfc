"""Sequence parallelism (Ulysses, arXiv 2309.14509): processes share the tokens of each sample.

Every process of a group has all weights and a run of the tokens. What is computed token by token
needs nothing of the others; for attention each gets all tokens of its share of the heads, and gives
its answer back to whoever has the tokens (all-to-all).

All of a group compute the same loss from the whole velocity, so the gradient of `whole` is that of
the own run. A process then has the part of the gradient that comes through its tokens and its
heads; the parts of a group add up to the gradient.

Differs from the paper: lengths need not divide, and several tensors go in one exchange. A process
that gets none of too few tokens computes on a stand-in, the first of them, which it neither sends
nor hears of.
Shapes: B rows, T tokens, t of them here, H heads, h = H / size of them here, Dh channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

T = TypeVar("T")


@dataclass(frozen=True)
class Ulysses:
    """A group of `size` processes that call each method together, of which this is number `rank`.

    group: torch.distributed's; None: nothing is sent, for tensors without values.
    """

    rank: int
    size: int
    group: Any

    def counts(self, length: int) -> list[int]:
        """Tokens of each process, of so many."""
        ends = [length * k // self.size for k in range(self.size + 1)]
        return [end - start for start, end in pairwise(ends)]

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens of x, which holds all of them in `dim`; at least one."""
        counts = self.counts(x.shape[dim])
        count = counts[self.rank]
        first = sum(counts[: self.rank]) if count else 0
        return x.narrow(dim, first, max(1, count)).contiguous()

    def own_heads(self, x: Tensor) -> Tensor:
        """[B, T, h, Dh] of x [B, T, H, Dh]."""
        return x.chunk(self.size, dim=2)[self.rank].contiguous()

    def whole(self, x: Tensor, length: int) -> Tensor:
        """[B, T, Z] of x [B, t, Z], its own tokens of `length`; the gradient is not exchanged."""
        found: Tensor = _Whole.apply(self, length, x)
        return found

    def to_heads(self, lengths: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """[B, T, h, Dh] of each part [B, t, H, Dh]; lengths: T of each."""
        return list(_ToHeads.apply(self, tuple(lengths), *parts))

    def to_tokens(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """[B, t, H, Dh] of each part [B, T, h, Dh]."""
        return list(_ToTokens.apply(self, *parts))

    def _exchange(self, pieces: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Any]]) -> Any:
        """For each process the tensors that it sends here; pieces: for each those that it gets.

        shapes: of what comes, for each process as many.
        """
        flat, wanted = list(chain(*pieces)), [torch.Size(shape) for shape in chain(*shapes)]
        sizes, come = [piece.numel() for piece in flat], [shape.numel() for shape in wanted]
        sent, found = (flat[0].new_empty(sum(numbers)) for numbers in (sizes, come))
        for piece, place in zip(flat, sent.split(sizes), strict=True):
            place.view(piece.shape).copy_(piece)
        if self.group is not None:
            to, fro = ([sum(each) for each in self._by_process(n)] for n in (sizes, come))
            dist.all_to_all_single(found, sent, fro, to, group=self.group)
        parts = zip(found.split(come), wanted, strict=True)
        return self._by_process([part.view(shape) for part, shape in parts])

    def _by_process(self, of_all: Sequence[T]) -> list[Sequence[T]]:
        each = len(of_all) // self.size
        return [of_all[k * each : (k + 1) * each] for k in range(self.size)]

    def _heads(self, lengths: Sequence[int], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        counts = [self.counts(length) for length in lengths]
        share = parts[0].shape[2] // self.size
        pieces = [
            [
                part[:, : count[self.rank], k * share : (k + 1) * share]
                for part, count in zip(parts, counts, strict=True)
            ]
            for k in range(self.size)
        ]
        shapes = [
            [(len(p), count[k], share, p.shape[3]) for p, count in zip(parts, counts, strict=True)]
            for k in range(self.size)
        ]
        found = self._exchange(pieces, shapes)
        return tuple(torch.cat(of, dim=1) for of in zip(*found, strict=True))

    def _tokens(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        counts = [self.counts(part.shape[1]) for part in parts]
        split = [part.split(count, dim=1) for part, count in zip(parts, counts, strict=True)]
        shapes = [
            (len(p), count[self.rank], *p.shape[2:]) for p, count in zip(parts, counts, strict=True)
        ]
        found = self._exchange(list(zip(*split, strict=True)), [shapes] * self.size)
        whole = [torch.cat(of, dim=2) for of in zip(*found, strict=True)]
        return tuple(t if t.shape[1] else _stand_in(t) for t in whole)


def _stand_in(x: Tensor) -> Tensor:
    """Zeros for one token, of x [B, 0, ...]."""
    return x.new_zeros(len(x), 1, *x.shape[2:])


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, among: Ulysses, lengths: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.among = among
        return among._heads(lengths, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.among._tokens(gradients)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, among: Ulysses, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.among, ctx.lengths = among, [part.shape[1] for part in parts]
        return among._tokens(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *ctx.among._heads(ctx.lengths, gradients)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, among: Ulysses, length: int, x: Tensor) -> Tensor:
        ctx.among = among
        counts = among.counts(length)
        own = x[:, : counts[among.rank]]
        shapes = [[(len(x), count, x.shape[2])] for count in counts]
        found = among._exchange([[own]] * among.size, shapes)
        return torch.cat([part for (part,) in found], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        own = ctx.among.own(gradient)
        some = ctx.among.counts(gradient.shape[1])[ctx.among.rank]
        return None, None, own if some else torch.zeros_like(own)
