"""guide: classifier-free guidance, optionally rescaled to the norm of the conditional velocity.

    g = v_u + w (v_c - v_u)                  w = scale, one value a row
    v = g                                    rescale=False (Qwen-Image-2.1)
    v = g |v_c| / |g|, 0 where |g| = 0       rescale=True (Qwen-Image), over the last dimension

Shapes: v_cond, v_uncond, v [B, ...] (with rescale at least [B, D]); scale float or float32 [B].
Dtypes: float32 or bfloat16, both velocities alike; computed in float32 and rounded once.
Gradients: to v_cond and v_uncond, not to scale.
Sums: over a token, in float32; cpu and cuda in one order and with one result, triton in its own.
Source: diffusers, pipeline_qwenimage.py (true CFG). It rounds each intermediate to the storage
dtype and yields NaN where |g| = 0; here there is one rounding and the factor is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from qirl_fast import _cpu
from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    require_finite,
    require_no_grad,
    require_operands,
)
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._guide_cuda import guide_backward_cuda, guide_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend, watched


# ---- reference ----------------------------------------------------------------------------------
def guide_reference(v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    if scale_B.device.type == "cpu":
        require_finite("guide", "scale", scale_B)
    wide = torch.promote_types(v_cond.dtype, torch.float32)
    c, u = v_cond.to(wide), v_uncond.to(wide)
    g = u + _per_row(scale_B, c) * (c - u)
    if rescale:
        g = g * _norm_factor(c, g)
    return g.to(v_cond.dtype)


def guide_backward_reference(
    grad: Tensor, v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to v_cond and v_uncond. With f = |c|/|g|: dg = f (dy - g <g,dy>/|g|^2)."""
    wide = torch.promote_types(v_cond.dtype, torch.float32)
    c, u, dy = v_cond.to(wide), v_uncond.to(wide), grad.to(wide)
    w = _per_row(scale_B, c)
    dg, dc_norm = dy, torch.zeros_like(dy)
    if rescale:
        g = u + w * (c - u)
        factor = _norm_factor(c, g)
        dot = (g * dy).sum(-1, keepdim=True)
        dg = factor * (dy - g * _divide_or_zero(dot, g.square().sum(-1, keepdim=True)))
        dc_norm = c * factor * _divide_or_zero(dot, c.square().sum(-1, keepdim=True))
    return (w * dg + dc_norm).to(v_cond.dtype), ((1 - w) * dg).to(v_uncond.dtype)


def _per_row(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _norm_factor(c: Tensor, g: Tensor) -> Tensor:
    norm_c, norm_g = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (c, g))
    return _divide_or_zero(norm_c, norm_g)


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "guide",
    {
        "reference": Backend(guide_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("guide"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("guide", "guide"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(guide_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "guide_backward",
    {
        "reference": Backend(guide_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("guide_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("guide", "guide_backward"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(guide_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(v_cond: Tensor, *_: object) -> Tensor:
    return v_cond.new_empty(v_cond.shape)


def _backward_fake(grad: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


_guide = OP.register(
    "(Tensor v_cond, Tensor v_uncond, Tensor scale_B, bool rescale) -> Tensor", _fake
)
_guide_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor v_cond, Tensor v_uncond, Tensor scale_B, bool rescale)"
    " -> (Tensor, Tensor)",
    _backward_fake,
)


class _Guide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(v_cond, v_uncond, scale_B)
        ctx.rescale, ctx.backend = rescale, backend
        return _guide(v_cond, v_uncond, scale_B, rescale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v_cond, v_uncond, scale_B = ctx.saved_tensors
        dc, du = _guide_backward(grad, v_cond, v_uncond, scale_B, ctx.rescale, ctx.backend)
        return dc, du, None, None, None


def guidance_rows(op: str, scale: float | Tensor, v_cond: Tensor, rescale: bool) -> Tensor:
    """The guidance strength as float32 [B], checked."""
    if rescale and v_cond.ndim < 2:
        raise ValueError(f"{op}: rescale needs shape [B, ..., D]; got {tuple(v_cond.shape)}.")
    if isinstance(scale, Tensor):
        require_operands(op, {"v_cond": v_cond}, per_row={"scale": scale})
        require_no_grad(op, "the guidance strength has no gradient", scale=scale)
        return scale
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"{op}: scale must be a number or a tensor [B]; got {scale!r}.")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite; got {scale}.")
    seen = is_dynamo_compiling() or watched()
    rows = None if seen else _cpu.filled_rows(v_cond, scale)
    return v_cond.new_full(v_cond.shape[:1], scale, dtype=torch.float32) if rows is None else rows


# ---- public -------------------------------------------------------------------------------------
def guide(
    v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor, *, rescale: bool = False
) -> Tensor:
    """Guided velocity [B, ...] in the dtype of v_cond; see the module docstring for the math.

    v_cond, v_uncond: [B, ...], float32 or bfloat16, same shape, dtype and device.
    scale: guidance strength w, a finite float or float32 [B]; 1 returns v_cond up to rounding.
    rescale: bring each last-dimension vector to the norm it has in v_cond.
    Raises ValueError for shapes, dtypes, devices or values outside this.
    """
    require_operands("guide", {"v_cond": v_cond, "v_uncond": v_uncond})
    scale_B = guidance_rows("guide", scale, v_cond, rescale)
    backend = forced_backend()
    if torch.is_grad_enabled() and (v_cond.requires_grad or v_uncond.requires_grad):
        return _Guide.apply(v_cond, v_uncond, scale_B, rescale, backend)
    return _guide(v_cond, v_uncond, scale_B, rescale, backend)
