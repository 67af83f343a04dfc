"""gelu and swiglu: values and gradients against float64, and all that must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qirl_fast import _cpu, ops
from qirl_fast.ops.gelu import gelu_backward_reference, gelu_reference
from qirl_fast.ops.swiglu import swiglu_backward_reference, swiglu_reference

SHAPES = [(1,), (1, 1), (3, 17), (2, 5, 64), (3, 2, 7, 33), (1, 4099), (2, 3, 4100), (9, 4096, 32)]
DTYPES = [torch.float32, torch.bfloat16]
PUBLIC: dict[str, Callable[..., Tensor]] = {"gelu": ops.gelu, "swiglu": ops.swiglu}
EAGER: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": lambda gate, up: F.silu(gate) * up,
}
COUNT = {"gelu": 1, "swiglu": 2}


def inputs(op: str, shape, dtype=torch.float32, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=g)).to(dtype) for _ in range(COUNT[op])]


def gradient_like(shape, dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def value_and_gradients(function, tensors, grad) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", PUBLIC)
def test_value_and_gradients_match_float64(op, shape, dtype, isa, poisoned, no_worse):
    tensors, grad = inputs(op, shape, dtype), gradient_like(shape, dtype)
    result = value_and_gradients(PUBLIC[op], tensors, grad)
    assert _cpu.last_isa() == isa
    same = value_and_gradients(EAGER[op], tensors, grad)
    truth = value_and_gradients(EAGER[op], [t.double() for t in tensors], grad.double())
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        assert got.dtype == dtype
        no_worse(got, torch_version, exact)


@pytest.mark.parametrize("op", PUBLIC)
def test_every_bfloat16_is_within_one_rounding(op, isa):
    """All finite bfloat16 x: half a unit in the last place of the exact value and no more than a
    hair, both tails included; below 1.1e-35 the value counts as zero."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    tensors = [x] if op == "gelu" else [x, torch.ones_like(x)]
    y = PUBLIC[op](*tensors).double()
    exact = EAGER[op](*(t.double() for t in tensors))
    if op == "gelu":  # 1 + tanh cancels even in float64 below x = -6
        wide = x.double()
        exact = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    tiny = exact.abs() < 1.1e-35
    assert float(y[tiny].abs().max()) < 1.1e-35
    ulp = torch.exp2(exact.abs().log2().floor() - 7)
    assert float(((y - exact).abs() / ulp)[~tiny].max()) < 0.505


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_tails_and_nan(dtype, isa):
    big = [-3e38, -1e30, -1e20, -200.0, 200.0, 1e20, 1e30, 3e38, math.nan]
    x = torch.tensor(big * 12, dtype=dtype)
    one = torch.ones_like(x)
    y, dx = value_and_gradients(ops.gelu, [x], one)
    silu, dgate, dup = value_and_gradients(ops.swiglu, [x, one], one)
    nan = x.isnan()
    for out in (y, dx, silu, dgate, dup):
        assert torch.equal(out.isnan(), nan)
    expected = x.clamp(min=0)[~nan]
    for out in (y, silu, dup):
        torch.testing.assert_close(out[~nan], expected, rtol=0, atol=1.1e-35)
    for out in (dx, dgate):
        torch.testing.assert_close(out[~nan], (expected > 0).to(dtype), rtol=0, atol=2e-33)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_nan_payload_stays_nan(dtype, isa):
    low, high = (0x7F81, 0x7FFF) if dtype == torch.bfloat16 else (0x7F800001, 0x7FFFFFFF)
    store = torch.int16 if dtype == torch.bfloat16 else torch.int32
    bits = torch.linspace(low, high, 77, dtype=torch.float64).long()
    sign = 1 << (15 if dtype == torch.bfloat16 else 31)
    nans = torch.cat((bits, bits - sign)).to(store).view(dtype)
    one = torch.ones_like(nans)
    results = value_and_gradients(ops.gelu, [nans], one)
    results += value_and_gradients(ops.swiglu, [nans, one], one)
    first, *_ = value_and_gradients(ops.swiglu, [one, nans], one)
    assert all(bool(t.isnan().all()) for t in (*results, first))


@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_run_or_isa(op, dtype, threads):
    tensors, grad = inputs(op, (5, 700, 33), dtype), gradient_like((5, 700, 33), dtype)
    with threads(1):
        expected = value_and_gradients(PUBLIC[op], tensors, grad)
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        for count in (1, 2, 3):
            with threads(count):
                again = value_and_gradients(PUBLIC[op], tensors, grad)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        alone = value_and_gradients(PUBLIC[op], [t[3:4] for t in tensors], grad[3:4])
        assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, expected, strict=True))
        _cpu.unforce_isa()


