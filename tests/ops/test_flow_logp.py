"""flow_logp: bitwise replay of flow_step, gradients against float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import _cpu, ops
from qirl_fast.ops.flow_logp import flow_logp_reference

SHAPES = [(1, 1), (3, 5, 7), (2, 1023), (2, 4, 33, 31), (1, 70_001)]
DTYPES = [torch.float32, torch.bfloat16]
COEFFICIENTS = ("a", "c", "w", "b")


def inputs(shape, x_dtype=torch.float32, v_dtype=torch.float32, delta_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = shape[0]
    s = 0.1 + 0.4 * torch.rand(rows, generator=g)

    def draw(dtype):
        return torch.randn(shape, generator=g).to(dtype)

    args = {
        "x": draw(x_dtype),
        "x_next": draw(x_dtype),
        "v": draw(v_dtype),
        "a": 0.9 + 0.2 * torch.rand(rows, generator=g),
        "c": -0.2 * torch.rand(rows, generator=g),
        "w": 1 / (2 * s * s),
        "b": torch.log(s) + 0.5 * math.log(2 * math.pi),
        "delta": None if delta_dtype is None else draw(delta_dtype),
    }
    return args, s


def call(args):
    return ops.flow_logp(
        *(args[n] for n in ("x", "x_next", "v", *COEFFICIENTS)), delta=args["delta"]
    )


def float64(args):
    return {n: None if t is None else t.detach().double() for n, t in args.items()}


def value_and_gradients(function, args, grad):
    """logp, dx, dv of `function` for leaves made of args' x and v."""
    leaves = {n: args[n].detach().clone().requires_grad_() for n in ("x", "v")}
    logp = function({**args, **leaves})
    dx, dv = torch.autograd.grad(logp, (leaves["x"], leaves["v"]), grad.to(logp.dtype))
    return logp.detach(), dx, dv


def reference(args):
    return flow_logp_reference(
        *(args[n] for n in ("x", "x_next", "v", *COEFFICIENTS)), args["delta"], False
    )[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
def test_value_and_gradients_match_float64(
    shape, x_dtype, v_dtype, delta_dtype, isa, poisoned, no_worse
):
    args, _ = inputs(shape, x_dtype, v_dtype, delta_dtype)
    grad = torch.linspace(-2, 3, shape[0])
    result = value_and_gradients(call, args, grad)
    assert _cpu.last_isa() == isa
    same = value_and_gradients(reference, args, grad)  # PyTorch's own autograd in the same dtypes
    truth = value_and_gradients(reference, float64(args), grad)
    assert [t.dtype for t in result] == [torch.float32, x_dtype, v_dtype]
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_replays_flow_step_bitwise(x_dtype, v_dtype, delta_dtype, backend, isa):
    """The ratio before the first update is exactly 1, also when the replay has other neighbours."""
    args, s = inputs((5, 3, 1111), x_dtype, v_dtype, delta_dtype)
    with ops.use_backend(backend):
        x_next, logp = ops.flow_step(
            args["x"],
            args["v"],
            args["a"],
            args["c"],
            s,
            args["w"],
            args["b"],
            seed=torch.arange(5),
            offset=3,
            delta=args["delta"],
        )
        args["x_next"] = x_next
        assert torch.equal(call(args), logp)
        args["v"].requires_grad_()
        assert torch.equal(call(args), logp)
        if backend == "cpu":
            rows = [4, 1]
            part = {n: None if t is None else t[rows] for n, t in args.items()}
            assert torch.equal(call(part), logp[rows])


def test_explicit_reference_gradient_is_autograds(no_worse):
    args, _ = inputs((3, 50), torch.float64, torch.float64, torch.float64)
    grad = torch.tensor([1.0, -2.0, 0.5])
    with ops.use_backend("reference"):
        explicit = value_and_gradients(call, args, grad)
    for got, want in zip(explicit, value_and_gradients(reference, args, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_gradcheck_of_the_reference():
    args, _ = inputs((2, 6), torch.float64, torch.float64)
    leaves = [args[n].requires_grad_() for n in ("x", "v")]
    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, v: call({**args, "x": x, "v": v}), leaves)


def test_gradient_only_where_it_is_asked_for(isa):
    args, _ = inputs((2, 40))
    grad = torch.ones(2)
    _, dx, dv = value_and_gradients(call, args, grad)
    for name, want in (("x", dx), ("v", dv)):
        leaf = args[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(call({**args, name: leaf}), leaf, grad)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, isa, threads):
    args, _ = inputs((6, 37_123), dtype, torch.bfloat16, torch.float32)
    grad = torch.linspace(-1, 1, 6)
    with threads(1):
        expected = value_and_gradients(call, args, grad)
    for count in (1, 2, 3, 8):
        with threads(count):
            again = value_and_gradients(call, args, grad)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for rows in ([0], [4, 2]):
        part = {n: t[rows] for n, t in args.items()}
        alone = value_and_gradients(call, part, grad[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, expected, strict=True))


def test_all_instruction_sets_give_the_same_bits():
    args, _ = inputs((3, 5001), torch.bfloat16, torch.float32, torch.float32)
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        results.append(value_and_gradients(call, args, torch.ones(3)))
    _cpu.unforce_isa()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_large_gradients_are_streamed_and_equal(isa):
    args, _ = inputs((9, 2**18))
    grad = torch.linspace(-1, 1, 9)
    expected = value_and_gradients(call, args, grad)
    part = {n: None if t is None else t[7:8] for n, t in args.items()}
    alone = value_and_gradients(call, part, grad[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, expected, strict=True))


def test_non_contiguous_inputs_and_gradient(isa):
    args, _ = inputs((4, 6, 10), delta_dtype=torch.float32)
    expected = value_and_gradients(call, args, torch.ones(4))
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
    ):
        moved = {n: layout(args[n]) for n in ("x", "x_next", "v", "delta")}
        leaf = layout(args["v"]).detach().requires_grad_()
        logp = call({**args, **moved, "v": leaf})
        logp.sum().backward()  # the incoming gradient is an expanded scalar
        assert torch.equal(logp, expected[0]) and torch.equal(leaf.grad, expected[2])


def test_opcheck():
    args, _ = inputs((3, 4, 6), torch.bfloat16, torch.float32, torch.float32)
    args["x"] = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors = [args[n] for n in ("x", "x_next", "v", "a", "c", "w")]
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.qirl.flow_logp.default, [*tensors, args["b"], args["delta"], keep, ""]
        )
    x_dtype, v_dtype = torch.bfloat16, torch.float32
    for dtypes in ((x_dtype, v_dtype), (None, v_dtype), (x_dtype, None)):
        torch.library.opcheck(
            torch.ops.qirl.flow_logp_backward.default,
            [torch.ones(3), args["delta"], *tensors[3:], *dtypes, ""],
        )


