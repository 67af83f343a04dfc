"""Launchers of csrc/cuda/guide.cu: the bits of the CPU kernels, rescaled or not."""

from __future__ import annotations

from torch import Tensor

from qirl_fast.ops._cuda import cuda_module, device_of, stream_of


def guide_cuda(v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool) -> Tensor:
    """CUDA kernel, csrc/cuda/guide.cu."""
    out = v_cond.new_empty(v_cond.shape)
    with device_of(v_cond):
        cuda_module().guide(
            v_cond,
            v_uncond,
            scale_B,
            out,
            rescale,
            stream_of(v_cond),
        )
    return out


def guide_backward_cuda(
    grad: Tensor, v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/guide.cu."""
    dc, du = v_cond.new_empty(v_cond.shape), v_cond.new_empty(v_cond.shape)
    with device_of(v_cond):
        cuda_module().guide_backward(
            grad,
            v_cond,
            v_uncond,
            scale_B,
            dc,
            du,
            rescale,
            stream_of(v_cond),
        )
    return dc, du
