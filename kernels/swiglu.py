"""swiglu and its gradients in Triton. Math, shapes, dtypes: qirl_fast/ops/swiglu.py.

exp and division are Triton's approximate ones (2 ulp): close to the C++ kernels, not their bits.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

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
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, width, blocks, BLOCK: tl.constexpr
):
    row, i, inside_row = _block(width, blocks, BLOCK)
    stored = tl.load(gate_ptr + row * gate_stride + i, mask=inside_row, other=0.0)
    up = tl.load(up_ptr + row * up_stride + i, mask=inside_row, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    above = tl.where(gate < -85.0, -85.0, gate)
    inside = tl.where(above > 85.0, 85.0, above)
    y = (above / (1.0 + tl.exp(-inside))) * up
    tl.store(y_ptr + row * width + i, y.to(stored.dtype), mask=inside_row)


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
def _matrices(*tensors):
    """One row of everything when all are contiguous; else [rows, K] with dense rows."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    views = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [v if v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous() for v in views]


def swiglu(gate, up):
    """y in the shape and dtype of gate."""
    y = gate.new_empty(gate.shape)
    gate, up = _matrices(gate, up)
    rows, width = gate.shape
    blocks = triton.cdiv(width, BLOCK)
    forward_kernel[(rows * blocks,)](
        gate,
        up,
        y,
        gate.stride(0),
        up.stride(0),
        width,
        blocks,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return y


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
def _case(kernel, dtype, pointers, strides):
    sizes = dict.fromkeys((*strides, "width"), "i64")
    return Case(
        kernel,
        {**dict.fromkeys(pointers, f"*{dtype}"), **sizes, "blocks": "i32"},
        {"BLOCK": BLOCK},
        WARPS,
        registers=64,
        divisible=(*pointers, *sizes),
    )


_FORWARD = ("gate_ptr", "up_ptr", "y_ptr"), ("gate_stride", "up_stride")
_BACKWARD = (
    ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"),
    ("dy_stride", "gate_stride", "up_stride"),
)
BUDGET = [
    _case(kernel, dtype, *arguments)
    for dtype in ("bf16", "fp32")
    for kernel, arguments in ((forward_kernel, _FORWARD), (backward_kernel, _BACKWARD))
]
