"""swiglu and its gradients in Triton. Math, shapes, dtypes: qirl_fast/ops/swiglu.py.

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
def _block(width, blocks, BLOCK: tl.constexpr):
    """Row, element indices and mask of this program's block."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    return row, i, i < width


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    q_ptr,
    q_scale_ptr,
    gate_stride,
    up_stride,
    width,
    blocks,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """UNIT: elements that share a scale where y is wanted in fp8 too, else 0."""
    row, i, inside_row = _block(width, blocks, BLOCK)
    stored = tl.load(gate_ptr + row * gate_stride + i, mask=inside_row, other=0.0)
    up = tl.load(up_ptr + row * up_stride + i, mask=inside_row, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    above = tl.where(gate < -85.0, -85.0, gate)
    inside = tl.where(above > 85.0, 85.0, above)
    y = (above / (1.0 + tl.exp(-inside))) * up
    y = y.to(stored.dtype)
    tl.store(y_ptr + row * width + i, y, mask=inside_row)
    if UNIT:
        first = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK
        store_quantized(y.to(tl.float32), q_ptr, q_scale_ptr, row, first, width, UNIT, BLOCK)


@triton.jit
def backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    row, i, inside_row = _block(width, blocks, BLOCK)
    stored = tl.load(gate_ptr + row * gate_stride + i, mask=inside_row, other=0.0)
    up = tl.load(up_ptr + row * up_stride + i, mask=inside_row, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + i, mask=inside_row, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    above = tl.where(gate < -85.0, -85.0, gate)
    inside = tl.where(above > 85.0, 85.0, above)
    e = tl.exp(-inside)
    s = 1.0 / (1.0 + e)
    dup = dy * (above * s)
    dgate = (dy * up) * (s + (inside * s) * (e * s))
    tl.store(dgate_ptr + row * width + i, dgate.to(stored.dtype), mask=inside_row)
    tl.store(dup_ptr + row * width + i, dup.to(stored.dtype), mask=inside_row)


# ---- launchers ----------------------------------------------------------------------------------
def _matrices(*tensors, rows=False):
    """One row of everything when all are contiguous and not `rows`; else [rows, K], rows dense."""
    if not rows and all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    views = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [v if v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous() for v in views]


def swiglu(gate, up, quantize):
    """(y, q, scale): y in the shape and dtype of gate."""
    y = gate.new_empty(gate.shape)
    q, scale = outputs(y, quantize)
    gate, up = _matrices(gate, up, rows=quantize != "")
    rows, width = gate.shape
    block, warps = pointwise_plan("swiglu", width, quantize, BLOCK, WARPS)
    blocks = triton.cdiv(width, block)
    forward_kernel[(rows * blocks,)](
        *(gate, up, y, *pointers(q, scale, y), gate.stride(0), up.stride(0), width, blocks),
        UNIT=unit_of(quantize, block),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y, q, scale


def swiglu_backward(grad, gate, up):
    """(dgate, dup)."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grad, gate, up = _matrices(grad, gate, up)
    rows, width = gate.shape
    blocks = triton.cdiv(width, BLOCK)
    backward_kernel[(rows * blocks,)](
        grad,
        gate,
        up,
        dgate,
        dup,
        grad.stride(0),
        gate.stride(0),
        up.stride(0),
        width,
        blocks,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return dgate, dup


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
    limits = {"registers": 64, **limits}
    return Case(
        kernel, {**kinds, **sizes, "blocks": "i32"}, constexprs, warps, divisible=aligned, **limits
    )


_FORWARD = ("gate_ptr", "up_ptr", "y_ptr"), ("gate_stride", "up_stride")
_BACKWARD = (
    ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"),
    ("dy_stride", "gate_stride", "up_stride"),
)
BUDGET = []
for _dtype in ("bf16", "fp32"):
    BUDGET += [
        _case(forward_kernel, _dtype, *_FORWARD),
        _case(backward_kernel, _dtype, *_BACKWARD),
        _case(forward_kernel, _dtype, *_FORWARD, "block", registers=96, narrow=1),
        _case(forward_kernel, _dtype, *_FORWARD, "row", 3072, registers=96, narrow=1),
        _case(forward_kernel, _dtype, *_FORWARD, "row", 12288, registers=128, narrow=1),
    ]
