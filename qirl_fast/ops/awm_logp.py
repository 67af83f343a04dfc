"""awm_logp: the pseudo log-probability of a clean sample, from how well its noise is undone.

    m_b    = mean_i (v_i - (noise_i - x0_i))^2
    logp_b = -m            weighting "uniform"
             -t m          "t"
             -t^2 m        "t2"
             -t (sqrt(m + 1e-10) - 1e-5)                       "huber"
             -t ((m + 1e-10)^power - (1e-10)^power) / power    "ghuber"
    dlogp_b/dv_i = -weight f'(m) 2 / N (v_i - (noise_i - x0_i)),  f as above, N elements a row

for v at x_t = (1 - t) x0 + t noise.
Shapes: v, noise, x0 [B, ...]; time float32 [B], t in 0..1; logp float32 [B].
Dtypes: v, noise, x0 float32 or bfloat16, each its own; computed in float32, squares added in blocks
of 1024 and the blocks, and f, in float64; the gradient is rounded once to the dtype of v.
Gradients: to v only.
Source: AWM (arXiv 2509.25050), its published training script, which takes the squares in float64.
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
    require_finite,
    require_no_grad,
    require_operands,
    row_sizes,
)
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._loss_cuda import awm_logp_backward_cuda, awm_logp_cuda
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

# Exponent of t; exponent of m; factor. With exponent 1 of m the 1e-10 is left out.
_WEIGHTINGS = {
    "uniform": (0, 1.0, 1.0),
    "t": (1, 1.0, 1.0),
    "t2": (2, 1.0, 1.0),
    "huber": (1, 0.5, 1.0),
}
WEIGHTINGS = (*_WEIGHTINGS, "ghuber")
_TINY = 1e-10  # kAwmTiny of csrc/math/awm_logp.h


# ---- reference ----------------------------------------------------------------------------------
def awm_logp_reference(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    time: Tensor,
    time_power: int,
    power: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """(logp [B], slope [B]) in float32 (float64 for a float64 v): dlogp/dv = slope residual."""
    if time.device.type == "cpu":
        require_finite("awm_logp", "time", time)
    residual = _residual(v, noise, x0)
    m = residual.square().mean(1)
    weight = factor * time.to(m.dtype) ** time_power
    if power == 1.0:
        value, derivative = m, torch.ones_like(m)
    else:
        value = (m + _TINY) ** power - _TINY**power
        derivative = power * (m + _TINY) ** (power - 1.0)
    return -weight * value, -weight * derivative * (2.0 / residual.shape[1])


def awm_logp_backward_reference(
    grad: Tensor, slope: Tensor, v: Tensor, noise: Tensor, x0: Tensor
) -> Tensor:
    """dv = grad slope residual."""
    dv = (grad * slope)[:, None] * _residual(v, noise, x0)
    return dv.to(v.dtype).reshape(v.shape)


def _residual(v: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    new, n, clean = (t.to(wide).reshape(row_sizes(v)) for t in (v, noise, x0))
    return new - (n - clean)


# ---- cpu ----------------------------------------------------------------------------------------
def awm_logp_cpu(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    time: Tensor,
    time_power: int,
    power: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """C++ kernel, csrc/cpu/awm_logp.inl.cpp."""
    form = time_power, power, factor
    return _cpu.awm_logp((v, noise, x0), time, form, torch.get_num_threads())


def awm_logp_backward_cpu(
    grad: Tensor, slope: Tensor, v: Tensor, noise: Tensor, x0: Tensor
) -> Tensor:
    """C++ kernel, csrc/cpu/awm_logp.inl.cpp."""
    return _cpu.awm_logp_backward(grad, slope, (v, noise, x0), torch.get_num_threads())


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "awm_logp",
    {
        "reference": Backend(awm_logp_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(awm_logp_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("awm_logp", "awm_logp"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(awm_logp_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "awm_logp_backward",
    {
        "reference": Backend(awm_logp_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(awm_logp_backward_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("awm_logp", "awm_logp_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(awm_logp_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    real = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(v.shape[:1], dtype=real), v.new_empty(v.shape[:1], dtype=real)


_awm_logp = OP.register(
    "(Tensor v, Tensor noise, Tensor x0, Tensor time, int time_power, float power, float factor)"
    " -> (Tensor, Tensor)",
    _fake,
    large=(0, 1, 2),
)
_awm_logp_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor slope, Tensor v, Tensor noise, Tensor x0) -> Tensor",
    lambda grad, slope, v, *_: v.new_empty(v.shape),
    large=(2, 3, 4),
)


class _AwmLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, noise: Tensor, x0: Tensor, time: Tensor, form: Any, backend: str
    ) -> Tensor:
        logp: Tensor
        logp, slope = _awm_logp(v, noise, x0, time, *form, backend)
        ctx.save_for_backward(slope, v, noise, x0)
        ctx.backend = backend
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _awm_logp_backward(grad, *ctx.saved_tensors, ctx.backend), *(None,) * 5


def require_awm(
    op: str, v: Tensor, noise: Tensor, x0: Tensor, time: Tensor, weighting: str, power: float
) -> None:
    """The arguments are what awm_logp takes; `op` names the one that asks."""
    require_operands(op, {"v": v}, like={"noise": noise, "x0": x0}, per_row={"time": time})
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{op}: weighting is {weighting!r}; choose from {', '.join(WEIGHTINGS)}.")
    if not 0 < power <= 1:
        raise ValueError(f"{op}: power is {power}; want 0 < power <= 1.")
    why = "it is differentiable in v only"
    require_no_grad(op, why, noise=noise, x0=x0, time=time)


# ---- public -------------------------------------------------------------------------------------
def awm_logp(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    time: Tensor,
    *,
    weighting: str = "uniform",
    power: float = 0.25,
) -> Tensor:
    """Pseudo log-probability [B] of x0; see the module docstring for the math.

    v: velocity at (1 - t) x0 + t noise. v, noise, x0: [B, ...] with B >= 1, same shape and device,
        float32 or bfloat16 each.
    time: t, float32 [B], finite; "uniform" has no use for its values.
    weighting: "uniform", "t", "t2", "huber" or "ghuber"; power, in (0, 1], is ghuber's.
    Raises ValueError for shapes, dtypes, devices or values outside this, and when anything but v
    asks for a gradient.
    """
    require_awm("awm_logp", v, noise, x0, time, weighting, power)
    form = _WEIGHTINGS.get(weighting, (1, power, 1.0 / power))
    backend = forced_backend()
    if torch.is_grad_enabled() and v.requires_grad:
        logp: Tensor = _AwmLogp.apply(v, noise, x0, time, form, backend)
        return logp
    return _awm_logp(v, noise, x0, time, *form, backend)[0]
