"""policy_loss: the clipped policy loss of B samples and its gradient, in one pass.

    r_i  = exp(logp_i - logp_old_i)
    loss = mean over rows of max(-A_i r_i, -A_i clip(r_i, 1 - clip_low, 1 + clip_high))
    dloss/dlogp_i = -A_i r_i / B,  0 where the clipped branch is the larger
    clip_fraction = share of rows with r_i outside the interval, whatever the sign of A_i
    approx_kl     = mean of (logp_i - logp_old_i)^2 / 2, zero only where nothing moved

Shapes: logp, logp_old, advantage [B], float32 or float64, all alike; loss, clip_fraction and
approx_kl are scalars, ratio [B]. Computed in float64 and rounded once: logp equal to logp_old gives
ratio exactly 1, and the same bits come out on every run and for any thread count. Rows are added in
order; by Triton in lanes of 256 and then those, an order the number of rows fixes. One launch.
A NaN in logp, logp_old or advantage reaches the loss; max and clip never drop it.
Gradients: to logp only; ratio, clip_fraction and approx_kl carry none.
Source: PPO (arXiv 1707.06347) as used by Flow-GRPO (arXiv 2505.05470), whose clip_fraction and
approx_kl these are; there the two clip ranges are equal.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from qirl_fast import _cpu
from qirl_fast.ops._checks import require_no_grad, require_tensor
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._loss_cuda import policy_loss_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend


class PolicyLoss(NamedTuple):
    """loss scalar, ratio [B], clip_fraction scalar, approx_kl scalar."""

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# ---- reference ----------------------------------------------------------------------------------
def policy_loss_reference(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> _Outputs:
    """(loss, ratio, clip_fraction, approx_kl, dloss/dlogp), the definition in float64."""
    log_ratio = logp.double() - logp_old.double()
    a, ratio = advantage.double(), log_ratio.exp()
    low, high = 1.0 - clip_low, 1.0 + clip_high
    clipped = ratio.clamp(low, high)
    loss = torch.maximum(-a * ratio, -a * clipped)
    grad = torch.where(-a * clipped > -a * ratio, 0.0, -a * ratio) / len(logp)
    fraction = ((ratio < low) | (ratio > high)).double().mean()
    kl = 0.5 * log_ratio.square().mean()
    loss, ratio, fraction, kl, grad = (
        t.to(logp.dtype) for t in (loss.mean(), ratio, fraction, kl, grad)
    )
    return loss, ratio, fraction, kl, grad


# ---- registration -------------------------------------------------------------------------------
_REALS = (torch.float32, torch.float64)
OP = Op(
    "policy_loss",
    {
        "reference": Backend(policy_loss_reference, ("cpu", "cuda"), _REALS),
        "cpu": Backend(cpu_launcher("policy_loss"), ("cpu",), _REALS),
        "triton": Backend(
            triton_launcher("policy_loss", "policy_loss"), ("cuda",), _REALS, missing_triton
        ),
        "cuda": Backend(policy_loss_cuda, ("cuda",), _REALS, missing_cuda),
    },
    {"cpu": "cpu", "cuda": "reference"},
)


def _empty_outputs(logp: Tensor) -> _Outputs:
    shape = logp.shape
    return (
        logp.new_empty(()),
        logp.new_empty(shape),
        logp.new_empty(()),
        logp.new_empty(()),
        logp.new_empty(shape),
    )


_policy_loss = OP.register(
    "(Tensor logp, Tensor logp_old, Tensor advantage, float clip_low, float clip_high)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logp, *_: _empty_outputs(logp),
)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        logp_old: Tensor,
        advantage: Tensor,
        clip_low: float,
        clip_high: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, ratio, fraction, kl, grad = _policy_loss(
            logp, logp_old, advantage, clip_low, clip_high, backend
        )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ratio, fraction, kl)
        return loss, ratio, fraction, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (grad_B,) = ctx.saved_tensors
        return grad_loss * grad_B, None, None, None, None, None


def _require_rows(logp: Tensor, logp_old: Tensor, advantage: Tensor) -> None:
    for name, t in (("logp", logp), ("logp_old", logp_old), ("advantage", advantage)):
        require_tensor("policy_loss", name, t)
    if logp.ndim != 1 or logp.shape[0] == 0:
        raise ValueError(
            f"policy_loss: logp needs shape [B] with at least one row; got {tuple(logp.shape)}."
        )
    if logp.dtype not in _REALS:
        raise ValueError(f"policy_loss: logp must be float32 or float64; got {logp.dtype}.")
    for name, t in (("logp_old", logp_old), ("advantage", advantage)):
        if t.shape != logp.shape or t.dtype != logp.dtype or t.device != logp.device:
            raise ValueError(
                f"policy_loss: {name} must be like logp, {logp.dtype} of shape {tuple(logp.shape)} "
                f"on {logp.device}; got {t.dtype} of shape {tuple(t.shape)} on {t.device}."
            )


# ---- public -------------------------------------------------------------------------------------
def policy_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """Clipped policy loss of B rows; see the module docstring for the math.

    logp, logp_old, advantage: [B] with B >= 1, float32 or float64, same dtype and device.
    clip_low in (0, 1], clip_high in (0, inf]: the clip interval is [1 - clip_low, 1 + clip_high].
    Raises ValueError for shapes, dtypes, devices or clip ranges outside this, and when logp_old or
    advantage asks for a gradient.
    """
    rows = logp, logp_old, advantage
    if is_dynamo_compiling() or not _cpu.plain_rows((logp,), (), rows, ()):
        _require_rows(*rows)
    if not 0 < clip_low <= 1:
        raise ValueError(f"policy_loss: clip_low is {clip_low}; want 0 < clip_low <= 1.")
    if not 0 < clip_high <= math.inf:
        raise ValueError(f"policy_loss: clip_high is {clip_high}; want clip_high > 0.")
    why = "the loss is differentiable in logp only"
    require_no_grad("policy_loss", why, logp_old=logp_old, advantage=advantage)
    arguments = (*rows, clip_low, clip_high, forced_backend())
    if torch.is_grad_enabled() and logp.requires_grad:
        return PolicyLoss(*_PolicyLoss.apply(*arguments))
    return PolicyLoss(*_policy_loss(*arguments)[:4])
