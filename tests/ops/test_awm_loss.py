"""awm_logp and awm_loss: values and gradients against float64 autograd, op contract."""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import _cpu, ops

SHAPES = [(1, 1), (3,), (3, 5, 7), (64, 1023), (2, 4, 33, 31), (1, 70_001)]
DTYPES = [torch.float32, torch.bfloat16]
WEIGHTINGS = ["uniform", "t", "t2", "huber", "ghuber"]


def inputs(shape, v_dtype=torch.float32, x_dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=g) for _ in range(2))
    v = (noise - x0) + 0.5 * torch.randn(shape, generator=g)
    time = 0.05 + 0.9 * torch.rand(shape[0], generator=g)
    return v.to(v_dtype), noise.to(x_dtype), x0.to(x_dtype), time


def plain(v, noise, x0, time, weighting="uniform", power=0.25):
    """The published lines, at least in float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    v, noise, x0 = (t.to(wide).reshape(len(v), -1) for t in (v, noise, x0))
    t = time.to(wide)
    logp = (-((v - (noise - x0)) ** 2)).mean(1)
    if weighting == "t":
        return logp * t
    if weighting == "t2":
        return logp * t**2
    if weighting == "huber":
        return -(torch.sqrt(-logp + 1e-10) - 1e-5) * t
    if weighting == "ghuber":
        tiny = torch.pow(torch.tensor(1e-10, dtype=wide), power)
        return -(torch.pow(-logp + 1e-10, power) - tiny) * t / power
    return logp


def ours(*args, **options):
    return ops.awm_logp(*args, **options)


def value_and_gradient(function, v, *rest, grad=None, **options):
    leaf = v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logp = function(leaf, *rest, **options)
    grad = torch.linspace(-2, 3, len(v)) if grad is None else grad
    (dv,) = torch.autograd.grad(logp, leaf, grad.to(logp.dtype))
    return logp.detach(), dv


def float64(args):
    return [t.double() for t in args]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_matches_float64(shape, v_dtype, x_dtype, weighting, isa, poisoned, no_worse):
    args = inputs(shape, v_dtype, x_dtype)
    result = value_and_gradient(ours, *args, weighting=weighting)
    assert _cpu.last_isa() == isa
    assert result[0].dtype == torch.float32 and result[1].dtype == v_dtype
    same = value_and_gradient(plain, *args, weighting=weighting)
    truth = value_and_gradient(plain, *float64(args), weighting=weighting)
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("power", [0.25, 0.9, 1.0])
def test_reference_is_autograd_in_float64(weighting, power):
    *large, time = float64(inputs((3, 50)))
    options = {"weighting": weighting, "power": power}
    with ops.use_backend("reference"):
        got = value_and_gradient(ours, *large, time.float(), **options)
    for ours_, exact in zip(got, value_and_gradient(plain, *large, time, **options), strict=True):
        # At power 1 the published line adds 1e-10 to m and takes it away again.
        torch.testing.assert_close(ours_, exact, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("v_dtype", DTYPES)
def test_mixed_storage_types(v_dtype, isa):
    v, noise, x0, time = inputs((2, 1100), v_dtype)
    x0 = x0.bfloat16()
    logp, dv = value_and_gradient(ours, v, noise, x0, time)
    wide, dv_wide = value_and_gradient(ours, v.float(), noise, x0.float(), time)
    assert torch.equal(logp, wide) and torch.equal(dv, dv_wide.to(v_dtype))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_perfect_velocity(weighting, backend):
    """m = 0: logp 0 and gradient 0, not 0 times infinity."""
    _, noise, x0, time = inputs((2, 30))
    with ops.use_backend(backend):
        logp, dv = value_and_gradient(ours, noise - x0, noise, x0, time, weighting=weighting)
    assert (logp == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, isa, threads):
    args = inputs((6, 37_123), dtype, torch.bfloat16)
    grad = torch.linspace(-1, 1, 6)
    with threads(1):
        expected = value_and_gradient(ours, *args, grad=grad)
    for count in (1, 2, 3, 8):
        with threads(count):
            again = value_and_gradient(ours, *args, grad=grad)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for rows in ([0], [4, 2]):
        alone = value_and_gradient(ours, *(t[rows] for t in args), grad=grad[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, expected, strict=True))


def test_all_instruction_sets_give_the_same_bits():
    args = inputs((3, 5001), torch.bfloat16)
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        results.append(value_and_gradient(ours, *args, weighting="ghuber"))
    _cpu.unforce_isa()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_large_gradients_are_streamed_and_equal(isa):
    args = inputs((9, 2**18))
    grad = torch.linspace(-1, 1, 9)
    expected = value_and_gradient(ours, *args, grad=grad)
    alone = value_and_gradient(ours, *(t[7:8] for t in args), grad=grad[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, expected, strict=True))


def test_non_contiguous_inputs_and_gradient(isa):
    *large, time = inputs((4, 6, 10))
    expected = value_and_gradient(ours, *large, time, grad=torch.ones(4))
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
    ):
        leaf = layout(large[0]).detach().requires_grad_()
        moved = [layout(t) for t in large[1:]]
        logp = ours(leaf, *moved, torch.stack((time, time), 1)[:, 0])
        logp.sum().backward()  # the incoming gradient is an expanded scalar
        assert torch.equal(logp, expected[0]) and torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    v, noise, x0, time = inputs((3, 4, 6), torch.bfloat16)
    permuted = v.transpose(1, 2).contiguous().transpose(1, 2)
    forward = torch.ops.qirl.awm_logp.default
    backward = torch.ops.qirl.awm_logp_backward.default
    for t in (v, permuted):
        torch.library.opcheck(forward, (t, noise, x0, time, 1, 0.25, 4.0, backend))
        torch.library.opcheck(backward, (torch.ones(3), time, t, noise, x0, backend))


# ---- awm_loss -----------------------------------------------------------------------------------
def loss_inputs(rows=6, dtype=torch.float32, seed=0):
    args = inputs((rows, 40), dtype, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    old = ops.awm_logp(*args, weighting="t") + 0.2 * torch.randn(rows, generator=g)
    return *args, old, torch.randn(rows, generator=g)


def plain_loss(v, noise, x0, time, old, advantage, low=0.1, high=0.2):
    ratio = torch.exp(plain(v, noise, x0, time, "t") - old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)).mean()


def our_loss(*args):
    return ops.awm_loss(*args, clip_low=0.1, clip_high=0.2, weighting="t").loss


def loss_and_gradient(function, v, *rest):
    leaf = v.detach().clone().requires_grad_()
    loss = function(leaf, *rest)
    (dv,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), dv


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_matches_float64(dtype, isa, no_worse):
    args = loss_inputs(32, dtype)
    result, same = loss_and_gradient(our_loss, *args), loss_and_gradient(plain_loss, *args)
    truth = loss_and_gradient(plain_loss, *float64(args))
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)
    assert 0 < int((result[1] == 0).all(1).sum()) < 32  # some rows are clipped, not all


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_before_an_update_the_ratio_is_one(backend):
    v, noise, x0, time, _, advantage = loss_inputs()
    leaf = v.clone().requires_grad_()
    with ops.use_backend(backend):
        old = ops.awm_logp(v, noise, x0, time, weighting="huber")
        out = ops.awm_loss(
            leaf, noise, x0, time, old, advantage, clip_low=1e-4, clip_high=1e-4, weighting="huber"
        )
    assert (out.ratio == 1).all() and float(out.clip_fraction) == 0 and float(out.approx_kl) == 0
    assert torch.equal(out.logp, old)
    assert out.loss.requires_grad and not any(t.requires_grad for t in out[1:])


def test_gradient_scales_and_compiles():
    args = loss_inputs(8, torch.bfloat16)
    expected = loss_and_gradient(our_loss, *args)
    _, tripled = loss_and_gradient(lambda *a: 4 * our_loss(*a), *args)
    assert torch.equal(tripled, 4 * expected[1])
    compiled = torch.compile(our_loss, fullgraph=True, backend="aot_eager")
    got = loss_and_gradient(compiled, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*args), expected[0])


def test_autocast_changes_nothing():
    args = loss_inputs()
    expected = loss_and_gradient(our_loss, *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradient(our_loss, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("which", range(6))
def test_nan_reaches_the_loss(which):
    args = [t.clone() for t in loss_inputs()]
    args[which].view(-1)[1] = math.nan
    if which == 3:
        with pytest.raises(ValueError, match=r"time\[1\] is nan"):
            our_loss(*args)
        return
    assert loss_and_gradient(our_loss, *args)[0].isnan()


BAD = {
    "no rows": ({"v": torch.zeros(0, 8)}, r"v needs shape.*\(0, 8\)"),
    "integer v": ({"v": torch.zeros(2, 8).int()}, "v must be float32 or bfloat16"),
    "shape of noise": ({"noise": torch.zeros(2, 7)}, "noise must have the shape of v"),
    "shape of x0": ({"x0": torch.zeros(1, 8)}, "x0 must have the shape of v"),
    "half x0 on meta": ({"x0": torch.zeros(2, 8, device="meta")}, "x0 must be on the device of v"),
    "rows of time": ({"time": torch.ones(3)}, "time needs one value a row"),
    "double time": ({"time": torch.ones(2).double()}, "time must be torch.float32"),
    "inf time": ({"time": torch.tensor([0.5, math.inf])}, r"time\[1\] is inf"),
    "weighting": ({"weighting": "t3"}, "weighting is 't3'; choose from uniform, t, t2"),
    "zero power": ({"power": 0.0}, r"power is 0\.0; want 0 < power <= 1"),
    "NaN power": ({"power": math.nan}, "power is nan"),
    "large power": ({"power": 1.5}, r"power is 1\.5"),
    "rows of logp_old": ({"logp_old": torch.ones(3)}, "logp_old needs one value a row"),
    "double logp_old": ({"logp_old": torch.ones(2).double()}, "logp_old must be torch.float32"),
    "column advantage": ({"advantage": torch.ones(2, 1)}, "advantage needs one value a row"),
    "clip_low": ({"clip_low": 0.0}, "clip_low is 0"),
    "clip_high": ({"clip_high": math.nan}, "clip_high is nan"),
    **{
        f"{name} with grad": (
            {name: torch.zeros(shape, requires_grad=True)},
            f"{name} requires grad",
        )
        for name, shape in (
            ("noise", (2, 8)),
            ("x0", (2, 8)),
            ("time", (2,)),
            ("logp_old", (2,)),
            ("advantage", (2,)),
        )
    },
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    change, message = BAD[case]
    args = {n: torch.zeros(2, 8) for n in ("v", "noise", "x0")}
    args |= {n: torch.ones(2) for n in ("time", "logp_old", "advantage")}
    args |= {"clip_low": 0.1, "clip_high": 0.1}
    with ops.use_backend(backend):
        ops.awm_loss(**args)
        with pytest.raises(ValueError, match=message):
            ops.awm_loss(**(args | change))
