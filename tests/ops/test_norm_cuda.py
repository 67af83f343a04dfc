"""The CUDA kernels of norm_modulate and the gated residuals on the host, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.ops import _norm_cuda as compiled
from qirl_fast.ops.gate_residual import gate_residual_backward_reference, gate_residual_reference
from qirl_fast.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate_backward_reference,
    gate_residual_norm_modulate_reference,
)
from qirl_fast.ops.norm_modulate import norm_modulate_backward_reference, norm_modulate_reference

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned")

EPS = 1e-6
# One element, rows of no whole vector, a chunk's end, more than one block, the two-pass backward.
SHAPES = [(1, 1, 1), (1, 3, 17), (2, 19, 48), (2, 33, 300), (1, 2, 3080), (1, 2, 8192)]
MARKS = [None, "tokens", "samples"]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("gate", "scale", "shift")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def modulation(samples: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A view of a chunked modulation: rows that lie apart, at odd addresses if width is odd."""
    return normal(samples, 2 * width, seed=seed, dtype=dtype)[:, width:]


def marked(kind: str | None, samples: int, tokens: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "tokens":
        return (torch.arange(tokens) % 3 == 0).expand(samples, tokens)
    return torch.arange(samples * tokens).reshape(samples, tokens) % 5 < 2


def rows_of(shape, kind, dtype):
    """t0, then gate, scale, shift of the unmarked and of the marked tokens (in float32)."""
    samples, tokens, width = shape
    t0 = marked(kind, samples, tokens)
    first = [modulation(samples, width, 10 + k, dtype) for k in range(3)]
    second = [modulation(samples, width, 20 + k, torch.float32) for k in range(3)]
    return t0, first, [None] * 3 if t0 is None else second


def check(got, wanted) -> None:
    """float32: a few roundings of terms of order one that may cancel; bfloat16: one more, its own.

    A sum over tokens is float32 whatever the inputs are.
    """
    got, wanted = (t if isinstance(t, tuple) else (t,) for t in (got, wanted))
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape, k
        size = max(float(b.abs().max()), 1.0) if b.numel() else 1.0
        own = 2.0**-8 if a.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=2e-6 + own, atol=2e-6 * size, msg=f"result {k}"
        )


