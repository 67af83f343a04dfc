"""Outputs in fp8 (quantize=...): y is the op's own, (q, scale) are those of fp8_quantize(y).

On every backend that runs on CPU tensors: the reference, the C++ kernels and the CUDA kernels
through the emulator. The Triton kernels: triton_act_cases.py and triton_norm_cases.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu, ops

DTYPES = [torch.float32, torch.bfloat16]
WANTED = ["row", "block"]
# One element, odd widths, spans of 128 whole and not, more than a CUDA block's 4096 of a row.
SHAPES = [(1, 1, 1), (2, 3, 17), (2, 1, 128), (1, 3, 300), (2, 2, 1153), (1, 2, 8192)]
WIDE = [(2, 16384), (1, 20011), (9, 4099), (40,)]  # of gelu and swiglu
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"norm": "rms", "shift": False},
    "t0": {"t0": True},
    "tanh": {"norm": "rms", "tanh": True, "t0": True},
}
Inputs = dict[str, Tensor]
Call = Callable[..., tuple[Any, tuple[Tensor, ...]]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def marked(samples: int, tokens: int) -> Tensor:
    return torch.arange(samples * tokens).reshape(samples, tokens) % 3 == 1


def norm_case(op: str, shape, dtype, kind: str) -> tuple[Inputs, Call]:
    """The tensors, and a call of them: the result of interest and the op's other results."""
    options = dict(NORMS[kind])
    samples, tokens, width = shape
    shifted, split = options.pop("shift", True), options.pop("t0", False)
    rows = ["scale"] + ["shift"] * shifted + ["gate"] * (op != "norm_modulate")
    large = ["x"] if op == "norm_modulate" else ["residual", "u"]
    given = {name: normal(*shape, seed=k, dtype=dtype) for k, name in enumerate(large)}
    names = [*rows, *(f"{name}_t0" for name in rows if split)]
    # Rows of a fused modulation: they lie apart.
    fused = [normal(samples, 2 * width, seed=10 + k, dtype=dtype) for k in range(len(names))]
    given |= {name: f[:, width:] for name, f in zip(names, fused, strict=True)}
    if split:
        options["t0"] = marked(samples, tokens)
    if op == "norm_modulate":
        options.pop("tanh", None)

    def call(**arguments: Any) -> tuple[Any, tuple[Tensor, ...]]:
        result = getattr(ops, op)(**options, **arguments)
        return (result, ()) if op == "norm_modulate" else (result[0], result[1:])

    return given, call


def act_case(op: str, shape, dtype, _: str = "") -> tuple[Inputs, Call]:
    names = ("x",) if op == "gelu" else ("gate", "up")
    given = {name: normal(*shape, seed=k, dtype=dtype) for k, name in enumerate(names)}
    return given, lambda **arguments: (getattr(ops, op)(**arguments), ())


CASES = [
    pytest.param(op, kind, norm_case, id=f"{op}-{kind}")
    for op in ("norm_modulate", "gate_residual_norm_modulate")
    for kind in NORMS
]
CASES += [pytest.param(op, "", act_case, id=op) for op in ("gelu", "swiglu")]
each_case = pytest.mark.parametrize(("op", "kind", "make"), CASES)
SIMPLE = [case for case in CASES if case.values[1] in ("", "t0")]


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that CPU tensors can be given to, forced."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    with ops.use_backend(request.param):
        yield request.param


