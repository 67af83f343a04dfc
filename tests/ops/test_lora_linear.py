"""lora_linear: values and gradients against float64 and against a real PEFT layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from qirl_fast import ops
from qirl_fast.ops.lora_linear import lora_linear_reference

DTYPES = [torch.float32, torch.bfloat16]
# x shape, out, ranks: one element, odd sizes, 1-D to 4-D, rank above a width, several, none
CASES = {
    "one element": ((1, 1), 1, (1,)),
    "odd": ((3, 7, 33), 21, (3, 5)),
    "1-D": ((40,), 24, (4,)),
    "4-D": ((2, 2, 5, 16), 8, (16, 2, 1)),
    "rank above widths": ((9, 6), 5, (11,)),
    "no adapter": ((4, 10), 6, ()),
    "wide": ((130, 256), 192, (32,)),
}
BACKENDS = ["cpu", "reference"]


def inputs(case, dtype=torch.float32, factor_dtype=None, seed=0):
    shape, out, ranks = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g)

    width = shape[-1]
    x, weight, bias = draw(*shape), draw(out, width) / width**0.5, draw(out)
    adapters = [(draw(r, width) / width**0.5, draw(out, r) / r**0.5, 0.5 + r % 3) for r in ranks]
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    kind = factor_dtype or dtype
    return x, weight, bias, [(a.to(kind), b.to(kind), s) for a, b, s in adapters]


def run(function, x, weight, bias, adapters, grad):
    """y and the gradients to x, weight, bias, every A, every B."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    factors = [[t.detach().clone().requires_grad_() for t in pair[:2]] for pair in adapters]
    y = function(*leaves, [(*f, p[2]) for f, p in zip(factors, adapters, strict=True)])
    leaves += [f[0] for f in factors] + [f[1] for f in factors]
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def plain(x, weight, bias, adapters):
    """The same formula in PyTorch at the dtype of x, as PEFT writes it."""
    y = F.linear(x, weight, bias)
    for a, b, s in adapters:
        y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * s
    return y


def double(x, weight, bias, adapters):
    pairs = [(a.double(), b.double(), s) for a, b, s in adapters]
    return x.double(), weight.double(), bias.double(), pairs


def absolute(x, weight, bias, adapters):
    return x.abs(), weight.abs(), bias.abs(), [(a.abs(), b.abs(), s) for a, b, s in adapters]


