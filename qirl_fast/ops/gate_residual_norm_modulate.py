"""gate_residual_norm_modulate: the end of one sublayer and the start of the next in one pass.

    out = residual + f(gate) u                 gate_residual, rounded to the dtype of residual
    y   = n(out) (1 + scale) + shift           norm_modulate of the rounded out

Bit for bit the two ops in sequence; see them for shapes, dtypes, norms, t0 and rounding. y and out
have the shape and dtype of residual.
Gradients: the two chained in float32, with d out (from norm_modulate) + dout not rounded between:
    dresidual = rstd (g - mean(g) - xhat mean(g xhat)) + dout,  g = dy (1 + scale)
    du = f(gate) dresidual,  dgate = f'(gate) sum_S dresidual u
    dscale = sum_S dy xhat,  dshift = sum_S dy
Saved: out, the gates and scales, mean and rstd in float32 and, where a gate trains, u. dout may be
absent.
quantize="row" or "block": y is returned in fp8 (e4m3fn) too, made in the same pass: the bits of
fp8_quantize(y, granularity=quantize). Gradients flow through y and out alone.
Source: diffusers, transformer_qwenimage.py and transformer_qwenimage21.py (the block's forward),
which round every intermediate.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import LARGE_DTYPES, REFERENCE_DTYPES
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._norm_checks import (
    as_tokens,
    from_tokens,
    gradient_for,
    require_modulated,
    require_norm,
)
from qirl_fast.ops._norm_cuda import (
    gate_residual_norm_modulate_backward_cuda,
    gate_residual_norm_modulate_cuda,
)
from qirl_fast.ops._norm_reference import (
    norm_gradient,
    normalized,
    rows_of_tokens,
    sums_over_tokens,
)
from qirl_fast.ops._quantized import and_quantized, fp8_outputs, quantized, require_quantize
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.fp8_quantize import Quantized
from qirl_fast.ops.gate_residual import gate_residual_reference
from qirl_fast.ops.norm_modulate import norm_modulate_reference


# ---- reference ----------------------------------------------------------------------------------
def gate_residual_norm_modulate_reference(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    scale_t0: Tensor | None,
    shift_t0: Tensor | None,
    tanh: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, out, mean (empty for RMSNorm) and rstd: the definition."""
    out = gate_residual_reference(residual, u, gate, t0, gate_t0, tanh)
    y, mean, rstd = norm_modulate_reference(out, scale, shift, t0, scale_t0, shift_t0, rms, eps)
    return y, out, mean, rstd


