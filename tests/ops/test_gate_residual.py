"""gate_residual and gate_residual_norm_modulate: values and gradients against float64, diffusers'
own code, the two ops in sequence, all that must not matter, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qirl_fast import _cpu, ops

SHAPES = [(1, 1, 2), (2, 5, 33), (2, 70, 100), (1, 130, 64), (3, 4, 3072)]
DTYPES = [torch.float32, torch.bfloat16]
SEEDS = 4  # taken together: the error of one small tensor is a matter of luck
MODES = [("layer", False), ("rms", True)]  # norm and tanh, as the two models pair them
GATED = ("residual", "u", "gate", "gate_t0")
NAMES = (*GATED, "scale", "shift", "scale_t0", "shift_t0")


def inputs(shape, dtype=torch.float32, rows=None, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = dtype if rows is None else rows
    made = {k: torch.randn(shape, generator=g).to(dtype) for k in NAMES[:2]}
    for name in NAMES[2:]:
        made[name] = torch.randn(shape[0], shape[-1], generator=g).to(rows)
    return made


def marked(shape) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) > 0.6


def gradients_like(x: Tensor) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=g).to(x.dtype) for _ in range(2)]


def tokens(row, row_t0, t0):
    row = row.unsqueeze(1)
    return row if t0 is None else torch.where(t0.unsqueeze(-1), row_t0.unsqueeze(1), row)


def gate_formula(residual, u, gate, gate_t0=None, *, tanh=False, t0=None):
    """As diffusers writes it."""
    f = tokens(gate, gate_t0, t0)
    return (residual + (f.tanh() if tanh else f) * u).to(residual.dtype)


def fused_formula(
    residual, u, gate, scale, shift, gate_t0=None, scale_t0=None, shift_t0=None, *, norm, tanh, t0
):
    out = gate_formula(residual, u, gate, gate_t0, tanh=tanh, t0=t0)
    n = F.layer_norm if norm == "layer" else F.rms_norm
    y = n(out, out.shape[-1:], eps=1e-6) * (1 + tokens(scale, scale_t0, t0))
    return (y + tokens(shift, shift_t0, t0)).to(out.dtype), out


def results(function, given, grads, **options) -> dict[str, Tensor]:
    """Outputs and the gradient to each input, by name."""
    leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given_grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)]
    found = torch.autograd.grad(outputs, list(leaves.values()), given_grads)
    values = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return {**values, **dict(zip(leaves, found, strict=True))}


def chosen(given, op, t0) -> dict[str, Tensor]:
    names = GATED if op == "gate" else NAMES
    return {k: given[k] for k in names if t0 is not None or "t0" not in k}


def call_of(op, norm, tanh, t0):
    """Function, eager formula and options of one op."""
    if op == "gate":
        return ops.gate_residual, gate_formula, {"tanh": tanh, "t0": t0}
    options = {"norm": norm, "tanh": tanh, "t0": t0}
    return ops.gate_residual_norm_modulate, fused_formula, options


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("op", ["gate", "fused"])
def test_values_and_gradients_match_float64(op, shape, dtype, mode, split, isa, poisoned, no_worse):
    t0 = marked(shape) if split else None
    ours, eager, options = call_of(op, *mode, t0)
    runs = []
    for seed in range(max(SEEDS, 512 // math.prod(shape))):
        given = chosen(inputs(shape, dtype, seed=seed), op, t0)
        grads = gradients_like(given["u"])
        got = results(ours, given, grads, **options)
        assert _cpu.last_isa() == isa
        same = results(eager, given, grads, **options)
        wide = {k: t.double() for k, t in given.items()}
        runs.append((got, same, results(eager, wide, [g.double() for g in grads], **options)))
    for name in runs[0][0]:
        got, same, exact = (torch.stack([r[k][name] for r in runs]) for k in range(3))
        assert got.dtype == dtype
        no_worse(got, same, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("u", DTYPES)
@pytest.mark.parametrize("rows", DTYPES)
def test_fused_is_the_two_in_sequence_whatever_the_dtypes(x, u, rows, mode, split, isa):
    t0 = marked((2, 70, 99)) if split else None
    given = chosen(inputs((2, 70, 99), torch.float32, rows), "fused", t0)
    given["residual"], given["u"] = given["residual"].to(x), given["u"].to(u)
    grads = gradients_like(given["residual"])
    norm, tanh = mode

    def sequence(scale, shift, scale_t0=None, shift_t0=None, **gated):
        out = ops.gate_residual(**gated, tanh=tanh, t0=t0)
        rows_t0 = {"scale_t0": scale_t0, "shift_t0": shift_t0}
        return ops.norm_modulate(out, scale, shift, norm=norm, t0=t0, **rows_t0), out

    function, _, options = call_of("fused", norm, tanh, t0)
    got, expected = results(function, given, grads, **options), results(sequence, given, grads)
    for name, value in got.items():
        assert value.dtype == expected[name].dtype
        if name.startswith("output") or "scale" in name or "shift" in name:
            assert torch.equal(value, expected[name])
        else:  # the sequence rounds the gradient between the two
            wide, truth = value.float(), expected[name].float()
            assert float((wide - truth).norm()) <= 2e-2 * float(truth.norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["gate", "fused"])
def test_float64_gradients_of_the_reference(op, mode):
    t0 = marked((2, 5, 4))
    function, eager, options = call_of(op, *mode, t0)
    given = {k: t.double() for k, t in chosen(inputs((2, 5, 4)), op, t0).items()}
    grads = gradients_like(given["u"])
    with ops.use_backend("reference"):
        got = results(function, given, grads, **options)
    expected = results(eager, given, grads, **options)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)


def test_equals_the_modules_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.transformers import transformer_qwenimage as image
    from diffusers.models.transformers import transformer_qwenimage21 as image21

    torch.manual_seed(0)
    residual, u, index = torch.randn(2, 9, 24), torch.randn(2, 9, 24), torch.arange(9) > 5
    mod1, mod2 = torch.randn(4, 72), torch.randn(4, 72)
    block = image.QwenImageTransformerBlock(24, 2, 12)
    positions = index.long().expand(2, 9)
    _, gate = block._modulate(residual, mod1, positions)
    out = residual + gate * u
    expected, _ = block._modulate(block.img_norm2(out), mod2, positions)
    shift, scale, _ = mod2.chunk(3, dim=-1)
    gates = mod1.chunk(3, dim=-1)[2]
    y, got = ops.gate_residual_norm_modulate(
        residual, u, gates[:2], scale[:2], shift[:2], t0=index,
        gate_t0=gates[2:], scale_t0=scale[2:], shift_t0=shift[2:],
    )  # fmt: skip
    torch.testing.assert_close(got, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    rows = torch.randn(3, 24)  # the last one is for t = 0
    expected = residual + image21._select_modulation_rows(rows, ~index).tanh() * u
    zero = rows[2:].expand(2, 24)
    got = ops.gate_residual(residual, u, rows[:2], tanh=True, t0=index, gate_t0=zero)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["gate", "fused"])
def test_bits_do_not_depend_on_batch_threads_run_or_isa(op, mode, dtype, threads):
    shape = (3, 150, 203)
    t0 = marked(shape)
    function, _, options = call_of(op, *mode, t0)
    given = chosen(inputs(shape, dtype), op, t0)
    grads = gradients_like(given["u"])
    with threads(1):
        expected = results(function, given, grads, **options)
    one = {k: t[1:2] for k, t in given.items()}
    for name in _cpu.available_isas():
        _cpu.force_isa(name)
        for count in (1, 2, 3):
            with threads(count):
                assert equal(results(function, given, grads, **options), expected)
        alone = results(function, one, [g[1:2] for g in grads], **{**options, "t0": t0[1:2]})
        assert equal(alone, {k: t[1:2] for k, t in expected.items()})
        _cpu.unforce_isa()


@pytest.mark.parametrize("op", ["gate", "fused"])
def test_large_output_is_streamed_and_equal(op, isa):
    function, _, options = call_of(op, "layer", False, None)
    given = chosen(inputs((2, 1100, 2048)), op, None)
    grads = gradients_like(given["u"])
    expected = results(function, given, grads, **options)
    alone = results(function, {k: t[1:2] for k, t in given.items()}, [g[1:2] for g in grads])
    assert equal(alone, {k: t[1:2] for k, t in expected.items()})


@pytest.mark.parametrize("op", ["gate", "fused"])
def test_layouts(op, isa):
    t0 = torch.arange(6) > 3
    function, _, options = call_of(op, "layer", True, t0)
    given = chosen(inputs((3, 6, 40)), op, t0)
    grads = gradients_like(given["u"])
    expected = results(function, given, grads, **{**options, "t0": t0.expand(3, 6).contiguous()})
    rows = [k for k in given if k not in ("residual", "u")]
    fused = torch.cat([given[k] for k in rows], dim=-1).chunk(len(rows), dim=-1)
    views = dict(zip(rows, fused, strict=True))
    for k in ("residual", "u"):
        views[k] = given[k].transpose(1, 2).contiguous().transpose(1, 2)
    assert equal(results(function, {k: views[k] for k in given}, grads, **options), expected)


def test_one_token_and_expanded_rows(isa):
    given = inputs((3, 1, 40))
    r, u, gate, scale = (given[k] for k in ("residual", "u", "gate", "scale"))
    row = gate[:1].expand(3, 40)
    out = ops.gate_residual(r, u, row)
    assert torch.equal(out, ops.gate_residual(r, u, row.contiguous()))
    assert torch.equal(ops.gate_residual(r[:, 0], u[:, 0], row), out[:, 0])
    y, out = ops.gate_residual_norm_modulate(r, u, gate, scale)
    flat = ops.gate_residual_norm_modulate(r[:, 0], u[:, 0], gate, scale)
    assert torch.equal(flat[0], y[:, 0]) and torch.equal(flat[1], out[:, 0])


def test_the_gradient_to_the_residual_is_not_copied():
    given = chosen(inputs((2, 5, 8)), "gate", None)
    leaf = given.pop("residual").requires_grad_()
    grad = gradients_like(leaf)[0]
    (found,) = torch.autograd.grad(ops.gate_residual(leaf, **given), leaf, grad)
    assert found.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token(dtype, isa):
    given = chosen(inputs((2, 5, 70), dtype), "fused", None)
    given["u"][1, 3, 69] = math.nan
    function, _, options = call_of("fused", "layer", True, None)
    got = results(function, given, gradients_like(given["u"]), **options)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[1, 3] = True
    for name in ("output 0", "u", "residual"):
        assert torch.equal(got[name].isnan().all(-1), bad)
        assert torch.equal(got[name].isnan().any(-1), bad)
    assert int(got["output 1"].isnan().sum()) == 1


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_output_takes_part(which):
    given = chosen(inputs((2, 5, 8)), "fused", None)
    leaves = {k: t.requires_grad_() for k, t in given.items()}
    ops.gate_residual_norm_modulate(**leaves)[which].sum().backward()
    got = {k: t.grad.clone() for k, t in leaves.items()}
    outputs = fused_formula(**leaves, norm="layer", tanh=False, t0=None)
    expected = torch.autograd.grad(outputs[which].sum(), list(leaves.values()), allow_unused=True)
    for value, exact in zip(got.values(), expected, strict=True):
        exact = torch.zeros_like(value) if exact is None else exact
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["gate", "fused"])
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(op, wanted):
    t0 = marked((2, 5, 8))
    function, _, options = call_of(op, "layer", True, t0)
    given = chosen(inputs((2, 5, 8)), op, t0)
    if wanted not in given:
        return
    grads = gradients_like(given["u"])
    expected = results(function, given, grads, **options)[wanted]
    leaves = {k: t.detach().requires_grad_(k == wanted) for k, t in given.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [o for o in outputs if o.requires_grad]
    torch.autograd.backward(outputs, grads[: len(outputs)])
    assert torch.equal(leaves[wanted].grad, expected)
    assert [k for k, t in leaves.items() if t.grad is not None] == [wanted]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("op", ["gate", "fused"])
def test_a_frozen_gate_keeps_no_branch(op, split, backend):
    """u is for the gate's gradient alone: it is not saved, and what stands for it is not read."""
    given = chosen(inputs((2, 9, 64)), op, marked((2, 9, 64)) if split else None)
    t0 = marked((2, 9, 64)) if split else None
    options = {"t0": t0, "tanh": True} | ({"norm": "rms"} if op == "fused" else {})
    function = ops.gate_residual if op == "gate" else ops.gate_residual_norm_modulate
    found, kept = {}, {}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for gate in (True, False):
            leaves = {
                k: t.clone().requires_grad_(gate or not k.startswith("gate"))
                for k, t in given.items()
            }
            u, saved = leaves["u"], []
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, to=saved: to.append(t.data_ptr()) or t, lambda t: t
            )
            with hooks, ops.use_backend(backend):
                y = function(**leaves, **options)
                y = y[0] if op == "fused" else y
                named = {k: t for k, t in leaves.items() if t.requires_grad}
                names = [k for k in named if not k.startswith("gate")]
                gradients = torch.autograd.grad(y.square().sum(), [named[k] for k in names])
            found[gate] = dict(zip(names, gradients, strict=True))
            kept[gate] = u.data_ptr() in saved
    finally:
        torch.use_deterministic_algorithms(False)
    assert kept == {True: True, False: False}
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[True].items():
        assert torch.equal(found[False][name], gradient), name