def grad_like(x, weight, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((*x.shape[:-1], weight.shape[0]), generator=g).to(dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_match_float64(case, dtype, factor_dtype, backend, poisoned, no_worse):
    given = inputs(case, dtype, factor_dtype)
    grad = grad_like(*given[:2], dtype)
    with ops.use_backend(backend):
        result = run(ops.lora_linear, *given, grad)
    same = run(plain, *given, grad)
    exact = run(plain, *double(*given), grad.double())
    magnitude = run(plain, *absolute(*double(*given)), grad.double().abs())
    dtypes = [dtype] * 4 + [factor_dtype] * (2 * len(given[3]))
    for got, theirs, truth, size, wanted in zip(
        result, same, exact, magnitude, dtypes, strict=True
    ):
        assert got.dtype == wanted
        if dtype == torch.bfloat16 or case == "wide":
            no_worse(got, theirs, truth)
        # Whether one order of a float32 sum beats another is chance where there are few results, so
        # each is held to 4 units of the sum of its absolute products (the worst case: their count).
        eps = torch.finfo(torch.promote_types(wanted, dtype)).eps
        rounding = torch.finfo(wanted).eps * truth.abs()
        if dtype == torch.float32:
            assert bool(((got.double() - truth).abs() <= 4 * eps * size + rounding).all())


def test_the_reference_is_the_merged_weight_in_float64():
    x, weight, bias, adapters = double(*inputs("4-D"))
    merged = weight + sum(s * b @ a for a, b, s in adapters)
    y, _ = lora_linear_reference(x, weight, bias, *map(list, zip(*adapters, strict=True)))
    torch.testing.assert_close(y, F.linear(x, merged, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_are_computed_and_frozen_tensors_stay_bare(backend):
    x, weight, bias, adapters = inputs("odd")
    grad = grad_like(x, weight, torch.float32)
    everything = run(ops.lora_linear, x, weight, bias, adapters, grad)
    names = ["x", "weight", "bias", "A0", "A1", "B0", "B1"]
    tensors = [x, weight, bias, *(p[0] for p in adapters), *(p[1] for p in adapters)]
    for chosen in (["x"], ["A0"], ["B1"], ["weight"], ["bias"], ["A1", "B0"], ["x", "A0", "B0"]):
        leaves = [
            t.detach().clone().requires_grad_(n in chosen)
            for n, t in zip(names, tensors, strict=True)
        ]
        pairs = [(leaves[3 + i], leaves[5 + i], adapters[i][2]) for i in range(2)]
        with ops.use_backend(backend):
            ops.lora_linear(*leaves[:3], pairs).backward(grad)
        for name, leaf, full in zip(names, leaves, everything[1:], strict=True):
            if name not in chosen:
                assert leaf.grad is None
            else:  # the reference sums in another order than the GEMM
                torch.testing.assert_close(leaf.grad, full, rtol=1e-4, atol=1e-5)


def saved_bytes(function):
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return total


def test_saves_x_only_where_an_A_is_trained():
    x, weight, bias, ((a, b, s),) = inputs("wide")
    x.requires_grad_()
    size = {n: t.numel() * 4 for n, t in (("x", x), ("w", weight), ("a", a), ("b", b))}
    frozen = size["w"] + size["a"] + size["b"]
    assert saved_bytes(lambda: ops.lora_linear(x, weight, bias, [(a, b, s)])) == frozen
    a.requires_grad_(), b.requires_grad_()
    t = 4 * x.shape[0] * a.shape[0]
    trained = saved_bytes(lambda: ops.lora_linear(x, weight, bias, [(a, b, s)]))
    assert trained == frozen + size["x"] + t
    with torch.no_grad():
        assert saved_bytes(lambda: ops.lora_linear(x, weight, bias, [(a, b, s)])) == 0


def test_without_adapters_it_is_the_linear_layer():
    x, weight, bias, _ = inputs("no adapter")
    assert torch.equal(ops.lora_linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(ops.lora_linear(x, weight), F.linear(x, weight))


def test_zero_B_changes_nothing():
    """A fresh adapter: B = 0 leaves the layer bit for bit what it was."""
    x, weight, bias, ((a, b, s),) = inputs("wide", torch.bfloat16)
    y = ops.lora_linear(x, weight, bias, [(a, torch.zeros_like(b), s)])
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_gradient(dtype, backend):
    x, weight, bias, adapters = inputs("odd", dtype)
    grad = grad_like(x, weight, dtype)
    with ops.use_backend(backend):
        expected = run(ops.lora_linear, x, weight, bias, adapters, grad)
        layouts = (
            lambda t: t.mT.contiguous().mT,
            lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
            lambda t: torch.stack((t, t), dim=-1)[..., 0],
        )
        for layout in layouts:
            leaves = [layout(t).detach().requires_grad_() for t in (x, weight)]
            factors = [[layout(t).detach().requires_grad_() for t in p[:2]] for p in adapters]
            pairs = [(*f, p[2]) for f, p in zip(factors, adapters, strict=True)]
            y = ops.lora_linear(*leaves, bias, pairs)
            y.backward(layout(grad))
            got = [y, leaves[0].grad, leaves[1].grad]
            got += [f[0].grad for f in factors] + [f[1].grad for f in factors]
            # Another layout is another GEMM kernel, which may sum in another order: float32 by a
            # few units, bfloat16 by one rounding of an intermediate.
            eps = torch.finfo(dtype).eps
            for value, want in zip(got, (*expected[:3], *expected[4:]), strict=True):
                size = float(want.float().abs().max())
                torch.testing.assert_close(value, want, rtol=0, atol=8 * eps * size)


def test_bits_do_not_depend_on_the_run():
    for dtype in DTYPES:
        given = inputs("wide", dtype)
        grad = grad_like(*given[:2], dtype)
        first = run(ops.lora_linear, *given, grad)
        again = run(ops.lora_linear, *given, grad)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_a_nan_stays_in_its_token():
    x, weight, bias, adapters = inputs("wide")
    clean = ops.lora_linear(x, weight, bias, adapters)
    x[3, 5] = math.nan
    y = ops.lora_linear(x, weight, bias, adapters)
    assert bool(y[3].isnan().all())
    others = torch.arange(len(x)) != 3
    assert torch.equal(y[others], clean[others])


def test_autocast_casts_as_the_linear_layer_does(no_worse):
    """A float32 layer under bfloat16 autocast: bfloat16 out, float32 gradients."""
    given = inputs("wide")
    grad = grad_like(*given[:2], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(ops.lora_linear, *given, grad)
        same = run(plain, *given, grad)
        with ops.use_backend("reference"):
            reference = run(ops.lora_linear, *given, grad)
    exact = run(plain, *double(*given), grad.double())
    assert result[0].dtype == same[0].dtype == torch.bfloat16
    for got, by_reference, torch_version, truth in zip(result, reference, same, exact, strict=True):
        assert got.dtype == torch_version.dtype
        no_worse(got, torch_version, truth)
        no_worse(by_reference, torch_version, truth)


def peft_layer(dtype, bias=True, ranks=(4, 8)):
    """A PEFT LoRA Linear with one active adapter per rank, none of them at its zero start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=bias)).to(dtype)
    names = [f"adapter{i}" for i in range(len(ranks))]
    configs = [
        LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=["0"], init_lora_weights=False)
        for r in ranks
    ]
    model = get_peft_model(base, configs[0], names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    layer = model.base_model.model[0]
    assert layer.active_adapters == names
    return layer


def ours_of(layer, x):
    """The same layer through lora_linear."""
    pairs = [
        (layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n])
        for n in layer.active_adapters
    ]
    return ops.lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, pairs)


def through(function, layer, x, grad):
    x = x.detach().clone().requires_grad_()
    trained = [p for n, p in layer.named_parameters() if "lora_" in n]
    y = function(layer, x)
    return y.detach(), *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(4,), (4, 8), (2, 3, 16)])
def test_drops_in_for_a_peft_layer(bias, ranks, no_worse):
    g = torch.Generator().manual_seed(1)
    x, grad = torch.randn(3, 50, 48, generator=g), torch.randn(3, 50, 40, generator=g)
    layer = peft_layer(torch.float32, bias, ranks)
    got, want = through(ours_of, layer, x, grad), through(lambda m, t: m(t), layer, x, grad)
    for value, expected in zip(got, want, strict=True):
        size = float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * size)

    small = peft_layer(torch.bfloat16, bias, ranks)
    x, grad = x.bfloat16(), grad.bfloat16()
    got, same = through(ours_of, small, x, grad), through(lambda m, t: m(t), small, x, grad)
    exact = through(lambda m, t: m(t), small.double(), x.double(), grad.double())
    for value, theirs, truth in zip(got, same, exact, strict=True):
        no_worse(value, theirs, truth)


def test_drops_in_for_a_peft_layer_under_autocast(no_worse):
    g = torch.Generator().manual_seed(1)
    x, grad = torch.randn(3, 50, 48, generator=g), torch.randn(3, 50, 40, generator=g)
    layer = peft_layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, same = through(ours_of, layer, x, grad), through(lambda m, t: m(t), layer, x, grad)
    exact = through(lambda m, t: m(t), layer.double(), x.double(), grad.double())
    for value, theirs, truth in zip(got, same, exact, strict=True):
        assert value.dtype == theirs.dtype
        no_worse(value, theirs, truth)


def test_gradcheck_of_the_reference():
    x, weight, bias, adapters = double(*inputs("odd"))
    flat = [t for a, b, _ in adapters for t in (a, b)]
    leaves = [t.requires_grad_() for t in (x[:1, :2], weight, bias, *flat)]

    def function(x, weight, bias, a0, b0, a1, b1):
        return ops.lora_linear(x, weight, bias, [(a0, b0, 0.5), (a1, b1, 2.0)])

    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["odd", "no adapter"])
def test_opcheck(dtype, case):
    x, weight, bias, adapters = inputs(case, dtype)
    x = x.mT.contiguous().mT
    a, b, scale = ([p[i] for p in adapters] for i in range(3))
    forward = torch.ops.qirl.lora_linear.default
    torch.library.opcheck(forward, [x, weight, bias, a, b, scale, ""])
    torch.library.opcheck(forward, [x, weight, None, a, b, scale, "reference"])
    _, t = forward(x, weight, bias, a, b, scale, "")
    dy = grad_like(x, weight, dtype).mT.contiguous().mT
    n = len(scale)
    for want, given in (([True] * (3 + 2 * n), x), ([True] + [False] * (2 + 2 * n), None)):
        for backend in ("", "reference"):
            torch.library.opcheck(
                torch.ops.qirl.lora_linear_backward.default,
                [dy, given, weight, a, b, t, scale, want, backend],
            )


@pytest.mark.parametrize("case", ["odd", "no adapter"])
def test_compiles_without_graph_break_with_gradient(case):
    given = inputs(case)
    grad = grad_like(*given[:2], torch.float32)
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, *given, grad), run(ops.lora_linear, *given, grad)
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*given), ops.lora_linear(*given))


X, W, A, B = torch.ones(2, 8), torch.ones(6, 8), torch.ones(3, 8), torch.ones(6, 3)
BAD = {
    "not a tensor": ((1.0, W), r"x must be a tensor; got float"),
    "zero rows": ((torch.ones(0, 8), W), r"at least one row.*\(0, 8\)"),
    "integers": ((X.int(), W), r"x must be float32 or bfloat16; got torch.int32"),
    "width": ((torch.ones(2, 7), W), r"weight must be \[out, in\].*size 7.*got \(6, 8\)"),
    "weight of rank 1": ((X, W[0]), r"weight must be \[out, in\].*got \(8,\)"),
    "no outputs": ((X, torch.ones(0, 8)), r"weight must be .*not empty"),
    "weight dtype": ((X, W.bfloat16()), r"must have the dtype of x, torch.float32; got torch.bf"),
    "bias dtype": ((X, W, W[:, 0].bfloat16()), r"must have the dtype of x"),
    "bias shape": ((X, W, torch.ones(5)), r"bias must be \[out\].*size 6.*got \(5,\)"),
    "no triple": ((X, W, None, [(A, B)]), r"adapters\[0\] must be \(A, B, scale\); got tuple"),
    "A width": ((X, W, None, [(A[:, :7], B, 1.0)]), r"adapters\[0\] A must be \[r, in\]"),
    "A None": ((X, W, None, [(None, B, 1.0)]), r"adapters\[0\] A must be a tensor .*NoneType"),
    "rank 0": ((X, W, None, [(A[:0], B[:, :0], 1.0)]), r"adapters\[0\] A must be .*not empty"),
    "ranks differ": ((X, W, None, [(A, B, 1.0), (A[:2], B, 1.0)]), r"adapters\[1\] B .*size 2"),
    "B out": ((X, W, None, [(A, B[:5], 1.0)]), r"adapters\[0\] B must be \[out, r\].*size 6"),
    "A integers": ((X, W, None, [(A.int(), B, 1.0)]), r"A must be float32 or bfloat16"),
    "NaN scale": ((X, W, None, [(A, B, math.nan)]), r"scale must be a finite float; got nan"),
    "tensor scale": ((X, W, None, [(A, B, torch.ones(()))]), r"scale must be a finite float"),
    "device": ((X, W.to("meta")), r"weight must be on cpu, as x is; got meta"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    arguments, message = BAD[case]
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.lora_linear(*arguments)


def test_half_precision_is_for_the_reference():
    with pytest.raises(ValueError, match=r"takes torch.float32, torch.bfloat16; got torch.float16"):
        ops.lora_linear(X.half(), W.half())
    with ops.use_backend("reference"):
        assert ops.lora_linear(X.half(), W.half()).dtype == torch.float16
