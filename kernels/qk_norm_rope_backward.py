"""Gradients of qk_norm_rope in Triton. Math, shapes, dtypes: qirl_fast/ops/qk_norm_rope.py.

A program walks over CHUNK tokens of one sample where weight gradients are wanted; its float32 sums
over tokens and heads go to `partials`, which a second kernel adds in float64 in the order of the
rows.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.qk_norm_rope import (
    case,
    dense,
    pick,
    ropes_of,
    rotated,
    strides_of,
    tiles_of,
    weights_of,
)

CHUNK = 8  # tokens whose weight gradients are added in one program
ROWS, COLUMNS = 32, 32  # of one step of the second kernel


@triton.jit
def backward_kernel(
    dQ_ptr,
    dK_ptr,
    tq_ptr,
    tk_ptr,
    q_ptr,
    k_ptr,
    tq_weight_ptr,
    tk_weight_ptr,
    q_weight_ptr,
    k_weight_ptr,
    t_rope_ptr,
    rope_ptr,
    dtq_ptr,
    dtk_ptr,
    dq_ptr,
    dk_ptr,
    partials_ptr,
    dQ_b,
    dQ_s,
    dQ_h,
    dK_b,
    dK_s,
    dK_h,
    tq_b,
    tq_s,
    tq_h,
    tk_b,
    tk_s,
    tk_h,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    t_rope_b,
    t_rope_s,
    rope_b,
    rope_s,
    batch,
    text_length,
    image_length,
    text_chunks,
    chunks,
    q_heads,
    k_heads,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A piece is chunk `chunk` of a sample: of the text before text_chunks, then of the image.

    partials: float32 [q and k, pieces * head tiles, 2 HALF], all pieces of the text first.
    """
    task = tl.program_id(0).to(tl.int64)
    is_k, piece = task % 2 == 1, task // 2
    b, chunk = piece // chunks, piece % chunks
    text = chunk < text_chunks
    before = tl.where(text, 0, text_chunks)  # chunks of a sample that are of the other stream
    length = tl.where(text, text_length, image_length)
    dy_ptr, dy_b = tl.where(is_k, dK_ptr, dQ_ptr), tl.where(is_k, dK_b, dQ_b)
    dy_s, dy_h = tl.where(is_k, dK_s, dQ_s), tl.where(is_k, dK_h, dQ_h)
    x_ptr = pick(text, is_k, tq_ptr, tk_ptr, q_ptr, k_ptr)
    x_b = pick(text, is_k, tq_b, tk_b, q_b, k_b)
    x_s = pick(text, is_k, tq_s, tk_s, q_s, k_s)
    x_h = pick(text, is_k, tq_h, tk_h, q_h, k_h)
    dx_ptr = pick(text, is_k, dtq_ptr, dtk_ptr, dq_ptr, dk_ptr)
    heads = tl.where(is_k, k_heads, q_heads)
    turn_ptr = tl.where(text, t_rope_ptr, rope_ptr) + b * tl.where(text, t_rope_b, rope_b)
    turn_s = tl.where(text, t_rope_s, rope_s)

    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)
    inside = (h < heads) & (d[None, :] < width)
    if HAS_WEIGHT:
        w_ptr = pick(text, is_k, tq_weight_ptr, tk_weight_ptr, q_weight_ptr, k_weight_ptr)
    total = tl.zeros([2 * HALF], tl.float32)
    for i in range(CHUNK):
        s = (chunk - before) * CHUNK + i
        if s < length:
            x_at = b * x_b + s * x_s + h * x_h + d[None, :]
            dy_at = b * dy_b + (s + tl.where(text, 0, text_length)) * dy_s + h * dy_h + d[None, :]
            stored = tl.load(x_ptr + x_at, mask=inside, other=0.0)
            dn = tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
            x = stored.to(tl.float32)
            if HAS_ROPE:
                dn = rotated(dn, turn_ptr + s * turn_s, d, width, -1.0, HEADS, HALF)
            r = (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps))[:, None]
            n = x * r
            if WANT_WEIGHTS:
                total += tl.sum(dn * n, axis=0)
            if HAS_WEIGHT:
                # Loaded again for each token, from the first-level cache: fewer registers.
                w = tl.load(w_ptr + d, mask=d < width, other=0.0).to(tl.float32)
                dn = dn * w[None, :]
            mean = tl.sum(dn * n, axis=1)[:, None] / width
            dx = r * (dn - n * mean)
            out = ((b * length + s) * heads + h) * width + d[None, :]
            tl.store(dx_ptr + out, dx.to(stored.dtype), mask=inside)
    if WANT_WEIGHTS:
        own = tl.where(text, text_chunks, chunks - text_chunks)
        row = batch * before + b * own + (chunk - before) + tl.where(is_k, batch * chunks, 0)
        row = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(partials_ptr + row * 2 * HALF + tl.arange(0, 2 * HALF), total)


