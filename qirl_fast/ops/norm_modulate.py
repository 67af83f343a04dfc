"""norm_modulate: adaptive normalisation of tokens by rows of a modulation (adaLN).

    y = n(x) (1 + scale) + shift
    n(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)      norm="layer"
    n(x) = x / sqrt(mean(x^2) + eps)                              norm="rms"

Shapes: x, y [B, S, D] or [B, D] (one token); scale, shift [B, D] with any row stride: chunks of a
fused modulation and expanded rows serve as they are. t0 [S] or [B, S] bool: the tokens it marks
take scale_t0 and shift_t0 [B, D] (causal_condition of Qwen-Image-2.1, zero_cond_t of
Qwen-Image-Edit-2511). The norms have no weight of their own; fold a weight w into the rows:
1 + scale' = w (1 + scale).
Dtypes: x float32 or bfloat16, each row its own; statistics (two passes: the mean, then squared
deviations) and arithmetic in float32, y rounded once to the dtype of x.
Gradients: to x and to the rows, each in its own dtype. With xhat = n(x), g = dy (1 + scale):
    dx = rstd (g - mean(g) - xhat mean(g xhat))      without mean(g) for "rms"
    dscale = sum_S dy xhat,  dshift = sum_S dy       over the tokens that take the row
Saved: x, and mean and rstd in float32. Sums over tokens: chunks of 32 tokens (CPU) or 16 (GPU) of
one sample in float32, then the chunks in order (compensated on the CPU), so they do not depend on
threads or batch.
quantize="row" or "block": y is returned in fp8 (e4m3fn) too, made in the same pass: the bits of
fp8_quantize(y, granularity=quantize). Gradients flow through y alone.
Source: diffusers, transformer_qwenimage.py and transformer_qwenimage21.py (_modulate). They round
after the norm, after 1 + scale and after the product; here there is one rounding.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import LARGE_DTYPES, REFERENCE_DTYPES
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._norm_checks import (
    as_tokens,
    from_tokens,
    gradient_for,
    require_modulated,
    require_norm,
)
from qirl_fast.ops._norm_cuda import (
    norm_modulate_backward_cuda,
    norm_modulate_cuda,
)
from qirl_fast.ops._norm_reference import (
    norm_gradient,
    normalized,
    rows_of_tokens,
    statistics,
    sums_over_tokens,
    widened,
)
from qirl_fast.ops._quantized import and_quantized, fp8_outputs, quantized, require_quantize
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.fp8_quantize import Quantized


# ---- reference ----------------------------------------------------------------------------------
def norm_modulate_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    t0: Tensor | None,
    scale_t0: Tensor | None,
    shift_t0: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (empty for RMSNorm) and rstd: the definition, in float32 (float64 for float64 x)."""
    wide = widened(x)
    xhat, mean, rstd = statistics(x.to(wide), rms, eps)
    y = xhat * (1 + rows_of_tokens(scale, scale_t0, t0, wide))
    if shift is not None:
        y = y + rows_of_tokens(shift, shift_t0, t0, wide)
    return y.to(x.dtype), mean, rstd


