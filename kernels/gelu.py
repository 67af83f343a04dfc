"""gelu and its gradient in Triton. Math, shapes, dtypes: qirl_fast/ops/gelu.py.

exp and division are Triton's approximate ones (2 ulp): close to the C++ kernels, not their bits.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.fp8_quantize import (
    outputs,
    pointers,
    pointwise_plan,
    row_config,
    store_quantized,
    unit_of,
)

BLOCK = 2048
WARPS = 4


@triton.jit
def _decay(inside, x2):
    """exp(-t), t = 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    return tl.exp(inside * (x2 * -0.0713548163 - 1.59576912))


@triton.jit
def _block(width, blocks, BLOCK: tl.constexpr):
    """Row, element indices and mask of this program's block."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    return row, i, i < width


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    q_ptr,
    q_scale_ptr,
    x_stride,
    width,
    blocks,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """UNIT: elements that share a scale where y is wanted in fp8 too, else 0."""
    row, i, inside_row = _block(width, blocks, BLOCK)
    stored = tl.load(x_ptr + row * x_stride + i, mask=inside_row, other=0.0)
    x = stored.to(tl.float32)
    above = tl.where(x < -9.9, -9.9, x)
    inside = tl.where(above > 9.9, 9.9, above)
    y = above / (1.0 + _decay(inside, inside * inside))
    y = y.to(stored.dtype)
    tl.store(y_ptr + row * width + i, y, mask=inside_row)
    if UNIT:
        first = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK
        store_quantized(y.to(tl.float32), q_ptr, q_scale_ptr, row, first, width, UNIT, BLOCK)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, width, blocks, BLOCK: tl.constexpr):
    row, i, inside_row = _block(width, blocks, BLOCK)
    stored = tl.load(x_ptr + row * x_stride + i, mask=inside_row, other=0.0)
    dy = tl.load(dy_ptr + row * dy_stride + i, mask=inside_row, other=0.0).to(tl.float32)
    x = stored.to(tl.float32)
    above = tl.where(x < -9.9, -9.9, x)
    inside = tl.where(above > 9.9, 9.9, above)
    x2 = inside * inside
    e = _decay(inside, x2)
    s = 1.0 / (1.0 + e)
    dt = x2 * 0.214064449 + 1.59576912
    dx = dy * (s + (inside * dt) * (s * (e * s)))
    tl.store(dx_ptr + row * width + i, dx.to(stored.dtype), mask=inside_row)


# ---- launchers ----------------------------------------------------------------------------------
def _matrices(*tensors, rows=False):
    """One row of everything when all are contiguous and not `rows`; else [rows, K], rows dense."""
    if not rows and all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    views = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [v if v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous() for v in views]


def gelu(x, quantize):
    """(y, q, scale): y in the shape and dtype of x."""
    y = x.new_empty(x.shape)
    q, scale = outputs(y, quantize)
    (x,) = _matrices(x, rows=quantize != "")
    rows, width = x.shape
    block, warps = pointwise_plan("gelu", width, quantize, BLOCK, WARPS)
    blocks = triton.cdiv(width, block)
    forward_kernel[(rows * blocks,)](
        *(x, y, *pointers(q, scale, y), x.stride(0), width, blocks),
        UNIT=unit_of(quantize, block),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y, q, scale


def gelu_backward(grad, x):
    """dx in the shape and dtype of x."""
    dx = x.new_empty(x.shape)
    grad, x = _matrices(grad, x)
    rows, width = x.shape
    blocks = triton.cdiv(width, BLOCK)
    backward_kernel[(rows * blocks,)](
        grad,
        x,
        dx,
        grad.stride(0),
        x.stride(0),
        width,
        blocks,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return dx


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, pointers, strides, quantize="", width=0, **limits):
    """quantize, width: of a forward kernel that also writes fp8."""
    kinds = dict.fromkeys(pointers, f"*{dtype}")
    block, warps = row_config(width) if quantize == "row" else (BLOCK, WARPS)
    constexprs = {"BLOCK": block}
    if kernel is forward_kernel:
        kinds |= {"q_ptr": "*u8", "q_scale_ptr": "*fp32"}
        constexprs["UNIT"] = unit_of(quantize, block)
    sizes = dict.fromkeys((*strides, "width"), "i64")
    aligned = (*kinds, *sizes)
    limits = {"registers": 48, **limits}
    return Case(
        kernel, {**kinds, **sizes, "blocks": "i32"}, constexprs, warps, divisible=aligned, **limits
    )


_FORWARD = ("x_ptr", "y_ptr"), ("x_stride",)
_BACKWARD = ("dy_ptr", "x_ptr", "dx_ptr"), ("dy_stride", "x_stride")
BUDGET = []
for _dtype in ("bf16", "fp32"):
    BUDGET += [
        _case(forward_kernel, _dtype, *_FORWARD),
        _case(backward_kernel, _dtype, *_BACKWARD),
        _case(forward_kernel, _dtype, *_FORWARD, "block", registers=96, narrow=1),
        _case(forward_kernel, _dtype, *_FORWARD, "row", 3072, registers=96, narrow=1),
        _case(forward_kernel, _dtype, *_FORWARD, "row", 12288, registers=128, narrow=1),
    ]
