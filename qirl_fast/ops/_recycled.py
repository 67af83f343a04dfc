"""Outputs of CPU kernels in memory that earlier ones have given back, see csrc/cpu/recycled.h."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qirl_fast import _cpu

New = Callable[..., Tensor]  # Tensor.new_empty, for fake tensors, or empty
_FLOOR = 1 << 20  # bytes; smaller arrays are kept by the C library itself
_INT, _FLOAT, _BFLOAT = 1, 2, 4  # DLPack's type codes
_DLPACK = {torch.float32: (_FLOAT, 32), torch.float64: (_FLOAT, 64), torch.bfloat16: (_BFLOAT, 16)}


def empty(like: Tensor, shape: tuple[int, ...] | int, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype); a large one on the CPU in recycled memory.

    MemoryError where there is none.
    """
    dtype = dtype or like.dtype
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if like.device.type != "cpu" or prod(sizes) * dtype.itemsize < _FLOOR:
        return like.new_empty(sizes, dtype=dtype)
    if dtype in _DLPACK:
        return from_dlpack(_cpu.recycled(sizes, *_DLPACK[dtype]))
    return from_dlpack(_cpu.recycled((*sizes[:-1], sizes[-1] * dtype.itemsize), _INT, 8)).view(
        dtype
    )
