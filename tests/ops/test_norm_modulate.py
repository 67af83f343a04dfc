"""norm_modulate: values and gradients against float64, diffusers' own code, all that must not
matter, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qirl_fast import _cpu, ops

SHAPES = [(1, 1, 1), (2, 3, 17), (2, 70, 100), (1, 130, 64), (3, 4, 3072)]
DTYPES = [torch.float32, torch.bfloat16]
NORMS = ["layer", "rms"]
NAMES = ("x", "scale", "shift", "scale_t0", "shift_t0")


def inputs(shape, dtype=torch.float32, rows=torch.float32, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 2 + 0.5
    made = {"x": x.to(dtype)}
    for name in NAMES[1:]:
        made[name] = torch.randn(shape[0], shape[-1], generator=g).to(rows)
    return made


def marked(shape) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) > 0.6


def formula(x, scale, shift=None, *, norm, eps=1e-6, t0=None, scale_t0=None, shift_t0=None):
    """As diffusers writes it."""

    def tokens(row, row_t0):
        row = row.unsqueeze(1)
        return row if t0 is None else torch.where(t0.unsqueeze(-1), row_t0.unsqueeze(1), row)

    n = F.layer_norm if norm == "layer" else F.rms_norm
    y = n(x, x.shape[-1:], eps=eps) * (1 + tokens(scale, scale_t0))
    return (y if shift is None else y + tokens(shift, shift_t0)).to(x.dtype)


def value_and_gradients(function, given, grad, **options) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def gradient_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)


def chosen(given, t0, shift=True) -> dict[str, Tensor]:
    return {
        k: v
        for k, v in given.items()
        if (t0 is not None or "t0" not in k) and (shift or "shift" not in k)
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("split", [False, True])
def test_value_and_gradients_match_float64(shape, dtype, norm, split, isa, poisoned, no_worse):
    t0 = marked(shape) if split else None
    # Sums over a few tokens: PyTorch's luck in one draw is no bound, its mean over many is.
    few = dtype == torch.float32 and 1 < shape[1] < 5
    squares: dict[str, list[Tensor]] = {}
    for draw in range(30 if few else 1):
        given = chosen(inputs(shape, dtype, dtype, draw), t0)
        grad = gradient_like(given["x"])
        got = value_and_gradients(ops.norm_modulate, given, grad, norm=norm, t0=t0)
        assert _cpu.last_isa() == isa
        same = value_and_gradients(formula, given, grad, norm=norm, t0=t0)
        wide = {k: t.double() for k, t in given.items()}
        exact = value_and_gradients(formula, wide, grad.double(), norm=norm, t0=t0)
        for name in got:
            assert got[name].dtype == dtype
            if shape == (1, 1, 1) and name in ("x", "scale") and (name, norm) != ("scale", "rms"):
                assert float(got[name].abs().max()) < 1e-5  # n of one element is constant
            elif few and name not in ("x", "y"):
                errors = [(t[name].double() - exact[name]).square().mean() for t in (got, same)]
                squares.setdefault(name, []).append(torch.stack(errors))
            elif draw == 0:
                no_worse(got[name], same[name], exact[name])
    for name, errors in squares.items():
        ours, theirs = torch.stack(errors).mean(0).sqrt().tolist()
        assert ours <= 1.25 * theirs, name


@pytest.mark.parametrize("rows", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_a_dtype_of_their_own_and_shift_may_be_absent(dtype, rows, isa):
    given = chosen(inputs((2, 5, 33), dtype, rows), None, shift=False)
    got = value_and_gradients(ops.norm_modulate, given, gradient_like(given["x"]))
    with ops.use_backend("reference"):
        expected = value_and_gradients(ops.norm_modulate, given, gradient_like(given["x"]))
    for name in got:
        assert got[name].dtype == expected[name].dtype
        assert got[name].dtype == (rows if name == "scale" else dtype)
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_float64_gradients_of_the_reference(norm):
    given = {k: t.double().requires_grad_() for k, t in inputs((2, 5, 4)).items()}
    t0 = marked((2, 5, 4))

    def call(x, scale, shift, scale_t0, shift_t0):
        return ops.norm_modulate(
            x, scale, shift, norm=norm, t0=t0, scale_t0=scale_t0, shift_t0=shift_t0
        )

    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(call, tuple(given.values()))
        y = call(*given.values())
    torch.testing.assert_close(y, formula(**given, norm=norm, t0=t0), rtol=1e-12, atol=1e-12)


def test_equals_the_modules_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.transformers import transformer_qwenimage as image
    from diffusers.models.transformers import transformer_qwenimage21 as image21

    torch.manual_seed(0)
    x, mod, index = torch.randn(2, 9, 24), torch.randn(4, 72), torch.arange(9) > 5
    block = image.QwenImageTransformerBlock(24, 2, 12)
    expected, _ = block._modulate(block.img_norm1(x), mod, index.long().expand(2, 9))
    shift, scale, _ = mod.chunk(3, dim=-1)
    y = ops.norm_modulate(x, scale[:2], shift[:2], t0=index, scale_t0=scale[2:], shift_t0=shift[2:])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    rows = torch.randn(3, 24)  # the last one is for t = 0
    chosen_rows = image21._select_modulation_rows(rows, ~index)
    expected = F.rms_norm(x, (24,), eps=1e-6) * (1 + chosen_rows)
    y = ops.norm_modulate(x, rows[:2], norm="rms", t0=index, scale_t0=rows[2:].expand(2, 24))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_threads_run_or_isa(norm, dtype, threads):
    shape = (3, 150, 203)
    given, t0 = inputs(shape, dtype), marked(shape)
    grad = gradient_like(given["x"])
    with threads(1):
        expected = value_and_gradients(ops.norm_modulate, given, grad, norm=norm, t0=t0)
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        for count in (1, 2, 3):
            with threads(count):
                again = value_and_gradients(ops.norm_modulate, given, grad, norm=norm, t0=t0)
            assert equal(again, expected)
        one = {k: t[1:2] for k, t in given.items()}
        alone = value_and_gradients(ops.norm_modulate, one, grad[1:2], norm=norm, t0=t0[1:2])
        assert equal(alone, {k: t[1:2] for k, t in expected.items()})
        _cpu.unforce_isa()


def test_large_output_is_streamed_and_equal(isa):
    given = chosen(inputs((2, 1500, 2048)), None)
    grad = gradient_like(given["x"])
    expected = value_and_gradients(ops.norm_modulate, given, grad)
    one = {k: t[1:2] for k, t in given.items()}
    alone = value_and_gradients(ops.norm_modulate, one, grad[1:2])
    assert equal(alone, {k: t[1:2] for k, t in expected.items()})


def test_layouts(isa):
    given, t0 = inputs((3, 6, 40)), torch.arange(6) > 3
    grad = gradient_like(given["x"])
    full = t0.expand(3, 6).contiguous()
    expected = value_and_gradients(ops.norm_modulate, given, grad, t0=full)
    transposed = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat([given[k] for k in NAMES[1:]], dim=-1).chunk(4, dim=-1)
    views = {"x": transposed, **dict(zip(NAMES[1:], fused, strict=True))}
    assert equal(value_and_gradients(ops.norm_modulate, views, grad, t0=t0), expected)
    odd = {k: torch.stack((v, v), dim=-1)[..., 0] for k, v in given.items()}
    every_other = torch.stack((full, ~full), dim=-1)[..., 0]
    assert equal(value_and_gradients(ops.norm_modulate, odd, grad, t0=every_other), expected)


def test_expanded_rows_and_one_token(isa):
    given = inputs((3, 1, 40))
    x, scale = given["x"], given["scale"][:1].expand(3, 40)
    y = ops.norm_modulate(x, scale)
    assert torch.equal(y, ops.norm_modulate(x, scale.contiguous()))
    assert torch.equal(ops.norm_modulate(x[:, 0], scale), y[:, 0])


def test_fused_rows_are_not_copied(isa, monkeypatch):
    given = inputs((2, 6, 40))
    fused = torch.cat((given["scale"], given["shift"]), dim=-1)
    scale, shift = fused.chunk(2, dim=-1)
    expected = ops.norm_modulate(given["x"], scale.contiguous(), shift.contiguous())
    real = Tensor.contiguous
    monkeypatch.setattr(
        Tensor, "contiguous", lambda t: pytest.fail("copied") if t.ndim == 2 else real(t)
    )
    assert torch.equal(ops.norm_modulate(given["x"], scale, shift), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token(norm, dtype, isa):
    given = chosen(inputs((2, 5, 70), dtype), None)
    given["x"][1, 3, 69] = math.nan
    got = value_and_gradients(ops.norm_modulate, given, gradient_like(given["x"]), norm=norm)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[1, 3] = True
    for t in (got["y"], got["x"]):
        assert torch.equal(t.isnan().all(-1), bad) and torch.equal(t.isnan().any(-1), bad)
    assert bool(got["scale"][1].isnan().all()) and not bool(got["scale"][0].isnan().any())


def test_large_mean_keeps_the_variance(isa):
    x = inputs((1, 4, 300))["x"] + 4096.0
    zero = torch.zeros(1, 300)
    exact = F.layer_norm(x.double(), (300,), eps=1e-6)
    torch.testing.assert_close(ops.norm_modulate(x, zero).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted):
    given, t0 = inputs((2, 5, 8)), marked((2, 5, 8))
    grad = gradient_like(given["x"])
    expected = value_and_gradients(ops.norm_modulate, given, grad, t0=t0)[wanted]
    leaves = {k: t.detach().requires_grad_(k == wanted) for k, t in given.items()}
    ops.norm_modulate(**leaves, t0=t0).backward(grad)
    assert torch.equal(leaves[wanted].grad, expected)
    assert [k for k, t in leaves.items() if t.grad is not None] == [wanted]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_opcheck(rms, split):
    given = inputs((2, 4, 6), torch.bfloat16)
    t0 = marked((2, 4, 6)) if split else None
    x, scale, shift, scale_t0, shift_t0 = given.values()
    if not split:
        scale_t0 = shift_t0 = None
    for tokens in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        args = (tokens, scale, shift, t0, scale_t0, shift_t0, rms, 1e-6, "", "")
        torch.library.opcheck(torch.ops.qirl.norm_modulate.default, args)
        _, mean, rstd, *_ = torch.ops.qirl.norm_modulate.default(*args)
        for mod, shifted in ((True, True), (True, False), (False, False)):
            torch.library.opcheck(
                torch.ops.qirl.norm_modulate_backward.default,
                (tokens, tokens, mean, rstd, scale, t0, scale_t0, rms, mod, shifted, ""),
            )


def test_compiles_without_graph_break_with_gradient():
    given, t0 = inputs((2, 20, 16)), marked((2, 20, 16))
    grad = gradient_like(given["x"])
    compiled = torch.compile(ops.norm_modulate, fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled, given, grad, t0=t0)
    assert equal(got, value_and_gradients(ops.norm_modulate, given, grad, t0=t0))


def test_under_autocast():
    layer = torch.nn.Linear(8, 12)
    x = inputs((2, 5, 6))["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scale, shift = layer(torch.ones(2, 8)).chunk(2, dim=-1)
        y = ops.norm_modulate(x, scale, shift)
    assert scale.dtype == torch.bfloat16 and y.dtype == torch.float32
    y.sum().backward()
    assert layer.weight.grad is not None and x.grad is not None


X, ROW, T0 = torch.ones(2, 3, 8), torch.ones(2, 8), torch.ones(3, dtype=torch.bool)
BAD = {
    "empty": ((torch.ones(2, 0, 8), ROW), {}, r"norm_modulate: x needs shape .*\(2, 0, 8\)"),
    "ndim": ((torch.ones(2, 3, 4, 8), ROW), {}, r"x needs shape \[B, S, D\] or \[B, D\]"),
    "not a tensor": ((1.0, ROW), {}, r"x must be a tensor; got float"),
    "integers": ((X.int(), ROW), {}, r"x must be float32 or bfloat16; got torch.int32"),
    "float16": ((X.half(), ROW), {}, r"takes torch.float32, torch.bfloat16; got torch.float16"),
    "row shape": ((X, ROW[:1]), {}, r"scale needs one row a sample, shape \(2, 8\); got \(1, 8\)"),
    "row type": ((X, 1.0), {}, r"scale must be a tensor \[B, D\]; got float"),
    "row dtype": ((X, ROW, ROW.long()), {}, r"shift must be float32 or bfloat16; got torch.int64"),
    "row float64": (
        (X, ROW.double()),
        {},
        r"takes torch.float32, torch.bfloat16; got torch.float64",
    ),
    "row device": ((X, ROW.to("meta")), {}, r"scale must be on cpu"),
    "norm": ((X, ROW), {"norm": "batch"}, r"norm must be 'layer' or 'rms'; got 'batch'"),
    "eps": ((X, ROW), {"eps": -1.0}, r"eps must be finite and at least 0; got -1.0"),
    "t0 shape": ((X, ROW), {"t0": T0[:2], "scale_t0": ROW}, r"t0 needs shape \(3,\) or \(2, 3\)"),
    "t0 dtype": ((X, ROW), {"t0": T0.int(), "scale_t0": ROW}, r"t0 must be torch.bool"),
    "t0 type": ((X, ROW), {"t0": [True], "scale_t0": ROW}, r"t0 must be a tensor"),
    "t0 device": ((X, ROW), {"t0": T0.to("meta"), "scale_t0": ROW}, r"t0 must be on cpu"),
    "no scale_t0": ((X, ROW), {"t0": T0}, r"t0 needs scale_t0"),
    "no shift_t0": ((X, ROW, ROW), {"t0": T0, "scale_t0": ROW}, r"t0 needs shift_t0"),
    "no t0": ((X, ROW), {"scale_t0": ROW}, r"scale_t0 came without t0"),
    "no shift": (
        (X, ROW),
        {"t0": T0, "scale_t0": ROW, "shift_t0": ROW},
        r"shift_t0 came without shift",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case):
    args, options, message = BAD[case]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        ops.norm_modulate(*args, **options)
