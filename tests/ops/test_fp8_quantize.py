"""fp8_quantize: the same bits as the definition, for every layout, scale and kind of number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu, ops

SHAPES = [(1,), (3, 17), (2, 5, 300), (1, 128), (70, 65), (130, 1027)]
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
LAYOUTS = [(g, t) for g in ("row", "tensor", "block") for t in (False, True)]
CASES = [(s, g, t) for s in SHAPES for g, t in LAYOUTS if len(s) > 1 or not t]


def inputs(shape, dtype=torch.float32, wild=True) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape, generator=g))
    if wild and x.numel() > 60:
        x.view(-1)[3], x.view(-1)[40], x.view(-1)[50] = math.nan, math.inf, -math.inf
    return x.to(dtype)


def same_codes(q: Tensor, expected: Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    nan = expected.float().isnan()
    bits, wanted = (t.view(torch.uint8)[~nan] for t in (q, expected))
    return torch.equal(q.float().isnan(), nan) and torch.equal(bits, wanted)


@pytest.mark.parametrize(("shape", "granularity", "transpose"), CASES)
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference(shape, dtype, fp8, granularity, transpose, isa, poisoned):
    options = {"granularity": granularity, "dtype": fp8, "transpose": transpose}
    x = inputs(shape, dtype)
    q, scale = ops.fp8_quantize(x, **options)
    assert _cpu.last_isa() == isa
    with ops.use_backend("reference"):
        wanted_q, wanted_scale = ops.fp8_quantize(x, **options)
    assert (q.dtype, scale.dtype, q.shape) == (fp8, torch.float32, wanted_q.shape)
    assert torch.equal(scale, wanted_scale)
    assert same_codes(q, wanted_q)


def _nearest_code(values: Tensor, fp8: torch.dtype) -> Tensor:
    """By search among all codes in float64: nearest, ties to the even code."""
    codes = torch.arange(128, dtype=torch.uint8).view(fp8).double()
    codes = codes[codes.isfinite()]
    size = values.abs().double()
    above = torch.searchsorted(codes, size).clamp(max=len(codes) - 1)
    below = (above - 1).clamp(min=0)
    up, down = codes[above] - size, size - codes[below]
    best = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return best.to(torch.uint8) | (values.signbit().to(torch.uint8) << 7)


@pytest.mark.parametrize("fp8", FORMATS)
def test_rounding_is_to_nearest_even_for_every_bfloat16_and_every_tie(fp8, isa):
    """A row whose largest element is that of the type has scale 1: q is the plain conversion."""
    largest = torch.finfo(fp8).max
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(128, dtype=torch.uint8).view(fp8).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1])))
    x = torch.cat((everything, near, -near))
    x = torch.cat((x[x.abs() <= largest], torch.tensor([largest])))
    q, scale = ops.fp8_quantize(x, dtype=fp8)
    assert scale.tolist() == [1.0]
    assert torch.equal(q.view(torch.uint8), _nearest_code(x, fp8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_tiny_and_non_finite_rows(backend):
    x = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [1e-45, -1e-45, 0.0, 0.0],
            [448e-38, 1e-40, 0.0, -448e-38],
            [math.nan, 3e38, -3e38, 0.0],
            [math.inf, 2.0, -math.inf, 1.0],
            [math.nan, math.nan, math.inf, math.nan],
        ]
    )
    with ops.use_backend(backend):
        q, scale = ops.fp8_quantize(x)
        q5, _ = ops.fp8_quantize(x, dtype=torch.float8_e5m2)
    assert scale[0].item() == 1.0 and scale[5].item() == 1.0
    assert scale[1].item() == scale[2].item() == 2.0**-126
    assert q[0].view(torch.uint8).tolist() == [0, 128, 0, 0]
    back = q.float() * scale
    assert back[2, 0] == pytest.approx(448e-38, rel=0.07)
    assert back[3].isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(back[3, 1:], x[3, 1:], rtol=1e-6, atol=0)
    assert back[4].isnan().tolist() == [True, False, True, False]
    assert back[4, 1] == 2.0 and back[4, 3] == 1.0
    assert q5[4].float().tolist()[::2] == [math.inf, -math.inf]
    assert torch.equal(q[5].float().isnan(), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
def test_dequantised_values_are_within_half_a_step(fp8, granularity, isa):
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    q, scale = ops.fp8_quantize(x, granularity=granularity, dtype=fp8)
    if granularity == "block":
        scale = scale.repeat_interleave(128, 1)[:, :300]
    error = (q.double() * scale.double() - x.double()).abs()
    step = {torch.float8_e4m3fn: (2**-4, 2**-10), torch.float8_e5m2: (2**-3, 2**-17)}[fp8]
    limit = torch.maximum(x.abs() * step[0], scale * step[1]) * (1 + 1e-6)
    assert bool((error <= limit).all())


@pytest.mark.parametrize(("granularity", "transpose"), LAYOUTS)
def test_bits_do_not_depend_on_threads_run_or_isa(granularity, transpose, threads):
    x = inputs((300, 203), torch.bfloat16)
    options = {"granularity": granularity, "transpose": transpose}
    with threads(1):
        expected = ops.fp8_quantize(x, **options)
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        for count in (1, 2, 3):
            with threads(count):
                q, scale = ops.fp8_quantize(x, **options)
            assert torch.equal(scale, expected[1])
            assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
        _cpu.unforce_isa()


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_row_alone_is_the_row_in_its_batch(granularity, isa):
    x = inputs((9, 300), torch.bfloat16)
    q, scale = ops.fp8_quantize(x, granularity=granularity)
    for rows in ([4], [7, 2]):
        alone, its_scale = ops.fp8_quantize(x[rows], granularity=granularity)
        assert torch.equal(its_scale, scale[rows])
        assert same_codes(alone, q[rows])


@pytest.mark.parametrize(("granularity", "transpose"), LAYOUTS)
def test_non_contiguous_input(granularity, transpose, isa):
    x = inputs((4, 6, 140))
    options = {"granularity": granularity, "transpose": transpose}
    q, scale = ops.fp8_quantize(x, **options)
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((x, x), dim=2)[..., :140],
        torch.cat((x, x), dim=1)[:, :6],
        torch.stack((x, x), dim=-1)[..., 0],
    ):
        got, its_scale = ops.fp8_quantize(view, **options)
        assert got.is_contiguous()
        assert torch.equal(its_scale, scale) and same_codes(got, q)


def test_transpose_is_the_quantised_transpose():
    w = inputs((96, 160), torch.bfloat16, wild=False)
    for granularity in ("row", "tensor", "block"):
        q, scale = ops.fp8_quantize(w, granularity=granularity, transpose=True)
        wanted, its_scale = ops.fp8_quantize(w.t().contiguous(), granularity=granularity)
        assert torch.equal(scale, its_scale) and same_codes(q, wanted)


@pytest.mark.parametrize(("granularity", "transpose"), LAYOUTS)
def test_opcheck(granularity, transpose):
    x = inputs((3, 4, 6))
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (x, permuted):
        torch.library.opcheck(
            torch.ops.qirl.fp8_quantize.default,
            [given, granularity, False, transpose, ""],
            # test_aot_dispatch compares outputs, which torch cannot for fp8.
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_compiles_without_graph_break():
    x = inputs((6, 200), torch.bfloat16, wild=False)
    compiled = torch.compile(ops.fp8_quantize, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x), ops.fp8_quantize(x), strict=True):
        assert torch.equal(got.float(), wanted.float())


GOOD = torch.ones(2, 8)
BAD = {
    "zero rows": (torch.ones(0, 8), {}, r"at least one row.*\(0, 8\)"),
    "zero columns": (torch.ones(2, 0), {}, r"one element a row.*\(2, 0\)"),
    "a list": ([1.0], {}, r"x must be a tensor; got list"),
    "integers": (torch.ones(2, 8, dtype=torch.int64), {}, r"float32 or bfloat16"),
    "float64": (GOOD.double(), {}, r"takes torch.float32, torch.bfloat16; got torch.float64"),
    "granularity": (GOOD, {"granularity": "column"}, r"row, tensor, block; got 'column'"),
    "dtype": (GOOD, {"dtype": torch.float16}, r"float8_e5m2; got torch.float16"),
    "vector": (torch.ones(8), {"transpose": True}, r"needs shape \[..., M, K\]; got \(8,\)"),
    "grad": (torch.ones(2, 8, requires_grad=True), {}, r"x requires grad, but rounding"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case):
    x, options, message = BAD[case]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        ops.fp8_quantize(x, **options)
