"""nft_loss: value, metrics and gradient against float64 autograd; edge rules, op contract."""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import _cpu, ops

SHAPES = [(1, 1), (3,), (3, 5, 7), (2, 1023), (2, 4, 33, 31)]
DTYPES = [torch.float32, torch.bfloat16]
LARGE = ("v", "v_old", "v_ref", "x_t", "x0")
METRICS = ("policy", "better_mse", "worse_mse", "ref_mse")


def inputs(shape, v_dtype=torch.float32, x_dtype=torch.float32, with_ref=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = shape[0]
    sigma = 0.1 + 0.8 * torch.rand(rows, generator=g)
    s = sigma.reshape(-1, *[1] * (len(shape) - 1))
    x0, noise = (torch.randn(shape, generator=g) for _ in range(2))
    v_old, v, v_ref = ((noise - x0) + 0.3 * torch.randn(shape, generator=g) for _ in range(3))
    return {
        "v": v.to(v_dtype),
        "v_old": v_old.to(v_dtype),
        "v_ref": v_ref.to(v_dtype) if with_ref else None,
        "x_t": ((1 - s) * x0 + s * noise).to(x_dtype),
        "x0": x0.to(x_dtype),
        "sigma": sigma,
        "advantage": 4 * torch.randn(rows, generator=g),
    }


def float64(args):
    return {n: None if t is None else t.detach().double() for n, t in args.items()}


def plain(args, beta=0.1, adv_clip=5.0, ref_weight=1e-4):
    """(loss, metrics) as the published script writes them, at least in float32."""
    wide = torch.promote_types(args["v"].dtype, torch.float32)
    t = {n: None if x is None else x.to(wide) for n, x in args.items()}
    v, old, x_t, x0 = (t[n].reshape(len(t["v"]), -1) for n in ("v", "v_old", "x_t", "x0"))
    s = t["sigma"][:, None]
    better = x_t - s * (beta * v + (1 - beta) * old)
    worse = x_t - s * ((1 + beta) * old - beta * v)
    with torch.no_grad():
        weights = [(e - x0).abs().mean(1, keepdim=True).clip(min=1e-5) for e in (better, worse)]
    losses = [((e - x0) ** 2 / w).mean(1) for e, w in zip((better, worse), weights, strict=True)]
    r = (t["advantage"].clamp(-adv_clip, adv_clip) / adv_clip) / 2 + 0.5
    policy = adv_clip * (r * losses[0] / beta + (1 - r) * losses[1] / beta)
    away = 0 * v if t["v_ref"] is None else v - t["v_ref"].reshape(v.shape)
    metrics = (policy, *(e.square().mean(1) for e in (better - x0, worse - x0, away)))
    return (policy + ref_weight * away.square().mean(1)).mean(), metrics


def ours(args, **options):
    return ops.nft_loss(**args, **{"beta": 0.1, **options})


def everything(function, args, grad=1.0, **options):
    """loss, the four metrics and dloss/dv."""
    leaf = args["v"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function({**args, "v": leaf}, **options)
    loss = out[0]
    metrics = out[1] if isinstance(out[1], tuple) else out[1:]
    (dv,) = torch.autograd.grad(grad * loss if grad != 1.0 else loss, leaf)
    return loss.detach(), *(m.detach() for m in metrics), dv


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_matches_float64(shape, v_dtype, x_dtype, with_ref, isa, poisoned, no_worse):
    args = inputs(shape, v_dtype, x_dtype, with_ref)
    result = everything(ours, args)
    assert _cpu.last_isa() == isa
    assert [t.dtype for t in result] == [torch.float32] * 5 + [v_dtype]
    same, truth = everything(plain, args), everything(plain, float64(args))
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "options",
    [{"beta": 1.0}, {"beta": 2.5, "adv_clip": 1.0}, {"ref_weight": 0.0}, {"ref_weight": 3.0}],
)
def test_options(backend, options, no_worse):
    args = inputs((4, 300))
    with ops.use_backend(backend):
        result = everything(ours, args, **options)
    options = {"beta": 0.1, **options}
    same = everything(plain, args, **options)
    truth = everything(plain, float64(args), **options)
    for got, torch_version, exact in zip(result, same, truth, strict=True):
        no_worse(got, torch_version, exact)


def test_reference_is_autograd_in_float64():
    args = float64(inputs((3, 50)))
    args["sigma"], args["advantage"] = args["sigma"].float(), args["advantage"].float()
    with ops.use_backend("reference"):
        result = everything(ours, args)
    for got, exact in zip(result, everything(plain, float64(args)), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("v_dtype", DTYPES)
def test_mixed_storage_types(v_dtype, isa):
    """Each of the five has a type of its own; values are those of the same numbers in float32."""
    args = inputs((2, 1100), v_dtype)
    for name in ("v_old", "x0"):
        args[name] = args[name].bfloat16()
    args["v_ref"] = args["v_ref"].float()
    wide = {n: t.float() for n, t in args.items()}
    *values, dv = everything(ours, args)
    *expected, dv_wide = everything(ours, wide)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert torch.equal(dv, dv_wide.to(v_dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weights_have_a_floor(backend, no_worse):
    """Estimates that hit x0: w stays 1e-5, nothing is divided by zero."""
    args = inputs((2, 64))
    args["x_t"] = args["x0"] + args["sigma"][:, None] * args["v_old"]
    args["v"] = args["v_old"] * (1 + 1e-7)
    with ops.use_backend(backend):
        result = everything(ours, args)
    assert all(bool(t.isfinite().all()) for t in result)
    assert (result[1] < 1e-6).all()  # e is rounding: 50 e^2 / 1e-5
    exact_args = {n: t.clone() for n, t in args.items()}
    exact_args["x_t"], exact_args["v"] = args["x0"].clone(), args["v_old"].clone()
    exact_args["v_old"].zero_()
    exact_args["v"].zero_()
    exact_args["v_ref"].zero_()
    with ops.use_backend(backend):
        zero = everything(ours, exact_args)
    assert all(bool((t == 0).all()) for t in zero)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_advantage_is_clipped_and_decides(backend):
    args = inputs((4, 200))
    args = {n: t[:1].expand(4, *t.shape[1:]).contiguous() for n, t in args.items()}
    args["advantage"] = torch.tensor([5.0, 50.0, -5.0, -math.inf])
    with ops.use_backend(backend):
        out = ours(args)
    assert out.policy[0] == out.policy[1] and out.policy[2] == out.policy[3]
    exact = [float(x[0]) for x in plain(float64(args))[1]]
    assert float(out.policy[0]) == pytest.approx(exact[0], rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [*LARGE, "advantage"])
def test_nan_reaches_the_loss(backend, name):
    args = inputs((3, 40))
    args[name] = args[name].clone()
    args[name][(1, 7) if name in LARGE else 1] = math.nan
    with ops.use_backend(backend):
        result = everything(ours, args)
    loss, policy, ref_mse, dv = result[0], result[1], result[4], result[5]
    assert loss.isnan() and (policy if name != "v_ref" else ref_mse)[1].isnan()
    assert dv[1].isnan().any() and dv[[0, 2]].isfinite().all()
    assert policy[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradient(dtype):
    args = inputs((3, 2000), dtype)
    once = everything(ours, args)[-1]
    assert torch.equal(everything(ours, args, grad=-0.25)[-1], -0.25 * once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_or_run(dtype, isa, threads):
    args = inputs((4, 37_123), dtype, torch.bfloat16)
    with threads(1):
        expected = everything(ours, args)
    for count in (1, 2, 3, 8):
        with threads(count):
            again = everything(ours, args)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for rows in ([0], [3, 2]):  # the mean over rows divides by powers of two: exact
        part = everything(ours, {n: t[rows] for n, t in args.items()})
        for a, b in zip(part[1:5], expected[1:5], strict=True):
            assert torch.equal(a, b[rows])
        assert torch.equal(part[5].float() * len(rows), expected[5][rows].float() * 4)


def test_many_rows_go_in_groups(isa):
    """More rows than a group holds, and streamed stores: the same rows as alone."""
    args = inputs((16, 2**17))
    expected = everything(ours, args)
    for row in (0, 9, 15):
        alone = everything(ours, {n: t[row : row + 1] for n, t in args.items()})
        assert torch.equal(alone[1], expected[1][row : row + 1])
        assert torch.equal(alone[5], expected[5][row : row + 1] * 16)


def test_all_instruction_sets_give_the_same_bits():
    args = inputs((3, 5001), torch.bfloat16)
    results = []
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        results.append(everything(ours, args))
    _cpu.unforce_isa()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_non_contiguous_inputs(isa):
    args = inputs((4, 6, 10))
    expected = everything(ours, args)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), dim=1)[:, :6],
        lambda t: torch.stack((t, t), dim=-1)[..., 0],
    ):
        moved = {
            n: layout(t) if n in LARGE else torch.stack((t, t), 1)[:, 0] for n, t in args.items()
        }
        got = everything(ours, moved)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def arguments(args, want_grad, backend):
    order = ("v", "v_old", "v_ref", "x_t", "x0", "sigma", "advantage")
    return (*(args[n] for n in order), 0.1, 5.0, 1e-4, want_grad, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    op = torch.ops.qirl.nft_loss.default
    args = inputs((3, 4, 6), torch.bfloat16)
    torch.library.opcheck(op, arguments(args, True, backend))
    args["v"] = args["v"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(op, arguments({**args, "v_ref": None}, True, backend))
    torch.library.opcheck(op, arguments(args, False, backend))


def test_compiles_without_graph_break_with_gradient():
    args = inputs((3, 200), torch.bfloat16)

    def run(v):
        out = ours({**args, "v": v})
        return out.loss, out.policy

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = everything(ours, args)
    leaf = args["v"].clone().requires_grad_()
    loss, policy = compiled(leaf)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(policy, expected[1])
    assert torch.equal(leaf.grad, expected[5])
    with torch.no_grad():
        assert torch.equal(compiled(args["v"])[0], expected[0])


def test_autocast_changes_nothing():
    args = inputs((2, 64))
    expected = everything(ours, args)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(ours, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


WRONG = torch.zeros(2, 7)
BAD = {
    "no rows": ({"v": torch.zeros(0, 8)}, r"v needs shape.*\(0, 8\)"),
    "integer v": ({"v": torch.zeros(2, 8).int()}, "v must be float32 or bfloat16"),
    **{
        f"shape of {name}": ({name: WRONG}, rf"{name} must have the shape of v, \(2, 8\)")
        for name in LARGE[1:]
    },
    "absent v_old": ({"v_old": None}, "v_old must be a tensor; got NoneType"),
    "integer x0": ({"x0": torch.zeros(2, 8).int()}, "x0 must be float32 or bfloat16"),
    "rows of sigma": ({"sigma": torch.ones(3)}, "sigma needs one value a row"),
    "double sigma": ({"sigma": torch.ones(2).double()}, "sigma must be torch.float32"),
    "NaN sigma": ({"sigma": torch.tensor([0.5, math.nan])}, r"sigma\[1\] is nan"),
    "inf sigma": ({"sigma": torch.tensor([math.inf, 0.5])}, r"sigma\[0\] is inf"),
    "matrix advantage": ({"advantage": torch.ones(2, 1)}, "advantage needs one value a row"),
    "double advantage": ({"advantage": torch.ones(2).double()}, "advantage must be torch.float32"),
    "zero beta": ({"beta": 0.0}, r"beta is 0\.0; want a finite beta > 0"),
    "NaN beta": ({"beta": math.nan}, "beta is nan"),
    "inf beta": ({"beta": math.inf}, "beta is inf"),
    "negative clip": ({"adv_clip": -1.0}, "adv_clip is -1"),
    "NaN clip": ({"adv_clip": math.nan}, "adv_clip is nan"),
    "negative weight": ({"ref_weight": -1e-4}, "ref_weight is -0"),
    "NaN weight": ({"ref_weight": math.nan}, "ref_weight is nan"),
    **{
        f"{name} with grad": (
            {name: torch.zeros(2, 8, requires_grad=True)},
            f"{name} requires grad",
        )
        for name in LARGE[1:]
    },
    "sigma with grad": ({"sigma": torch.ones(2, requires_grad=True)}, "sigma requires grad"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_what_came_and_what_is_wanted(case, backend):
    change, message = BAD[case]
    args = {n: torch.zeros(2, 8) for n in LARGE} | {"sigma": torch.ones(2)}
    args |= {"advantage": torch.zeros(2), "beta": 0.1}
    with ops.use_backend(backend):
        ops.nft_loss(**args)
        with pytest.raises(ValueError, match=message):
            ops.nft_loss(**(args | change))