def norm_modulate_backward_reference(
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
    """dx, dscale, dshift, dscale_t0, dshift_t0; the rows' in float32, empty where not wanted."""
    wide = rstd.dtype
    xhat, dy = normalized(x, mean, rstd, rms), grad.to(wide)
    g = dy * (1 + rows_of_tokens(scale, scale_t0, t0, wide))
    dx = norm_gradient(g, xhat, rstd, rms).to(x.dtype)
    dscale = dscale_t0 = dshift = dshift_t0 = rstd.new_empty(0)
    if want_mod:
        dscale, dscale_t0 = sums_over_tokens(dy * xhat, t0, rstd)
    if want_mod and has_shift:
        dshift, dshift_t0 = sums_over_tokens(dy, t0, rstd)
    return dx, *_distinct(dscale, dshift, dscale_t0, dshift_t0)


def _distinct(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of an op must not alias: an empty one each."""
    a, b, c, d = (t if t.numel() else t.new_empty(0) for t in (a, b, c, d))
    return a, b, c, d


# ---- registration -------------------------------------------------------------------------------
_DEFAULT = {"cpu": "cpu", "cuda": "reference"}
OP = Op(
    "norm_modulate",
    {
        "reference": Backend(
            and_quantized(norm_modulate_reference), ("cpu", "cuda"), REFERENCE_DTYPES
        ),
        "cpu": Backend(cpu_launcher("norm_modulate"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("norm_modulate", "norm_modulate"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(norm_modulate_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)
OP_BACKWARD = Op(
    "norm_modulate_backward",
    {
        "reference": Backend(norm_modulate_backward_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("norm_modulate_backward"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("norm_modulate", "norm_modulate_backward"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(norm_modulate_backward_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    _DEFAULT,
)


def _fake(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    t0: Tensor | None,
    scale_t0: Tensor | None,
    shift_t0: Tensor | None,
    rms: bool,
    eps: float,
    quantize: str,
) -> tuple[Tensor, ...]:
    rstd = x.new_empty(x.shape[:-1], dtype=widened(x))
    y, mean = x.new_empty(x.shape), rstd.new_empty(0 if rms else rstd.shape)
    return y, mean, rstd, *fp8_outputs(y, quantize)


def _backward_fake(
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
    def sums(wanted: bool) -> Tensor:
        return rstd.new_empty(scale.shape if wanted else 0)

    shifted = want_mod and has_shift
    return (
        x.new_empty(x.shape),
        sums(want_mod),
        sums(shifted),
        sums(want_mod and t0 is not None),
        sums(shifted and t0 is not None),
    )


_norm_modulate = OP.register(
    "(Tensor x, Tensor scale, Tensor? shift, Tensor? t0, Tensor? scale_t0, Tensor? shift_t0,"
    " bool rms, float eps, str quantize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    (0, 1, 2, 4, 5),
)
_norm_modulate_backward = OP_BACKWARD.register(
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor? t0, Tensor? scale_t0,"
    " bool rms, bool want_mod, bool has_shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    (0, 1, 4, 6),
)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        t0: Tensor | None,
        scale_t0: Tensor | None,
        shift_t0: Tensor | None,
        rms: bool,
        eps: float,
        quantize: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows = (scale, shift, t0, scale_t0, shift_t0)
        y, mean, rstd, *fp8 = _norm_modulate(x, *rows, rms, eps, quantize, backend)
        ctx.save_for_backward(x, mean, rstd, scale, t0, scale_t0)
        ctx.rms, ctx.backend = rms, backend
        ctx.dtypes = [None if t is None else t.dtype for t in (scale, shift, scale_t0, shift_t0)]
        ctx.mark_non_differentiable(*fp8)
        ctx.set_materialize_grads(False)
        return y, *fp8

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        want_shift = needs[2] or needs[5]
        dx, dscale, dshift, dscale_t0, dshift_t0 = _norm_modulate_backward(
            grad,
            *ctx.saved_tensors,
            ctx.rms,
            needs[1] or needs[4] or want_shift,
            want_shift,
            ctx.backend,
        )
        dscale, dshift, dscale_t0, dshift_t0 = (
            gradient_for(t, dtype)
            for t, dtype in zip((dscale, dshift, dscale_t0, dshift_t0), ctx.dtypes, strict=True)
        )
        return dx, dscale, dshift, None, dscale_t0, dshift_t0, None, None, None, None


# ---- public -------------------------------------------------------------------------------------
@overload
def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: None = None,
) -> Tensor: ...
@overload
def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: str,
) -> Quantized: ...
def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    t0: Tensor | None = None,
    scale_t0: Tensor | None = None,
    shift_t0: Tensor | None = None,
    quantize: str | None = None,
) -> Tensor | Quantized:
    """n(x) (1 + scale) + shift, in the shape and dtype of x; see the module docstring.

    x: [B, S, D] or [B, D], float32 or bfloat16.
    scale, shift: [B, D], float32 or bfloat16 each; no shift is a shift of 0.
    norm: 'layer' or 'rms'. eps: added to the variance (or mean square), finite and >= 0.
    t0: bool [S] or [B, S]; True tokens take scale_t0 and shift_t0 [B, D] instead.
    quantize: "row" or "block" returns Quantized(y, q, scale): q float8_e4m3fn in the shape of x,
        scale float32 [..., 1] or [..., ceil(D / 128)].
    Raises ValueError for shapes, dtypes, devices or names outside this.
    """
    op = "norm_modulate"
    firsts = {"scale": scale, "shift": shift}
    at_t0 = {"scale_t0": scale_t0, "shift_t0": shift_t0}
    t0 = require_modulated(op, {"x": x}, firsts, t0, at_t0)
    require_norm(op, norm, eps)
    granularity = require_quantize(op, quantize)
    options = (norm == "rms", eps, granularity, forced_backend())
    args = (as_tokens(x), scale, shift, t0, scale_t0, shift_t0, *options)
    rows = (x, scale, shift, scale_t0, shift_t0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in rows):
        y, q, q_scale = _NormModulate.apply(*args)
    else:
        y, _, _, q, q_scale = _norm_modulate(*args)
    y = from_tokens(y, x)
    return quantized(y, q, q_scale) if granularity else y
