"""Launchers of csrc/cpu/norm_forward.inl.cpp, csrc/cpu/norm_backward.inl.cpp, csrc/cuda/norm.cu.

The bindings of both modules take the same arguments, the last one apart: threads or the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qirl_fast.ops._compiled import CPU, CUDA, Compiled
from qirl_fast.ops._quantized import fp8_of, fp8_outputs
from qirl_fast.ops._recycled import empty


@dataclass(frozen=True)
class _Kernels:
    on: Compiled
    chunk: int  # tokens of one sample that a task of the backward adds up
    chunk_alone: int  # tokens of a task that makes no sums
    widest: int | None = None  # elements of a row under a norm


_CPU = _Kernels(CPU, chunk=32, chunk_alone=64)
_CUDA = _Kernels(CUDA, chunk=16, chunk_alone=1, widest=8192)  # kNormWidest of csrc/cuda/norm.h

Three = tuple[Tensor | None, Tensor | None, Tensor | None]  # gate, scale, shift
_ABSENT: Three = (None, None, None)


def _ready(rows: Three) -> Three:
    """Rows [B, D] whose last dimension is contiguous; others are copied."""
    a, b, c = (
        r if r is None or r.stride(1) == 1 or r.shape[1] == 1 else r.contiguous() for r in rows
    )
    return a, b, c


def _require_width(kernels: _Kernels, norm: bool, width: int) -> None:
    if norm and kernels.widest is not None and width > kernels.widest:
        raise ValueError(
            f"norm_modulate, gate_residual_norm_modulate: the {kernels.on.name} backend takes rows "
            f"of at most {kernels.widest}; got {width}."
        )


def _forward(
    kernels: _Kernels,
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
    _require_width(kernels, norm, x.shape[-1])
    x, u = x.contiguous(), None if u is None else u.contiguous()
    rows, rows_t0 = _ready(rows), _ready(rows_t0)
    y = empty(x, x.shape if norm else 0)
    out = empty(x, 0 if u is None else x.shape)
    mean = x.new_empty(x.shape[:2] if norm and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty(x.shape[:2] if norm else 0, dtype=torch.float32)
    q, q_scale = fp8_outputs(y, quantize)
    on = kernels.on
    with on.device(x):
        on.module().norm_forward(
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
            kernels.chunk_alone,
            tanh,
            eps,
            on.last(x),
        )
    return y, out, mean, rstd, q, q_scale


def _backward(
    kernels: _Kernels,
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
    _require_width(kernels, dy is not None, width)
    chunk = kernels.chunk if any(wanted) else kernels.chunk_alone
    dx = empty(given, 0 if x is None else given.shape, dtype)
    du = dx.new_empty(0) if u is None else empty(u, u.shape if want_du else 0)
    chunks = (samples, (tokens + chunk - 1) // chunk, width)
    wants = (wanted, tuple(w and t0 is not None for w in wanted))

    def arrays(shape: tuple[int, ...]) -> list[list[Tensor]]:
        return [[empty(dx, shape if w else 0, torch.float32) for w in ws] for ws in wants]

    parts, sums = arrays(chunks), arrays((samples, width))
    mean, rstd = (None, None) if stats is None else (t.contiguous() for t in stats)
    on = kernels.on
    with on.device(given):
        on.module().norm_backward(
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
            on.last(given),
        )
    return dx, du, sums[0], sums[1]


# ---- norm_modulate ------------------------------------------------------------------------------
def _norm_modulate(
    kernels: _Kernels,
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
    rows, rows_t0 = (None, scale, shift), (None, scale_t0, shift_t0)
    y, _, mean, rstd, q, q_scale = _forward(
        kernels, x, None, rows, rows_t0, t0, norm=True, rms=rms, eps=eps, quantize=quantize
    )
    return y, mean, rstd, q, q_scale


def _norm_modulate_backward(
    kernels: _Kernels,
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
    dx, _, (_, dscale, dshift), (_, dscale_t0, dshift_t0) = _backward(
        kernels,
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
def _gate_residual(
    kernels: _Kernels,
    residual: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
) -> Tensor:
    rows, rows_t0 = (gate, None, None), (gate_t0, None, None)
    return _forward(kernels, residual, u, rows, rows_t0, t0, norm=False, tanh=tanh)[1]


def _gate_residual_backward(
    kernels: _Kernels,
    grad: Tensor,
    u: Tensor,
    gate: Tensor,
    t0: Tensor | None,
    gate_t0: Tensor | None,
    tanh: bool,
    want_du: bool,
    want_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, du, (dgate, _, _), (dgate_t0, _, _) = _backward(
        kernels,
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
def _gate_residual_norm_modulate(
    kernels: _Kernels,
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
    rows, rows_t0 = (gate, scale, shift), (gate_t0, scale_t0, shift_t0)
    return _forward(
        kernels,
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


def _gate_residual_norm_modulate_backward(
    kernels: _Kernels,
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
    dresidual, du, (dgate, dscale, dshift), (dgate_t0, dscale_t0, dshift_t0) = _backward(
        kernels,
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


# ---- the backends' functions --------------------------------------------------------------------
norm_modulate_cpu = partial(_norm_modulate, _CPU)
norm_modulate_cuda = partial(_norm_modulate, _CUDA)
norm_modulate_backward_cpu = partial(_norm_modulate_backward, _CPU)
norm_modulate_backward_cuda = partial(_norm_modulate_backward, _CUDA)
gate_residual_cpu = partial(_gate_residual, _CPU)
gate_residual_cuda = partial(_gate_residual, _CUDA)
gate_residual_backward_cpu = partial(_gate_residual_backward, _CPU)
gate_residual_backward_cuda = partial(_gate_residual_backward, _CUDA)
gate_residual_norm_modulate_cpu = partial(_gate_residual_norm_modulate, _CPU)
gate_residual_norm_modulate_cuda = partial(_gate_residual_norm_modulate, _CUDA)
gate_residual_norm_modulate_backward_cpu = partial(_gate_residual_norm_modulate_backward, _CPU)
gate_residual_norm_modulate_backward_cuda = partial(_gate_residual_norm_modulate_backward, _CUDA)