def same(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits, any NaN for another: which one a NaN is, is the processor's affair."""
    store = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    nan = wanted.float().isnan()
    pair = (t.contiguous().view(store)[~nan] for t in (got, wanted))
    return (
        got.shape == wanted.shape and torch.equal(got.float().isnan(), nan) and torch.equal(*pair)
    )


def check(call: Call, given: Inputs, quantize: str) -> ops.Quantized:
    plain, others = call(**given)
    fused, fused_others = call(**given, quantize=quantize)
    assert isinstance(fused, ops.Quantized)
    assert same(fused.y, plain) and fused.y.dtype == plain.dtype
    assert all(same(a, b) for a, b in zip(fused_others, others, strict=True))
    q, scale = ops.fp8_quantize(plain.detach(), granularity=quantize)
    assert fused.q.dtype == torch.float8_e4m3fn and fused.q.is_contiguous()
    assert fused.scale.dtype == torch.float32
    assert same(fused.q, q) and same(fused.scale, scale)
    return fused


@each_case
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_equals_the_op_and_fp8_quantize(op, kind, make, shape, dtype, quantize, backend, poisoned):
    given, call = make(op, shape, dtype, kind)
    check(call, given, quantize)


@pytest.mark.parametrize("op", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_rows_of_any_width(op, shape, dtype, quantize, backend, poisoned):
    given, call = act_case(op, shape, dtype)
    check(call, given, quantize)


@pytest.mark.parametrize(("op", "kind", "make"), SIMPLE)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 4, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_every_instruction_set(op, kind, make, shape, dtype, quantize, isa):
    given, call = make(op, shape, dtype, kind)
    got = check(call, given, quantize)
    call(**given, quantize=quantize)
    assert _cpu.last_isa() == isa
    with ops.use_backend("cpu"):
        _cpu.force_isa("base")
        assert all(
            same(a, b) for a, b in zip(call(**given, quantize=quantize)[0], got, strict=True)
        )


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate"])
def test_one_token_a_sample(op, backend):
    given, call = norm_case(op, (3, 1, 40), torch.float32, "plain")
    flat = {k: t.reshape(3, 40) for k, t in given.items()}
    for quantize in WANTED:
        assert check(call, flat, quantize).scale.shape == (3, 1)


@pytest.mark.parametrize("op", ["gelu", "swiglu"])
@pytest.mark.parametrize("quantize", WANTED)
def test_halves_and_other_layouts(op, quantize, backend):
    fused = normal(4, 6, 2 * 150).bfloat16()
    layouts = (
        lambda t: t[..., :150],
        lambda t: t[..., 149:299],  # rows at odd addresses
        lambda t: t[..., ::2],
        lambda t: t[..., :150].transpose(0, 1),
        lambda t: t[::2, :, :150],
    )
    for layout in layouts:
        names = ("x",) if op == "gelu" else ("gate", "up")
        given = {name: layout(t) for name, t in zip(names, (fused, -fused), strict=False)}
        strided = check(act_case(op, (1,), torch.float32)[1], given, quantize)
        dense = getattr(ops, op)(**{k: t.contiguous() for k, t in given.items()}, quantize=quantize)
        assert all(same(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate"])
def test_tokens_that_are_not_contiguous(op, backend):
    given, call = norm_case(op, (4, 3, 136), torch.float32, "t0")
    for layout in (
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        spread = {k: layout(t) if t.ndim == 3 else t for k, t in given.items()}
        assert same(check(call, spread, "block").q, check(call, given, "block").q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_nan_and_inf_rows(dtype, quantize, backend):
    """What is not finite keeps to its element, or under a norm to its row, and enters no scale."""
    x = normal(6, 300).to(dtype)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        x[row, 7 * row + 3] = value
    x[3], x[4] = math.nan, 0.0
    got = check(act_case("gelu", (1,), dtype)[1], {"x": x}, quantize)
    assert bool(got.scale.isfinite().all()) and bool((got.scale > 0).all())
    check(act_case("swiglu", (1,), dtype)[1], {"gate": normal(6, 300).to(dtype), "up": x}, quantize)
    rows = {"scale": normal(1, 300), "shift": normal(1, 300, seed=1)}
    _, call = norm_case("norm_modulate", (1, 1, 1), dtype, "plain")
    got = check(call, {"x": x[None], **rows}, quantize)
    assert torch.equal(got.q.float().isnan().all(-1)[0, 3:], torch.tensor([True, False, False]))
    # A modulation of which one element is inf.
    rows["shift"][0, 200] = math.inf
    check(call, {"x": x[None, 4:], **rows}, quantize)


@each_case
@pytest.mark.parametrize("quantize", WANTED)
def test_gradients_are_those_without_quantize(op, kind, make, quantize, backend):
    given, call = make(op, (2, 3, 200), torch.float32, kind)

    def gradients(**options: str) -> list[Tensor]:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in given.items()}
        result, others = call(**leaves, **options)
        if options:
            assert not result.q.requires_grad and not result.scale.requires_grad
        outputs = [result.y if options else result, *others]
        seeds = [normal(*t.shape, seed=7 + k) for k, t in enumerate(outputs)]
        return list(torch.autograd.grad(outputs, list(leaves.values()), seeds))

    pairs = zip(gradients(quantize=quantize), gradients(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("op", "kind", "make"), SIMPLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(
    op, kind, make, dtype, quantize, backend, threads
):
    shape = (3, 70, 132)
    given, _ = make(op, shape, dtype, kind)
    options = {"t0": marked(*shape[:2])} if kind == "t0" else {}

    def results(given: Inputs, **options: Any) -> ops.Quantized:
        result = getattr(ops, op)(**given, **options, quantize=quantize)
        return result if isinstance(result, ops.Quantized) else result[0]

    if backend == "reference":
        pytest.skip("torch's own sigmoid rounds by the place of a value in memory")
    with threads(1):
        all_rows = results(given, **options)
    one = {k: t[1:2, 40:41] if t.ndim == 3 else t[1:2] for k, t in given.items()}
    alone = results(one, **{k: t[1:2, 40:41] for k, t in options.items()})
    assert all(same(a, b[1:2, 40:41]) for a, b in zip(alone, all_rows, strict=True))
    with threads(3):
        assert all(same(a, b) for a, b in zip(results(given, **options), all_rows, strict=True))


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate", "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", WANTED)
def test_a_large_output_is_streamed_and_equal(op, dtype, quantize, isa):
    """More than 8 MiB: stores bypass the caches, and what is quantised must not be read back."""
    make = act_case if op in ("gelu", "swiglu") else norm_case
    given, call = make(op, (1, 1100, 4096), dtype, "plain")
    check(call, given, quantize)


@pytest.mark.parametrize(("op", "kind", "make"), SIMPLE)
@pytest.mark.parametrize("quantize", WANTED)
def test_compiles_without_graph_break_with_gradient(op, kind, make, quantize):
    given, call = make(op, (2, 3, 200), torch.float32, kind)

    def run(function: Call) -> list[Tensor]:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in given.items()}
        result, _ = function(**leaves, quantize=quantize)
        assert isinstance(result, ops.Quantized)
        result.y.sum().backward()
        return [*(t.detach() for t in result), *(leaf.grad for leaf in leaves.values())]

    got = run(torch.compile(call, fullgraph=True, backend="aot_eager"))
    assert all(same(a, b) for a, b in zip(got, run(call), strict=True))


@pytest.mark.parametrize("quantize", ["", *WANTED])
def test_opcheck(quantize):
    x, u = (normal(2, 3, 140, seed=k, dtype=torch.bfloat16) for k in range(2))
    row = normal(2, 140)
    t0 = marked(2, 3)
    check, q = torch.library.opcheck, torch.ops.qirl
    for leaf in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        check(q.gelu.default, (leaf, quantize, ""))
        check(q.swiglu.default, (leaf, u, quantize, ""))
        for rms in (False, True):
            rows = (row, row, t0, row, row)
            check(q.norm_modulate.default, (leaf, *rows, rms, 1e-6, quantize, ""))
            rows = (row, row, row, t0, row, row, row)
            options = (True, rms, 1e-6, quantize, "")
            check(q.gate_residual_norm_modulate.default, (leaf, u, *rows, *options))


def test_under_autocast_behind_a_linear_layer():
    layer = torch.nn.Linear(8, 24)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y, q, _ = ops.swiglu(*layer(x).chunk(2, dim=-1), quantize="row")
    assert y.dtype == torch.bfloat16 and q.dtype == torch.float8_e4m3fn
    y.float().sum().backward()
    assert layer.weight.grad is not None


def test_float64_and_float16_on_the_reference():
    for dtype in (torch.float16, torch.float64):
        with ops.use_backend("reference"):
            check(act_case("gelu", (1,), dtype)[1], {"x": normal(3, 130).to(dtype)}, "block")


@pytest.mark.parametrize(("op", "kind", "make"), SIMPLE)
def test_other_granularities_are_refused(op, kind, make):
    given, call = make(op, (2, 3, 16), torch.float32, kind)
    for wrong in ("rows", "", 1, True, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"{op}: quantize must be None, 'row' or 'block'; got"):
            call(**given, quantize=wrong)
    with pytest.raises(ValueError, match=r"got 'tensor'.*call fp8_quantize on y"):
        call(**given, quantize="tensor")
