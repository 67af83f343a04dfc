"""fp8_quantize: x ~ q scale with q in 8-bit floats, scales taken from x itself (dynamic).

For each span of x that shares a scale, with L the largest number of the fp8 type (448 for e4m3fn,
57344 for e5m2):

    amax  = largest |x| among the finite elements of the span
    scale = max(amax / L, 2^-126),  1 where amax = 0
    q     = clamp(x (1 / scale), -L, L) rounded to nearest, ties to even

Spans (granularity): "row": a vector of the last dimension, scale [..., 1]; "block": 128 consecutive
elements of it (fewer in the last), scale [..., ceil(K / 128)]; "tensor": all of x, scale [1]. Rows
and blocks do not see their neighbours, so their results do not depend on the batch; a whole
tensor's do. q has the shape of x; q and scale are what torch._scaled_mm takes.
transpose=True quantises the transpose: with x as a matrix [M, K], q is [K, M] and contiguous, and
spans run along M, as a GEMM over M wants it.

Non-finite elements enter no scale and change no other element: NaN gives NaN; inf gives inf in
e5m2 and NaN in e4m3fn, which has no inf (Tensor.to makes that NaN or 448, by torch version).

Dtypes: x float32 or bfloat16; scale float32; arithmetic in float32, 1 / scale rounded once. All
backends give the same bits. No gradient: a rounding has none.
Source: Micikevicius et al., arXiv 2209.05433; torch's Tensor.to(float8) for the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    matrix,
    require_no_grad,
    require_operands,
)
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import cuda_module, device_of, missing_cuda, stream_of
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

GRANULARITIES = ("row", "tensor", "block")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 128  # elements that share a scale, granularity "block"


class Quantized(NamedTuple):
    """y and its fp8 form, y ~ q scale: what an op returns that is asked to `quantize` its result.

    y: [..., K]. q: float8_e4m3fn, contiguous, in the shape of y. scale: float32 [..., 1] for "row",
    [..., ceil(K / 128)] for "block". Gradients flow through y alone.
    """

    y: Tensor
    q: Tensor
    scale: Tensor


def _dtype(e5m2: bool) -> torch.dtype:
    return FP8_DTYPES[int(e5m2)]


# ---- reference ----------------------------------------------------------------------------------
def fp8_quantize_reference(
    x: Tensor, granularity: str, e5m2: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """The definition. In float32 whatever the dtype of x: the rounding is part of it."""
    x = x.float()
    if transpose:
        x = x.reshape(-1, x.shape[-1]).t()
    dtype = _dtype(e5m2)
    length, largest = x.shape[-1], torch.finfo(dtype).max
    size = {"row": length, "tensor": x.numel(), "block": BLOCK}[granularity]
    spans = x.reshape(1, -1) if granularity == "tensor" else x
    short = -spans.shape[-1] % size
    spans = torch.nn.functional.pad(spans, (0, short)).unflatten(-1, (-1, size))
    amax = spans.abs().masked_fill(~spans.isfinite(), 0.0).amax(-1, keepdim=True)
    scale = torch.where(amax > 0, (amax / largest).clamp(min=2.0**-126), 1.0)
    scaled = spans * (1.0 / scale)
    infinite = spans if e5m2 else spans * float("nan")
    clamped = torch.where(spans.isinf(), infinite, scaled.clamp(-largest, largest))
    q = clamped.to(dtype).flatten(-2)[..., : x.numel() if granularity == "tensor" else length]
    scale = scale.flatten() if granularity == "tensor" else scale.squeeze(-1)
    return q.reshape(x.shape).contiguous(), scale.contiguous()


# ---- cuda ---------------------------------------------------------------------------------------
def empty_outputs(
    x: Tensor, granularity: str, e5m2: bool, transpose: bool
) -> tuple[Tensor, Tensor, int]:
    """Empty q and scale, and the elements a scale (0: all)."""
    width = x.shape[-1]
    shape = (width, x.numel() // width) if transpose else tuple(x.shape)
    unit = {"row": shape[-1], "tensor": 0, "block": BLOCK}[granularity]
    scales = (1,) if unit == 0 else (*shape[:-1], (shape[-1] + unit - 1) // unit)
    q = x.new_empty(shape, dtype=_dtype(e5m2))
    return q, x.new_empty(scales, dtype=torch.float32), unit


def fp8_quantize_cuda(
    x: Tensor, granularity: str, e5m2: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/fp8_quantize.cu."""
    q, scale, unit = empty_outputs(x, granularity, e5m2, transpose)
    x = matrix(x)
    amax = x.new_empty(x.shape[0] if unit == 0 else 0, dtype=torch.float32)
    with device_of(x):
        cuda_module().fp8_quantize(
            x,
            q,
            scale,
            amax,
            unit,
            int(e5m2),
            transpose,
            stream_of(x),
        )
    return q, scale


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "fp8_quantize",
    {
        "reference": Backend(fp8_quantize_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("fp8_quantize"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("fp8_quantize", "fp8_quantize"),
            ("cuda",),
            LARGE_DTYPES,
            missing_triton,
        ),
        "cuda": Backend(fp8_quantize_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    default={"cpu": "cpu", "cuda": "reference"},
)


def _fake(x: Tensor, granularity: str, e5m2: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(x, granularity, e5m2, transpose)[:2]


_fp8_quantize = OP.register(
    "(Tensor x, str granularity, bool e5m2, bool transpose) -> (Tensor, Tensor)", _fake
)


# ---- public -------------------------------------------------------------------------------------
def fp8_quantize(
    x: Tensor,
    *,
    granularity: str = "row",
    dtype: torch.dtype = torch.float8_e4m3fn,
    transpose: bool = False,
) -> tuple[Tensor, Tensor]:
    """(q, scale) with x ~ q scale; see the module docstring.

    x: [..., K], float32 or bfloat16, at least one element; with transpose at least two dimensions.
    granularity: what shares a scale: "row", "tensor" or "block" (1 x 128).
    dtype of q: torch.float8_e4m3fn or torch.float8_e5m2.
    transpose: quantise x^T instead, q [K, M] contiguous.
    Raises ValueError for anything outside this, and where x requires grad in grad mode.
    """
    require_operands("fp8_quantize", {"x": x})
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"fp8_quantize: granularity must be {', '.join(GRANULARITIES)}; got {granularity!r}."
        )
    if dtype not in FP8_DTYPES:
        raise ValueError(
            f"fp8_quantize: dtype must be {' or '.join(map(str, FP8_DTYPES))}; got {dtype}."
        )
    if transpose and x.ndim < 2:
        raise ValueError(f"fp8_quantize: transpose needs shape [..., M, K]; got {tuple(x.shape)}.")
    require_no_grad("fp8_quantize", "rounding to fp8 has no gradient", x=x)
    with torch.no_grad():
        return _fp8_quantize(
            x, granularity, dtype == torch.float8_e5m2, transpose, forced_backend()
        )
