"""The kernels of norm_modulate and the gate ops in Triton's interpreter, on CPU tensors.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. The interpreter truncates float32 to
bfloat16 where hardware rounds to nearest, so large tensors are float32 here.
"""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import ops
from qirl_fast.kernels import gate_residual as gate_kernels
from qirl_fast.kernels import gate_residual_norm_modulate as fused_kernels
from qirl_fast.kernels import norm_modulate as norm_kernels
from qirl_fast.ops.gate_residual import gate_residual_backward_reference, gate_residual_reference
from qirl_fast.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate_backward_reference,
    gate_residual_norm_modulate_reference,
)
from qirl_fast.ops.norm_modulate import norm_modulate_backward_reference, norm_modulate_reference

EPS = 1e-6
SHAPES = [(2, 19, 48), (1, 3, 17), (1, 1, 1), (1, 2, 300)]
MARKS = [None, "tokens", "all"]
FLAGS = [(False, False), (False, True), (True, False), (True, True)]  # rms, tanh


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(samples, width, seed, dtype=torch.float32):
    """A view of a chunked modulation: rows that are not next to each other."""
    return normal(samples, 2 * width, seed=seed).to(dtype)[:, width:]


def marked(kind, samples, tokens):
    if kind is None:
        return None
    if kind == "tokens":  # one mark a token, the same in each sample
        return (torch.arange(tokens) % 3 == 0).expand(samples, tokens)
    return torch.arange(samples * tokens).reshape(samples, tokens) % 5 < 2


def double(args):
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]


def check(got, wanted):
    """float32 against float64: a few roundings of terms that are of order one and may cancel."""
    got, wanted = (t if isinstance(t, tuple) else (t,) for t in (got, wanted))
    assert len(got) == len(wanted)
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape, k
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=2e-6, atol=2e-6 * max(size, 1.0), msg=f"result {k}"
        )


def inputs(shape, kind, names, dtype=torch.float32):
    samples, tokens, width = shape
    t0 = marked(kind, samples, tokens)
    first = [rows(samples, width, 10 + k, dtype) for k in range(names)]
    second = [None if t0 is None else rows(samples, width, 20 + k) for k in range(names)]
    return t0, first, second


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("has_shift", [False, True])
def test_norm_modulate(shape, kind, rms, has_shift):
    t0, (scale, shift), (scale_t0, shift_t0) = inputs(shape, kind, 2, torch.bfloat16)
    x, dy = normal(*shape) + 0.5, normal(*shape, seed=1)
    if not has_shift:
        shift = shift_t0 = None
    args = (x, scale, shift, t0, scale_t0, shift_t0, rms, EPS)
    wanted = norm_modulate_reference(*double(args))
    check(norm_kernels.norm_modulate(*args, "")[:3], wanted)
    mean, rstd = (t.float() for t in wanted[1:])
    for want_mod in (False, True):
        args = (dy, x, mean, rstd, scale, t0, scale_t0, rms, want_mod, has_shift)
        wanted = norm_modulate_backward_reference(*double(args))
        check(norm_kernels.norm_modulate_backward(*args), wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 1100)])
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("tanh", [False, True])
def test_gate_residual(shape, kind, tanh):
    t0, (gate,), (gate_t0,) = inputs(shape, kind, 1)
    residual, u, dout = (normal(*shape, seed=k) for k in range(3))
    args = (residual, u, gate, t0, gate_t0, tanh)
    check(gate_kernels.gate_residual(*args), gate_residual_reference(*double(args)))
    for wants in ((True, True), (False, True), (True, False)):
        args = (dout, u, gate, t0, gate_t0, tanh, *wants)
        wanted = gate_residual_backward_reference(*double(args))
        check(gate_kernels.gate_residual_backward(*args), wanted)


FUSED = [(s, kind, rms, tanh) for s in SHAPES[:3] for kind in MARKS for rms, tanh in FLAGS]


