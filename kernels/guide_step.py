"""guide and flow_step in one pass in Triton. Math, shapes, dtypes: qirl_fast/ops/guide_step.py.

With rescale a first kernel finds the factor of each token, in the order of sums of
kernels/guide.py; the step then takes blocks of elements whatever the width.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.flow_step import BLOCK, WARPS, drawn, grid_of, log_prob
from qirl_fast.kernels.guide import WARPS as FACTOR_WARPS
from qirl_fast.kernels.guide import factor_by_steps, rows_of, tile, tile_of


@triton.jit
def factor_kernel(
    c_ptr,
    u_ptr,
    scale_ptr,
    factor_ptr,
    c_stride,
    u_stride,
    size,
    width,
    blocks,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, start, i, is_token = tile(size, width, blocks, TOKENS, WIDTH)
    w = tl.load(scale_ptr + row)
    c_row, u_row = c_ptr + row * c_stride, u_ptr + row * u_stride
    factor = factor_by_steps(c_row, u_row, start, i, is_token, w, width, TOKENS, WIDTH)
    token = (tl.program_id(0).to(tl.int64) % blocks) * TOKENS + tl.arange(0, TOKENS)
    tokens = size // width
    tl.store(factor_ptr + row * tokens + token, factor, mask=token < tokens)


@triton.jit(do_not_specialize=["offset"])
def step_kernel(
    x_ptr,
    c_ptr,
    u_ptr,
    scale_ptr,
    factor_ptr,
    x_next_ptr,
    delta_ptr,
    a_ptr,
    c_coefficient_ptr,
    s_ptr,
    seed_ptr,
    sums_ptr,
    c_stride,
    u_stride,
    offset,
    size,
    width,
    blocks,
    RESCALE: tl.constexpr,
    FROZEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < size
    at = row * size + i
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    stored = tl.load(c_ptr + row * c_stride + i, mask=inside, other=0.0)
    u = tl.load(u_ptr + row * u_stride + i, mask=inside, other=0.0).to(tl.float32)
    v = stored.to(tl.float32)
    g = u + tl.load(scale_ptr + row) * (v - u)
    if RESCALE:
        token = first // width  # the first one of the block; the others are counted in 32 bits
        ahead = ((first - token * width).to(tl.int32) + tl.arange(0, BLOCK)) // width.to(tl.int32)
        factors = factor_ptr + row * (size // width) + token
        g = g * tl.load(factors + ahead, mask=inside, other=0.0)
    g = g.to(stored.dtype).to(tl.float32)  # as guide stores it
    a, c = tl.load(a_ptr + row), tl.load(c_coefficient_ptr + row)
    if FROZEN:
        delta = (c * (g - v)).to(x.dtype)
        tl.store(delta_ptr + at, delta, mask=inside)
        mean = (a * x.to(tl.float32) + c * v) + delta.to(tl.float32)
    else:
        mean = a * x.to(tl.float32) + c * g
    x_next = drawn(mean, s_ptr, seed_ptr, row, offset, first, x.dtype, BLOCK)
    tl.store(x_next_ptr + at, x_next, mask=inside)
    r = tl.where(inside, x_next.to(tl.float32) - mean, 0.0)
    tl.store(sums_ptr + task, tl.sum(r * r))


# ---- launcher -----------------------------------------------------------------------------------
def guide_step(x, v_cond, v_uncond, scale_B, rescale, a, c, s, w, b, seed, offset, frozen):
    """(x_next, logp, delta); delta is empty unless frozen. Arguments are already checked."""
    x, scale_B = x.contiguous(), scale_B.contiguous()
    (vc, c_stride), (vu, u_stride) = rows_of(v_cond), rows_of(v_uncond)
    a, c, s, seed = (t.contiguous() for t in (a, c, s, seed))
    size, blocks = grid_of(x)
    width = x.shape[-1] if rescale else 1
    x_next, delta = x.new_empty(x.shape), x.new_empty(x.shape if frozen else 0)
    sums = a.new_empty((x.shape[0], blocks))
    factor = a
    if rescale:
        factor = a.new_empty((x.shape[0], size // width))
        tokens, columns, _ = tile_of(width)
        tiles = triton.cdiv(size // width, tokens)
        factor_kernel[(x.shape[0] * tiles,)](
            *(vc, vu, scale_B, factor, c_stride, u_stride, size, width, tiles),
            TOKENS=tokens,
            WIDTH=columns,
            num_warps=FACTOR_WARPS,
            enable_fp_fusion=False,
        )
    step_kernel[(x.shape[0] * blocks,)](
        *(x, vc, vu, scale_B, factor, x_next, delta if frozen else x_next, a, c, s, seed, sums),
        *(c_stride, u_stride, offset, size, width, blocks),
        RESCALE=rescale,
        FROZEN=frozen,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return x_next, log_prob(sums, size, w, b), delta


# ---- budget -------------------------------------------------------------------------------------
def _step_case(dtype, rescale, frozen):
    large = ("x_ptr", "c_ptr", "u_ptr", "x_next_ptr", "delta_ptr")
    rows = ("scale_ptr", "factor_ptr", "a_ptr", "c_coefficient_ptr", "s_ptr", "sums_ptr")
    kinds = dict.fromkeys(large, f"*{dtype}") | dict.fromkeys(rows, "*fp32") | {"seed_ptr": "*i64"}
    kinds |= dict.fromkeys(("c_stride", "u_stride", "offset", "size", "width"), "i64")
    kinds["blocks"] = "i32"
    kinds = {name: kinds[name] for name in step_kernel.arg_names if name in kinds}
    constexprs = {"RESCALE": rescale, "FROZEN": frozen, "BLOCK": BLOCK}
    aligned = (*large, "c_stride", "u_stride", "size")
    gathered = BLOCK // (32 * WARPS) if rescale else 0  # one factor an element
    return Case(
        step_kernel, kinds, constexprs, WARPS, registers=80, divisible=aligned, narrow=gathered
    )


def _factor_case(dtype, width):
    tokens, columns, _ = tile_of(width)
    kinds = {"c_ptr": f"*{dtype}", "u_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    kinds |= {"factor_ptr": "*fp32"}
    kinds |= dict.fromkeys(("c_stride", "u_stride", "size", "width"), "i64") | {"blocks": "i32"}
    return Case(
        factor_kernel,
        kinds,
        {"TOKENS": tokens, "WIDTH": columns},
        FACTOR_WARPS,
        registers=64,
        width=32,  # of the one small store; what is read is 128 bits wide
        divisible=("c_ptr", "u_ptr", "c_stride", "u_stride", "size", "width"),
    )


BUDGET = [
    case
    for dtype in ("bf16", "fp32")
    for case in (
        _step_case(dtype, rescale=False, frozen=True),
        _step_case(dtype, rescale=True, frozen=True),
        _step_case(dtype, rescale=False, frozen=False),
        _factor_case(dtype, 64),
    )
]