def gate_residual_norm_modulate_backward_reference(
    grad_y: Tensor,
    grad_out: Tensor | None,
    out: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    scale: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    scale_t0: Tensor | None,
    tanh: bool,
    rms: bool,
    want_du: bool,
    want_gate: bool,
    want_mod: bool,
    has_shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dresidual, du, dgate, dgate_t0, dscale, dshift, dscale_t0, dshift_t0; the rows' float32."""
    wide = rstd.dtype
    xhat, dy = normalized(out, mean, rstd, rms), grad_y.to(wide)
    d = norm_gradient(dy * (1 + rows_of_tokens(scale, scale_t0, t0, wide)), xhat, rstd, rms)
    if grad_out is not None:
        d = d + grad_out.to(wide)
    f = rows_of_tokens(gate, gate_t0, t0, wide)
    f = f.tanh() if tanh else f
    du = (f * d).to(u.dtype) if want_du else u.new_empty(0)
    gates = mods = shifts = (rstd.new_empty(0), rstd.new_empty(0))
    if want_gate:
        slope = 1 - f.square() if tanh else torch.ones_like(f)
        gates = sums_over_tokens(slope * d * u.to(wide), t0, rstd)
    if want_mod:
        mods = sums_over_tokens(dy * xhat, t0, rstd)
    if want_mod and has_shift:
        shifts = sums_over_tokens(dy, t0, rstd)
    sums = (*gates, mods[0], shifts[0], mods[1], shifts[1])
    a, b, c, e, g, h = (t if t.numel() else t.new_empty(0) for t in sums)  # results may not alias
    return d.to(out.dtype), du, a, b, c, e, g, h


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "gate_residual_norm_modulate",
    {
        "reference": Backend(
            and_quantized(gate_residual_norm_modulate_reference), ("cpu", "cuda"), REFERENCE_DTYPES
        ),
        "cpu": Backend(cpu_launcher("gate_residual_norm_modulate"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("gate_residual_norm_modulate", "gate_residual_norm_modulate"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(gate_residual_norm_modulate_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "gate_residual_norm_modulate_backward",
    {
        "reference": Backend(
            gate_residual_norm_modulate_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES
        ),
        "cpu": Backend(
            cpu_launcher("gate_residual_norm_modulate_backward"), ("cpu",), LARGE_DTYPES
        ),
        "triton": Backend(
            triton_launcher("gate_residual_norm_modulate", "gate_residual_norm_modulate_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(
            gate_residual_norm_modulate_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda
        ),
    },
    _DEFAULT,
)


def _fake(residual: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rms, _, quantize = args[-3:]
    stats = torch.promote_types(residual.dtype, torch.float32)
    rstd = residual.new_empty(residual.shape[:-1], dtype=stats)
    y, out = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    return y, out, rstd.new_empty(0 if rms else rstd.shape), rstd, *fp8_outputs(y, quantize)


def _backward_fake(grad_y: Tensor, grad_out: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    out, u, _, rstd, gate, _, t0, *_ = args
    want_du, want_gate, want_mod, has_shift = args[-4:]
    split = t0 is not None

    def sums(wanted: bool) -> Tensor:
        return rstd.new_empty(gate.shape if wanted else 0)

    return (
        out.new_empty(out.shape),
        u.new_empty(u.shape if want_du else 0),
        sums(want_gate),
        sums(want_gate and split),
        sums(want_mod),
        sums(want_mod and has_shift),
        sums(want_mod and split),
        sums(want_mod and has_shift and split),
    )


_forward = OP.register(
    "(Tensor residual, Tensor u, Tensor gate, Tensor scale, Tensor? shift, Tensor? t0,"
    " Tensor? gate_t0, Tensor? scale_t0, Tensor? shift_t0, bool tanh, bool rms, float eps,"
    " str quantize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    (0, 1, 2, 3, 4, 6, 7, 8),
)
_backward = OP_BACKWARD.register(
    "(Tensor grad_y, Tensor? grad_out, Tensor out, Tensor u, Tensor mean, Tensor rstd, Tensor gate,"
    " Tensor scale, Tensor? t0, Tensor? gate_t0, Tensor? scale_t0, bool tanh, bool rms,"
    " bool want_du, bool want_gate, bool want_mod, bool has_shift)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    (0, 1, 2, 3, 6, 7, 9, 10),
)


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, trains_gate = args
        _, u, gate, scale, shift, t0, gate_t0, scale_t0, shift_t0, *options, backend = inputs
        tanh, rms, *_ = options
        y, out, mean, rstd, *fp8 = _forward(*inputs)
        kept_u = u if trains_gate else None  # the gate's gradient alone reads it
        ctx.save_for_backward(out, kept_u, mean, rstd, gate, scale, t0, gate_t0, scale_t0)
        ctx.options, ctx.backend, ctx.u_dtype = (tanh, rms), backend, u.dtype
        rows = (gate, gate_t0, scale, shift, scale_t0, shift_t0)
        ctx.dtypes = [None if t is None else t.dtype for t in rows]
        ctx.mark_non_differentiable(*fp8)
        ctx.set_materialize_grads(False)
        return y, out, *fp8

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_out: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        out, u, *saved = ctx.saved_tensors  # once: checkpointing allows no second reading
        if grad_y is None and grad_out is None:
            return (None,) * len(needs)
        if u is None:
            u = out.new_empty(out.shape, dtype=ctx.u_dtype)  # for its shape; never read
        want_shift = needs[4] or needs[8]
        dresidual, du, *sums = _backward(
            out.new_zeros(out.shape) if grad_y is None else grad_y,
            grad_out,
            out,
            u,
            *saved,
            *ctx.options,
            needs[1],
            needs[2] or needs[6],
            needs[3] or needs[7] or want_shift,
            want_shift,
            ctx.backend,
        )
        dgate, dgate_t0, dscale, dshift, dscale_t0, dshift_t0 = (
            gradient_for(t, dtype) for t, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        du = du if needs[1] else None
        rows = (dgate, dscale, dshift, None, dgate_t0, dscale_t0, dshift_t0)
        return dresidual, du, *rows, *[None] * 6


# ---- public -------------------------------------------------------------------------------------
@overload
def gate_residual_norm_modulate(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    tanh: bool = False,
    t0: Tensor | None = None,
    gate_t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def gate_residual_norm_modulate(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    tanh: bool = False,
    t0: Tensor | None = None,
    gate_t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: str,
) -> tuple[Quantized, Tensor]: ...
def gate_residual_norm_modulate(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    tanh: bool = False,
    t0: Tensor | None = None,
    gate_t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: str | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """(y, out): out = residual + f(gate) u and y = n(out) (1 + scale) + shift.

    residual, u: [B, S, D] or [B, D], float32 or bfloat16 each; y and out are as residual.
    gate, scale, shift: [B, D], float32 or bfloat16 each; no shift is a shift of 0.
    norm: 'layer' or 'rms'. eps: finite and >= 0. tanh: pass the gate through tanh.
    t0: bool [S] or [B, S]; True tokens take gate_t0, scale_t0 and shift_t0 [B, D] instead.
    quantize: "row" or "block" returns (Quantized(y, q, scale), out): q float8_e4m3fn in y's shape,
        scale float32 [..., 1] or [..., ceil(D / 128)].
    Raises ValueError for shapes, dtypes, devices or names outside this.
    """
    op = "gate_residual_norm_modulate"
    firsts = {"gate": gate, "scale": scale, "shift": shift}
    at_t0 = {"gate_t0": gate_t0, "scale_t0": scale_t0, "shift_t0": shift_t0}
    t0 = require_modulated(op, {"residual": residual, "u": u}, firsts, t0, at_t0)
    require_norm(op, norm, eps)
    rows = (gate, scale, shift, t0, gate_t0, scale_t0, shift_t0)
    granularity = require_quantize(op, quantize)
    options = (tanh, norm == "rms", eps, granularity, forced_backend())
    args = (as_tokens(residual), as_tokens(u), *rows, *options)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (residual, u, *rows)
    ):
        trains_gate = any(t is not None and t.requires_grad for t in (gate, gate_t0))
        y, out, q, q_scale = _GateResidualNormModulate.apply(*args, trains_gate)
    else:
        y, out, _, _, q, q_scale = _forward(*args)
    y, out = from_tokens(y, residual), from_tokens(out, residual)
    return (quantized(y, q, q_scale) if granularity else y), out
