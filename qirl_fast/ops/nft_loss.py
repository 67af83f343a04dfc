"""nft_loss: DiffusionNFT's contrast of a better and a worse implicit policy, and its gradient.

    v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v
    e+ = x_t - sigma v+ - x0,         e- = x_t - sigma v- - x0       errors of the x0 estimates
    w+ = max(mean_i |e+_i|, 1e-5),    w- alike                       a row each, constants
    p  = 1/2 + clip(advantage / adv_clip, -1, 1) / 2
    policy_b = adv_clip / beta (p mean_i e+_i^2 / w+ + (1 - p) mean_i e-_i^2 / w-)
    loss = mean_b (policy_b + ref_weight mean_i (v_i - v_ref_i)^2)   without v_ref: policy alone

    dloss/dv_i = 2 / (N B) (adv_clip sigma ((1 - p) e-_i / w- - p e+_i / w+)
                            + ref_weight (v_i - v_ref_i)),  N elements a row

With y = x_t - x0 - sigma v_old and d = sigma beta (v - v_old) the errors are e+ = y - d and
e- = y + d; the kernels take them so, and a v equal to v_old gives e+ = e- to the bit.

Shapes: v, v_old, v_ref, x_t, x0 [B, ...]; sigma, advantage float32 [B]; loss scalar and the four
metrics [B], all float32.
Dtypes: the large tensors float32 or bfloat16, each its own; computed in float32, sums over blocks
of 1024 in float32 and over blocks in float64; the gradient is rounded once to the dtype of v.
Gradients: to v only; the metrics carry none. A NaN in any input reaches the loss.
Source: DiffusionNFT (arXiv 2509.16117), its published training script. It forms e+ and e- from v+
and v- rounded to the dtype of v; equal otherwise.

The forward pass writes the gradient when v asks for one; see velocity_loss for what that means for
an incoming gradient other than 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    row_sizes,
)
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._gradient import scaled
from qirl_fast.ops._loss_cuda import nft_loss_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

_Outputs = tuple[Tensor, Tensor, Tensor]
_FLOOR = 1e-5  # kNftFloor of csrc/math/nft_loss.h


class NftLoss(NamedTuple):
    """loss scalar; [B] each: policy term, mean squares of e+, e- and v - v_ref (0 without)."""

    loss: Tensor
    policy: Tensor
    better_mse: Tensor
    worse_mse: Tensor
    ref_mse: Tensor


# ---- reference ----------------------------------------------------------------------------------
def nft_loss_reference(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float,
    ref_weight: float,
    want_grad: bool,
) -> _Outputs:
    """(loss, metrics [4, B], dloss/dv), the definition in float32 (float64 for a float64 v)."""
    if sigma.device.type == "cpu":
        require_finite("nft_loss", "sigma", sigma)
    wide = torch.promote_types(v.dtype, torch.float32)
    rows, size = row_sizes(v)
    new, old, noisy, clean = (t.to(wide).reshape(rows, size) for t in (v, v_old, x_t, x0))
    s = sigma.to(wide)[:, None]
    better = noisy - s * ((1 - beta) * old + beta * new) - clean
    worse = noisy - s * ((1 + beta) * old - beta * new) - clean
    p = 0.5 + 0.5 * (advantage.to(wide) / adv_clip).clamp(-1, 1)
    better_mse, worse_mse = better.square().mean(1), worse.square().mean(1)
    floor = torch.full_like(p, _FLOOR)
    w_better = torch.maximum(better.abs().mean(1), floor)
    w_worse = torch.maximum(worse.abs().mean(1), floor)
    policy = adv_clip / beta * (p * better_mse / w_better + (1 - p) * worse_mse / w_worse)
    away = torch.zeros_like(new) if v_ref is None else new - v_ref.to(wide).reshape(rows, size)
    ref_mse = away.square().mean(1)
    loss = (policy + ref_weight * ref_mse).mean()
    metrics = torch.stack((policy, better_mse, worse_mse, ref_mse))
    if not want_grad:
        return loss, metrics, v.new_empty(0)
    pull = ((1 - p) / w_worse)[:, None] * worse - (p / w_better)[:, None] * better
    dv = 2.0 / (rows * size) * (adv_clip * s * pull + ref_weight * away)
    return loss, metrics, dv.to(v.dtype).reshape(v.shape)


# ---- cpu ----------------------------------------------------------------------------------------
def nft_loss_cpu(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float,
    ref_weight: float,
    want_grad: bool,
) -> _Outputs:
    """C++ kernel, csrc/cpu/nft_loss.inl.cpp."""
    large, numbers = (v, v_old, v_ref, x_t, x0), (beta, adv_clip, ref_weight)
    return _cpu.nft_loss(large, sigma, advantage, numbers, want_grad, torch.get_num_threads())


def _empty_outputs(v: Tensor, want_grad: bool) -> _Outputs:
    real = torch.promote_types(v.dtype, torch.float32)
    return (
        v.new_empty((), dtype=real),
        v.new_empty((4, v.shape[0]), dtype=real),
        v.new_empty(v.shape if want_grad else 0),
    )


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "nft_loss",
    {
        "reference": Backend(nft_loss_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(nft_loss_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("nft_loss", "nft_loss"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(nft_loss_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    {"cpu": "cpu", "cuda": "reference"},
)


_nft_loss = OP.register(
    "(Tensor v, Tensor v_old, Tensor? v_ref, Tensor x_t, Tensor x0, Tensor sigma,"
    " Tensor advantage, float beta, float adv_clip, float ref_weight, bool want_grad)"
    " -> (Tensor, Tensor, Tensor)",
    lambda v, *rest: _empty_outputs(v, rest[-1]),
    large=(0, 1, 2, 3, 4),
)


class _NftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, backend: str, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, metrics, dv = _nft_loss(v, *rest, True, backend)
        ctx.save_for_backward(dv)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (dv,) = ctx.saved_tensors
        return scaled(dv, grad), *(None,) * 10


# ---- public -------------------------------------------------------------------------------------
def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    v_ref: Tensor | None = None,
    adv_clip: float = 5.0,
    ref_weight: float = 1e-4,
) -> NftLoss:
    """DiffusionNFT's loss of B noised samples; see the module docstring for the math.

    v, v_old, v_ref: velocities [B, ...] at x_t of the policy, the sampling policy, the reference.
    x_t, x0: the noised sample and its clean one, shaped and placed like v; all five tensors are
        float32 or bfloat16, each its own.
    sigma: noise level, float32 [B], finite. advantage: float32 [B].
    beta > 0, adv_clip > 0, ref_weight >= 0 (weight of the term of v_ref), all finite.
    Raises ValueError for shapes, dtypes, devices or values outside this, and when anything but v
    asks for a gradient.
    """
    require_operands(
        "nft_loss",
        {"v": v},
        like={"v_old": v_old, "x_t": x_t, "x0": x0, **given(v_ref=v_ref)},
        per_row={"sigma": sigma, "advantage": advantage},
    )
    for name, value in (("beta", beta), ("adv_clip", adv_clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"nft_loss: {name} is {value}; want a finite {name} > 0.")
    if not 0 <= ref_weight < math.inf:
        raise ValueError(f"nft_loss: ref_weight is {ref_weight}; want a finite ref_weight >= 0.")
    require_no_grad(
        "nft_loss",
        "the loss is differentiable in v only",
        v_old=v_old,
        v_ref=v_ref,
        x_t=x_t,
        x0=x0,
        sigma=sigma,
        advantage=advantage,
    )
    rest = (v_old, v_ref, x_t, x0, sigma, advantage, beta, adv_clip, ref_weight)
    backend = forced_backend()
    if torch.is_grad_enabled() and v.requires_grad:
        loss, metrics = _NftLoss.apply(v, backend, *rest)
    else:
        loss, metrics, _ = _nft_loss(v, *rest, False, backend)
    return NftLoss(loss, *metrics.unbind(0))