@pytest.mark.parametrize("split", [False, True])
def test_opcheck(split):
    given = inputs((2, 4, 6), torch.bfloat16)
    t0 = marked((2, 4, 6)) if split else None
    r, u, gate, gate_t0, scale, shift, scale_t0, shift_t0 = given.values()
    if not split:
        gate_t0 = scale_t0 = shift_t0 = None
    check, q = torch.library.opcheck, torch.ops.qirl
    r = r.transpose(1, 2).contiguous().transpose(1, 2)
    check(q.gate_residual.default, (r, u, gate, t0, gate_t0, True, ""))
    for du, dgate in ((True, True), (True, False), (False, True)):
        check(q.gate_residual_backward.default, (r, u, gate, t0, gate_t0, True, du, dgate, ""))
    rows = (gate, scale, shift, t0, gate_t0, scale_t0, shift_t0)
    args = (r, u, *rows, True, not split, 1e-6, "", "")
    check(q.gate_residual_norm_modulate.default, args)
    y, out, mean, rstd, *_ = q.gate_residual_norm_modulate.default(*args)
    saved = (out, u, mean, rstd, gate, scale, t0, gate_t0, scale_t0, True, not split)
    for wants in ((True, True, True, True), (False, False, False, False)):
        for dout in (r, None):
            check(q.gate_residual_norm_modulate_backward.default, (y, dout, *saved, *wants, ""))


