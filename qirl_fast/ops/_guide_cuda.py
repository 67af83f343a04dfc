"""Launchers of csrc/cuda/guide.cu: the bits of the CPU kernels, rescaled or not."""

from __future__ import annotations

from torch import Tensor

from qirl_fast.ops._checks import dense
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of


def guide_cuda(v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool) -> Tensor:
    """CUDA kernel, csrc/cuda/guide.cu."""
    c, u, scale_B = dense((v_cond, v_uncond), (scale_B,))
    out = c.new_empty(c.shape)
    with device_of(c):
        cuda_module().guide(
            c,
            u,
            scale_B,
            out,
            rescale,
            stream_of(c),
        )
    return out


def guide_backward_cuda(
    grad: Tensor, v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/guide.cu."""
    dy, c, u, scale_B = dense((grad, v_cond, v_uncond), (scale_B,))
    dc, du = c.new_empty(c.shape), u.new_empty(u.shape)
    with device_of(c):
        cuda_module().guide_backward(
            dy,
            c,
            u,
            scale_B,
            dc,
            du,
            rescale,
            stream_of(c),
        )
    return dc, du
