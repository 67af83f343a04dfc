"""Launchers of csrc/cuda/gelu.cu and csrc/cuda/swiglu.cu."""

from __future__ import annotations

from torch import Tensor

from qirl_fast.ops._checks import matrices, matrix
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of
from qirl_fast.ops._quantized import fp8_of, fp8_outputs


def gelu_cuda(x: Tensor, quantize: str) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/gelu.cu."""
    y = x.new_empty(x.shape)
    q, scale = fp8_outputs(y, quantize)
    (m,) = [matrix(x)] if quantize else matrices(x)
    fp8 = fp8_of(q, scale, quantize)
    with device_of(x):
        cuda_module().gelu(m, y, fp8, stream_of(x))
    return y, q, scale


def gelu_backward_cuda(grad: Tensor, x: Tensor) -> Tensor:
    """CUDA kernel, csrc/cuda/gelu.cu."""
    dx = x.new_empty(x.shape)
    dy, m = matrices(grad, x)
    with device_of(x):
        cuda_module().gelu_backward(dy, m, dx, stream_of(x))
    return dx


def swiglu_cuda(gate: Tensor, up: Tensor, quantize: str) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/swiglu.cu."""
    y = gate.new_empty(gate.shape)
    q, scale = fp8_outputs(y, quantize)
    g, u = [matrix(gate), matrix(up)] if quantize else matrices(gate, up)
    fp8 = fp8_of(q, scale, quantize)
    with device_of(gate):
        cuda_module().swiglu(g, u, y, fp8, stream_of(gate))
    return y, q, scale


def swiglu_backward_cuda(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/swiglu.cu."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dy, g, u = matrices(grad, gate, up)
    with device_of(gate):
        cuda_module().swiglu_backward(
            dy,
            g,
            u,
            dgate,
            dup,
            stream_of(gate),
        )
    return dgate, dup
