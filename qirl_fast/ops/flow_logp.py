"""flow_logp: the log-probability of a stored step under a policy's velocity, with its gradient.

    mean = a x + c v + delta,  r = x' - mean
    logp = mean over the N elements of a row of (-w r^2) - b
    d logp / d v = 2 w c r / N,   d logp / d x = 2 w a r / N

On the inputs of a flow_step and its x', the result is bitwise what flow_step returned (with the
same backend): before the first update the policy ratio is exactly 1.

Shapes: x, x_next, v, delta [B, ...]; a, c, w, b, logp [B].
Dtypes: x and x_next float32 or bfloat16, alike; v and delta float32 or bfloat16 each; coefficients
and logp float32. Products and sums are rounded to float32 one by one, never contracted; squares are
added in blocks of 1024 elements in float32, the blocks in float64. Gradients come in the dtype of
their tensor. With gradient r is kept for it, in float32, and x, x' and v are not.
Source: Flow-GRPO (arXiv 2505.05470), sde_step_with_logprob(prev_sample=...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast import _cpu
from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    given,
    require_finite,
    require_no_grad,
    require_operands,
)
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._flow_cuda import flow_logp_backward_cuda, flow_logp_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend


# ---- reference ----------------------------------------------------------------------------------
def flow_logp_reference(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor,
    delta: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 x): (logp, r); r is empty unless kept."""
    if x.device.type == "cpu":
        for name, value in (("a", a), ("c", c), ("w", w), ("b", b)):
            require_finite("flow_logp", name, value)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = a.to(wide)[:, None] * x.flatten(1).to(wide) + c.to(wide)[:, None] * v.flatten(1).to(wide)
    if delta is not None:
        mean = mean + delta.flatten(1).to(wide)
    r = x_next.flatten(1).to(wide) - mean
    logp = 0.0 - w.to(wide) * r.square().mean(dim=1) - b.to(wide)
    return logp, r.reshape(x.shape) if keep else r.new_empty(0)


def flow_logp_backward_reference(
    grad: Tensor,
    residual: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    x_dtype: torch.dtype | None,
    v_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(dx, dv) for grad [B] in these dtypes; of None an empty tensor."""
    r = residual.flatten(1)
    slope = (2.0 / r.shape[1]) * (grad * w).to(r.dtype)[:, None] * r

    def scaled(coefficient: Tensor, dtype: torch.dtype | None) -> Tensor:
        if dtype is None:
            return r.new_empty(0)
        return (slope * coefficient.to(r.dtype)[:, None]).to(dtype).reshape(residual.shape)

    return scaled(a, x_dtype), scaled(c, v_dtype)


# ---- cpu ----------------------------------------------------------------------------------------
_DTYPE_CODE = {None: -1, torch.float32: 0, torch.bfloat16: 1}  # enum Dtype of csrc/cpu/dtype.h


def flow_logp_cpu(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor,
    delta: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """C++ kernel, csrc/cpu/flow_logp.inl.cpp."""
    return _cpu.flow_logp(x, x_next, v, delta, a, c, w, b, keep, torch.get_num_threads())


def flow_logp_backward_cpu(
    grad: Tensor,
    residual: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    x_dtype: torch.dtype | None,
    v_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """C++ kernel, csrc/cpu/flow_logp.inl.cpp."""
    codes = _DTYPE_CODE[x_dtype], _DTYPE_CODE[v_dtype]
    return _cpu.flow_logp_backward(grad, residual, a, c, w, *codes, torch.get_num_threads())


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "flow_logp",
    {
        "reference": Backend(flow_logp_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(flow_logp_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("flow_step", "flow_logp"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(flow_logp_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "flow_logp_backward",
    {
        "reference": Backend(flow_logp_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(flow_logp_backward_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("flow_step", "flow_logp_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(flow_logp_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    keep = rest[-1]
    return x.new_empty(x.shape[:1], dtype=wide), x.new_empty(x.shape if keep else 0, dtype=wide)


def _backward_fake(grad: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    x_dtype, v_dtype = rest[-2:]
    return (
        residual.new_empty(0 if x_dtype is None else residual.shape, dtype=x_dtype),
        residual.new_empty(0 if v_dtype is None else residual.shape, dtype=v_dtype),
    )


_flow_logp = OP.register(
    "(Tensor x, Tensor x_next, Tensor v, Tensor a, Tensor c, Tensor w, Tensor b, Tensor? delta,"
    " bool keep) -> (Tensor, Tensor)",
    _fake,
    large=(0, 2, 7),
)
_flow_logp_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor residual, Tensor a, Tensor c, Tensor w, ScalarType? x_dtype,"
    " ScalarType? v_dtype) -> (Tensor, Tensor)",
    _backward_fake,
    large=(1,),
)


class _FlowLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_next: Tensor,
        v: Tensor,
        a: Tensor,
        c: Tensor,
        w: Tensor,
        b: Tensor,
        delta: Tensor | None,
        backend: str,
    ) -> Tensor:
        logp, residual = _flow_logp(x, x_next, v, a, c, w, b, delta, True, backend)
        ctx.save_for_backward(residual, a, c, w)
        ctx.dtypes, ctx.backend = (x.dtype, v.dtype), backend
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dtypes = (d if want else None for d, want in zip(ctx.dtypes, wanted, strict=True))
        dx, dv = _flow_logp_backward(grad, *ctx.saved_tensors, *dtypes, ctx.backend)
        no_more = (None,) * 6
        return dx if wanted[0] else None, None, dv if wanted[1] else None, *no_more


# ---- public -------------------------------------------------------------------------------------
def flow_logp(
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    delta: Tensor | None = None,
) -> Tensor:
    """Log-probability [B] of the stored step x -> x_next; differentiable in v and x.

    x, x_next, v, delta: [B, ...] of one shape and device, x_next in the dtype of x.
    a, c, w, b: float32 [B], finite.
    x_next, delta and the coefficients are constants: ValueError if one of them requires grad.
    Raises ValueError for shapes, dtypes, devices or values outside this (on CUDA, values are not
    read: a non-finite coefficient gives non-finite results).
    """
    require_operands(
        "flow_logp",
        {"x": x, "x_next": x_next},
        like={"v": v, **given(delta=delta)},
        per_row={"a": a, "c": c, "w": w, "b": b},
    )
    backend = forced_backend()
    if torch.is_grad_enabled():
        require_no_grad(
            "flow_logp", "is a constant here", x_next=x_next, delta=delta, a=a, c=c, w=w, b=b
        )
        if x.requires_grad or v.requires_grad:
            return _FlowLogp.apply(x, x_next, v, a, c, w, b, delta, backend)
    return _flow_logp(x, x_next, v, a, c, w, b, delta, False, backend)[0]
