"""fp8_linear: y = x W^T + bias with x and W in 8-bit floats, W frozen and quantised once.

    xq, xs = fp8_quantize(x)               on every call, unless x comes quantised
    y      = (xq Wq^T) xs Ws^T + bias      products of fp8, sums in float32
    dL/dx  = dL/dy W                       grad="bf16": W in high precision
    dL/dx  = (gq Wtq^T) gs Wts^T           grad="fp8": g = dL/dy quantised (e4m3fn by rows and
                                           blocks, e5m2 by tensor), and W^T, quantised once

Weights have no gradient: that is what makes the transposed activations of fp8 training unnecessary
(LoRA trains on top; see lora_linear).

Shapes: x [..., K], weight_q [N, K], bias [N], y [..., N]; K and N multiples of 16, for the GEMM.
Granularity "row": scales [..., 1] and [N, 1], a row of y depends on its row of x alone. "block":
scales [..., K / 128] and [N, K / 128], K a multiple of 128 (N too for grad="fp8"). "tensor": scales
[1], one outlier or a different batch changes all rows.
Dtypes: x and y float32 or bfloat16; x is rounded to fp8 (2 to 3 % of each element, e4m3fn), so y
is that far from the exact product whatever the GEMM does, and rounded once or, with a bias in
bfloat16, twice to the dtype of x.
GEMM: cuBLASLt on CUDA, through torch._scaled_mm and, by blocks, torch.nn.functional.scaled_mm
(sm_90). On a CPU the 8-bit numbers, exact in float32, go through sgemm: torch._scaled_mm is there
too, 20 times slower.
Batch-invariance: by rows and blocks bitwise on the CPU, where rows go through the GEMM in tiles of
TILE, padded. On CUDA the quantisation is, and cuBLASLt may choose another kernel for another number
of rows: calls of one shape give the same bits.
Source: the rowwise recipe of torchao's float8 and of vLLM; Transformer Engine's current scaling;
1 x 128 blocks: DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qirl_fast import _cpu
from qirl_fast.ops._checks import LARGE_DTYPES, REFERENCE_DTYPES
from qirl_fast.ops._fp8_checks import (
    MULTIPLE,
    require_frozen,
    require_gradient_weight,
    require_linear,
    require_quantized,
)
from qirl_fast.ops._triton import missing_triton
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.fp8_quantize import BLOCK, Quantized, fp8_quantize_reference
from qirl_fast.ops.fp8_quantize import OP as QUANTIZE

TILE = 256  # rows a call of the CPU's GEMM, where rows do not depend on each other


# ---- reference ----------------------------------------------------------------------------------
def fp8_linear_reference(
    x: Tensor,
    xq: Tensor | None,
    xs: Tensor | None,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    granularity: str,
    e5m2: bool,
) -> Tensor:
    """Quantise, dequantise, multiply in float32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if xq is None or xs is None:
        xq, xs = fp8_quantize_reference(x, granularity, e5m2, False)
    with torch.autocast(x.device.type, enabled=False):
        y = _dequantized(xq, xs, wide) @ _dequantized(weight_q, weight_scale, wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q scale [..., K] in `dtype`; scale [1], [..., 1] or [..., ceil(K / 128)]."""
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]
    return q.to(dtype) * scale.to(dtype)


# ---- cpu, triton, cuda --------------------------------------------------------------------------
def _run(
    backend: str,
    x: Tensor,
    xq: Tensor | None,
    xs: Tensor | None,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    granularity: str,
    e5m2: bool,
) -> Tensor:
    """x quantised by that backend of fp8_quantize, then the GEMM."""
    if xq is None or xs is None:
        name = QUANTIZE.choose(backend, x.device, x.dtype)
        xq, xs = QUANTIZE.backends[name].run(x, granularity, e5m2, False)
    xq = xq.reshape(-1, xq.shape[-1]).contiguous()
    xs = xs if granularity == "tensor" else xs.reshape(len(xq), -1)
    gemm = _gemm_cuda if x.device.type == "cuda" else _gemm_cpu
    with torch.autocast(x.device.type, enabled=False):
        y = gemm(xq, xs, weight_q, weight_scale, bias, granularity, x.dtype)
    return y.reshape(*x.shape[:-1], weight_q.shape[0])


def _run_cuda(*args: Any) -> Tensor:
    """torch's GEMM behind what quantises CUDA tensors by default; ours where that is asked for."""
    return _run("cuda" if forced_backend() == "cuda" else "", *args)


def _gemm_cpu(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    granularity: str,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N]. Every row meets the same kernel, whatever the batch: TILE rows at a time, padded."""
    rows = len(xq)
    tile = rows if granularity == "tensor" else TILE
    w_KN = _widened(wq, ws).t()
    start = w_KN.new_zeros(len(wq)) if bias is None else bias.float()
    y = _cpu.new_output((rows, len(wq)), LARGE_DTYPES.index(dtype))
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        part = _widened(xq[first:last], xs if granularity == "tensor" else xs[first:last])
        if last - first == tile and dtype == torch.float32:
            torch.addmm(start, part, w_KN, out=y[first:last])
            continue
        part = F.pad(part, (0, 0, 0, tile - (last - first)))
        y[first:last] = torch.addmm(start, part, w_KN)[: last - first]
    return y


def _widened(q: Tensor, scale: Tensor) -> Tensor:
    """q scale in float32 [rows, K], dense, on a CPU: C++, csrc/cpu/fp8_linear.inl.cpp."""
    unit = {1: 0, 2: q.shape[1] if scale.shape[-1] == 1 else BLOCK}[scale.ndim]
    return _cpu.fp8_widen(q, scale, unit, q.dtype == torch.float8_e5m2, torch.get_num_threads())


def _gemm_cuda(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    granularity: str,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N]. cuBLASLt scales rows only into bfloat16, and adds no float32 bias."""
    w_KN, ws = wq.t(), ws.contiguous()  # torch._scaled_mm takes no other scales
    if granularity == "block":
        kind = F.ScalingType.BlockWise1x128
        rows, short = len(xq), -len(xq) % MULTIPLE  # cuBLASLt takes whole multiples
        xq = F.pad(xq.view(torch.uint8), (0, 0, 0, short)).view(xq.dtype)
        xs, ws = (s.t().contiguous().t() for s in (F.pad(xs, (0, 0, 0, short), value=1.0), ws))
        y = F.scaled_mm(xq, w_KN, xs, kind, ws, kind, output_dtype=torch.bfloat16)[:rows].to(dtype)
        return y if bias is None else y + bias.to(dtype)
    if dtype == torch.bfloat16:
        bias = None if bias is None else bias.to(dtype)
        scales = (xs, ws.t()) if granularity == "row" else (xs, ws)
        return torch._scaled_mm(xq, w_KN, *scales, bias=bias, out_dtype=dtype)
    one = xs.new_ones(())
    y = torch._scaled_mm(xq, w_KN, one, one, out_dtype=dtype) * xs * ws.t()
    return y if bias is None else y + bias


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "fp8_linear",
    {
        "reference": Backend(fp8_linear_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(partial(_run, "cpu"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(partial(_run, "triton"), ("cuda",), LARGE_DTYPES, missing_triton),
        "cuda": Backend(_run_cuda, ("cuda",), LARGE_DTYPES),
    },
    default={"cpu": "cpu", "cuda": "cuda"},
)


def _fake(x: Tensor, xq: Tensor | None, xs: Tensor | None, weight_q: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))


_fp8_linear = OP.register(
    "(Tensor x, Tensor? xq, Tensor? xs, Tensor weight_q, Tensor weight_scale, Tensor? bias,"
    " str granularity, bool e5m2) -> Tensor",
    _fake,
)


class _Fp8Linear(torch.autograd.Function):
    """In backward the op is its own gradient, on W^T; or a plain product with W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xq: Tensor | None,
        xs: Tensor | None,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        granularity: str,
        weight: Tensor,
        weight_t_scale: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_t_scale)
        ctx.granularity, ctx.backend = granularity, backend
        return _fp8_linear(x, xq, xs, weight_q, weight_scale, bias, granularity, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        if scale is None:
            dx = grad @ weight.to(grad.dtype)
        else:
            e5m2 = ctx.granularity == "tensor"
            given = (grad, None, None, weight, scale, None, ctx.granularity, e5m2)
            dx = _fp8_linear(*given, ctx.backend)
        return dx, *(None,) * 9


# ---- public -------------------------------------------------------------------------------------
def fp8_linear(
    x: Tensor | Quantized,
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

    x: [..., K], float32 or bfloat16; or Quantized(y, q, scale), y with what fp8_quantize or an op's
    quantize= made of it in this granularity: the gradient goes to y.
    weight_q, weight_scale: fp8_quantize(W, granularity=...) of W [N, K], in e4m3fn. bias: [N],
    float32 or bfloat16. granularity: "row", "block" or "tensor", also for x.
    grad: how dx is made when x requires grad. "bf16" needs weight, W itself in float32 or bfloat16;
    "fp8" needs weight_t = fp8_quantize(W, granularity=..., transpose=True).
    Raises ValueError for anything outside this, and where a weight, scale or bias requires grad.
    """
    x, xq, xs = x if isinstance(x, Quantized) else (x, None, None)
    require_linear(x, weight_q, weight_scale, bias, granularity)
    if xq is not None:
        require_quantized(x, xq, xs, granularity)
    require_gradient_weight(x, weight_q, granularity, grad, weight, weight_t)
    backend = forced_backend()
    given = (x, xq, xs, weight_q, weight_scale, bias, granularity)
    if torch.is_grad_enabled():
        require_frozen(weight_q, weight_scale, bias, weight, weight_t)
        if x.requires_grad:
            back, scale = (weight, None) if weight_t is None or grad == "bf16" else weight_t
            out: Tensor = _Fp8Linear.apply(*given, back, scale, backend)
            return out
    return _fp8_linear(*given, False, backend)
