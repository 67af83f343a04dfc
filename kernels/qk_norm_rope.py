"""qk_norm_rope in Triton. Math, shapes, dtypes: qirl_fast/ops/qk_norm_rope.py.

One launch takes q, k and v of both streams: a program takes one token's heads of one of them (up to
TILE elements) and writes its place in the joint buffer. Gradients: qk_norm_rope_backward.py.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

TILE = 4096  # elements of one program


@triton.jit
def rotated(x, rope_ptr, d, width, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Pairs of x [HEADS, 2 HALF] times (cos + i sign sin) of one token."""
    rope = tl.load(rope_ptr + d, mask=d < width, other=0.0)
    cos, sin = tl.split(tl.reshape(rope, [HALF, 2]))
    cos, sin = cos[None, :], sin[None, :] * sign
    even, odd = tl.split(tl.reshape(x, [HEADS, HALF, 2]))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, [HEADS, 2 * HALF])


@triton.jit
def pick(text, is_k, t_q, t_k, q, k):
    """Of q or k, of the text or the image stream."""
    return tl.where(text, tl.where(is_k, t_k, t_q), tl.where(is_k, k, q))


@triton.jit
def forward_kernel(
    tq_ptr,
    tk_ptr,
    tv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tq_weight_ptr,
    tk_weight_ptr,
    q_weight_ptr,
    k_weight_ptr,
    t_rope_ptr,
    rope_ptr,
    Q_ptr,
    K_ptr,
    V_ptr,
    tq_b,
    tq_s,
    tq_h,
    tk_b,
    tk_s,
    tk_h,
    tv_b,
    tv_s,
    tv_h,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    t_rope_b,
    t_rope_s,
    rope_b,
    rope_s,
    text_length,
    joint,
    q_heads,
    k_heads,
    width,
    eps,
    KINDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Token `place` of `joint` tokens: of the text stream before text_length, then of the image."""
    task = tl.program_id(0).to(tl.int64)
    kind, token = task % KINDS, task // KINDS
    b, place = token // joint, token % joint
    text, is_k = place < text_length, kind == 1
    s = tl.where(text, place, place - text_length)
    x_ptr = pick(text, is_k, tq_ptr, tk_ptr, q_ptr, k_ptr)
    stride_b = pick(text, is_k, tq_b, tk_b, q_b, k_b)
    stride_s = pick(text, is_k, tq_s, tk_s, q_s, k_s)
    stride_h = pick(text, is_k, tq_h, tk_h, q_h, k_h)
    y_ptr = tl.where(is_k, K_ptr, Q_ptr)
    heads = tl.where(kind == 0, q_heads, k_heads)
    if KINDS == 3:
        is_v = kind == 2
        x_ptr = tl.where(is_v, tl.where(text, tv_ptr, v_ptr), x_ptr)
        stride_b = tl.where(is_v, tl.where(text, tv_b, v_b), stride_b)
        stride_s = tl.where(is_v, tl.where(text, tv_s, v_s), stride_s)
        stride_h = tl.where(is_v, tl.where(text, tv_h, v_h), stride_h)
        y_ptr = tl.where(is_v, V_ptr, y_ptr)

    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)
    inside = (h < heads) & (d[None, :] < width)
    at = b * stride_b + s * stride_s + h * stride_h + d[None, :]
    stored = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = stored.to(tl.float32)
    if kind < 2:
        r = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=1) / width + eps)
        y = y * r[:, None]
        if HAS_WEIGHT:
            w_ptr = pick(text, is_k, tq_weight_ptr, tk_weight_ptr, q_weight_ptr, k_weight_ptr)
            w = tl.load(w_ptr + d, mask=d < width, other=0.0).to(tl.float32)
            y = y * w[None, :]
        if HAS_ROPE:
            turn_ptr = tl.where(text, t_rope_ptr, rope_ptr)
            turn_ptr += b * tl.where(text, t_rope_b, rope_b) + s * tl.where(text, t_rope_s, rope_s)
            y = rotated(y, turn_ptr, d, width, 1.0, HEADS, HALF)
    out = (token * heads + h) * width + d[None, :]
    tl.store(y_ptr + out, y.to(stored.dtype), mask=inside)


# ---- launchers ----------------------------------------------------------------------------------
def dense(t):
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def weights_of(like, *weights):
    """(all of one dtype, whether there are any). An absent one beside others is ones."""
    given = [w for w in weights if w is not None]
    if not given:
        return [like] * len(weights), False
    dtype = given[0].dtype if all(w.dtype == given[0].dtype for w in given) else torch.float32
    ones = None if len(given) == len(weights) else torch.ones_like(given[0], dtype=dtype)
    return [ones if w is None else w.to(dtype).contiguous() for w in weights], True


def ropes_of(like, *ropes):
    """(float32 [.., S, Dh] each, their strides of B and S, whether there are any).

    An absent one beside another turns by nothing.
    """
    given = [r for r in ropes if r is not None]
    if not given:
        return [like] * len(ropes), [0, 0] * len(ropes), False
    reals, strides = [], []
    for rope in ropes:
        turn = given[0].new_ones((1, given[0].shape[-1])) if rope is None else rope.resolve_conj()
        real = dense(torch.view_as_real(turn).flatten(-2))
        reals.append(real)
        strides += [real.stride(0) if real.ndim == 3 else 0, 0 if rope is None else real.stride(-2)]
    return reals, strides, True


def tiles_of(q, k):
    """HEADS, HALF, head tiles, warps: a program holds at most TILE elements."""
    width = triton.next_power_of_2(q.shape[3])
    heads = max(q.shape[2], k.shape[2])
    tile = min(triton.next_power_of_2(heads), max(1, TILE // width))
    return tile, width // 2, triton.cdiv(heads, tile), 8 if tile * width >= 2048 else 4


def strides_of(*tensors):
    return [stride for t in tensors for stride in t.stride()[:3]]


def qk_norm_rope(q, k, v, q_weight, k_weight, rope, tq, tk, tv, tq_weight, tk_weight, t_rope, eps):
    """(Q, K, V); arguments as the reference's. V is empty without a text stream."""
    joined = tq is not None
    q, k, v = dense(q), dense(k), dense(v) if joined else k
    tq, tk, tv = (dense(tq), dense(tk), dense(tv)) if joined else (q, k, v)
    if not joined:  # stand-ins that are never read
        tq_weight, tk_weight, t_rope = q_weight, k_weight, rope
    weights, has_weight = weights_of(q, tq_weight, tk_weight, q_weight, k_weight)
    reals, rope_strides, has_rope = ropes_of(q, t_rope, rope)
    batch, length, heads, width = q.shape
    start = tq.shape[1] if joined else 0
    Q, K, V = (t.new_empty((batch, start + length, *t.shape[2:])) for t in (q, k, k))
    V = V if joined else q.new_empty(0)
    tile, half, tiles, warps = tiles_of(q, k)
    kinds = 3 if joined else 2
    forward_kernel[(batch * (start + length) * kinds, tiles)](
        *(tq, tk, tv, q, k, v, *weights, *reals, Q, K, V if joined else Q),
        *(*strides_of(tq, tk, tv, q, k, v), *rope_strides),
        *(start, start + length, heads, k.shape[2], width, eps),
        KINDS=kinds,
        HAS_WEIGHT=has_weight,
        HAS_ROPE=has_rope,
        HEADS=tile,
        HALF=half,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return Q, K, V


# ---- budget -------------------------------------------------------------------------------------
def case(kernel, dtype, sizes, registers, narrow=0, **constexprs):
    """Heads of 128, weights of the heads' dtype; float32 ropes and partials."""
    names = kernel.arg_names[: kernel.arg_names.index("eps")]
    pointers = [n for n in names if n.endswith("_ptr")]
    wide = ("rope_ptr", "t_rope_ptr", "partials_ptr")
    strides = [n for n in names if n not in pointers and n not in sizes]
    return Case(
        kernel,
        {p: "*fp32" if p in wide else f"*{dtype}" for p in pointers}
        | dict.fromkeys(strides, "i64")
        | dict.fromkeys(sizes, "i32")
        | {"eps": "fp32"},
        {"HAS_WEIGHT": True, "HAS_ROPE": True, "HEADS": 32, "HALF": 64} | constexprs,
        8,
        registers=registers,
        divisible=(*pointers, *strides, "width"),
        narrow=narrow,
    )


_SIZES = ("text_length", "joint", "q_heads", "k_heads", "width")
BUDGET = [case(forward_kernel, t, _SIZES, 64, KINDS=3) for t in ("bf16", "fp32")]
