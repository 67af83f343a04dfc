"""qk_norm_rope and its gradients in Triton. Math, shapes, dtypes: qirl_fast/ops/qk_norm_rope.py.

One launch for each stream, q, k and v together: a program takes one token's heads of one of them
(up to TILE elements) and writes its place in the joint buffer. In the backward pass a program walks
over CHUNK tokens of one sample where weight gradients are wanted; its float32 sums over tokens and
heads go to `partials`, which a second kernel adds in float64 in the order of the rows.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

TILE = 4096  # elements of one program
CHUNK = 8  # tokens whose weight gradients are added in one program
ROWS, COLUMNS = 32, 32  # of one step of the second kernel


@triton.jit
def _pairs(x, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Even and odd elements of [HEADS, 2 HALF]."""
    return tl.split(tl.reshape(x, [HEADS, HALF, 2]))


@triton.jit
def _joined(even, odd, HEADS: tl.constexpr, HALF: tl.constexpr):
    return tl.reshape(tl.join(even, odd), [HEADS, 2 * HALF])


@triton.jit
def _rotated(x, rope_ptr, d, width, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Pairs of x times (cos + i sign sin) of one token."""
    rope = tl.load(rope_ptr + d, mask=d < width, other=0.0)
    cos, sin = tl.split(tl.reshape(rope, [HALF, 2]))
    cos, sin = cos[None, :], sin[None, :] * sign
    even, odd = _pairs(x, HEADS, HALF)
    return _joined(even * cos - odd * sin, odd * cos + even * sin, HEADS, HALF)


@triton.jit
def _head_block(
    x_ptr,
    at,
    stride_h,
    weight_ptr,
    rope_ptr,
    y_ptr,
    heads,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token's heads: x_ptr + at -> y_ptr, which points to the token."""
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)
    inside = (h < heads) & (d[None, :] < width)
    stored = tl.load(x_ptr + at + h * stride_h + d[None, :], mask=inside, other=0.0)
    y = stored.to(tl.float32)
    if NORM:
        r = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=1) / width + eps)
        y = y * r[:, None]
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
            y = y * w[None, :]
        if HAS_ROPE:
            y = _rotated(y, rope_ptr, d, width, 1.0, HEADS, HALF)
    tl.store(y_ptr + h * width + d[None, :], y.to(stored.dtype), mask=inside)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rope_ptr,
    Q_ptr,
    K_ptr,
    V_ptr,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    rope_b,
    rope_s,
    length,
    start,
    joint,
    q_heads,
    k_heads,
    width,
    eps,
    KINDS: tl.constexpr,
    HAS_QW: tl.constexpr,
    HAS_KW: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Tokens of a stream of `length` go to [start, start + length) of `joint` tokens."""
    task = tl.program_id(0).to(tl.int64)
    kind, token = task % KINDS, task // KINDS
    b, s = token // length, token % length
    rope_ptr += b * rope_b + s * rope_s
    out = (b * joint + start + s) * width
    if kind == 0:
        at = b * q_b + s * q_s
        y = Q_ptr + out * q_heads
        _head_block(
            *(q_ptr, at, q_h, q_weight_ptr, rope_ptr, y, q_heads, width, eps),
            *(HAS_QW, HAS_ROPE, True, HEADS, HALF),
        )
    elif kind == 1:
        at = b * k_b + s * k_s
        y = K_ptr + out * k_heads
        _head_block(
            *(k_ptr, at, k_h, k_weight_ptr, rope_ptr, y, k_heads, width, eps),
            *(HAS_KW, HAS_ROPE, True, HEADS, HALF),
        )
    else:
        at = b * v_b + s * v_s
        y = V_ptr + out * k_heads
        _head_block(
            *(v_ptr, at, v_h, k_weight_ptr, rope_ptr, y, k_heads, width, eps),
            *(False, False, False, HEADS, HALF),
        )


@triton.jit
def _head_block_grad(
    dy_ptr,
    dy_at,
    dy_h,
    x_ptr,
    x_at,
    x_h,
    weight_ptr,
    rope_ptr,
    dx_ptr,
    heads,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Writes dx of one token's heads; their part of the weight gradient [2 HALF]."""
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)
    inside = (h < heads) & (d[None, :] < width)
    stored = tl.load(x_ptr + x_at + h * x_h + d[None, :], mask=inside, other=0.0)
    dn = tl.load(dy_ptr + dy_at + h * dy_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
    x = stored.to(tl.float32)
    if HAS_ROPE:
        dn = _rotated(dn, rope_ptr, d, width, -1.0, HEADS, HALF)
    r = (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps))[:, None]
    n = x * r
    dw = tl.sum(dn * n, axis=0)
    if HAS_WEIGHT:
        dn = dn * tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(dn * n, axis=1)[:, None] / width
    dx = r * (dn - n * mean)
    tl.store(dx_ptr + h * width + d[None, :], dx.to(stored.dtype), mask=inside)
    return dw