@pytest.mark.parametrize(
    ("shape", "kind", "rms", "tanh"), [*FUSED, ((1, 2, 4100), "tokens", False, True)]
)
def test_gate_residual_norm_modulate(shape, kind, rms, tanh):
    t0, first, second = inputs(shape, kind, 3)
    residual, u, dy, dout = (normal(*shape, seed=k) for k in range(4))
    has_shift = not (rms and tanh)
    if not has_shift:
        first[2] = second[2] = None
    flags = (tanh, rms, EPS)
    args = (residual, u, *first, t0, *second, *flags)
    got = fused_kernels.gate_residual_norm_modulate(*args, "")[:4]
    out = gate_kernels.gate_residual(residual, u, first[0], t0, second[0], tanh)
    assert torch.equal(got[1], out)
    apart = norm_kernels.norm_modulate(out, *first[1:], t0, *second[1:], rms, EPS, "")[:3]
    assert all(torch.equal(a, b) for a, b in zip((got[0], *got[2:]), apart, strict=True))
    check(got, gate_residual_norm_modulate_reference(*double(args)))
    for grad_out, *wants in ((dout, 1, 1, 1), (None, 1, 1, 0), (dout, 0, 0, 1), (dout, 0, 0, 0)):
        args = (dy, grad_out, out, u, *got[2:], *first[:2], t0, *second[:2], tanh, rms)
        args = (*args, *map(bool, wants), has_shift)
        wanted = gate_residual_norm_modulate_backward_reference(*double(args))
        check(fused_kernels.gate_residual_norm_modulate_backward(*args), wanted)


@pytest.mark.parametrize("shape", [*SHAPES[1:], (1, 2, 1100)])
@pytest.mark.parametrize("kind", [None, "tokens"])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_in_fp8_too(shape, kind, rms, dtype):
    """The other results are those without quantize; (q, scale) are fp8_quantize's of that y."""
    t0, first, second = inputs(shape, kind, 3)
    residual, u = (normal(*shape, seed=k).to(dtype) for k in range(2))
    residual[0, 0, 0] = math.nan
    fused = (residual, u, *first, t0, *second, not rms, rms, EPS)
    plain = (residual, *first[1:], t0, *second[1:], rms, EPS)
    for op, args in (
        (fused_kernels.gate_residual_norm_modulate, fused),
        (norm_kernels.norm_modulate, plain),
    ):
        wanted = op(*args, "")[:-2]
        for quantize in ("row", "block"):
            *results, q, scale = op(*args, quantize)
            pairs = zip(results, wanted, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
            q_wanted, scale_wanted = ops.fp8_quantize(wanted[0], granularity=quantize)
            nan = q_wanted.float().isnan()
            assert q.is_contiguous() and torch.equal(scale, scale_wanted)
            assert torch.equal(q.float().isnan(), nan)
            assert torch.equal(q.view(torch.uint8)[~nan], q_wanted.view(torch.uint8)[~nan])


def test_tanh_of_the_gate_is_accurate_and_keeps_nan():
    gate = torch.cat([torch.logspace(-20, 2, 400), torch.tensor([0.0, math.inf])])
    gate = torch.cat([gate, -gate, torch.tensor([math.nan])])[None]
    one, zero = torch.ones(1, 1, gate.shape[1]), torch.zeros(1, 1, gate.shape[1])
    got = gate_kernels.gate_residual(zero, one, gate, None, None, True)[0]
    torch.testing.assert_close(
        got.double(), gate.double().tanh(), rtol=5e-7, atol=0, equal_nan=True
    )


def test_a_row_too_wide_is_refused():
    wide = (normal(1, 1, 8193), normal(1, 8193), *[None] * 4, False, EPS, "")
    with pytest.raises(ValueError, match="at most 8192; got 8193"):
        norm_kernels.norm_modulate(*wide)


def test_nan_stays_in_its_token_and_sums():
    x = normal(1, 20, 48)
    x[0, 3, 5] = math.nan
    y, mean, rstd, *_ = norm_kernels.norm_modulate(x, normal(1, 48), *[None] * 4, False, EPS, "")
    assert torch.equal(y.isnan().any(-1), torch.arange(20)[None] == 3)
    args = (torch.ones_like(x), x, mean, rstd, normal(1, 48), None, None, False, True, False)
    dx, dscale, *_ = norm_kernels.norm_modulate_backward(*args)
    assert torch.equal(dx.isnan().any(-1), torch.arange(20)[None] == 3) and dscale.isnan().all()