@pytest.mark.parametrize("op", PUBLIC)
def test_large_output_is_streamed_and_equal(op, isa):
    tensors = inputs(op, (9, 4096, 64), torch.float32)
    grad = gradient_like((9, 4096, 64), torch.float32)
    expected = value_and_gradients(PUBLIC[op], tensors, grad)
    alone = value_and_gradients(PUBLIC[op], [t[7:8] for t in tensors], grad[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, expected, strict=True))


@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_inputs_and_gradient(op, dtype, isa):
    tensors, grad = inputs(op, (4, 6, 10), dtype), torch.ones(4, 6, 10)
    expected = value_and_gradients(PUBLIC[op], tensors, grad)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=2)[..., :10],
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
    ):
        leaves = [layout(t).detach().requires_grad_() for t in tensors]
        y = PUBLIC[op](*leaves)
        y.sum().backward()  # an expanded gradient
        got = (y, *(leaf.grad for leaf in leaves))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_halves_of_one_projection_are_not_copied(isa, monkeypatch):
    fused = torch.randn(3, 50, 2 * 96, generator=torch.Generator().manual_seed(0))
    gate, up = fused.chunk(2, dim=-1)
    expected = ops.swiglu(gate.contiguous(), up.contiguous())
    monkeypatch.setattr(Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    assert torch.equal(ops.swiglu(gate, up), expected)


@pytest.mark.parametrize("op", PUBLIC)
def test_references_agree_with_torch_and_their_gradients_with_autograd(op):
    tensors, grad = [t.double() for t in inputs(op, (3, 7))], gradient_like((3, 7), torch.float64)
    forward, backward = {
        "gelu": (gelu_reference, gelu_backward_reference),
        "swiglu": (swiglu_reference, swiglu_backward_reference),
    }[op]
    expected = value_and_gradients(EAGER[op], tensors, grad)
    gradients = backward(grad, *tensors)
    got = [forward(*tensors), *([gradients] if op == "gelu" else gradients)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(PUBLIC[op], [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("op", PUBLIC)
def test_opcheck(op):
    tensors = inputs(op, (3, 4, 6), torch.bfloat16)
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    for given in (tensors, permuted):
        torch.library.opcheck(getattr(torch.ops.qirl, op).default, [*given, "", ""])
        torch.library.opcheck(
            getattr(torch.ops.qirl, f"{op}_backward").default,
            [torch.ones_like(given[0]), *given, ""],
        )


@pytest.mark.parametrize("op", PUBLIC)
def test_compiles_without_graph_break_with_gradient(op):
    tensors, grad = inputs(op, (3, 20, 16)), torch.ones(3, 20, 16)
    compiled = torch.compile(PUBLIC[op], fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled, tensors, grad)
    expected = value_and_gradients(PUBLIC[op], tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", PUBLIC)
def test_under_autocast_behind_a_linear_layer(op):
    layer = torch.nn.Linear(8, 12 * COUNT[op])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = PUBLIC[op](*layer(x).chunk(COUNT[op], dim=-1))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_one_gradient_alone(which):
    gate, up = inputs("swiglu", (3, 8))
    leaves = [t.requires_grad_(wanted) for t, wanted in zip((gate, up), which, strict=True)]
    ops.swiglu(*leaves).sum().backward()
    assert [t.grad is not None for t in leaves] == list(which)


GOOD = torch.ones(2, 8)
BAD = {
    "zero rows": ("gelu", (torch.ones(0, 8),), r"gelu: x needs .*at least one row.*\(0, 8\)"),
    "a number": ("gelu", (torch.tensor(1.0),), r"x needs shape"),
    "not a tensor": ("gelu", (1.0,), r"x must be a tensor; got float"),
    "integers": ("gelu", (torch.ones(2, 8, dtype=torch.int32),), r"float32 or bfloat16"),
    "float16": ("gelu", (GOOD.half(),), r"takes torch.float32, torch.bfloat16; got torch.float16"),
    "shape": ("swiglu", (GOOD, torch.ones(2, 7)), r"up must have the shape of gate, \(2, 8\)"),
    "dtype": ("swiglu", (GOOD, GOOD.bfloat16()), r"up must have the dtype of gate"),
    "up": ("swiglu", (GOOD, None), r"up must be a tensor; got NoneType"),
    "device": ("swiglu", (GOOD, GOOD.to("meta")), r"up must be on the device of gate, cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case):
    op, arguments, message = BAD[case]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        PUBLIC[op](*arguments)
