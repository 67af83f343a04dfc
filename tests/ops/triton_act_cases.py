"""kernels/gelu.py, swiglu.py and fp8_quantize.py in Triton's interpreter, on CPU tensors.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. The interpreter truncates float32 to
bfloat16 where hardware rounds to nearest: bfloat16 results of gelu and swiglu may be one unit off.
fp8 codes are made from the bits of float32 and must be exact.
"""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import ops
from qirl_fast.kernels import fp8_quantize as fp8
from qirl_fast.kernels import gelu as gelu_kernels
from qirl_fast.kernels import swiglu as swiglu_kernels


def normal(*shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(got, wanted):
    """Two approximations of one formula, a few float32 roundings apart."""
    assert torch.equal(got.isnan(), wanted.isnan())
    if got.dtype == torch.bfloat16:
        steps = got.view(torch.int16).int() - wanted.view(torch.int16).int()
        assert int(steps[~got.isnan()].abs().max()) <= 1
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [False, True])
def test_gelu_and_swiglu_match_the_cpu_kernels(dtype, halves):
    fused = normal(3, 2, 5000).to(dtype)
    fused[0, 0, :3] = torch.tensor([math.nan, -1e30, 1e30])
    gate, up = fused.chunk(2, dim=-1)
    grad = normal(3, 2, 2500, seed=1).to(dtype)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    check(gelu_kernels.gelu(gate, "")[0], ops.gelu(gate))
    leaf = gate.clone().requires_grad_()
    ops.gelu(leaf).backward(grad)
    check(gelu_kernels.gelu_backward(grad, gate), leaf.grad)

    up = up.clamp(-1e3, 1e3)
    check(swiglu_kernels.swiglu(gate, up, "")[0], ops.swiglu(gate, up))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    ops.swiglu(*leaves).backward(grad)
    for got, wanted in zip(
        swiglu_kernels.swiglu_backward(grad, gate, up), [t.grad for t in leaves], strict=True
    ):
        check(got, wanted)


def check_quantized(results, plain, quantize):
    """y is the y without quantize; (q, scale) are the CPU kernel's of that y, bit for bit."""
    y, q, scale = results
    assert torch.equal(y.nan_to_num(), plain.nan_to_num()) and q.is_contiguous()
    wanted, wanted_scale = ops.fp8_quantize(plain, granularity=quantize)
    nan = wanted.float().isnan()
    assert torch.equal(q.float().isnan(), nan) and torch.equal(scale, wanted_scale)
    assert torch.equal(q.view(torch.uint8)[~nan], wanted.view(torch.uint8)[~nan])


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 3, 700), (2, 2051), (1, 16384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["row", "block"])
@pytest.mark.parametrize("halves", [False, True])
def test_gelu_and_swiglu_in_fp8_too(shape, dtype, quantize, halves):
    fused = normal(*shape[:-1], 2 * shape[-1]).to(dtype)
    fused.view(-1)[:3:2] = torch.tensor([math.nan, math.inf]) if shape[-1] > 1 else 0.0
    gate, up = fused.chunk(2, dim=-1)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    check_quantized(gelu_kernels.gelu(gate, quantize), gelu_kernels.gelu(gate, "")[0], quantize)
    plain, *_ = swiglu_kernels.swiglu(gate, up, "")
    check_quantized(swiglu_kernels.swiglu(gate, up, quantize), plain, quantize)


def test_a_row_too_wide_for_one_scale_is_refused():
    x = normal(1, 16385)
    with pytest.raises(ValueError, match=r"gelu: with quantize='row' .* at most 16384; got 16385"):
        gelu_kernels.gelu(x, "row")
    check_quantized(gelu_kernels.gelu(x, "block"), gelu_kernels.gelu(x, "")[0], "block")


@pytest.mark.parametrize("shape", [(3, 17), (2, 3, 700), (70, 130), (1, 40000)])
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("e5m2", [False, True])
def test_fp8_codes_and_scales_are_those_of_the_cpu_kernels(shape, granularity, transpose, e5m2):
    if transpose and shape == (1, 40000):
        shape = (200, 65)
    x = normal(*shape) * torch.exp(normal(*shape, seed=1))
    x.view(-1)[3:8] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-42])
    q, scale = fp8.fp8_quantize(x, granularity, e5m2, transpose)
    wanted, wanted_scale = ops.fp8_quantize(
        x, granularity=granularity, dtype=q.dtype, transpose=transpose
    )
    assert torch.equal(scale, wanted_scale)
    nan = wanted.float().isnan()
    assert torch.equal(q.float().isnan(), nan)
    assert torch.equal(q.view(torch.uint8)[~nan], wanted.view(torch.uint8)[~nan])


def test_bfloat16_input_of_fp8_is_exact():
    x = normal(5, 300).bfloat16()
    for granularity in ("row", "block"):
        q, scale = fp8.fp8_quantize(x, granularity, False, False)
        wanted, wanted_scale = ops.fp8_quantize(x, granularity=granularity)
        assert torch.equal(scale, wanted_scale)
        assert torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))
