"""guide and its gradients in Triton, plain and rescaled. Math, shapes: qirl_fast/ops/guide.py.

Plain results have the bits of the C++ kernels. Rescaled, the sums over a token have Triton's order,
fixed by the width: a token's result does not depend on the batch, but its factor may differ from
that of the other backends in the last bits. Loops are `while`: the interpreter cannot count to a
run-time bound under NumPy 2.4.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

BLOCK = 2048  # elements of a program
LOOP_WIDTH = 2048  # tokens wider than this are read in steps of as many elements
WARPS = 8


@triton.jit
def _span(size, blocks, BLOCK: tl.constexpr):
    """Row, element indices and mask of this program's block."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    return row, i, i < size


@triton.jit
def tile(size, width, blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Row, index of each token's first element and element offsets, for TOKENS tokens of a row."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * TOKENS
    start = (first + tl.arange(0, TOKENS)[:, None]) * width
    return row, start, tl.arange(0, WIDTH)[None, :].to(tl.int64), start < size


@triton.jit
def _divide_or_zero(a, b):
    return tl.where(b > 0.0, tl.div_rn(a, b), 0.0)


@triton.jit
def factor_of(sum_c2, sum_g2):
    root = tl.div_rn(tl.sqrt_rn(sum_c2), tl.sqrt_rn(sum_g2))
    return tl.where(sum_g2 > 0.0, root, 0.0)


@triton.jit
def factor_by_steps(
    c_row, u_row, start, i, is_token, w, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """Factors of TOKENS tokens, read WIDTH elements at a time."""
    c2 = tl.zeros([TOKENS, WIDTH], tl.float32)
    g2 = tl.zeros([TOKENS, WIDTH], tl.float32)
    done = width * 0
    while done < width:
        inside = is_token & (done + i < width)
        c = tl.load(c_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        g = u + w * (c - u)
        c2 += c * c
        g2 += g * g
        done += WIDTH
    return factor_of(tl.sum(c2, axis=1), tl.sum(g2, axis=1))


@triton.jit
def plain_kernel(
    c_ptr, u_ptr, scale_ptr, y_ptr, c_stride, u_stride, size, blocks, BLOCK: tl.constexpr
):
    row, i, inside = _span(size, blocks, BLOCK)
    w = tl.load(scale_ptr + row)
    stored = tl.load(c_ptr + row * c_stride + i, mask=inside, other=0.0)
    u = tl.load(u_ptr + row * u_stride + i, mask=inside, other=0.0).to(tl.float32)
    g = u + w * (stored.to(tl.float32) - u)
    tl.store(y_ptr + row * size + i, g.to(stored.dtype), mask=inside)


@triton.jit
def plain_backward_kernel(
    dy_ptr, scale_ptr, dc_ptr, du_ptr, dy_stride, size, blocks, BLOCK: tl.constexpr
):
    row, i, inside = _span(size, blocks, BLOCK)
    w = tl.load(scale_ptr + row)
    stored = tl.load(dy_ptr + row * dy_stride + i, mask=inside, other=0.0)
    dy = stored.to(tl.float32)
    dc = w * dy
    tl.store(dc_ptr + row * size + i, dc.to(stored.dtype), mask=inside)
    tl.store(du_ptr + row * size + i, (dy - dc).to(stored.dtype), mask=inside)


@triton.jit
def rescale_kernel(
    c_ptr,
    u_ptr,
    scale_ptr,
    y_ptr,
    c_stride,
    u_stride,
    size,
    width,
    blocks,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOOP: tl.constexpr,
):
    """LOOP: tokens are wider than WIDTH and read twice; else they stay in registers."""
    row, start, i, is_token = tile(size, width, blocks, TOKENS, WIDTH)
    w = tl.load(scale_ptr + row)
    c_row, u_row, y_row = c_ptr + row * c_stride, u_ptr + row * u_stride, y_ptr + row * size
    if LOOP:
        factor = factor_by_steps(c_row, u_row, start, i, is_token, w, width, TOKENS, WIDTH)[:, None]
        done = width * 0
        while done < width:
            inside = is_token & (done + i < width)
            stored = tl.load(c_row + start + done + i, mask=inside, other=0.0)
            u = tl.load(u_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
            y = (u + w * (stored.to(tl.float32) - u)) * factor
            tl.store(y_row + start + done + i, y.to(stored.dtype), mask=inside)
            done += WIDTH
    else:
        inside = is_token & (i < width)
        stored = tl.load(c_row + start + i, mask=inside, other=0.0)
        u = tl.load(u_row + start + i, mask=inside, other=0.0).to(tl.float32)
        c = stored.to(tl.float32)
        g = u + w * (c - u)
        factor = factor_of(tl.sum(c * c, axis=1), tl.sum(g * g, axis=1))[:, None]
        tl.store(y_row + start + i, (g * factor).to(stored.dtype), mask=inside)


@triton.jit
def rescale_backward_kernel(
    dy_ptr,
    c_ptr,
    u_ptr,
    scale_ptr,
    dc_ptr,
    du_ptr,
    dy_stride,
    c_stride,
    u_stride,
    size,
    width,
    blocks,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dg = f dy - k g;  dc = w dg + m c;  du = dg - w dg. Wide tokens are read twice."""
    row, start, i, is_token = tile(size, width, blocks, TOKENS, WIDTH)
    w = tl.load(scale_ptr + row)
    c_row, u_row, dy_row = c_ptr + row * c_stride, u_ptr + row * u_stride, dy_ptr + row * dy_stride
    c2 = tl.zeros([TOKENS, WIDTH], tl.float32)
    g2 = tl.zeros([TOKENS, WIDTH], tl.float32)
    gdy = tl.zeros([TOKENS, WIDTH], tl.float32)
    done = width * 0
    while done < width:
        inside = is_token & (done + i < width)
        c = tl.load(c_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        g = u + w * (c - u)
        c2 += c * c
        g2 += g * g
        gdy += g * dy
        done += WIDTH
    sum_c2, sum_g2, dot = tl.sum(c2, axis=1), tl.sum(g2, axis=1), tl.sum(gdy, axis=1)
    f = factor_of(sum_c2, sum_g2)
    k, m = _divide_or_zero(f * dot, sum_g2)[:, None], _divide_or_zero(f * dot, sum_c2)[:, None]
    f = f[:, None]
    done = width * 0
    while done < width:
        inside = is_token & (done + i < width)
        at = row * size + start + done + i
        stored = tl.load(c_row + start + done + i, mask=inside, other=0.0)
        u = tl.load(u_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + start + done + i, mask=inside, other=0.0).to(tl.float32)
        c = stored.to(tl.float32)
        dg = f * dy - k * (u + w * (c - u))
        dc = w * dg
        tl.store(dc_ptr + at, (dc + m * c).to(stored.dtype), mask=inside)
        tl.store(du_ptr + at, (dg - dc).to(stored.dtype), mask=inside)
        done += WIDTH


# ---- launchers ----------------------------------------------------------------------------------
def rows_of(x):
    """x with dense rows x[r] and the stride between them; copied where it must be."""
    flat = x.reshape(x.shape[0], -1)
    flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
    return flat, flat.stride(0)


def tile_of(width):
    """Tokens a program takes, elements of each it holds at a time, and whether it loops."""
    columns = min(triton.next_power_of_2(width), LOOP_WIDTH)
    return BLOCK // columns, columns, width > columns


def guide(v_cond, v_uncond, scale_B, rescale):
    """y in the shape and dtype of v_cond; arguments as the op's, already checked."""
    y = v_cond.new_empty(v_cond.shape)
    (c, c_stride), (u, u_stride), scale_B = rows_of(v_cond), rows_of(v_uncond), scale_B.contiguous()
    rows, size = c.shape
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    if rescale:
        width = v_cond.shape[-1]
        tokens, columns, loop = tile_of(width)
        blocks = triton.cdiv(size // width, tokens)
        arguments = (c, u, scale_B, y, c_stride, u_stride, size, width, blocks)
        shape = {"TOKENS": tokens, "WIDTH": columns, "LOOP": loop}
        rescale_kernel[(rows * blocks,)](*arguments, **shape, **options)
        return y
    blocks = triton.cdiv(size, BLOCK)
    arguments = (c, u, scale_B, y, c_stride, u_stride, size, blocks)
    plain_kernel[(rows * blocks,)](*arguments, BLOCK=BLOCK, **options)
    return y


def guide_backward(grad, v_cond, v_uncond, scale_B, rescale):
    """(dc, du)."""
    dc, du = v_cond.new_empty(v_cond.shape), v_uncond.new_empty(v_uncond.shape)
    (dy, dy_stride), scale_B = rows_of(grad), scale_B.contiguous()
    rows, size = dy.shape
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    if rescale:
        (c, c_stride), (u, u_stride) = rows_of(v_cond), rows_of(v_uncond)
        width = v_cond.shape[-1]
        tokens, columns, _ = tile_of(width)
        blocks = triton.cdiv(size // width, tokens)
        arguments = (dy, c, u, scale_B, dc, du, dy_stride, c_stride, u_stride, size, width, blocks)
        shape = {"TOKENS": tokens, "WIDTH": columns}
        rescale_backward_kernel[(rows * blocks,)](*arguments, **shape, **options)
        return dc, du
    blocks = triton.cdiv(size, BLOCK)
    arguments = (dy, scale_B, dc, du, dy_stride, size, blocks)
    plain_backward_kernel[(rows * blocks,)](*arguments, BLOCK=BLOCK, **options)
    return dc, du


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, pointers, strides, shape, registers):
    sizes = dict.fromkeys((*strides, "size", *(("width",) if "WIDTH" in shape else ())), "i64")
    return Case(
        kernel,
        {
            **dict.fromkeys(pointers, f"*{dtype}"),
            "scale_ptr": "*fp32",
            **sizes,
            "blocks": "i32",
        },
        shape,
        WARPS,
        registers,
        divisible=(*pointers, *sizes),
    )


_INPUTS, _STRIDES = ("c_ptr", "u_ptr"), ("c_stride", "u_stride")
_GRADS, _TILE = ("dc_ptr", "du_ptr"), {"TOKENS": BLOCK // 64, "WIDTH": 64}
_WIDE = {"TOKENS": 1, "WIDTH": LOOP_WIDTH}
BUDGET = [
    case
    for dtype in ("bf16", "fp32")
    for case in (
        _case(plain_kernel, dtype, (*_INPUTS, "y_ptr"), _STRIDES, {"BLOCK": BLOCK}, 40),
        _case(
            plain_backward_kernel,
            dtype,
            ("dy_ptr", *_GRADS),
            ("dy_stride",),
            {"BLOCK": BLOCK},
            40,
        ),
        *(
            _case(rescale_kernel, dtype, (*_INPUTS, "y_ptr"), _STRIDES, shape, 64)
            for shape in ({**_TILE, "LOOP": False}, {**_WIDE, "LOOP": True})
        ),
        *(
            _case(
                rescale_backward_kernel,
                dtype,
                ("dy_ptr", *_INPUTS, *_GRADS),
                ("dy_stride", *_STRIDES),
                shape,
                96,
            )
            for shape in (_TILE, _WIDE)
        ),
    )
]
