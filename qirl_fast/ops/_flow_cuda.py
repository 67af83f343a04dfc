"""Launchers of csrc/cuda/flow_step.cu: the `cuda` backend of flow_step and flow_logp.

Sums have the order of the CPU kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import row_sizes
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of

_BLOCK = 1024  # elements whose squares are added together, kBlock of flow_step.cu


def flow_scratch(x: Tensor) -> Tensor:
    rows, size = row_sizes(x)
    return x.new_empty(rows * ((size + _BLOCK - 1) // _BLOCK), dtype=torch.float32)


def flow_step_cuda(
    x: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    seed: Tensor,
    offset: int,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/flow_step.cu."""
    x_next, logp, sums = x.new_empty(x.shape), a.new_empty(a.shape), flow_scratch(x)
    with device_of(x):
        cuda_module().flow_step(
            x,
            v,
            delta,
            (a, c, w, b),
            s,
            seed,
            offset,
            sums,
            x_next,
            logp,
            stream_of(x),
        )
    return x_next, logp


def flow_logp_cuda(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor,
    delta: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/flow_step.cu."""
    logp, sums = a.new_empty(a.shape), flow_scratch(x)
    residual = a.new_empty(x.shape if keep else 0)
    with device_of(x):
        cuda_module().flow_logp(
            x,
            x_next,
            v,
            delta,
            (a, c, w, b),
            sums,
            logp,
            residual,
            stream_of(x),
        )
    return logp, residual


def flow_logp_backward_cuda(
    grad: Tensor,
    residual: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    x_dtype: torch.dtype | None,
    v_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/flow_step.cu."""
    dx, dv = (
        residual.new_empty(0 if dtype is None else residual.shape, dtype=dtype)
        for dtype in (x_dtype, v_dtype)
    )
    with device_of(residual):
        cuda_module().flow_logp_backward(
            grad,
            residual,
            (a, c, w),
            dx,
            dv,
            stream_of(residual),
        )
    return dx, dv
