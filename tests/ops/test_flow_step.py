"""flow_step: values against float64, rounding before scoring, and all that must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qirl_fast import _cpu, ops
from qirl_fast.ops.flow_step import flow_step_reference

SHAPES = [(1, 1), (3, 5, 7), (2, 1023), (2, 4, 33, 31), (3, 128), (1, 70_001)]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("x", "v", "a", "c", "s", "w", "b")


def inputs(shape, x_dtype=torch.float32, v_dtype=torch.float32, delta_dtype=None, seed=0):
    """Arguments of a Flow-SDE-like step; one row (the last of several) without density."""
    g = torch.Generator().manual_seed(seed)
    rows = shape[0]
    s = 0.1 + 0.4 * torch.rand(rows, generator=g)
    args = {
        "x": torch.randn(shape, generator=g).to(x_dtype),
        "v": torch.randn(shape, generator=g).to(v_dtype),
        "a": 0.9 + 0.2 * torch.rand(rows, generator=g),
        "c": -0.2 * torch.rand(rows, generator=g),
        "s": s,
        "w": 1 / (2 * s * s),
        "b": torch.log(s) + 0.5 * math.log(2 * math.pi),
    }
    if rows > 1:
        for name in ("s", "w", "b"):
            args[name][-1] = 0.0
    keywords = {
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g),
        "offset": 5,
        "delta": None
        if delta_dtype is None
        else 0.1 * torch.randn(shape, generator=g).to(delta_dtype),
    }
    return args, keywords


def call(args, keywords):
    return ops.flow_step(*(args[n] for n in NAMES), **keywords)


def float64_truth(args, keywords):
    """mean, noise-free of rounding: x' before storage rounding, in float64."""
    wide = {n: t.double() for n, t in args.items()}
    delta = keywords["delta"]
    return flow_step_reference(
        *(wide[n] for n in NAMES),
        keywords["seed"],
        keywords["offset"],
        None if delta is None else delta.double(),
    )