@triton.jit
def backward_kernel(
    dQ_ptr,
    dK_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rope_ptr,
    dq_ptr,
    dk_ptr,
    partials_ptr,
    dQ_b,
    dQ_s,
    dQ_h,
    dK_b,
    dK_s,
    dK_h,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    rope_b,
    rope_s,
    length,
    start,
    chunks,
    q_heads,
    k_heads,
    width,
    eps,
    HAS_QW: tl.constexpr,
    HAS_KW: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """partials: float32 [2, B chunks * head tiles, 2 HALF], q first."""
    task = tl.program_id(0).to(tl.int64)
    kind, piece = task % 2, task // 2
    b, first = piece // chunks, (piece % chunks) * CHUNK
    total = tl.zeros([2 * HALF], tl.float32)
    for i in range(CHUNK):
        s = first + i
        if s < length:
            rope = rope_ptr + b * rope_b + s * rope_s
            out = (b * length + s) * width
            if kind == 0:
                dy_at = b * dQ_b + (start + s) * dQ_s
                x_at = b * q_b + s * q_s
                dx = dq_ptr + out * q_heads
                total += _head_block_grad(
                    *(dQ_ptr, dy_at, dQ_h, q_ptr, x_at, q_h, q_weight_ptr, rope, dx, q_heads),
                    *(width, eps, HAS_QW, HAS_ROPE, HEADS, HALF),
                )
            else:
                dy_at = b * dK_b + (start + s) * dK_s
                x_at = b * k_b + s * k_s
                dx = dk_ptr + out * k_heads
                total += _head_block_grad(
                    *(dK_ptr, dy_at, dK_h, k_ptr, x_at, k_h, k_weight_ptr, rope, dx, k_heads),
                    *(width, eps, HAS_KW, HAS_ROPE, HEADS, HALF),
                )
    if WANT_WEIGHTS:
        pieces = tl.num_programs(0) // 2
        row = (kind * pieces + piece) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partials_ptr + row * 2 * HALF + tl.arange(0, 2 * HALF), total)


