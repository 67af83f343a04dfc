"""Outputs of CPU kernels; large ones in memory that earlier ones have given back.

See csrc/bindings/cpu/arrays.cpp and csrc/cpu/recycled.h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qirl_fast import _cpu

New = Callable[..., Tensor]  # Tensor.new_empty, for fake tensors, or empty
_INT, _FLOAT, _BFLOAT = 1, 2, 4  # DLPack's type codes
_DLPACK = {torch.float32: (_FLOAT, 32), torch.float64: (_FLOAT, 64), torch.bfloat16: (_BFLOAT, 16)}


def empty(
    like: Tensor, shape: tuple[int, ...] | int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """like.new_empty(shape, dtype=dtype), in the shape of `like` where none is given.

    On the CPU a large one lies in recycled memory. MemoryError where there is none.
    """
    if shape is None and dtype is None:
        made = _cpu.empty_like(like)  # one call: a tensor's attributes cost one each
        if made is not None:
            return made
    dtype = dtype or like.dtype
    sizes = like.shape if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
    if not like.is_cpu or 0 in sizes:
        return like.new_empty(sizes, dtype=dtype)
    if dtype in _DLPACK:
        return _cpu.empty(tuple(sizes), *_DLPACK[dtype])
    return _cpu.empty((*sizes[:-1], sizes[-1] * dtype.itemsize), _INT, 8).view(dtype)