def score_float64(args, keywords, x_next: Tensor) -> tuple[Tensor, float]:
    """logp in float64 of a given stored x', and what one float32 rounding of its parts may cost.

    A rounding of the mean moves r by eps |mean|, hence logp by the mean over i of
    2 w |r| eps |mean|; a rounding of the sum of squares moves it by eps |logp + b|.
    """
    d = {n: t.double() for n, t in args.items()}
    mean = d["a"][:, None] * d["x"].flatten(1) + d["c"][:, None] * d["v"].flatten(1)
    if keywords["delta"] is not None:
        mean = mean + keywords["delta"].double().flatten(1)
    r = x_next.double().flatten(1) - mean
    squares = d["w"] * r.square().mean(1)
    cost = squares + 2 * d["w"] * (r * mean).abs().mean(1)
    return -squares - d["b"], torch.finfo(torch.float32).eps * float(cost.max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
def test_matches_float64(shape, x_dtype, v_dtype, delta_dtype, isa, poisoned, no_worse):
    args, keywords = inputs(shape, x_dtype, v_dtype, delta_dtype)
    x_next, logp = call(args, keywords)
    assert _cpu.last_isa() == isa
    assert x_next.dtype == x_dtype and logp.dtype == torch.float32
    with ops.use_backend("reference"):
        same_x, same_logp = call(args, keywords)
    no_worse(x_next, same_x, float64_truth(args, keywords)[0])
    truth, rounding = score_float64(
        args, keywords, x_next
    )  # each logp is judged on the x' it scored
    same_error = float((same_logp - score_float64(args, keywords, same_x)[0]).abs().max())
    assert float((logp - truth).abs().max()) <= max(2 * same_error, rounding)


def test_the_stored_value_is_what_is_scored(isa):
    """With s far below the spacing of bfloat16, x' is the rounded mean: r is that rounding."""
    args, keywords = inputs((1, 4096), torch.bfloat16)
    args["s"].fill_(1e-6)
    args["w"].fill_(0.5e12)
    x_next, logp = call(args, keywords)
    truth, _ = score_float64(args, keywords, x_next)
    assert float(logp) == pytest.approx(float(truth), rel=1e-5)
    assert float(truth) < -1e5  # scoring the unrounded value would give about -0.5


def test_rows_without_density_are_plain_ode(isa):
    args, keywords = inputs((4, 999))
    for name in ("s", "w", "b"):
        args[name].zero_()
    x_next, logp = call(args, keywords)
    mean = args["a"][:, None] * args["x"] + args["c"][:, None] * args["v"]
    assert torch.equal(x_next, mean)  # two products and a sum, each rounded once, on both sides
    assert torch.equal(logp, torch.zeros(4)) and not bool(torch.signbit(logp).any())


def test_all_instruction_sets_give_the_same_bits():
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        for dtype in DTYPES:
            args, keywords = inputs((3, 5001), dtype, torch.bfloat16, torch.float32)
            results.append((dtype, *call(args, keywords)))
    _cpu.unforce_isa()
    for dtype, x_next, logp in results:
        first = next(r for r in results if r[0] == dtype)
        assert torch.equal(x_next, first[1]) and torch.equal(logp, first[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, isa, threads):
    args, keywords = inputs((6, 37_123), dtype, torch.bfloat16, torch.float32)
    with threads(1):
        x_next, logp = call(args, keywords)
    for count in (2, 3, 8):
        with threads(count):
            again = call(args, keywords)
        assert torch.equal(again[0], x_next) and torch.equal(again[1], logp)
    for rows in ([0], [5], [4, 2], [3, 3, 1]):
        part = {n: t[rows] for n, t in args.items()}
        sub = {**keywords, "seed": keywords["seed"][rows], "delta": keywords["delta"][rows]}
        alone = call(part, sub)
        assert torch.equal(alone[0], x_next[rows]) and torch.equal(alone[1], logp[rows])


def test_large_output_is_streamed_and_equal(isa):
    """8 MiB outputs leave by non-temporal stores; rows of a small batch must not notice."""
    args, keywords = inputs((9, 2**18))
    x_next, logp = call(args, keywords)
    part = {n: t[7:8] for n, t in args.items()}
    alone = call(part, {**keywords, "seed": keywords["seed"][7:8]})
    assert torch.equal(alone[0], x_next[7:8]) and torch.equal(alone[1], logp[7:8])


def test_non_contiguous_inputs(isa):
    args, keywords = inputs((4, 6, 10), delta_dtype=torch.float32)
    x_next, logp = call(args, keywords)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # dense, permuted
        lambda t: torch.cat((t, t), dim=1)[:, :6],  # dense rows, larger row stride
        lambda t: torch.stack((t, t), dim=-1)[..., 0],  # strided elements
    ):
        moved = {**args, "x": layout(args["x"]), "v": layout(args["v"])}
        moved["a"] = torch.stack((args["a"], args["a"]), dim=1)[:, 0]
        again = call(moved, {**keywords, "delta": layout(keywords["delta"])})
        assert torch.equal(again[0], x_next) and torch.equal(again[1], logp)
        assert again[0].is_contiguous()


def test_nan_and_infinity_stay_in_their_row(isa):
    for bad in (math.nan, math.inf):
        for dtype in DTYPES:
            args, keywords = inputs((3, 2000), dtype)
            clean = call(args, keywords)
            args["x"][1, 1234] = bad
            x_next, logp = call(args, keywords)
            assert torch.equal(x_next[[0, 2]], clean[0][[0, 2]])
            assert torch.equal(logp[[0, 2]], clean[1][[0, 2]])
            assert not bool(torch.isfinite(x_next[1, 1234])) and bool(torch.isnan(logp[1]))


def test_bfloat16_rounding_is_to_nearest_even(isa):
    """Every finite bfloat16 midpoint, its neighbours, infinities and NaN, against torch's cast."""
    high = torch.arange(0x10000, dtype=torch.int64)
    low = torch.tensor([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((high[:, None] << 16) | low).flatten()
    values = bits.to(torch.int32).view(torch.float32)
    values = values[torch.isfinite(values)][None]
    zero, one = torch.zeros(1), torch.ones(1)
    # x is bfloat16 zeros and v carries the value, so x' = round(value).
    x_next, _ = ops.flow_step(
        torch.zeros(values.shape, dtype=torch.bfloat16),
        values,
        zero,
        one,
        zero,
        zero,
        zero,
        seed=torch.zeros(1, dtype=torch.int64),
        offset=0,
    )
    assert torch.equal(x_next, values.to(torch.bfloat16))


def test_outputs_are_constants():
    args, keywords = inputs((2, 8))
    args["v"].requires_grad_()
    x_next, logp = call(args, keywords)
    assert not x_next.requires_grad and not logp.requires_grad


def test_opcheck():
    op = torch.ops.qirl.flow_step.default
    for x_dtype, delta_dtype in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        args, keywords = inputs((3, 4, 6), x_dtype, delta_dtype=delta_dtype)
        args["x"] = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
        values = [*(args[n] for n in NAMES), keywords["seed"], 5, keywords["delta"], ""]
        torch.library.opcheck(op, values)


def test_compiles_without_graph_break_and_follows_the_offset():
    args, keywords = inputs((3, 200), torch.bfloat16)
    compiled = torch.compile(
        lambda offset: call(args, {**keywords, "offset": offset}),
        fullgraph=True,
        backend="aot_eager",
    )
    for offset in (0, 1, 2, 9):
        expected = call(args, {**keywords, "offset": offset})
        for got, want in zip(compiled(offset), expected, strict=True):
            assert torch.equal(got, want)


def test_autocast_and_no_grad_change_nothing():
    args, keywords = inputs((2, 64))
    expected = call(args, keywords)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = call(args, keywords)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


BAD = {
    "zero rows": ({"x": torch.zeros(0, 4)}, r"at least one row.*\(0, 4\)"),
    "zero elements": ({"x": torch.zeros(2, 0)}, r"at least one row.*\(2, 0\)"),
    "integer x": (
        {"x": torch.zeros(2, 8, dtype=torch.int32)},
        r"float32 or bfloat16; got torch.int32",
    ),
    "shape of v": ({"v": torch.zeros(2, 7)}, r"v must have the shape of x, \(2, 8\); got \(2, 7\)"),
    "device of v": (
        {"v": torch.zeros(2, 8, device="meta")},
        r"v must be on the device of x, cpu; got meta",
    ),
    "float64 a": (
        {"a": torch.ones(2, dtype=torch.float64)},
        r"a must be torch.float32; got torch.float64",
    ),
    "rows of c": ({"c": torch.ones(3)}, r"c needs one value a row, shape \(2,\); got \(3,\)"),
    "number for s": ({"s": 0.5}, r"s must be a tensor \[2\].*got float"),
    "NaN in w": (
        {"w": torch.tensor([1.0, math.nan])},
        r"w\[1\] is nan; coefficients must be finite",
    ),
    "inf in b": ({"b": torch.tensor([-math.inf, 0.0])}, r"b\[0\] is -inf"),
    "int32 seed": ({"seed": torch.zeros(2, dtype=torch.int32)}, r"seed must be torch.int64"),
    "negative offset": ({"offset": -1}, r"offset must be in \[0, 2\^63\); got -1"),
    "delta shape": ({"delta": torch.zeros(1, 8)}, r"delta must have the shape of x"),
    "float16": (
        {"x": torch.zeros(2, 8).half(), "v": torch.zeros(2, 8).half()},
        r"takes torch.float32, torch.bfloat16; got torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case):
    change, message = BAD[case]
    args, keywords = inputs((2, 8))
    args = {n: change.get(n, t) for n, t in args.items()}
    keywords = {n: change.get(n, t) for n, t in keywords.items()}
    with pytest.raises(ValueError, match=message):
        call(args, keywords)
    if case != "float16":  # the reference serves float16
        with ops.use_backend("reference"), pytest.raises(ValueError, match=message):
            call(args, keywords)
