"""velocity_loss in Triton: block sums and the gradient in one pass, then a program for the rows.

Math, shapes, dtypes: qirl_fast/ops/velocity_loss.py.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.rows import BLOCK, CHUNK, ROWS, WARPS, block_count, row_totals, strided


@triton.jit
def velocity_kernel(
    v_ptr,
    target_ptr,
    weight_ptr,
    sums_ptr,
    dv_ptr,
    v_stride,
    target_stride,
    size,
    blocks,
    scale,
    HAS_WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row; dv = weight scale (v - target), scale = 2 / (elements of all rows)."""
    task = tl.program_id(0).to(tl.int64)
    row, i = task // blocks, (task % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    v = tl.load(v_ptr + row * v_stride + i, mask=inside, other=0.0)
    target = tl.load(target_ptr + row * target_stride + i, mask=inside, other=0.0)
    r = v.to(tl.float32) - target.to(tl.float32)
    tl.store(sums_ptr + task, tl.sum(r * r))
    if GRADIENT:
        slope = tl.load(weight_ptr + row) * scale if HAS_WEIGHT else scale
        tl.store(dv_ptr + row * size + i, (slope * r).to(v.dtype), mask=inside)


@triton.jit
def velocity_rows_kernel(
    sums_ptr,
    weight_ptr,
    loss_ptr,
    mse_ptr,
    rows,
    blocks,
    size,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """All rows in one program: mse and the loss."""
    total = tl.zeros([ROWS], tl.float64)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)
        mse = row_totals(sums_ptr, row, rows, blocks, ROWS, CHUNK) / size
        tl.store(mse_ptr + row, mse.to(tl.float32), mask=row < rows)
        if HAS_WEIGHT:
            mse *= tl.load(weight_ptr + row, mask=row < rows, other=0.0).to(tl.float64)
        total += mse
        first += ROWS
    tl.store(loss_ptr, (tl.sum(total) / rows).to(tl.float32))


# ---- launchers ----------------------------------------------------------------------------------
def velocity_loss(v, target, weight, want_grad):
    """(loss, mse, dv); arguments as the op's, already checked."""
    (size, blocks), rows = block_count(v), v.shape[0]
    dv = v.new_empty(v.shape if want_grad else 0)
    (v, v_stride), (target, target_stride) = strided(v), strided(target)
    sums = v.new_empty((rows, blocks), dtype=torch.float32)
    loss, mse = sums.new_empty(()), sums.new_empty(rows)
    weight = None if weight is None else weight.contiguous()
    given = sums if weight is None else weight
    velocity_kernel[(rows * blocks,)](
        v,
        target,
        given,
        sums,
        dv,
        v_stride,
        target_stride,
        size,
        blocks,
        2.0 / (size * rows),
        HAS_WEIGHT=weight is not None,
        GRADIENT=want_grad,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    velocity_rows_kernel[(1,)](
        sums,
        given,
        loss,
        mse,
        rows,
        blocks,
        size,
        HAS_WEIGHT=weight is not None,
        ROWS=ROWS,
        CHUNK=CHUNK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return loss, mse, dv


# ---- budget -------------------------------------------------------------------------------------
def _case(dtype: str, target: str, gradient: bool) -> Case:
    large = {"v_ptr": f"*{dtype}", "target_ptr": f"*{target}", "dv_ptr": f"*{dtype}"}
    sizes = dict.fromkeys(("v_stride", "target_stride", "size"), "i64")
    return Case(
        velocity_kernel,
        {
            **large,
            **sizes,
            "weight_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "blocks": "i32",
            "scale": "fp32",
        },
        {"HAS_WEIGHT": True, "GRADIENT": gradient, "BLOCK": BLOCK},
        WARPS,
        registers=40,
        divisible=(*large, *sizes),
    )


BUDGET = [
    _case("bf16", "bf16", gradient=True),
    _case("bf16", "fp32", gradient=True),
    _case("fp32", "fp32", gradient=True),
    _case("fp32", "fp32", gradient=False),
    Case(
        velocity_rows_kernel,
        {
            **dict.fromkeys(("sums_ptr", "weight_ptr", "loss_ptr", "mse_ptr"), "*fp32"),
            **dict.fromkeys(("rows", "blocks"), "i32"),
            "size": "i64",
        },
        {"HAS_WEIGHT": True, "ROWS": ROWS, "CHUNK": CHUNK},
        WARPS,
        registers=96,
        width=32,
        divisible=("sums_ptr", "blocks"),
    ),
]
