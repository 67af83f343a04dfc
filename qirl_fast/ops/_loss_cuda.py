"""Launchers of csrc/cuda/{velocity_loss,nft_loss,awm_logp,policy_loss}.cu: the `cuda` backends.

Sums have the order of the CPU kernels. Coefficients are not looked at, which would stop the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._checks import dense_rows, row_sizes, rows_of
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
    v, target = dense_rows(v), dense_rows(target)
    weight_B = None if weight_B is None else weight_B.contiguous()
    sums, terms = _scratch(v)
    loss, mse = sums.new_empty(()), sums.new_empty(v.shape[0])
    dv = v.new_empty(v.shape if want_grad else 0)
    with device_of(v):
        cuda_module().velocity_loss(
            rows_of(v),
            rows_of(target),
            0 if weight_B is None else weight_B.data_ptr(),
            (sums.data_ptr(), terms.data_ptr()),
            loss.data_ptr(),
            mse.data_ptr(),
            dv.data_ptr() if want_grad else 0,
            *row_sizes(v),
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
    large = [None if t is None else dense_rows(t) for t in (v, v_old, v_ref, x_t, x0)]
    sigma, advantage = sigma.contiguous(), advantage.contiguous()
    rows = v.shape[0]
    sums, terms = _scratch(v, 5)
    slopes = sums.new_empty((3, rows))
    loss, metrics = sums.new_empty(()), sums.new_empty((4, rows))
    dv = v.new_empty(v.shape if want_grad else 0)
    with device_of(v):
        cuda_module().nft_loss(
            tuple(rows_of(t) for t in large),
            (sigma.data_ptr(), advantage.data_ptr()),
            (beta, adv_clip, ref_weight),
            (sums.data_ptr(), slopes.data_ptr(), terms.data_ptr()),
            loss.data_ptr(),
            metrics.data_ptr(),
            dv.data_ptr() if want_grad else 0,
            *row_sizes(v),
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
    v, noise, x0, time = dense_rows(v), dense_rows(noise), dense_rows(x0), time.contiguous()
    sums, _ = _scratch(v)
    logp, slope = time.new_empty(time.shape), time.new_empty(time.shape)
    with device_of(v):
        cuda_module().awm_logp(
            (rows_of(v), rows_of(noise), rows_of(x0)),
            time.data_ptr(),
            (time_power, power, factor),
            sums.data_ptr(),
            logp.data_ptr(),
            slope.data_ptr(),
            *row_sizes(v),
            stream_of(v),
        )
    return logp, slope


def awm_logp_backward_cuda(
    grad: Tensor, slope: Tensor, v: Tensor, noise: Tensor, x0: Tensor
) -> Tensor:
    """CUDA kernel, csrc/cuda/awm_logp.cu."""
    v, noise, x0 = dense_rows(v), dense_rows(noise), dense_rows(x0)
    grad, slope = grad.contiguous(), slope.contiguous()
    dv = v.new_empty(v.shape)
    with device_of(v):
        cuda_module().awm_logp_backward(
            grad.data_ptr(),
            slope.data_ptr(),
            (rows_of(v), rows_of(noise), rows_of(x0)),
            dv.data_ptr(),
            *row_sizes(v),
            stream_of(v),
        )
    return dv


def policy_loss_cuda(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/policy_loss.cu: one launch, rows added in order."""
    inputs = [t.contiguous() for t in (logp, logp_old, advantage)]
    loss, fraction, kl = (logp.new_empty(()) for _ in range(3))
    ratio, grad = logp.new_empty(logp.shape), logp.new_empty(logp.shape)
    with device_of(logp):
        cuda_module().policy_loss(
            *(t.data_ptr() for t in inputs),
            *(t.data_ptr() for t in (loss, ratio, fraction, kl, grad)),
            len(logp),
            1.0 - clip_low,
            1.0 + clip_high,
            logp.dtype == torch.float64,
            stream_of(logp),
        )
    return loss, ratio, fraction, kl, grad