@pytest.mark.parametrize("op", ["gate", "fused"])
def test_compiles_without_graph_break_with_gradient(op):
    t0 = marked((2, 20, 16))
    function, _, options = call_of(op, "rms", True, t0)
    given = chosen(inputs((2, 20, 16)), op, t0)
    grads = gradients_like(given["u"])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = results(compiled, given, grads, **options)
    assert equal(got, results(function, given, grads, **options))


def test_under_autocast():
    layer = torch.nn.Linear(8, 6)
    residual = inputs((2, 5, 6))["residual"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        gate, u = layer(torch.ones(2, 8)), layer(torch.ones(2, 5, 8))
        y, out = ops.gate_residual_norm_modulate(residual, u, gate, gate)
    assert u.dtype == torch.bfloat16 and y.dtype == out.dtype == torch.float32
    (y.sum() + out.sum()).backward()
    assert layer.weight.grad is not None and residual.grad is not None


X, ROW, T0 = torch.ones(2, 3, 8), torch.ones(2, 8), torch.ones(3, dtype=torch.bool)
BAD = {
    "empty": ((torch.ones(0, 3, 8), X, ROW), {}, r"residual needs shape .*got \(0, 3, 8\)"),
    "u shape": ((X, X[:, :2], ROW), {}, r"u must have the shape of residual, \(2, 3, 8\)"),
    "u type": ((X, 2.0, ROW), {}, r"u must be a tensor; got float"),
    "u dtype": ((X, X.half(), ROW), {}, r"takes torch.float32, torch.bfloat16; got torch.float16"),
    "u device": ((X, X.to("meta"), ROW), {}, r"u must be on the device of residual"),
    "gate": ((X, X, ROW[:, :7]), {}, r"gate needs one row a sample, shape \(2, 8\); got \(2, 7\)"),
    "no gate_t0": ((X, X, ROW), {"t0": T0}, r"t0 needs gate_t0"),
    "no t0": ((X, X, ROW), {"gate_t0": ROW}, r"gate_t0 came without t0"),
    "t0": ((X, X, ROW), {"t0": T0.float(), "gate_t0": ROW}, r"t0 must be torch.bool"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_what_came_and_what_is_wanted(case, fused):
    args, options, message = BAD[case]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        if fused:
            scale_t0 = {"scale_t0": ROW} if "t0" in options else {}
            ops.gate_residual_norm_modulate(*args, ROW, **options, **scale_t0)
        else:
            ops.gate_residual(*args, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, r"norm must be 'layer' or 'rms'"),
        ({"eps": math.nan}, r"eps must be finite"),
        ({"shift": ROW, "t0": T0, "gate_t0": ROW, "scale_t0": ROW}, r"t0 needs shift_t0"),
        ({"scale": ROW[:1]}, r"scale needs one row a sample"),
    ],
)
def test_bad_norm_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ops.gate_residual_norm_modulate(X, X, **{"gate": ROW, "scale": ROW, **options})