@triton.jit
def weights_kernel(
    partials_ptr, dw_ptr, rows, width, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dw [2, width] from partials [2, rows, padded], added in float64."""
    kind = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)[:, None]
        at = partials_ptr + (kind * rows + row) * padded + d[None, :]
        total += tl.load(at, mask=row < rows, other=0.0).to(tl.float64)
        first += ROWS
    tl.store(dw_ptr + kind * width + d, tl.sum(total, axis=0).to(tl.float32), mask=d < width)


# ---- launchers ----------------------------------------------------------------------------------
def _dense(t):
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _reals(rope, like):
    """(float32 [.., S, Dh], stride of B, stride of S); `like` stands in for no rotation."""
    if rope is None:
        return like, 0, 0
    real = _dense(torch.view_as_real(rope.resolve_conj()).flatten(-2))
    return real, real.stride(0) if real.ndim == 3 else 0, real.stride(-2)


def _tiles(q, k):
    """HEADS, HALF, head tiles, warps: a program holds at most TILE elements."""
    width = triton.next_power_of_2(q.shape[3])
    heads = max(q.shape[2], k.shape[2])
    tile = min(triton.next_power_of_2(heads), max(1, TILE // width))
    return tile, width // 2, triton.cdiv(heads, tile), 8 if tile * width >= 2048 else 4


def _stream(q, k, v, q_weight, k_weight, rope, Q, K, V, start, eps):
    q, k, v = _dense(q), _dense(k), _dense(v)
    real, rope_b, rope_s = _reals(rope, q)
    tile, half, tiles, warps = _tiles(q, k)
    kinds = 2 if v is None else 3
    batch, length, heads, width = q.shape
    v_strides = (0, 0, 0) if v is None else v.stride()[:3]
    forward_kernel[(batch * length * kinds, tiles)](
        *(q, k, q if v is None else v),
        q if q_weight is None else q_weight.contiguous(),
        q if k_weight is None else k_weight.contiguous(),
        *(real, Q, K, Q if V is None else V),
        *(*q.stride()[:3], *k.stride()[:3], *v_strides, rope_b, rope_s),
        *(length, start, Q.shape[1], heads, k.shape[2], width, eps),
        KINDS=kinds,
        HAS_QW=q_weight is not None,
        HAS_KW=k_weight is not None,
        HAS_ROPE=rope is not None,
        HEADS=tile,
        HALF=half,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def qk_norm_rope(q, k, v, q_weight, k_weight, rope, tq, tk, tv, tq_weight, tk_weight, t_rope, eps):
    """(Q, K, V); arguments as the reference's. V is empty without a text stream."""
    start = 0 if tq is None else tq.shape[1]
    length = start + q.shape[1]
    Q, K, V = (t.new_empty((t.shape[0], length, *t.shape[2:])) for t in (q, k, k))
    if tq is None:
        _stream(q, k, None, q_weight, k_weight, rope, Q, K, None, 0, eps)
        return Q, K, q.new_empty(0)
    _stream(tq, tk, tv, tq_weight, tk_weight, t_rope, Q, K, V, 0, eps)
    _stream(q, k, v, q_weight, k_weight, rope, Q, K, V, start, eps)
    return Q, K, V


def _stream_grad(dQ, dK, q, k, q_weight, k_weight, rope, start, eps, want_weights):
    """(dq, dk, dq_weight, dk_weight); an absent or unwanted one is empty."""
    dq, dk, q, k = q.new_empty(q.shape), k.new_empty(k.shape), _dense(q), _dense(k)
    real, rope_b, rope_s = _reals(rope, q)
    tile, half, tiles, warps = _tiles(q, k)
    batch, length, heads, width = q.shape
    wanted = want_weights and not (q_weight is None and k_weight is None)
    chunk = CHUNK if wanted else 1
    chunks = triton.cdiv(length, chunk)
    rows = batch * chunks * tiles
    partials = dq.new_empty((2, rows, 2 * half) if wanted else 0, dtype=torch.float32)
    backward_kernel[(batch * chunks * 2, tiles)](
        *(dQ, dK, q, k),
        q if q_weight is None else q_weight.contiguous(),
        q if k_weight is None else k_weight.contiguous(),
        *(real, dq, dk, partials if wanted else dq),
        *(*dQ.stride()[:3], *dK.stride()[:3], *q.stride()[:3], *k.stride()[:3], rope_b, rope_s),
        *(length, start, chunks, heads, k.shape[2], width, eps),
        HAS_QW=q_weight is not None,
        HAS_KW=k_weight is not None,
        HAS_ROPE=rope is not None,
        WANT_WEIGHTS=wanted,
        CHUNK=chunk,
        HEADS=tile,
        HALF=half,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    if not wanted:
        return (
            dq,
            dk,
            *(q.new_empty(0) if w is None else w.new_empty(0) for w in (q_weight, k_weight)),
        )
    dw = dq.new_empty((2, width), dtype=torch.float32)
    columns = min(COLUMNS, 2 * half)
    weights_kernel[(2, triton.cdiv(2 * half, columns))](
        partials, dw, rows, width, 2 * half, ROWS=ROWS, COLUMNS=columns, num_warps=4
    )
    return (
        dq,
        dk,
        *(
            q.new_empty(0) if w is None else dw[i].to(w.dtype, copy=True)
            for i, w in enumerate((q_weight, k_weight))
        ),
    )


def qk_norm_rope_backward(
    dQ, dK, q, k, q_weight, k_weight, rope, tq, tk, tq_weight, tk_weight, t_rope, eps, want_weights
):
    """Gradients of q, k, q_weight, k_weight, then of the text stream's."""
    dQ, dK = _dense(dQ), _dense(dK)
    start = 0 if tq is None else tq.shape[1]
    image = _stream_grad(dQ, dK, q, k, q_weight, k_weight, rope, start, eps, want_weights)
    if tq is None:
        return *image, *(q.new_empty(0) for _ in range(4))
    return *image, *_stream_grad(dQ, dK, tq, tk, tq_weight, tk_weight, t_rope, 0, eps, want_weights)


# ---- budget -------------------------------------------------------------------------------------
_STRIDES = [f"{t}_{axis}" for t in ("q", "k", "v") for axis in "bsh"] + ["rope_b", "rope_s"]
_GRAD_STRIDES = [f"{t}_{axis}" for t in ("dQ", "dK", "q", "k") for axis in "bsh"]
_GRAD_STRIDES += ["rope_b", "rope_s"]


def _case(kernel, dtype, pointers, strides, sizes, registers, narrow=0, **constexprs):
    """Heads of 128; pointers named *_weight and rope, partials have types of their own."""
    types = {"rope_ptr": "*fp32", "partials_ptr": "*fp32"}
    return Case(
        kernel,
        {p: types.get(p, f"*{dtype}") for p in pointers}
        | dict.fromkeys(strides, "i64")
        | dict.fromkeys(sizes, "i32")
        | {"eps": "fp32"},
        {"HAS_QW": True, "HAS_KW": True, "HAS_ROPE": True, "HEADS": 32, "HALF": 64} | constexprs,
        8,
        registers=registers,
        divisible=(*pointers, *strides, "width"),
        narrow=narrow,
    )


_POINTERS = ["q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "rope_ptr"]
_POINTERS += ["Q_ptr", "K_ptr", "V_ptr"]
_GRAD_POINTERS = ["dQ_ptr", "dK_ptr", "q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr", "rope_ptr"]
_GRAD_POINTERS += ["dq_ptr", "dk_ptr", "partials_ptr"]
_SIZES = ["length", "start", "joint", "q_heads", "k_heads", "width"]
_GRAD_SIZES = ["length", "start", "chunks", "q_heads", "k_heads", "width"]
BUDGET = [
    *(_case(forward_kernel, t, _POINTERS, _STRIDES, _SIZES, 96, KINDS=3) for t in ("bf16", "fp32")),
    *(
        _case(
            *(backward_kernel, t, _GRAD_POINTERS, _GRAD_STRIDES, _GRAD_SIZES, 168),
            narrow=int(wanted),  # one row of partials
            WANT_WEIGHTS=wanted,
            CHUNK=CHUNK if wanted else 1,
        )
        for t in ("bf16", "fp32")
        for wanted in (True, False)
    ),
    Case(
        weights_kernel,
        {
            "partials_ptr": "*fp32",
            "dw_ptr": "*fp32",
            "rows": "i32",
            "width": "i32",
            "padded": "i32",
        },
        {"ROWS": ROWS, "COLUMNS": COLUMNS},
        4,
        registers=64,
        divisible=("partials_ptr", "dw_ptr", "width", "padded"),
        width=32,
    ),
]
