"""One benchmarked job and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]
Function = Callable[..., object]


@dataclass
class Case:
    """`ours` and `eager` do the same job on `inputs`; `leaves` are the positions trained.

    forward_bytes, backward_bytes: what a pass must at least read and write, once each.
    same_job: eager's results are those of ours up to rounding (another noise stream is not).
    rivals: other libraries' functions of the same arguments; each imports its library when called.
    tolerance: error allowed against the reference, relative to the largest true value; None: 2e-5
        in float32, 2e-2 in bfloat16.
    """

    op: str
    shape: Shape
    inputs: tuple[object, ...]
    ours: Function
    eager: Function
    forward_bytes: int
    backward_bytes: int = 0
    leaves: tuple[int, ...] = ()
    same_job: bool = True
    rivals: dict[str, Function] = field(default_factory=dict)
    tolerance: float | None = None


class Make:
    """Random inputs of one dtype on one device, the same for the same seed."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def large(self, *size: int) -> Tensor:
        """Normal, in the dtype that is benchmarked."""
        return self.rows(*size).to(self.dtype)

    def rows(self, *size: int) -> Tensor:
        """Normal, float32."""
        return torch.randn(size, generator=self.generator).to(self.device)

    def full(self, rows: int, value: float) -> Tensor:
        """One float32 value a row."""
        return torch.full((rows,), value, device=self.device)

    def seeds(self, rows: int) -> Tensor:
        """One int64 seed a row."""
        return torch.arange(rows, device=self.device)


def size_of(*tensors: Tensor) -> int:
    """Bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def per_row(values_B: Tensor, like: Tensor) -> Tensor:
    """[B] against [B, ...]."""
    return values_B.reshape(-1, *[1] * (like.ndim - 1))
