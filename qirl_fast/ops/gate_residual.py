"""gate_residual: a branch added to the residual stream under a gate.

    out = residual + f(gate) u          f(gate) = gate, or tanh(gate) with tanh=True

Shapes: residual, u, out [B, S, D] or [B, D] (one token); gate [B, D] with any row stride. t0 [S]
or [B, S] bool: the tokens it marks take gate_t0 [B, D].
Dtypes: residual, u and the gates float32 or bfloat16, each its own; computed in float32 and rounded
once to the dtype of residual.
Gradients: dresidual = dout itself (no copy), du = f(gate) dout, and
    dgate = f'(gate) sum_S dout u       over the tokens that take the row, f' = 1 - tanh(gate)^2
in chunks of 32 tokens (CPU) or 16 (GPU) of one sample in float32, then the chunks in order. Saved:
the gates and, where a gate trains, u.
Source: diffusers, transformer_qwenimage.py and transformer_qwenimage21.py (tanh), which round
tanh(gate) and the product to the storage dtype; here there is one rounding.
"""

from __future__ import annotations

from typing import Any

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
)
from qirl_fast.ops._norm_cuda import (
    gate_residual_backward_cuda,
    gate_residual_cuda,
)
from qirl_fast.ops._norm_reference import rows_of_tokens, sums_over_tokens, widened
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend


# ---- reference ----------------------------------------------------------------------------------
def gate_residual_reference(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = widened(residual, u)
    f = rows_of_tokens(gate, gate_t0, t0, wide)
    return (residual.to(wide) + (f.tanh() if tanh else f) * u.to(wide)).to(residual.dtype)


def gate_residual_backward_reference(
    grad: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
    want_du: bool,
    want_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dgate and dgate_t0 (float32); empty where not wanted or absent."""
    wide = widened(grad, u)
    dout, f = grad.to(wide), rows_of_tokens(gate, gate_t0, t0, wide)
    du, dgate, dgate_t0 = u.new_empty(0), *(u.new_empty(0, dtype=wide) for _ in range(2))
    if want_du:
        du = ((f.tanh() if tanh else f) * dout).to(u.dtype)
    if want_dgate:
        dgate, dgate_t0 = sums_over_tokens(dout * u.to(wide), t0, dout)
        if tanh:
            dgate = dgate * (1 - gate.to(wide).tanh().square())
        if tanh and gate_t0 is not None:
            dgate_t0 = dgate_t0 * (1 - gate_t0.to(wide).tanh().square())
    return du, dgate, dgate_t0


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "gate_residual",
    {
        "reference": Backend(gate_residual_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("gate_residual"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("gate_residual", "gate_residual"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(gate_residual_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "gate_residual_backward",
    {
        "reference": Backend(gate_residual_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("gate_residual_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("gate_residual", "gate_residual_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(gate_residual_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(residual: Tensor, *_: object) -> Tensor:
    return residual.new_empty(residual.shape)


def _backward_fake(
    grad: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
    want_du: bool,
    want_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widened(grad, u)
    return (
        u.new_empty(u.shape if want_du else 0),
        u.new_empty(gate.shape if want_dgate else 0, dtype=wide),
        u.new_empty(gate.shape if want_dgate and t0 is not None else 0, dtype=wide),
    )


_gate_residual = OP.register(
    "(Tensor residual, Tensor u, Tensor gate, Tensor? t0, Tensor? gate_t0, bool tanh) -> Tensor",
    _fake,
    (0, 1, 2, 4),
)
_gate_residual_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor u, Tensor gate, Tensor? t0, Tensor? gate_t0, bool tanh, bool want_du,"
    " bool want_dgate) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    (0, 1, 2, 4),
)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        u: Tensor,
        gate: Tensor,
        t0: Tensor | None,
        gate_t0: Tensor | None,
        tanh: bool,
        backend: str,
        trains_gate: bool,
    ) -> Tensor:
        # The gate's gradient alone reads u.
        ctx.save_for_backward(u if trains_gate else None, gate, t0, gate_t0)
        ctx.tanh, ctx.backend, ctx.u_dtype = tanh, backend, u.dtype
        return _gate_residual(residual, u, gate, t0, gate_t0, tanh, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, gate, t0, gate_t0 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if u is None:
            u = grad.new_empty(grad.shape, dtype=ctx.u_dtype)  # for its shape; never read
        du = dgate = dgate_t0 = None
        if needs[1] or needs[2] or needs[4]:
            du, dgate, dgate_t0 = _gate_residual_backward(
                grad, u, gate, t0, gate_t0, ctx.tanh, needs[1], needs[2] or needs[4], ctx.backend
            )
            dgate = gradient_for(dgate, gate.dtype)
            dgate_t0 = gradient_for(dgate_t0, None if gate_t0 is None else gate_t0.dtype)
        return grad, du if needs[1] else None, dgate, None, dgate_t0, None, None, None


# ---- public -------------------------------------------------------------------------------------
def gate_residual(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    *,
    tanh: bool = False,
    t0: Tensor | None = None,
    gate_t0: Tensor | None = None,
) -> Tensor:
    """residual + f(gate) u, in the shape and dtype of residual; see the module docstring.

    residual, u: [B, S, D] or [B, D], float32 or bfloat16 each.
    gate: [B, D], float32 or bfloat16. tanh: pass the gate through tanh.
    t0: bool [S] or [B, S]; True tokens take gate_t0 [B, D] instead.
    Raises ValueError for shapes, dtypes or devices outside this.
    """
    op = "gate_residual"
    large = {"residual": residual, "u": u}
    t0 = require_modulated(op, large, {"gate": gate}, t0, {"gate_t0": gate_t0})
    args = (as_tokens(residual), as_tokens(u), gate, t0, gate_t0, tanh)
    backend = forced_backend()
    rows = (residual, u, gate, gate_t0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in rows):
        trains_gate = any(t is not None and t.requires_grad for t in (gate, gate_t0))
        out = _GateResidual.apply(*args, backend, trains_gate)
    else:
        out = _gate_residual(*args, backend)
    return from_tokens(out, residual)
