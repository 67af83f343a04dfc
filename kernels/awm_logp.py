"""awm_logp in Triton: block sums, a program for the rows, and the gradient.

Math, shapes, dtypes: qirl_fast/ops/awm_logp.py.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.rows import BLOCK, CHUNK, ROWS, WARPS, block_count, row_totals, strided


@triton.jit
def awm_kernel(
    v_ptr,
    noise_ptr,
    x0_ptr,
    grad_ptr,
    slope_ptr,
    out_ptr,
    v_stride,
    noise_stride,
    x0_stride,
    size,
    blocks,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row with r = v - (noise - x0): the sum of r^2, or dv = grad slope r."""
    task = tl.program_id(0).to(tl.int64)
    row, i = task // blocks, (task % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    v = tl.load(v_ptr + row * v_stride + i, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + row * noise_stride + i, mask=inside, other=0.0)
    x0 = tl.load(x0_ptr + row * x0_stride + i, mask=inside, other=0.0)
    r = v.to(tl.float32) - (noise.to(tl.float32) - x0.to(tl.float32))
    if GRADIENT:
        slope = tl.load(grad_ptr + row) * tl.load(slope_ptr + row)
        tl.store(out_ptr + row * size + i, (slope * r).to(v.dtype), mask=inside)
    else:
        tl.store(out_ptr + task, tl.sum(r * r))


@triton.jit
def awm_rows_kernel(
    sums_ptr,
    time_ptr,
    logp_ptr,
    slope_ptr,
    rows,
    blocks,
    size,
    TIME_POWER: tl.constexpr,
    POWER: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ROWS rows: logp and dlogp/dr. The numbers are constants of a run: compiled in, in float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = row_totals(sums_ptr, row, rows, blocks, ROWS, CHUNK) / size
    time = tl.load(time_ptr + row, mask=row < rows, other=0.0).to(tl.float64)
    weight = tl.zeros([ROWS], tl.float64) + FACTOR
    for _ in tl.static_range(TIME_POWER):
        weight *= time
    if POWER == 1.0:
        value, derivative = m, tl.zeros([ROWS], tl.float64) + 1.0
    else:
        # tiny^power: at m = 0 the same bits as the value's, so that the difference is 0.
        tiny = tl.zeros([ROWS], tl.float64) + 1e-10
        log_m = tl.log(m + tiny)
        value = tl.exp(log_m * POWER) - tl.exp(tl.log(tiny) * POWER)
        derivative = tl.exp(log_m * (POWER - 1.0)) * POWER
    logp, slope = 0.0 - weight * value, 0.0 - weight * derivative * (2.0 / size)
    tl.store(logp_ptr + row, logp.to(tl.float32), mask=row < rows)
    tl.store(slope_ptr + row, slope.to(tl.float32), mask=row < rows)


# ---- launchers ----------------------------------------------------------------------------------
def _blocks(v, noise, x0, grad, slope, out, gradient):
    (v, v_stride), (noise, noise_stride), (x0, x0_stride) = strided(v), strided(noise), strided(x0)
    size, blocks = block_count(v)
    awm_kernel[(v.shape[0] * blocks,)](
        v,
        noise,
        x0,
        grad,
        slope,
        out,
        v_stride,
        noise_stride,
        x0_stride,
        size,
        blocks,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def awm_logp(v, noise, x0, time, time_power, power, factor):
    """(logp, slope); arguments as the op's, already checked."""
    (size, blocks), rows = block_count(v), v.shape[0]
    sums = time.new_empty((rows, blocks))
    logp, slope = time.new_empty(rows), time.new_empty(rows)
    _blocks(v, noise, x0, sums, sums, sums, False)
    awm_rows_kernel[(triton.cdiv(rows, ROWS),)](
        sums,
        time.contiguous(),
        logp,
        slope,
        rows,
        blocks,
        size,
        TIME_POWER=time_power,
        POWER=power,
        FACTOR=factor,
        ROWS=ROWS,
        CHUNK=CHUNK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return logp, slope


def awm_logp_backward(grad, slope, v, noise, x0):
    """dv; arguments as the op's."""
    dv = v.new_empty(v.shape)
    _blocks(v, noise, x0, grad.contiguous(), slope.contiguous(), dv, True)
    return dv


# ---- budget -------------------------------------------------------------------------------------
def _case(dtype: str, x_dtype: str, gradient: bool) -> Case:
    large = {
        "v_ptr": f"*{dtype}",
        "noise_ptr": f"*{x_dtype}",
        "x0_ptr": f"*{x_dtype}",
        "out_ptr": f"*{dtype}" if gradient else "*fp32",
    }
    sizes = dict.fromkeys(("v_stride", "noise_stride", "x0_stride", "size"), "i64")
    return Case(
        awm_kernel,
        {**large, **sizes, "grad_ptr": "*fp32", "slope_ptr": "*fp32", "blocks": "i32"},
        {"GRADIENT": gradient, "BLOCK": BLOCK},
        WARPS,
        registers=48,
        divisible=(*large, *sizes),
    )


def _rows_case(power: float) -> Case:
    return Case(
        awm_rows_kernel,
        {
            **dict.fromkeys(("sums_ptr", "time_ptr", "logp_ptr", "slope_ptr"), "*fp32"),
            **dict.fromkeys(("rows", "blocks"), "i32"),
            "size": "i64",
        },
        {"TIME_POWER": 1, "POWER": power, "FACTOR": 1.0, "ROWS": ROWS, "CHUNK": CHUNK},
        WARPS,
        registers=96,
        width=32,
        divisible=("sums_ptr", "blocks"),
    )


BUDGET = [
    _case("bf16", "bf16", gradient=False),
    _case("fp32", "fp32", gradient=False),
    _case("bf16", "fp32", gradient=True),
    _case("fp32", "fp32", gradient=True),
    _rows_case(1.0),
    _rows_case(0.25),
]