def test_compiles_without_graph_break_with_gradient():
    args, _ = inputs((3, 200), torch.bfloat16)
    grad = torch.ones(3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(call, args, grad)
    got = value_and_gradients(compiled, args, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(args), expected[0])


def test_autocast_changes_nothing():
    args, _ = inputs((2, 64))
    expected = value_and_gradients(call, args, torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(call, args, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_constants_that_ask_for_a_gradient_are_refused():
    args, _ = inputs((2, 8), delta_dtype=torch.float32)
    for name in ("x_next", "delta", *COEFFICIENTS):
        leaf = args[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            call({**args, name: leaf})
        with torch.no_grad():
            call({**args, name: leaf})


BAD = {
    "zero rows": ({"x": torch.zeros(0, 4)}, r"at least one row.*\(0, 4\)"),
    "dtype of x_next": (
        {"x_next": torch.zeros(2, 8).bfloat16()},
        r"x_next must have the dtype of x",
    ),
    "shape of x_next": (
        {"x_next": torch.zeros(1, 8)},
        r"x_next must have the shape of x, \(2, 8\)",
    ),
    "shape of v": ({"v": torch.zeros(2, 7)}, r"v must have the shape of x"),
    "integer v": ({"v": torch.zeros(2, 8, dtype=torch.int64)}, r"v must be float32 or bfloat16"),
    "rows of c": ({"c": torch.ones(3)}, r"c needs one value a row"),
    "matrix for w": ({"w": torch.ones(2, 1)}, r"w needs one value a row"),
    "inf in a": (
        {"a": torch.tensor([1.0, math.inf])},
        r"a\[1\] is inf; coefficients must be finite",
    ),
    "NaN in b": ({"b": torch.tensor([math.nan, 1.0])}, r"b\[0\] is nan"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    change, message = BAD[case]
    args, _ = inputs((2, 8))
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        call({**args, **change})
