"""fp8_linear: the product of what was quantised, its gradient, its invariance and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.ops.fp8_linear import _dequantized, _widened, fp8_linear_reference
from qirl_fast.ops.fp8_quantize import fp8_quantize_reference

SHAPES = [((1, 16), 16), ((5, 48), 32), ((2, 70, 64), 96), ((130, 272), 48)]
CASES = [(shape, out, granularity) for granularity in ("row", "tensor") for shape, out in SHAPES]
CASES += [((7, 128), 32, "block"), ((2, 70, 256), 96, "block")]
DTYPES = [torch.float32, torch.bfloat16]
GRANULARITIES = ["row", "tensor", "block"]


def inputs(shape, out, dtype, granularity) -> tuple[Tensor, dict[str, object]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    w = (torch.randn(out, shape[-1], generator=g) / shape[-1] ** 0.5).bfloat16()
    weight_q, weight_scale = ops.fp8_quantize(w, granularity=granularity)
    return x, {
        "weight_q": weight_q,
        "weight_scale": weight_scale,
        "granularity": granularity,
        "weight": w,
        "weight_t": ops.fp8_quantize(w, granularity=granularity, transpose=True),
    }


def reference(x, weight_q, weight_scale, bias, granularity, e5m2=False) -> Tensor:
    return fp8_linear_reference(x, None, None, weight_q, weight_scale, bias, granularity, e5m2)


def eager(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias, granularity) -> Tensor:
    """In PyTorch at the dtype of x: quantise, dequantise, multiply."""
    xq, xs = fp8_quantize_reference(x, granularity, False, False)
    x_back, w_back = (
        _dequantized(q, s, torch.float32).to(x.dtype)
        for q, s in ((xq, xs), (weight_q, weight_scale))
    )
    return torch.nn.functional.linear(x_back, w_back, None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize(("shape", "out", "granularity"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_value_matches_float64(shape, out, dtype, granularity, bias_dtype, no_worse):
    x, options = inputs(shape, out, dtype, granularity)
    q, scale = options["weight_q"], options["weight_scale"]
    bias = None if bias_dtype is None else torch.linspace(-1, 1, out, dtype=bias_dtype)
    y = ops.fp8_linear(x, q, scale, bias, granularity=granularity)
    assert y.dtype == dtype and y.shape == (*shape[:-1], out)
    truth = reference(x.double(), q, scale, bias, granularity)
    baseline = eager(x, q, scale, bias, granularity)
    no_worse(y, baseline, truth)
    with ops.use_backend("reference"):
        plain = ops.fp8_linear(x, q, scale, bias, granularity=granularity)
    no_worse(plain, baseline, truth)
    quantized = ops.Quantized(x, *ops.fp8_quantize(x, granularity=granularity))
    assert torch.equal(ops.fp8_linear(quantized, q, scale, bias, granularity=granularity), y)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("width", [256, 64, 37])
def test_every_code_is_widened_exactly(dtype, width, isa):
    codes = torch.arange(256, dtype=torch.uint8).repeat(width).view(-1, width).view(dtype)
    for scale in (torch.rand(len(codes), 1), torch.rand(1), torch.ones(len(codes), 1)):
        wide = _widened(codes, scale)
        assert torch.equal(wide.nan_to_num(7e7), (codes.float() * scale).nan_to_num(7e7))
    blocks = torch.rand(len(codes), -(-width // 128))
    expected = codes.float() * blocks.repeat_interleave(128, 1)[:, :width]
    assert torch.equal(_widened(codes, blocks).nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_agrees_with_torch_scaled_mm(granularity):
    """The GEMM that CUDA runs, as torch has it on a CPU: the same numbers in another order."""
    x, options = inputs((130, 272), 48, torch.float32, granularity)
    q, scale = options["weight_q"], options["weight_scale"]
    xq, xs = ops.fp8_quantize(x, granularity=granularity)
    theirs = torch._scaled_mm(xq, q.t(), xs, scale.t(), out_dtype=torch.float32)
    ours = ops.fp8_linear(x, q, scale, granularity=granularity)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", ["bf16", "fp8"])
def test_gradient_of_a_quantised_input_goes_to_what_it_was(grad):
    x, options = inputs((5, 48), 32, torch.float32, "row")
    results = []
    for quantize in (False, True):
        leaf = x.clone().requires_grad_()
        given = ops.Quantized(leaf, *ops.fp8_quantize(x)) if quantize else leaf
        ops.fp8_linear(given, **options, grad=grad).square().sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_blocks_of_the_gradient_need_whole_blocks():
    x, options = inputs((4, 128), 48, torch.float32, "block")
    with pytest.raises(ValueError, match=r"multiple of 128 in both.*\(48, 128\).*grad='bf16'"):
        ops.fp8_linear(x.requires_grad_(), **options, grad="fp8")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_close_to_the_unquantised_product(granularity):
    x, options = inputs((256, 512), 128, torch.float32, granularity)
    exact = x @ options["weight"].float().t()
    y = ops.fp8_linear(x, **options)
    assert float((y - exact).norm() / exact.norm()) < 0.05  # two roundings of 2.6 % rms each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient(dtype, granularity, backend, no_worse):
    x, options = inputs((2, 40, 128), 256, dtype, granularity)
    grad = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = {}
    for kind in ("bf16", "fp8"):
        leaf = x.clone().requires_grad_()
        with ops.use_backend(backend):
            ops.fp8_linear(leaf, **options, grad=kind).backward(grad)
        got[kind] = leaf.grad
        assert leaf.grad.dtype == dtype
    w = options["weight"]
    no_worse(got["bf16"], grad @ w.to(dtype), grad.double() @ w.double())
    q, scale = options["weight_t"]
    e5m2 = granularity == "tensor"
    truth = reference(grad.double(), q, scale, None, granularity, e5m2)
    same = reference(grad, q, scale, None, granularity, e5m2)
    no_worse(got["fp8"], same, truth)
    exact = grad.double() @ w.double()
    assert float((got["fp8"] - exact).norm() / exact.norm()) < (0.08 if e5m2 else 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_rows_do_not_depend_on_the_batch(dtype, granularity, threads):
    x, options = inputs((600, 256), 128, dtype, granularity)
    x.requires_grad_()
    y = ops.fp8_linear(x, **options, grad="fp8")
    y.sum().backward()
    for rows in ([0], [5, 599], list(range(60, 440))):
        part = x.detach()[rows].requires_grad_()
        alone = ops.fp8_linear(part, **options, grad="fp8")
        alone.sum().backward()
        assert torch.equal(alone, y[rows])
        assert torch.equal(part.grad, x.grad[rows])


def test_non_finite_rows_do_not_touch_others():
    x, options = inputs((6, 64), 32, torch.float32, "row")
    clean = ops.fp8_linear(x, **options)
    x[2, 3], x[4, 5] = math.nan, math.inf
    y = ops.fp8_linear(x, **options)
    bad = torch.tensor([False, False, True, False, True, False])
    assert bool(y[bad].isnan().all())
    assert torch.equal(y[~bad], clean[~bad])


def test_non_contiguous_x():
    x, options = inputs((4, 6, 32), 16, torch.bfloat16, "row")
    expected = ops.fp8_linear(x, **options)
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((x, x), dim=2)[..., :32],
    ):
        assert torch.equal(ops.fp8_linear(view, **options), expected)


# test_schema adds and multiplies its inputs, which fp8 tensors do not support.
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_a_column_of_another_tensor(dtype):
    x, given = inputs((5, 48), 32, dtype, "row")
    scale = given["weight_scale"]
    column = scale.repeat(1, 3)[:, 1:2]
    assert not column.is_contiguous()
    strided = ops.fp8_linear(x, **(given | {"weight_scale": column}))
    assert torch.equal(strided, ops.fp8_linear(x, **given))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity):
    x, options = inputs((3, 4, 128), 16, torch.bfloat16, granularity)
    permuted = x.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (x, permuted):
        torch.library.opcheck(
            torch.ops.qirl.fp8_linear.default,
            [
                *(given, None, None, options["weight_q"], options["weight_scale"], None),
                *(granularity, False, ""),
            ],
            test_utils=UTILS,
        )


@pytest.mark.parametrize("grad", ["bf16", "fp8"])
def test_compiles_without_graph_break_with_gradient(grad):
    x, options = inputs((7, 32), 16, torch.bfloat16, "row")

    def call(leaf: Tensor) -> Tensor:
        return ops.fp8_linear(leaf, **options, grad=grad)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.sum().backward()
        results.append((y, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend):
    x, options = inputs((7, 32), 16, torch.float32, "row")
    with ops.use_backend(backend):
        expected = ops.fp8_linear(x, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.fp8_linear(x, **options), expected)


def _bad(**changes: object) -> tuple[Tensor, dict[str, object]]:
    x, options = inputs((3, 32), 16, torch.float32, "row")
    return changes.pop("x", x), {**options, **changes}  # type: ignore[return-value]


FP8 = torch.float8_e4m3fn
LEAF = torch.ones(3, 32, requires_grad=True)
BAD = {
    "zero rows": (_bad(x=torch.ones(0, 32)), r"x needs shape.*\(0, 32\)"),
    "width": (_bad(x=torch.ones(3, 16)), r"x needs 32 elements.*got \(3, 16\)"),
    "float64": (_bad(x=torch.ones(3, 32).double()), r"takes torch.float32.*got torch.float64"),
    "granularity": (_bad(granularity="mx"), r"granularity must be row, tensor, block; got 'mx'"),
    "narrow blocks": (_bad(granularity="block"), r"multiple of 128.*\(16, 32\).*by rows"),
    "quantised shape": (
        _bad(x=ops.Quantized(torch.ones(3, 32), torch.ones(2, 32).to(FP8), torch.ones(3, 1))),
        r"x.q must have the shape of x.y, \(3, 32\); got \(2, 32\)",
    ),
    "quantised otherwise": (
        _bad(x=ops.Quantized(torch.ones(3, 32), torch.ones(3, 32).to(FP8), torch.ones(1))),
        r"x.scale must have shape \(3, 1\) for granularity 'row'; got \(1,\)",
    ),
    "other granularity": (_bad(granularity="tensor"), r"weight_scale must have shape \(1,\)"),
    "bf16 weight": (_bad(weight_q=torch.ones(16, 32).bfloat16()), r"weight_q must be torch.float8"),
    "strided": (_bad(weight_q=torch.ones(32, 16).to(FP8).t()), r"must be a contiguous matrix"),
    "odd": (
        _bad(weight_q=torch.ones(10, 32).to(FP8)),
        r"multiples of 16; got \(10, 32\).*Keep this layer in bfloat16",
    ),
    "bias": (_bad(bias=torch.ones(15)), r"bias must have shape \(16,\); got \(15,\)"),
    "grad": (_bad(grad="e5m2"), r"grad must be bf16 or fp8; got 'e5m2'"),
    "no weight": (_bad(x=LEAF, weight=None), r"grad='bf16': pass weight=W"),
    "no transpose": (_bad(x=LEAF, weight_t=None, grad="fp8"), r"transpose=True"),
    "weight shape": (_bad(weight=torch.ones(16, 16)), r"weight must have the shape of weight_q"),
    "trained weight": (
        _bad(weight=torch.ones(16, 32, requires_grad=True)),
        r"weight requires grad, but weights are frozen",
    ),
    "trained bias": (_bad(bias=torch.ones(16, requires_grad=True)), r"bias requires grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case):
    (x, options), message = BAD[case]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        ops.fp8_linear(x, **options)
