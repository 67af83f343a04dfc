"""The CUDA kernels of gelu, swiglu and fp8_quantize on the host: the bits of the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import ops

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    nan = wanted.float().isnan()
    store = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    bits, expected = (t.contiguous().view(store)[~nan] for t in (got, wanted))
    return torch.equal(got.float().isnan(), nan) and torch.equal(bits, expected)


def results(backend: str, gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    with ops.use_backend(backend):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        y = ops.gelu(leaves[0])
        out = [y.detach(), torch.autograd.grad(y, leaves[0], grad)[0]]
        y = ops.swiglu(*leaves)
        return [*out, y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 40), (2, 2051), (1, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
def test_gelu_and_swiglu(emulated_cuda, poisoned, shape, dtype, halves):
    fused = normal(*shape[:-1], 2 * shape[-1]).to(dtype)
    fused.view(-1)[:1] = math.nan
    gate, up = fused.chunk(2, dim=-1)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    grad = normal(*shape, seed=1).to(dtype)
    got, wanted = (results(backend, gate, up, grad) for backend in ("cuda", "cpu"))
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 3, 700), (70, 130), (2, 9000), (200, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_quantize(emulated_cuda, poisoned, shape, dtype, granularity, transpose, fp8):
    if transpose and shape == (2, 9000):
        shape = (300, 65)
    x = (normal(*shape) * torch.exp(normal(*shape, seed=1))).to(dtype)
    if x.numel() > 40:
        x.view(-1)[3:8] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-42])
    options = {"granularity": granularity, "transpose": transpose, "dtype": fp8}
    with ops.use_backend("cuda"):
        q, scale = ops.fp8_quantize(x, **options)
    with ops.use_backend("cpu"):
        wanted, wanted_scale = ops.fp8_quantize(x, **options)
    assert torch.equal(scale, wanted_scale)
    assert same(q, wanted)


def test_fp8_quantize_of_a_strided_view(emulated_cuda, poisoned):
    x = normal(4, 6, 300).bfloat16()[..., 1:150]  # rows at odd addresses
    for granularity in ("row", "tensor", "block"):
        for transpose in (False, True):
            options = {"granularity": granularity, "transpose": transpose}
            with ops.use_backend("cuda"):
                q, scale = ops.fp8_quantize(x, **options)
            wanted, wanted_scale = ops.fp8_quantize(x.contiguous(), **options)
            assert torch.equal(scale, wanted_scale) and same(q, wanted)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_linear(emulated_cuda, granularity, dtype):
    x, w = normal(70, 64).to(dtype), normal(32, 64, seed=1).bfloat16()
    quantized = ops.fp8_quantize(w, granularity=granularity)
    got = []
    for backend in ("cuda", "cpu"):
        with ops.use_backend(backend):
            got.append(ops.fp8_linear(x, *quantized, granularity=granularity))
    assert torch.equal(*got)
