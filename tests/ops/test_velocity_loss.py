"""velocity_loss: value and gradient against float64 autograd, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import _cpu, ops

SHAPES = [(1, 1), (3,), (3, 5, 7), (2, 1023), (2, 4, 33, 31), (1, 70_001)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(shape, v_dtype=torch.float32, target_dtype=torch.float32, weighted=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, target = (torch.randn(shape, generator=g) for _ in range(2))
    weight = torch.rand(shape[0], generator=g) + 0.1 if weighted else None
    return v.to(v_dtype), target.to(target_dtype), weight


def plain(v, target, weight):
    """The textbook lines; in float32 for bfloat16 inputs, as trainers write them."""
    wide = torch.promote_types(v.dtype, torch.float32)
    mse = (v.to(wide) - target.to(wide)).square().reshape(len(v), -1).mean(1)
    return (mse if weight is None else weight.to(wide) * mse).mean()


def ours(v, target, weight):
    return ops.velocity_loss(v, target, weight=weight).loss


def loss_and_gradient(function, v, *rest, grad=1.0):
    leaf = v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf, *rest)
    (dv,) = torch.autograd.grad(grad * loss if grad != 1.0 else loss, leaf)
    return loss.detach(), dv


def float64(v, target, weight):
    return v.double(), target.double(), None if weight is None else weight.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_float64(shape, v_dtype, target_dtype, weighted, isa, poisoned, no_worse):
    args = inputs(shape, v_dtype, target_dtype, weighted)
    result = loss_and_gradient(ours, *args)
    assert _cpu.last_isa() == isa
    assert result[0].dtype == torch.float32 and result[1].dtype == v_dtype
    same, truth = loss_and_gradient(plain, *args), loss_and_gradient(plain, *float64(*args))
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_of_each_row_and_no_gradient(backend, dtype, no_worse):
    v, target, weight = inputs((5, 700), dtype, dtype)
    v.requires_grad_()
    exact = (v.detach().double() - target.double()).square().mean(1)
    with ops.use_backend(backend):
        out = ops.velocity_loss(v, target, weight=weight)
        with torch.no_grad():
            again = ops.velocity_loss(v, target, weight=weight)
    assert out.loss.requires_grad and not out.mse.requires_grad and not again.loss.requires_grad
    assert torch.equal(out.mse, again.mse) and torch.equal(out.loss.detach(), again.loss)
    plain_mse = (v.detach().float() - target.float()).square().mean(1)
    no_worse(out.mse, plain_mse, exact)


def test_reference_is_its_own_autograd():
    args = float64(*inputs((3, 50)))
    with ops.use_backend("reference"):
        leaf = args[0].requires_grad_()
        out = ops.velocity_loss(leaf, args[1], weight=inputs((3, 50))[2])
    (dv,) = torch.autograd.grad(out.loss, leaf)
    loss, exact = loss_and_gradient(plain, *args)
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(dv, exact, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradient(dtype, isa):
    """A power of two is exact; the saved gradient stays whole for a second pass."""
    v, target, weight = inputs((3, 2000), dtype)
    _, once = loss_and_gradient(ours, v, target, weight)
    _, scaled = loss_and_gradient(ours, v, target, weight, grad=-0.25)
    assert torch.equal(scaled, -0.25 * once) and scaled.dtype == dtype
    leaf = v.clone().requires_grad_()
    loss = ours(leaf, target, weight)
    passes = [torch.autograd.grad(k * loss, leaf, retain_graph=True)[0] for k in (1, 2, 1)]
    assert torch.equal(passes[0], once) and torch.equal(passes[2], once)
    assert torch.equal(passes[1], 2 * once)
    loss.backward()
    loss_again = ours(leaf, target, weight)
    loss_again.backward()
    assert torch.equal(leaf.grad, once + once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, isa, threads):
    v, target, weight = inputs((4, 37_123), dtype, torch.bfloat16)
    with threads(1):
        expected = loss_and_gradient(ours, v, target, weight)
        mse = ops.velocity_loss(v, target).mse
    for count in (1, 2, 3, 8):
        with threads(count):
            again = loss_and_gradient(ours, v, target, weight)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for rows in ([0], [3, 2]):  # the mean over rows divides by powers of two: exact
        _, dv = loss_and_gradient(ours, v[rows], target[rows], weight[rows])
        assert torch.equal(dv.float() * len(rows), expected[1][rows].float() * 4)
        out = ops.velocity_loss(v[rows], target[rows])
        assert torch.equal(out.mse, mse[rows])
        if len(rows) == 1:
            assert torch.equal(out.loss, mse[0])


def test_all_instruction_sets_give_the_same_bits():
    args = inputs((3, 5001), torch.bfloat16, torch.float32)
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        results.append(loss_and_gradient(ours, *args))
    _cpu.unforce_isa()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_large_gradients_are_streamed_and_equal(isa):
    v, target, weight = inputs((8, 2**18))
    expected = loss_and_gradient(ours, v, target, weight)[1]
    alone = loss_and_gradient(ours, v[7:], target[7:], weight[7:])[1]
    assert torch.equal(alone, 8 * expected[7:])


def test_non_contiguous_inputs(isa):
    v, target, weight = inputs((4, 6, 10))
    expected = loss_and_gradient(ours, v, target, weight)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
        lambda t: t.flip(0).flip(0),
    ):
        wide_weight = torch.stack((weight, weight), 1)[:, 0]
        got = loss_and_gradient(ours, layout(v), layout(target), wide_weight)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    shared = target[:1].expand(4, 6, 10)  # rows that overlap
    got = loss_and_gradient(ours, v, shared, weight)
    want = loss_and_gradient(ours, v, shared.contiguous(), weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_reaches_loss_and_gradient(which, isa):
    args = list(inputs((3, 40)))
    args[which] = args[which].clone()
    args[which][1, 7] = math.nan
    loss, dv = loss_and_gradient(ours, *args)
    assert loss.isnan() and dv[1, 7].isnan() and int(dv.isnan().sum()) == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    v, target, weight = inputs((3, 4, 6), torch.bfloat16)
    op = torch.ops.qirl.velocity_loss.default
    permuted = v.transpose(1, 2).contiguous().transpose(1, 2)
    for want_grad in (False, True):
        torch.library.opcheck(op, (v, target, weight, want_grad, backend))
        torch.library.opcheck(op, (permuted, target, None, want_grad, backend))


def test_compiles_without_graph_break_with_gradient():
    v, target, weight = inputs((3, 200), torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for grad in (1.0, 0.5):
        expected = loss_and_gradient(ours, v, target, weight, grad=grad)
        got = loss_and_gradient(compiled, v, target, weight, grad=grad)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(v, target, weight), ours(v, target, weight))


def test_autocast_changes_nothing():
    args = inputs((2, 64))
    expected = loss_and_gradient(ours, *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradient(ours, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


BAD = {
    "no rows": ({"v": torch.zeros(0, 8)}, r"at least one row.*\(0, 8\)"),
    "no elements": ({"v": torch.zeros(2, 0)}, r"one element a row"),
    "scalar": ({"v": torch.zeros(())}, r"\[B, ...\]"),
    "list": ({"v": [1.0]}, "must be a tensor; got list"),
    "integer v": ({"v": torch.zeros(2, 8, dtype=torch.int64)}, "float32 or bfloat16"),
    "shape of target": (
        {"target": torch.zeros(2, 7)},
        r"target must have the shape of v, \(2, 8\)",
    ),
    "broadcast": ({"target": torch.zeros(1, 8)}, "target must have the shape of v"),
    "integer target": (
        {"target": torch.zeros(2, 8, dtype=torch.int32)},
        "target must be float32 or bfloat16",
    ),
    "meta target": ({"target": torch.zeros(2, 8, device="meta")}, "target must be on the device"),
    "rows of weight": ({"weight": torch.ones(3)}, "weight needs one value a row"),
    "column weight": ({"weight": torch.ones(2, 1)}, "weight needs one value a row"),
    "double weight": ({"weight": torch.ones(2).double()}, "weight must be torch.float32"),
    "number weight": ({"weight": 1.0}, "weight must be a tensor"),
    "inf weight": ({"weight": torch.tensor([1.0, math.inf])}, r"weight\[1\] is inf"),
    "NaN weight": ({"weight": torch.tensor([math.nan, 1.0])}, r"weight\[0\] is nan"),
    "target with grad": ({"target": torch.zeros(2, 8, requires_grad=True)}, "target requires grad"),
    "weight with grad": ({"weight": torch.ones(2, requires_grad=True)}, "weight requires grad"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    change, message = BAD[case]
    args = {"v": torch.zeros(2, 8), "target": torch.zeros(2, 8), "weight": torch.ones(2)}
    with ops.use_backend(backend):
        ops.velocity_loss(**args)
        with pytest.raises(ValueError, match=message):
            ops.velocity_loss(**(args | change))


def test_types_the_kernel_lacks_are_refused():
    v = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes torch\.float32, .*; got torch\.float64"):
        ops.velocity_loss(v, v)
