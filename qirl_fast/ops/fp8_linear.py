"""fp8_linear: y = x W^T + bias with x and W in 8-bit floats, W frozen and quantised once.

    xq, xs = fp8_quantize(x)               on every call
    y      = (xq Wq^T) xs Ws^T + bias      products of fp8, sums in float32 (torch._scaled_mm)
    dL/dx  = dL/dy W                       grad="bf16": W in high precision
    dL/dx  = (gq Wtq^T) gs Wts^T           grad="fp8": g = dL/dy quantised (e4m3fn by rows, e5m2 by
                                           tensor), and W^T, quantised once

Weights have no gradient: that is what makes the transposed activations of fp8 training unnecessary
(LoRA trains on top; see lora_linear).

Shapes: x [..., K], weight_q [N, K], bias [N], y [..., N]; K and N multiples of 16, for the GEMM.
Granularity "row": scales [..., 1] and [N, 1], a row of y depends on its row of x alone. "tensor":
scales [1], one outlier or a different batch changes all rows.
Dtypes: x and y float32 or bfloat16; x is rounded to fp8 (2 to 3 % of each element, e4m3fn), so y
is that far from the exact product whatever the GEMM does, and rounded once or, with a bias in
bfloat16, twice to the dtype of x.
Batch-invariance: by rows bitwise on the CPU, where rows go through the GEMM in tiles of TILE,
padded (torch._scaled_mm itself is not: its kernel depends on the number of rows). On CUDA the
quantisation is, and cuBLASLt may choose another kernel for another number of rows: calls of one
shape give the same bits.
Source: the rowwise recipe of torchao's float8 and of vLLM; Transformer Engine's current scaling.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast.ops._checks import LARGE_DTYPES, REFERENCE_DTYPES
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._fp8_checks import require_frozen, require_gradient_weight, require_linear
from qirl_fast.ops._triton import missing_triton
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.fp8_quantize import OP as QUANTIZE
from qirl_fast.ops.fp8_quantize import fp8_quantize_reference

TILE = 64  # rows a call of the CPU's GEMM, granularity "row"


# ---- reference ----------------------------------------------------------------------------------
def fp8_linear_reference(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, e5m2: bool
) -> Tensor:
    """Quantise, dequantise, multiply in float32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    granularity = "row" if weight_scale.ndim == 2 else "tensor"
    xq, xs = fp8_quantize_reference(x, granularity, e5m2, False)
    with torch.autocast(x.device.type, enabled=False):
        y = (xq.to(wide) * xs.to(wide)) @ (weight_q.to(wide) * weight_scale.to(wide)).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


# ---- cpu, triton, cuda: torch._scaled_mm --------------------------------------------------------
def _run(
    backend: str,
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    e5m2: bool,
) -> Tensor:
    """x quantised by that backend of fp8_quantize, then the GEMM."""
    by_row = weight_scale.ndim == 2
    x_MK = x.reshape(-1, x.shape[-1])
    quantize = QUANTIZE.choose_for(backend, x_MK).run
    xq, xs = quantize(x_MK, "row" if by_row else "tensor", e5m2, False)
    gemm = _gemm_cuda if x.device.type == "cuda" else _tiled if by_row else _gemm
    weight_scale = weight_scale.contiguous()  # torch._scaled_mm takes no other
    ws = weight_scale.t() if by_row else weight_scale
    with torch.autocast(x.device.type, enabled=False):  # it would reach into _scaled_mm on the CPU
        y = gemm(xq, xs, weight_q.t(), ws, bias, x.dtype)
    return y.reshape(*x.shape[:-1], weight_q.shape[0])


def _gemm(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(xq, wq, xs, ws, bias=bias, out_dtype=dtype)


def _tiled(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """_gemm on TILE rows at a time: every row meets the same kernel, whatever the batch."""
    rows, short = len(xq), -len(xq) % TILE
    padded = F.pad(xq.view(torch.uint8), (0, 0, 0, short)).view(xq.dtype)
    scales = F.pad(xs, (0, 0, 0, short), value=1.0)
    tiles = zip(padded.split(TILE), scales.split(TILE), strict=True)
    return torch.cat([_gemm(q, s, wq, ws, bias, dtype) for q, s in tiles])[:rows]


def _gemm_cuda(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """cuBLASLt scales rows only into bfloat16, and adds no float32 bias: float32 comes after."""
    if dtype == torch.bfloat16:
        return _gemm(xq, xs, wq, ws, bias, dtype)
    one = xs.new_ones(())
    y = torch._scaled_mm(xq, wq, one, one, out_dtype=dtype) * xs * ws
    return y if bias is None else y + bias


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "fp8_linear",
    {
        "reference": Backend(fp8_linear_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(partial(_run, "cpu"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(partial(_run, "triton"), ("cuda",), LARGE_DTYPES, missing_triton),
        "cuda": Backend(partial(_run, "cuda"), ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    default={"cpu": "cpu", "cuda": "reference"},
)


def _fake(x: Tensor, weight_q: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))


_fp8_linear = OP.register(
    "(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias, bool e5m2) -> Tensor", _fake
)


class _Fp8Linear(torch.autograd.Function):
    """In backward the op is its own gradient, on W^T; or a plain product with W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        weight_t_scale: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_t_scale)
        ctx.backend = backend
        return _fp8_linear(x, weight_q, weight_scale, bias, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        if scale is None:
            dx = grad @ weight.to(grad.dtype)
        else:
            dx = _fp8_linear(grad, weight, scale, None, scale.ndim == 1, ctx.backend)
        return dx, *(None,) * 6


# ---- public -------------------------------------------------------------------------------------
def fp8_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    granularity: str = "row",
    weight: Tensor | None = None,
    weight_t: tuple[Tensor, Tensor] | None = None,
    grad: str = "bf16",
) -> Tensor:
    """x W^T + bias [..., N] in the dtype of x; see the module docstring.

    x: [..., K], float32 or bfloat16. weight_q, weight_scale: fp8_quantize(W, granularity=...) of
    W [N, K], in e4m3fn. bias: [N], float32 or bfloat16. granularity: "row" or "tensor", also for x.
    grad: how dx is made when x requires grad. "bf16" needs weight, W itself in float32 or bfloat16;
    "fp8" needs weight_t = fp8_quantize(W, granularity=..., transpose=True).
    Raises ValueError for anything outside this, and where a weight, scale or bias requires grad.
    """
    require_linear(x, weight_q, weight_scale, bias, granularity)
    require_gradient_weight(x, weight_q, granularity, grad, weight, weight_t)
    backend = forced_backend()
    if torch.is_grad_enabled():
        require_frozen(weight_q, weight_scale, bias, weight, weight_t)
        if x.requires_grad:
            back, scale = (weight, None) if weight_t is None or grad == "bf16" else weight_t
            return _Fp8Linear.apply(x, weight_q, weight_scale, bias, back, scale, backend)
    return _fp8_linear(x, weight_q, weight_scale, bias, False, backend)
