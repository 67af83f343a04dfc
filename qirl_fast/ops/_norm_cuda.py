"""Launchers of csrc/cuda/norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._cuda import cuda_module, device_of, stream_of
from qirl_fast.ops._quantized import fp8_of, fp8_outputs

CHUNK = 16  # tokens of one sample that a block of the backward adds up; 1 where there are no sums
WIDEST = 8192  # elements of a row under a norm, kNormWidest of csrc/cuda/norm.h

Three = tuple[Tensor | None, Tensor | None, Tensor | None]  # gate, scale, shift
_ABSENT: Three = (None, None, None)


def _ready(rows: Three) -> Three:
    """Rows [B, D] whose last dimension is contiguous; others are copied."""
    a, b, c = (
        r if r is None or r.stride(1) == 1 or r.shape[1] == 1 else r.contiguous() for r in rows
    )
    return a, b, c


def _require_width(norm: bool, width: int) -> None:
    if norm and width > WIDEST:
        raise ValueError(
            f"norm_modulate, gate_residual_norm_modulate: the cuda backend takes rows "
            f"of at most {WIDEST}; got {width}."
        )


def _forward(
    x: Tensor,
    u: Tensor | None,
    rows: Three,
    rows_t0: Three,
    t0: Tensor | None,
    *,
    norm: bool,
    tanh: bool = False,
    rms: bool = False,
    eps: float = 0.0,
    quantize: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, out, mean, rstd, q, scale of q; those the op does not have are empty."""
    _require_width(norm, x.shape[-1])
    x, u = x.contiguous(), None if u is None else u.contiguous()
    rows, rows_t0 = _ready(rows), _ready(rows_t0)
    y = x.new_empty(x.shape if norm else 0)
    out = x.new_empty(0 if u is None else x.shape)
    mean = x.new_empty(x.shape[:2] if norm and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2] if norm else 0, dtype=torch.float32)
    q, q_scale = fp8_outputs(y, quantize)
    with device_of(x):
        cuda_module().norm_forward(
            x,
            u,
            rows,
            rows_t0,
            t0,
            y,
            out,
            mean,
            rstd,
            fp8_of(q, q_scale, quantize),
            1,
            tanh,
            eps,
            stream_of(x),
        )
    return y, out, mean, rstd, q, q_scale


def _backward(
    dy: Tensor | None,
    dout: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    stats: tuple[Tensor, Tensor] | None,
    rows: Three,
    rows_t0: Three,
    t0: Tensor | None,
    *,
    tanh: bool,
    wanted: tuple[bool, bool, bool],
    want_du: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """dx, du, and the sums of gate, scale and shift without and with t0; empty: not wanted."""
    given = dy if dy is not None else dout
    assert given is not None
    dtype = given.dtype if x is None else x.dtype
    dy, dout = (None if t is None else t.to(dtype).contiguous() for t in (dy, dout))
    x, u = (None if t is None else t.contiguous() for t in (x, u))
    rows, rows_t0 = _ready(rows), _ready(rows_t0)
    samples, tokens, width = given.shape
    _require_width(dy is not None, width)
    chunk = CHUNK if any(wanted) else 1
    dx = given.new_empty(0 if x is None else given.shape, dtype=dtype)
    du = dx.new_empty(0) if u is None else u.new_empty(u.shape if want_du else 0)
    chunks = (samples, (tokens + chunk - 1) // chunk, width)
    wants = (wanted, tuple(w and t0 is not None for w in wanted))

    def arrays(shape: tuple[int, ...]) -> list[list[Tensor]]:
        return [[dx.new_empty(shape if w else 0, dtype=torch.float32) for w in ws] for ws in wants]

    parts, sums = arrays(chunks), arrays((samples, width))
    mean, rstd = (None, None) if stats is None else (t.contiguous() for t in stats)
    with device_of(given):
        cuda_module().norm_backward(
            (dy, dout),
            x,
            u,
            mean,
            rstd,
            rows,
            rows_t0,
            t0,
            dx,
            du,
            parts,
            sums,
            chunk,
            tanh,
            stream_of(given),
        )
    return dx, du, sums[0], sums[1]


# ---- norm_modulate ------------------------------------------------------------------------------
def norm_modulate_cuda(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    t0: Tensor | None,
    scale_t0: Tensor | None,
    shift_t0: Tensor | None,
    rms: bool,
    eps: float,
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/norm.cu."""
    rows, rows_t0 = (None, scale, shift), (None, scale_t0, shift_t0)
    y, _, mean, rstd, q, q_scale = _forward(
        x, None, rows, rows_t0, t0, norm=True, rms=rms, eps=eps, quantize=quantize
    )
    return y, mean, rstd, q, q_scale


def norm_modulate_backward_cuda(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    t0: Tensor | None,
    scale_t0: Tensor | None,
    rms: bool,
    want_mod: bool,
    has_shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/norm.cu."""
    dx, _, (_, dscale, dshift), (_, dscale_t0, dshift_t0) = _backward(
        grad,
        None,
        x,
        None,
        (mean, rstd),
        (None, scale, None),
        (None, scale_t0, None),
        t0,
        tanh=False,
        wanted=(False, want_mod, want_mod and has_shift),
        want_du=False,
    )
    return dx, dscale, dshift, dscale_t0, dshift_t0


# ---- gate_residual ------------------------------------------------------------------------------
def gate_residual_cuda(
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
) -> Tensor:
    """CUDA kernel, csrc/cuda/norm.cu."""
    rows, rows_t0 = (gate, None, None), (gate_t0, None, None)
    return _forward(residual, u, rows, rows_t0, t0, norm=False, tanh=tanh)[1]


def gate_residual_backward_cuda(
    grad: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
    want_du: bool,
    want_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/norm.cu."""
    _, du, (dgate, _, _), (dgate_t0, _, _) = _backward(
        None,
        grad,
        None,
        u,
        None,
        (gate, None, None),
        (gate_t0, None, None),
        t0,
        tanh=tanh,
        wanted=(want_dgate, False, False),
        want_du=want_du,
    )
    return du, dgate, dgate_t0


# ---- gate_residual_norm_modulate ----------------------------------------------------------------
def gate_residual_norm_modulate_cuda(
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
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/norm.cu."""
    rows, rows_t0 = (gate, scale, shift), (gate_t0, scale_t0, shift_t0)
    return _forward(
        residual,
        u,
        rows,
        rows_t0,
        t0,
        norm=True,
        tanh=tanh,
        rms=rms,
        eps=eps,
        quantize=quantize,
    )


def gate_residual_norm_modulate_backward_cuda(
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
    """CUDA kernel, csrc/cuda/norm.cu."""
    dresidual, du, (dgate, dscale, dshift), (dgate_t0, dscale_t0, dshift_t0) = _backward(
        grad_y,
        grad_out,
        out,
        u,
        (mean, rstd),
        (gate, scale, None),
        (gate_t0, scale_t0, None),
        t0,
        tanh=tanh,
        wanted=(want_gate, want_mod, want_mod and has_shift),
        want_du=want_du,
    )
    return dresidual, du, dgate, dgate_t0, dscale, dshift, dscale_t0, dshift_t0