def double(args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_norm_modulate(shape, kind, dtype, rms):
    t0, first, second = rows_of(shape, kind, torch.bfloat16)
    has_shift = not (rms and kind)
    if not has_shift:
        first[2] = second[2] = None
    x, dy = normal(*shape, dtype=dtype) + 0.5, normal(*shape, seed=1, dtype=dtype)
    args = (x, *first[1:], t0, *second[1:], rms, EPS)
    wanted = norm_modulate_reference(*double(args))
    check(compiled.norm_modulate_cuda(*args, "")[:3], wanted)
    stats = [t.float() for t in wanted[1:]]
    for want_mod in (True, False):
        args = (dy, x, *stats, first[1], t0, second[1], rms, want_mod, has_shift)
        wanted = norm_modulate_backward_reference(*double(args))
        check(compiled.norm_modulate_backward_cuda(*args), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh", [False, True])
def test_gate_residual(shape, kind, dtype, tanh):
    t0, (gate, *_), (gate_t0, *_) = rows_of(shape, kind, dtype)
    residual, u, dout = (normal(*shape, seed=k, dtype=dtype) for k in range(3))
    args = (residual, u, gate, t0, gate_t0, tanh)
    check(compiled.gate_residual_cuda(*args), gate_residual_reference(*double(args)))
    for wants in ((True, True), (False, True), (True, False)):
        args = (dout, u, gate, t0, gate_t0, tanh, *wants)
        wanted = gate_residual_backward_reference(*double(args))
        check(compiled.gate_residual_backward_cuda(*args), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("tanh", [False, True])
def test_gate_residual_norm_modulate(shape, kind, rms, tanh):
    t0, first, second = rows_of(shape, kind, torch.float32)
    residual, u, dy, dout = (normal(*shape, seed=k) for k in range(4))
    has_shift = not (rms and tanh)
    if not has_shift:
        first[2] = second[2] = None
    args = (residual, u, *first, t0, *second, tanh, rms, EPS)
    got = compiled.gate_residual_norm_modulate_cuda(*args, "")[:4]
    out = compiled.gate_residual_cuda(residual, u, first[0], t0, second[0], tanh)
    assert torch.equal(got[1], out)
    apart = compiled.norm_modulate_cuda(out, *first[1:], t0, *second[1:], rms, EPS, "")[:3]
    assert all(torch.equal(a, b) for a, b in zip((got[0], *got[2:]), apart, strict=True))
    if shape[-1] > 1:  # the LayerNorm of one element has no width to lean on
        check(got, gate_residual_norm_modulate_reference(*double(args)))
    for grad_out, *wants in ((dout, 1, 1, 1), (None, 1, 1, 0), (dout, 0, 0, 1), (dout, 0, 0, 0)):
        args = (dy, grad_out, out, u, *got[2:], *first[:2], t0, *second[:2], tanh, rms)
        args = (*args, *map(bool, wants), has_shift)
        wanted = gate_residual_norm_modulate_backward_reference(*double(args))
        check(compiled.gate_residual_norm_modulate_backward_cuda(*args), wanted)


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("u", DTYPES)
@pytest.mark.parametrize("width", [99, 3080])
def test_autograd_gives_what_the_cpu_kernels_give(x, u, width):
    """Through the public op, with mixed dtypes; a bfloat16 may be rounded to the neighbour.

    Rows too wide for one pass take the gate's gradients from dresidual as it was stored.
    """
    shape, kind = (2, 21, width), "samples"
    t0, first, second = rows_of(shape, kind, torch.bfloat16)
    large = [normal(*shape, dtype=x), normal(*shape, seed=1, dtype=u)]
    grads = [normal(*shape, seed=k, dtype=x) for k in (2, 3)]

    def run(backend: str) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (*large, *first, *second)]
        residual, branch, *rows = leaves
        marks = dict(zip((f"{n}_t0" for n in NAMES), rows[3:], strict=True))
        with ops.use_backend(backend):
            outputs = ops.gate_residual_norm_modulate(
                residual, branch, *rows[:3], tanh=True, t0=t0, **marks
            )
            return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    for k, (a, b) in enumerate(zip(run("cuda"), run("cpu"), strict=True)):
        assert a.dtype == b.dtype
        rounded = torch.bfloat16 in (a.dtype, x if width > 3072 else None)
        close = 2.0**-7 if rounded else 2e-6
        size = float(b.detach().float().abs().max())
        torch.testing.assert_close(a, b, rtol=close, atol=close * size / 2, msg=f"result {k}")


def test_the_order_of_blocks_and_threads_does_not_matter(emulated_cuda):
    t0, first, second = rows_of((2, 33, 300), "samples", torch.float32)
    dy, dout, out, u = (normal(2, 33, 300, seed=k) for k in range(4))
    mean, rstd = normal(2, 33, seed=5), normal(2, 33, seed=6).abs() + 0.1
    args = (dy, dout, out, u, mean, rstd, *first[:2], t0, *second[:2], True, False)
    runs = []
    for order in (1, 2, 3):
        emulated_cuda.seed_order(order)
        runs.append(compiled.gate_residual_norm_modulate_backward_cuda(*args, *[True] * 4))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_nan_stays_in_its_token_and_reaches_the_sums():
    x = normal(1, 20, 48)
    x[0, 3, 5] = math.nan
    scale = normal(1, 48)
    y, mean, rstd, *_ = compiled.norm_modulate_cuda(x, scale, *[None] * 4, False, EPS, "")
    assert torch.equal(y.isnan().any(-1), torch.arange(20)[None] == 3)
    args = (torch.ones_like(x), x, mean, rstd, scale, None, None, False, True, False)
    dx, dscale, *_ = compiled.norm_modulate_backward_cuda(*args)
    assert torch.equal(dx.isnan().any(-1), torch.arange(20)[None] == 3) and dscale.isnan().all()


def test_a_row_too_wide_is_refused():
    wide = (normal(1, 1, 8193), normal(1, 8193), *[None] * 4, False, EPS, "")
    with pytest.raises(ValueError, match="cuda backend takes rows of at most 8192; got 8193"):
        compiled.norm_modulate_cuda(*wide)
    u, gate = normal(1, 1, 8193), normal(1, 8193)
    out = compiled.gate_residual_cuda(u, u, gate, None, None, False)  # without a norm it is not
    assert torch.equal(out, u + gate * u)
