"""Launchers of csrc/cuda/{velocity_loss,nft_loss,awm_logp,policy_loss}.cu: the `cuda` backends.

Sums have the order of the CPU kernels. Coefficients are not looked at, which would stop the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import row_sizes
from qirl_fast.ops._cuda import cuda_module, device_of, stream_of

_BLOCK = 1024  # elements whose values are added together, kRowBlock of csrc/math/rows.h


def _scratch(v: Tensor, sums: int = 1) -> tuple[Tensor, Tensor]:
    """float32 for `sums` sums of each block, float64 for a value a row."""
    rows, size = row_sizes(v)
    blocks = (size + _BLOCK - 1) // _BLOCK
    return (
        v.new_empty(rows * blocks * sums, dtype=torch.float32),
        v.new_empty(rows, dtype=torch.float64),
    )


def velocity_loss_cuda(
    v: Tensor, target: Tensor, weight_B: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/velocity_loss.cu."""
    sums, terms = _scratch(v)
    loss, mse = sums.new_empty(()), sums.new_empty(v.shape[0])
    dv = v.new_empty(v.shape if want_grad else 0)
    with device_of(v):
        cuda_module().velocity_loss(
            v,
            target,
            weight_B,
            (sums, terms),
            loss,
            mse,
            dv,
            stream_of(v),
        )
    return loss, mse, dv


def nft_loss_cuda(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernels, csrc/cuda/nft_loss.cu."""
    rows = v.shape[0]
    sums, terms = _scratch(v, 5)
    slopes = sums.new_empty((3, rows))
    loss, metrics = sums.new_empty(()), sums.new_empty((4, rows))
    dv = v.new_empty(v.shape if want_grad else 0)
    with device_of(v):
        cuda_module().nft_loss(
            (v, v_old, v_ref, x_t, x0),
            (sigma, advantage),
            (beta, adv_clip, ref_weight),
            (sums, slopes, terms),
            loss,
            metrics,
            dv,
            stream_of(v),
        )
    return loss, metrics, dv


def awm_logp_cuda(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    time: Tensor,
    time_power: int,
    power: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """CUDA kernels, csrc/cuda/awm_logp.cu."""
    sums, _ = _scratch(v)
    logp, slope = time.new_empty(time.shape), time.new_empty(time.shape)
    with device_of(v):
        cuda_module().awm_logp(
            (v, noise, x0),
            time,
            (time_power, power, factor),
            sums,
            logp,
            slope,
            stream_of(v),
        )
    return logp, slope


def awm_logp_backward_cuda(
    grad: Tensor, slope: Tensor, v: Tensor, noise: Tensor, x0: Tensor
) -> Tensor:
    """CUDA kernel, csrc/cuda/awm_logp.cu."""
    dv = v.new_empty(v.shape)
    with device_of(v):
        cuda_module().awm_logp_backward(
            grad,
            slope,
            (v, noise, x0),
            dv,
            stream_of(v),
        )
    return dv


def policy_loss_cuda(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/policy_loss.cu: one launch, rows added in order."""
    loss, fraction, kl = (logp.new_empty(()) for _ in range(3))
    ratio, grad = logp.new_empty(logp.shape), logp.new_empty(logp.shape)
    with device_of(logp):
        cuda_module().policy_loss(
            logp,
            logp_old,
            advantage,
            *(loss, ratio, fraction, kl, grad),
            1.0 - clip_low,
            1.0 + clip_high,
            logp.dtype == torch.float64,
            stream_of(logp),
        )
    return loss, ratio, fraction, kl, grad
