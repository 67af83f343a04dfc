"""velocity_loss: mean squared distance of a velocity from a target, and its gradient, in one pass.

    mse_b = mean_i (v_i - target_i)^2          the row's elements
    loss  = mean_b weight_b mse_b              weight absent: 1
    dloss/dv_i = 2 weight_b / (N B) (v_i - target_i),  N elements a row

Shapes: v, target [B, ...]; weight float32 [B]; loss scalar, mse [B], both float32.
Dtypes: v and target float32 or bfloat16, each its own; computed in float32, squares added in
blocks of 1024 and the blocks in float64; the gradient is rounded once to the dtype of v.
Gradients: to v only; the target is a constant and mse, for metrics, carries none.

The weight says what is compared, with x = (1 - sigma) x0 + sigma noise and a step of mean
a x + c v: 1 the velocity; sigma^2 the x0 estimate x - sigma v; c^2 the mean; c^2 / (2 s^2) the
Gaussian KL of the step; times any weighting over time. Distillation is v of the student against v
of the teacher (arXiv 2605.08063, 2605.15055), supervised training v against noise - x0.

The forward pass writes the gradient when v asks for one. A backward pass that starts with another
gradient than 1 multiplies by it: one pass and, in bfloat16, one rounding more. Constant factors,
such as 1 / accumulation steps, therefore belong in the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    given,
    require_finite,
    require_no_grad,
    require_operands,
    row_sizes,
)
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._gradient import scaled
from qirl_fast.ops._loss_cuda import velocity_loss_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

_Outputs = tuple[Tensor, Tensor, Tensor]


class VelocityLoss(NamedTuple):
    """loss scalar, mse [B]: each row's mean square, without its weight."""

    loss: Tensor
    mse: Tensor


# ---- reference ----------------------------------------------------------------------------------
def velocity_loss_reference(
    v: Tensor, target: Tensor, weight_B: Tensor | None, want_grad: bool
) -> _Outputs:
    """(loss, mse, dloss/dv), the definition in float32 (float64 for a float64 v)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    rows, size = row_sizes(v)
    difference = (v.to(wide) - target.to(wide)).reshape(rows, size)
    mse = difference.square().mean(1)
    weight = torch.ones_like(mse) if weight_B is None else weight_B.to(wide)
    if weight.device.type == "cpu":
        require_finite("velocity_loss", "weight", weight)
    if not want_grad:
        return (weight * mse).mean(), mse, v.new_empty(0)
    dv = (2.0 / (rows * size) * weight)[:, None] * difference
    return (weight * mse).mean(), mse, dv.to(v.dtype).reshape(v.shape)


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "velocity_loss",
    {
        "reference": Backend(velocity_loss_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("velocity_loss"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("velocity_loss", "velocity_loss"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(velocity_loss_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    {"cpu": "cpu", "cuda": "reference"},
)


def _empty_outputs(v: Tensor, want_grad: bool) -> _Outputs:
    real = torch.promote_types(v.dtype, torch.float32)
    return (
        v.new_empty((), dtype=real),
        v.new_empty(v.shape[:1], dtype=real),
        v.new_empty(v.shape if want_grad else 0),
    )


_velocity_loss = OP.register(
    "(Tensor v, Tensor target, Tensor? weight_B, bool want_grad) -> (Tensor, Tensor, Tensor)",
    lambda v, *rest: _empty_outputs(v, rest[-1]),
    large=(0, 1),
)


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, target: Tensor, weight_B: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        loss, mse, dv = _velocity_loss(v, target, weight_B, True, backend)
        ctx.save_for_backward(dv)
        ctx.mark_non_differentiable(mse)
        return loss, mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (dv,) = ctx.saved_tensors
        return scaled(dv, grad), None, None, None


# ---- public -------------------------------------------------------------------------------------
def velocity_loss(v: Tensor, target: Tensor, *, weight: Tensor | None = None) -> VelocityLoss:
    """Weighted mean square of v - target; see the module docstring for the math.

    v, target: [B, ...] with B >= 1, same shape and device, float32 or bfloat16 each.
    weight: float32 [B], finite; absent: 1.
    Raises ValueError for shapes, dtypes, devices or values outside this, and when the target or
    the weight asks for a gradient.
    """
    require_operands(
        "velocity_loss", {"v": v}, like={"target": target}, per_row=given(weight=weight)
    )
    require_no_grad("velocity_loss", "it is a constant here", target=target, weight=weight)
    backend = forced_backend()
    if torch.is_grad_enabled() and v.requires_grad:
        return VelocityLoss(*_VelocityLoss.apply(v, target, weight, backend))
    return VelocityLoss(*_velocity_loss(v, target, weight, False, backend)[:2])
