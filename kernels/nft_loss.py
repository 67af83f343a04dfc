"""nft_loss in Triton: five sums of each block, a program for the rows, and the gradient.

The gradient needs the sums of the whole row, so it reads the inputs again. Math, shapes, dtypes:
qirl_fast/ops/nft_loss.py.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.rows import BLOCK, CHUNK, ROWS, WARPS, block_count, row_totals, strided


@triton.jit(do_not_specialize=["rows"])
def nft_kernel(
    v_ptr,
    v_old_ptr,
    v_ref_ptr,
    x_t_ptr,
    x0_ptr,
    sigma_ptr,
    slopes_ptr,
    out_ptr,
    v_stride,
    v_old_stride,
    v_ref_stride,
    x_t_stride,
    x0_stride,
    rows,
    size,
    blocks,
    beta,
    HAS_REF: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: its sums to out [5, rows, blocks], or dv from slopes [3, rows]."""
    task = tl.program_id(0).to(tl.int64)
    row, i = task // blocks, (task % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    v = tl.load(v_ptr + row * v_stride + i, mask=inside, other=0.0)
    v_old = tl.load(v_old_ptr + row * v_old_stride + i, mask=inside, other=0.0).to(tl.float32)
    x_t = tl.load(x_t_ptr + row * x_t_stride + i, mask=inside, other=0.0).to(tl.float32)
    x0 = tl.load(x0_ptr + row * x0_stride + i, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.load(sigma_ptr + row)
    new = v.to(tl.float32)
    y = (x_t - x0) - sigma * v_old
    d = (sigma * beta) * (new - v_old)
    better, worse = y - d, y + d
    if HAS_REF:
        v_ref = tl.load(v_ref_ptr + row * v_ref_stride + i, mask=inside, other=0.0)
        away = new - v_ref.to(tl.float32)
    if GRADIENT:
        slope_better, slope_worse = tl.load(slopes_ptr + row), tl.load(slopes_ptr + rows + row)
        dv = slope_better * better + slope_worse * worse
        if HAS_REF:
            dv += tl.load(slopes_ptr + 2 * rows + row) * away
        tl.store(out_ptr + row * size + i, dv.to(v.dtype), mask=inside)
    else:
        step = rows.to(tl.int64) * blocks
        tl.store(out_ptr + task, tl.sum(tl.abs(better)))
        tl.store(out_ptr + step + task, tl.sum(tl.abs(worse)))
        tl.store(out_ptr + 2 * step + task, tl.sum(better * better))
        tl.store(out_ptr + 3 * step + task, tl.sum(worse * worse))
        if HAS_REF:
            tl.store(out_ptr + 4 * step + task, tl.sum(away * away))


@triton.jit(do_not_specialize=["rows", "blocks"])
def nft_rows_kernel(
    sums_ptr,
    sigma_ptr,
    advantage_ptr,
    slopes_ptr,
    metrics_ptr,
    loss_ptr,
    rows,
    blocks,
    size,
    BETA: tl.constexpr,
    ADV_CLIP: tl.constexpr,
    REF_WEIGHT: tl.constexpr,
    HAS_REF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """All rows in one program: metrics, slopes, loss. Comparisons let a NaN pass."""
    total = tl.zeros([ROWS], tl.float64)
    step = rows * blocks.to(tl.int64)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        w_better = row_totals(sums_ptr, row, rows, blocks, ROWS, CHUNK) / size
        w_worse = row_totals(sums_ptr + step, row, rows, blocks, ROWS, CHUNK) / size
        better = row_totals(sums_ptr + 2 * step, row, rows, blocks, ROWS, CHUNK) / size
        worse = row_totals(sums_ptr + 3 * step, row, rows, blocks, ROWS, CHUNK) / size
        ref = tl.zeros([ROWS], tl.float64)
        if HAS_REF:
            ref = row_totals(sums_ptr + 4 * step, row, rows, blocks, ROWS, CHUNK) / size
        floor = tl.full([ROWS], 1e-5, tl.float64)
        w_better = tl.where(w_better < floor, floor, w_better)
        w_worse = tl.where(w_worse < floor, floor, w_worse)
        sigma = tl.load(sigma_ptr + row, mask=inside, other=0.0).to(tl.float64)
        a = tl.load(advantage_ptr + row, mask=inside, other=0.0).to(tl.float64) / ADV_CLIP
        p = 0.5 * tl.where(a < -1.0, -1.0, tl.where(a > 1.0, 1.0, a)) + 0.5
        policy = (p * better / w_better + (1.0 - p) * worse / w_worse) * (ADV_CLIP / BETA)
        total += tl.where(inside, policy + REF_WEIGHT * ref, 0.0)
        scale = 2.0 / (tl.zeros([ROWS], tl.float64) + size) / rows
        pull = scale * ADV_CLIP * sigma
        tl.store(slopes_ptr + row, (0.0 - pull * p / w_better).to(tl.float32), mask=inside)
        slope_worse = pull * (1.0 - p) / w_worse
        tl.store(slopes_ptr + rows + row, slope_worse.to(tl.float32), mask=inside)
        tl.store(slopes_ptr + 2 * rows + row, (scale * REF_WEIGHT).to(tl.float32), mask=inside)
        tl.store(metrics_ptr + row, policy.to(tl.float32), mask=inside)
        tl.store(metrics_ptr + rows + row, better.to(tl.float32), mask=inside)
        tl.store(metrics_ptr + 2 * rows + row, worse.to(tl.float32), mask=inside)
        tl.store(metrics_ptr + 3 * rows + row, ref.to(tl.float32), mask=inside)
        first += ROWS
    tl.store(loss_ptr, (tl.sum(total) / rows).to(tl.float32))


# ---- launchers ----------------------------------------------------------------------------------
def nft_loss(v, v_old, v_ref, x_t, x0, sigma, advantage, beta, adv_clip, ref_weight, want_grad):
    """(loss, metrics, dv); arguments as the op's, already checked."""
    has_ref = v_ref is not None
    large, strides = zip(*map(strided, (v, v_old, v_ref if has_ref else v, x_t, x0)), strict=True)
    (size, blocks), rows = block_count(v), v.shape[0]
    sigma, advantage = sigma.contiguous(), advantage.contiguous()
    sums = sigma.new_empty((5, rows, blocks))
    loss, metrics = sigma.new_empty(()), sigma.new_empty((4, rows))
    slopes = sigma.new_empty((3, rows))
    dv = v.new_empty(v.shape if want_grad else 0)

    def over_blocks(out, gradient):
        nft_kernel[(rows * blocks,)](
            *large,
            sigma,
            slopes,
            out,
            *strides,
            rows,
            size,
            blocks,
            beta,
            HAS_REF=has_ref,
            GRADIENT=gradient,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

    over_blocks(sums, False)
    nft_rows_kernel[(1,)](
        sums,
        sigma,
        advantage,
        slopes,
        metrics,
        loss,
        rows,
        blocks,
        size,
        BETA=beta,
        ADV_CLIP=adv_clip,
        REF_WEIGHT=ref_weight,
        HAS_REF=has_ref,
        ROWS=ROWS,
        CHUNK=CHUNK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    if want_grad:
        over_blocks(dv, True)
    return loss, metrics, dv


# ---- budget -------------------------------------------------------------------------------------
def _case(dtype: str, x_dtype: str, gradient: bool) -> Case:
    velocities = dict.fromkeys(("v_ptr", "v_old_ptr", "v_ref_ptr"), f"*{dtype}")
    samples = dict.fromkeys(("x_t_ptr", "x0_ptr"), f"*{x_dtype}")
    large = {**velocities, **samples, "out_ptr": f"*{dtype}" if gradient else "*fp32"}
    strides = [n for n in nft_kernel.arg_names if n.endswith("_stride")]
    sizes = dict.fromkeys((*strides, "size"), "i64")
    rest = {"sigma_ptr": "*fp32", "slopes_ptr": "*fp32", "rows": "i32", "blocks": "i32"}
    return Case(
        nft_kernel,
        {**large, **sizes, **rest, "beta": "fp32"},
        {"HAS_REF": True, "GRADIENT": gradient, "BLOCK": BLOCK},
        WARPS,
        registers=72,
        divisible=(*large, *sizes),
    )


_ROW_POINTERS = [n for n in nft_rows_kernel.arg_names if n.endswith("_ptr")]
BUDGET = [
    _case("bf16", "bf16", gradient=False),
    _case("fp32", "fp32", gradient=False),
    _case("bf16", "fp32", gradient=True),
    _case("fp32", "fp32", gradient=True),
    Case(
        nft_rows_kernel,
        {
            **dict.fromkeys(_ROW_POINTERS, "*fp32"),
            **dict.fromkeys(("rows", "blocks"), "i32"),
            "size": "i64",
        },
        {
            "BETA": 0.1,
            "ADV_CLIP": 5.0,
            "REF_WEIGHT": 1e-4,
            "HAS_REF": True,
            "ROWS": ROWS,
            "CHUNK": CHUNK,
        },
        WARPS,
        registers=128,
        width=32,
        divisible=("sums_ptr",),
    ),
]