@triton.jit
def weights_kernel(
    partials_ptr,
    dw_ptr,
    text_rows,
    rows,
    width,
    padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dw [text q, text k, q, k][width] from partials [q and k, rows, padded], added in float64."""
    which = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    first = tl.where(which < 2, 0, text_rows)
    end = tl.where(which < 2, text_rows, rows)
    while first < end:
        row = first + tl.arange(0, ROWS)[:, None]
        at = partials_ptr + (which % 2 * rows + row) * padded + d[None, :]
        total += tl.load(at, mask=row < end, other=0.0).to(tl.float64)
        first += ROWS
    tl.store(dw_ptr + which * width + d, tl.sum(total, axis=0).to(tl.float32), mask=d < width)


# ---- launcher -----------------------------------------------------------------------------------
def qk_norm_rope_backward(
    dQ, dK, q, k, q_weight, k_weight, rope, tq, tk, tq_weight, tk_weight, t_rope, eps, want_weights
):
    """Gradients of q, k, q_weight, k_weight, then of the text stream's; see the reference."""
    given = (q_weight, k_weight, tq_weight, tk_weight)
    wanted = want_weights and any(w is not None for w in given)
    joined = tq is not None
    dQ, dK, q, k = map(dense, (dQ, dK, q, k))
    dq, dk = (t.new_empty(t.shape) for t in (q, k))
    if joined:
        tq, tk = dense(tq), dense(tk)
        dtq, dtk = (t.new_empty(t.shape) for t in (tq, tk))
    else:  # stand-ins that are neither read nor written
        tq, tk, dtq, dtk, t_rope = q, k, dq, dk, rope
        tq_weight, tk_weight = q_weight, k_weight
    weights, has_weight = weights_of(q, tq_weight, tk_weight, q_weight, k_weight)
    reals, rope_strides, has_rope = ropes_of(q, t_rope, rope)
    tile, half, tiles, warps = tiles_of(q, k)
    batch, length, heads, width = q.shape
    start = tq.shape[1] if joined else 0
    chunk = CHUNK if wanted else 1
    text_chunks, chunks = triton.cdiv(start, chunk), triton.cdiv(start, chunk)
    chunks += triton.cdiv(length, chunk)
    text_rows, rows = batch * text_chunks * tiles, batch * chunks * tiles
    partials = dq.new_empty((2, rows, 2 * half) if wanted else 0, dtype=torch.float32)
    backward_kernel[(batch * chunks * 2, tiles)](
        *(dQ, dK, tq, tk, q, k, *weights, *reals, dtq, dtk, dq, dk, partials if wanted else dq),
        *(*strides_of(dQ, dK, tq, tk, q, k), *rope_strides),
        *(batch, start, length, text_chunks, chunks, heads, k.shape[2], width, eps),
        HAS_WEIGHT=has_weight,
        HAS_ROPE=has_rope,
        WANT_WEIGHTS=wanted,
        CHUNK=chunk,
        HEADS=tile,
        HALF=half,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    dw = None
    if wanted:
        dw = dq.new_empty((4, width), dtype=torch.float32)
        columns = min(COLUMNS, 2 * half)
        weights_kernel[(4, triton.cdiv(2 * half, columns))](
            *(partials, dw, text_rows, rows, width, 2 * half),
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=4,
        )

    def weight_grad(weight, row):
        if weight is None:
            return q.new_empty(0)
        return weight.new_empty(0) if dw is None else dw[row].to(weight.dtype, copy=True)

    dqw, dkw, dtqw, dtkw = (weight_grad(w, i) for w, i in zip(given, (2, 3, 0, 1), strict=True))
    if not joined:
        dtq, dtk = q.new_empty(0), q.new_empty(0)
    return dq, dk, dqw, dkw, dtq, dtk, dtqw, dtkw


# ---- budget -------------------------------------------------------------------------------------
_GRAD_SIZES = ("batch", "text_length", "image_length", "text_chunks", "chunks")
_GRAD_SIZES += ("q_heads", "k_heads", "width")
BUDGET = [
    *(
        case(
            *(backward_kernel, t, _GRAD_SIZES, 128),
            narrow=int(wanted),  # one row of partials
            WANT_WEIGHTS=wanted,
            CHUNK=CHUNK if wanted else 1,
        )
        for t in ("bf16", "fp32")
        for wanted in (True, False)
    ),
    Case(
        weights_kernel,
        {"partials_ptr": "*fp32", "dw_ptr": "*fp32"}
        | dict.fromkeys(("text_rows", "rows", "width", "padded"), "i32"),
        {"ROWS": ROWS, "COLUMNS": COLUMNS},
        4,
        registers=64,
        divisible=("partials_ptr", "dw_ptr", "width", "padded"),
        width=32,
    ),
]
