"""norm_modulate and its gradients in Triton. Math, shapes, dtypes: qirl_fast/ops/norm_modulate.py.

Forward: a program takes a row, which stays in registers. Backward: a program takes CHUNK tokens of
one sample that read the same modulation rows (those marked by t0 have programs of their own), so
the sums of dscale and dshift stay in registers; column_sums adds the partial sums of the chunks.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.fp8_quantize import outputs, pointers, store_quantized, unit_of

CHUNK = 16  # tokens a program of the backward adds up: enough programs for one long sample
WIDEST = 8192
TILE_CHUNKS, TILE_COLUMNS = 64, 32


@triton.jit
def row_pointer(ptr, stride, ptr_t0, stride_t0, b, taken, HAS_T0: tl.constexpr):
    """Row of sample b, of the second tensor where taken."""
    row = ptr + b * stride
    if HAS_T0:
        row = tl.where(taken != 0, ptr_t0 + b * stride_t0, row)
    return row


@triton.jit
def moments(x, inside, width, eps, RMS: tl.constexpr):
    """Mean (0 for RMSNorm) and rstd of a row; the variance in a second pass over registers."""
    mean = 0.0
    centred = x
    if not RMS:
        mean = tl.div_rn(tl.sum(x, 0), width.to(tl.float32))
        centred = tl.where(inside, x - mean, 0.0)
    squares = tl.div_rn(tl.sum(centred * centred, 0), width.to(tl.float32))
    return mean, tl.div_rn(1.0, tl.sqrt_rn(squares + eps))


@triton.jit
def norm_dx(dy, x, scale, mean, rstd, inside, width, RMS: tl.constexpr):
    """(dx, xhat) of a row."""
    xhat = (x - mean) * rstd
    g = dy * (1.0 + scale)
    both = tl.div_rn(tl.sum(tl.where(inside, g * xhat, 0.0), 0), width.to(tl.float32))
    if not RMS:
        g = g - tl.div_rn(tl.sum(tl.where(inside, g, 0.0), 0), width.to(tl.float32))
    return rstd * (g - xhat * both), xhat


@triton.jit
def forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    scale_t0_ptr,
    shift_t0_ptr,
    t0_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    q_ptr,
    q_scale_ptr,
    scale_stride,
    shift_stride,
    scale_t0_stride,
    shift_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    eps,
    RMS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_T0: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """UNIT: elements that share a scale where y is wanted in fp8 too, else 0."""
    row = tl.program_id(0).to(tl.int64)
    b = row // tokens
    i = tl.arange(0, BLOCK)
    inside = i < width
    stored = tl.load((x_ptr + row * width) + i, mask=inside, other=0.0)
    taken = 0
    if HAS_T0:
        taken = tl.load(t0_ptr + b * t0_sample + (row % tokens) * t0_token)
    scale_row = row_pointer(
        scale_ptr, scale_stride, scale_t0_ptr, scale_t0_stride, b, taken, HAS_T0
    )
    scale = tl.load(scale_row + i, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    mean, rstd = moments(x, inside, width, eps, RMS)
    y = ((x - mean) * rstd) * (1.0 + scale.to(tl.float32))
    if HAS_SHIFT:
        shift_row = row_pointer(
            shift_ptr, shift_stride, shift_t0_ptr, shift_t0_stride, b, taken, HAS_T0
        )
        y = y + tl.load(shift_row + i, mask=inside, other=0.0).to(tl.float32)
    y = y.to(stored.dtype)
    tl.store((y_ptr + row * width) + i, y, mask=inside)
    if UNIT:
        store_quantized(y.to(tl.float32), q_ptr, q_scale_ptr, row, 0, width, UNIT, BLOCK)
    tl.store(rstd_ptr + row, rstd)
    if not RMS:
        tl.store(mean_ptr + row, mean)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    scale_t0_ptr,
    t0_ptr,
    dx_ptr,
    partial_ptr,
    scale_stride,
    scale_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    chunks,
    RMS: tl.constexpr,
    HAS_T0: tl.constexpr,
    WANT_MOD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Without WANT_MOD, TOKENS is 1 and one program serves a token whichever rows it reads."""
    task = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    b = task // chunks
    first = (task % chunks) * TOKENS
    i = tl.arange(0, BLOCK)
    inside = i < width
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    for k in range(TOKENS):  # the interpreter takes constant bounds only
        s = first + k
        taken = group
        mine = s < tokens
        if HAS_T0:
            at = t0_ptr + b * t0_sample + s * t0_token
            mark = tl.load(at, mask=mine, other=0).to(tl.int32)
            if WANT_MOD:
                mine = mine & ((mark != 0) == (group != 0))
            else:
                taken = mark
        if mine:
            row = b * tokens + s
            scale_row = row_pointer(
                scale_ptr, scale_stride, scale_t0_ptr, scale_t0_stride, b, taken, HAS_T0
            )
            dy = tl.load((dy_ptr + row * width) + i, mask=inside, other=0.0).to(tl.float32)
            stored = tl.load((x_ptr + row * width) + i, mask=inside, other=0.0)
            scale = tl.load(scale_row + i, mask=inside, other=0.0).to(tl.float32)
            mean = 0.0
            if not RMS:
                mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            x = stored.to(tl.float32)
            dx, xhat = norm_dx(dy, x, scale, mean, rstd, inside, width, RMS)
            tl.store((dx_ptr + row * width) + i, dx.to(stored.dtype), mask=inside)
            if WANT_MOD:
                dscale += dy * xhat
                dshift += dy
    if WANT_MOD:
        plane = chunks.to(tl.int64) * width
        at = ((group * (tl.num_programs(0) // chunks) + b) * 2) * plane + (task % chunks) * width
        tl.store((partial_ptr + at) + i, dscale, mask=inside)
        tl.store((partial_ptr + at + plane) + i, dshift, mask=inside)


@triton.jit
def column_sums_kernel(
    partial_ptr, out_ptr, chunks, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[m, k] = sum over c of partial[m, c, k]: lanes by c mod ROWS, then a fixed tree."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    inside = (k < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    c = 0
    while c < chunks:
        at = (m * chunks + c + r[:, None]) * width + k[None, :]
        total += tl.load(partial_ptr + at, mask=inside & (c + r < chunks)[:, None], other=0.0)
        c += ROWS
    tl.store(out_ptr + m * width + k, tl.sum(total, 0), mask=k < width)


# ---- launchers ----------------------------------------------------------------------------------
def plan(op, width, itemsize):
    """BLOCK and warps: two 128-bit accesses of a row a thread."""
    if width > WIDEST:
        raise ValueError(f"{op}: the triton backend takes rows of at most {WIDEST}; got {width}.")
    block = max(256, triton.next_power_of_2(width))
    return block, max(2, block * itemsize // 1024)


def rows_t0(rows, rows_t0, absent):
    """(rows, rows_t0, stride, stride_t0) of one dtype; `absent` stands in for what is not there."""
    if rows is None:
        return absent, absent, 0, 0
    if rows_t0 is None:
        return rows, rows, rows.stride(0), 0
    if rows.dtype != rows_t0.dtype:
        rows, rows_t0 = rows.float(), rows_t0.float()
    return rows, rows_t0, rows.stride(0), rows_t0.stride(0)


def marks(t0, absent):
    """(t0 as bytes, its strides)."""
    return (absent, 0, 0) if t0 is None else (t0.view(torch.uint8), *t0.stride())


def column_sums(partial):
    """[..., chunks, D] -> [..., D]."""
    *lead, chunks, width = partial.shape
    out = partial.new_empty(*lead, width)
    grid = (out.numel() // width, triton.cdiv(width, TILE_COLUMNS))
    column_sums_kernel[grid](
        partial, out, chunks, width, ROWS=TILE_CHUNKS, COLUMNS=TILE_COLUMNS, num_warps=4
    )
    return out


def norm_modulate(x, scale, shift, t0, scale_t0, shift_t0, rms, eps, quantize):
    """(y, mean, rstd, q, scale of q)."""
    x = x.contiguous()
    samples, tokens, width = x.shape
    block, warps = plan("norm_modulate", width, x.element_size())
    y = torch.empty_like(x)
    rstd = x.new_empty(samples, tokens, dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    q, q_scale = outputs(y, quantize)
    scale, scale_t0, *scale_strides = rows_t0(scale, scale_t0, x)
    has_shift = shift is not None
    shift, shift_t0, *shift_strides = rows_t0(shift, shift_t0, x)
    strides = (scale_strides[0], shift_strides[0], scale_strides[1], shift_strides[1])
    marked, *mark_strides = marks(t0, x)
    rows = (scale, shift, scale_t0, shift_t0, marked)
    forward_kernel[(samples * tokens,)](
        *(x, *rows, y, rstd if rms else mean, rstd, *pointers(q, q_scale, y)),
        *(*strides, *mark_strides, tokens, width, eps),
        RMS=rms,
        HAS_SHIFT=has_shift,
        HAS_T0=t0 is not None,
        UNIT=unit_of(quantize, block),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y, mean, rstd, q, q_scale


def norm_modulate_backward(dy, x, mean, rstd, scale, t0, scale_t0, rms, want_mod, has_shift):
    """(dx, dscale, dshift, dscale_t0, dshift_t0)."""
    dy, x = dy.contiguous(), x.contiguous()
    samples, tokens, width = x.shape
    block, warps = plan("norm_modulate", width, x.element_size())
    dx, absent = torch.empty_like(x), rstd.new_empty(0)
    scale, scale_t0, *strides = rows_t0(scale, scale_t0, x)
    marked, *mark_strides = marks(t0, x)
    chunks = triton.cdiv(tokens, CHUNK) if want_mod else tokens
    groups = 2 if want_mod and t0 is not None else 1
    partial = rstd.new_empty(groups, samples, 2, chunks, width) if want_mod else absent
    backward_kernel[(samples * chunks, groups)](
        *(dy, x, rstd if rms else mean, rstd, scale, scale_t0, marked, dx),
        *(partial if want_mod else rstd, *strides, *mark_strides, tokens, width, chunks),
        RMS=rms,
        HAS_T0=t0 is not None,
        WANT_MOD=want_mod,
        TOKENS=CHUNK if want_mod else 1,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    if not want_mod:
        return (dx, *(rstd.new_empty(0) for _ in range(4)))
    sums = [s for group in column_sums(partial) for s in group.unbind(1)]
    sums += [absent] * (4 - len(sums))
    wanted = (s.contiguous() if has_shift or k % 2 == 0 else absent for k, s in enumerate(sums))
    return (dx, *(s.clone() if s is absent else s for s in wanted))


# ---- budget -------------------------------------------------------------------------------------
_FORWARD = ("x_ptr", "y_ptr"), ("scale_ptr", "shift_ptr", "scale_t0_ptr", "shift_t0_ptr")
_BACKWARD = ("dy_ptr", "x_ptr", "dx_ptr"), ("scale_ptr", "scale_t0_ptr")


FP32 = ("mean_ptr", "rstd_ptr", "partial_ptr", "q_scale_ptr")


def case(kernel, dtype, pointers, sizes, constexprs, width, registers, narrow=0):
    """A kernel of this family: pointers = (large, modulation); statistics and sums are fp32."""
    large, rows = pointers
    names = kernel.arg_names
    kinds = dict.fromkeys((*large, *rows), f"*{dtype}")
    kinds |= {n: "*fp32" for n in names if n in FP32}
    kinds |= {"q_ptr": "*u8"} if "q_ptr" in names else {}
    strides = [n for n in names if n.endswith("_stride")]
    kinds |= {"t0_ptr": "*u8", "t0_sample": "i64", "t0_token": "i64", **sizes}
    kinds |= dict.fromkeys(strides, "i64")
    block, warps = plan("", width, 2 if dtype == "bf16" else 4)
    aligned = (n for n in kinds if n in ("width", *strides) or n.endswith("_ptr"))
    return Case(
        kernel,
        kinds,
        {**constexprs, "BLOCK": block},
        warps,
        registers,
        divisible=tuple(aligned),
        narrow=narrow,
    )


_FLAGS = {"RMS": False, "HAS_T0": True}
BUDGET = [
    Case(
        column_sums_kernel,
        {"partial_ptr": "*fp32", "out_ptr": "*fp32", "chunks": "i32", "width": "i32"},
        {"ROWS": TILE_CHUNKS, "COLUMNS": TILE_COLUMNS},
        4,
        registers=64,
        width=32,  # of the one small store; what is read is 128 bits wide
        divisible=("partial_ptr", "out_ptr", "width"),
    )
]
for _dtype in ("bf16", "fp32"):
    for _width in (3072, 8192):
        _sizes = {"tokens": "i32", "width": "i32"}
        _forward = (forward_kernel, _dtype, _FORWARD, {**_sizes, "eps": "fp32"})
        BUDGET += [
            case(
                *(backward_kernel, _dtype, _BACKWARD, {**_sizes, "chunks": "i32"}),
                *({**_FLAGS, "WANT_MOD": True, "TOKENS": CHUNK}, _width, 128),
            ),
        ]
        for _quantize in ("", "row", "block"):
            _unit = unit_of(_quantize, plan("", _width, 2)[0])
            _flags = {**_FLAGS, "HAS_SHIFT": True, "UNIT": _unit}
            BUDGET.append(case(*_forward, _flags, _width, 96, narrow=3 if _unit else 0))
