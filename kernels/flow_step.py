"""flow_step and flow_logp in Triton: noise drawn in the kernel, squares summed per block of 1024.

The noise is that of csrc/math/philox.h: the same Philox words and the same polynomials, each
product and sum rounded on its own (enable_fp_fusion=False). The order of sums inside a block is
Triton's, fixed by the shape; blocks are added in float64. Math, shapes, dtypes:
qirl_fast/ops/flow_step.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from qirl_fast.kernels.budget import Case

BLOCK = 1024
WARPS = 4


@triton.jit
def _log_of_24_bits(k):
    """ln(k / 2^24) for integer-valued float32 k in [1, 2^24]."""
    shifted = k.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = ((shifted >> 23) - 24).to(tl.float32)
    t = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = t * -0.0763449296 + 0.12761575
    p = p * t - 0.131601825
    p = p * t + 0.142017588
    p = p * t - 0.166233569
    p = p * t + 0.200012267
    p = p * t - 0.250008196
    p = p * t + 0.333333313
    t2 = t * t
    small = (t * t2) * p + e * -2.12194440e-4
    return ((small - t2 * 0.5) + t) + e * 0.693359375


@triton.jit
def _sincos_of_turns(turns):
    """sin and cos of 2 pi turns / 2^24 for int32 turns in [0, 2^24)."""
    quarter = (turns + (1 << 21)) >> 22
    g = (turns - (quarter << 22)).to(tl.float32) * 2.38418579e-7
    z = g * g
    s = g * (((z * -0.00460531004 + 0.0796815827) * z - 0.645963669) * z + 1.57079637)
    c = (((z * 0.000904021668 - 0.0208602883) * z + 0.253669232) * z - 1.23370051) * z + 1.0
    odd = (quarter & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) == 0, sine, -sine)
    return sine, tl.where(((quarter + 1) & 2) == 0, cosine, -cosine)


@triton.jit
def _box_muller(p, q):
    radius = tl.sqrt_rn(_log_of_24_bits(((p >> 8) + 1).to(tl.int32).to(tl.float32)) * -2.0)
    sine, cosine = _sincos_of_turns((q >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def row_noise(seed, offset, first, BLOCK: tl.constexpr):
    """Noise of elements [first, first + BLOCK) of the row with this seed."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, zero, zero + low, zero + high)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _mean(x, v, delta, a, c, HAS_DELTA: tl.constexpr):
    mean = a * x.to(tl.float32) + c * v.to(tl.float32)
    return mean + delta.to(tl.float32) if HAS_DELTA else mean


@triton.jit
def drawn(mean, s_ptr, seed_ptr, row, offset, first, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """x' of one block, rounded to storage."""
    noise = row_noise(tl.load(seed_ptr + row), offset.to(tl.int64), first, BLOCK)
    return (mean + tl.load(s_ptr + row) * noise).to(dtype)


@triton.jit(do_not_specialize=["offset"])
def flow_kernel(
    x_ptr,
    v_ptr,
    delta_ptr,
    x_next_ptr,
    r_ptr,
    a_ptr,
    c_ptr,
    s_ptr,
    seed_ptr,
    sums_ptr,
    offset,
    size,
    blocks,
    HAS_DELTA: tl.constexpr,
    REPLAY: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row. REPLAY: x_next is read, else it is drawn and written. KEEP: r is."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < size
    at = row * size + i
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0) if HAS_DELTA else x
    mean = _mean(x, v, delta, tl.load(a_ptr + row), tl.load(c_ptr + row), HAS_DELTA)
    if REPLAY:
        x_next = tl.load(x_next_ptr + at, mask=inside, other=0.0)
    else:
        x_next = drawn(mean, s_ptr, seed_ptr, row, offset, first, x.dtype, BLOCK)
        tl.store(x_next_ptr + at, x_next, mask=inside)
    r = tl.where(inside, x_next.to(tl.float32) - mean, 0.0)
    if KEEP:
        tl.store(r_ptr + at, r, mask=inside)
    tl.store(sums_ptr + task, tl.sum(r * r))


@triton.jit
def backward_kernel(
    r_ptr,
    a_ptr,
    c_ptr,
    slope_ptr,
    dx_ptr,
    dv_ptr,
    size,
    blocks,
    WANT_DX: tl.constexpr,
    WANT_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = slope a r, dv = slope c r with slope = 2 w grad / N of the row."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // blocks, (task % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < size
    at = row * size + i
    slope = tl.load(slope_ptr + row)
    r = tl.load(r_ptr + at, mask=inside, other=0.0)
    if WANT_DX:
        dx = (slope * tl.load(a_ptr + row)) * r
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WANT_DV:
        dv = (slope * tl.load(c_ptr + row)) * r
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# ---- launchers ----------------------------------------------------------------------------------
def grid_of(x: Tensor) -> tuple[int, int]:
    """Elements a row, blocks a row."""
    size = x.numel() // x.shape[0]
    return size, triton.cdiv(size, BLOCK)


def log_prob(sums: Tensor, size: int, w: Tensor, b: Tensor) -> Tensor:
    mean_square = sums.double().sum(dim=1) / size
    return (0.0 - w.double() * mean_square - b.double()).float()


def flow_step(x, v, a, c, s, w, b, seed, offset, delta):
    """(x_next, logp); arguments as the public op's, already checked."""
    x, v = x.contiguous(), v.contiguous()
    delta = None if delta is None else delta.contiguous()
    a, c, s, seed = (t.contiguous() for t in (a, c, s, seed))
    size, blocks = grid_of(x)
    x_next = x.new_empty(x.shape)
    sums = a.new_empty((x.shape[0], blocks))
    flow_kernel[(x.shape[0] * blocks,)](
        x,
        v,
        x if delta is None else delta,
        x_next,
        sums,
        a,
        c,
        s,
        seed,
        sums,
        offset,
        size,
        blocks,
        HAS_DELTA=delta is not None,
        REPLAY=False,
        KEEP=False,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return x_next, log_prob(sums, size, w, b)


def flow_logp(x, x_next, v, a, c, w, b, delta, keep):
    """(logp [B] of a stored x_next, r or an empty tensor)."""
    x, x_next, v = x.contiguous(), x_next.contiguous(), v.contiguous()
    delta = None if delta is None else delta.contiguous()
    a, c = a.contiguous(), c.contiguous()
    size, blocks = grid_of(x)
    sums = a.new_empty((x.shape[0], blocks))
    residual = a.new_empty(x.shape if keep else 0)
    flow_kernel[(x.shape[0] * blocks,)](
        x,
        v,
        x if delta is None else delta,
        x_next,
        residual if keep else sums,
        a,
        c,
        a,
        a,
        sums,
        0,
        size,
        blocks,
        HAS_DELTA=delta is not None,
        REPLAY=True,
        KEEP=keep,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return log_prob(sums, size, w, b), residual


def flow_logp_backward(grad, residual, a, c, w, x_dtype, v_dtype):
    """(dx, dv) in these dtypes; of None an empty tensor."""
    residual, a, c = residual.contiguous(), a.contiguous(), c.contiguous()
    size, blocks = grid_of(residual)
    slope = ((2.0 / size) * grad.double() * w.double()).float()
    dx, dv = (
        residual.new_empty(0 if dtype is None else residual.shape, dtype=dtype)
        for dtype in (x_dtype, v_dtype)
    )
    backward_kernel[(residual.shape[0] * blocks,)](
        residual,
        a,
        c,
        slope,
        dx if x_dtype else residual,
        dv if v_dtype else residual,
        size,
        blocks,
        WANT_DX=x_dtype is not None,
        WANT_DV=v_dtype is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return dx, dv


# ---- budget -------------------------------------------------------------------------------------
_POINTERS = {"a_ptr": "*fp32", "c_ptr": "*fp32"}
_SIZES = {"size": "i64", "blocks": "i32"}


def _case(dtype: str, replay: bool, delta: bool, registers: int) -> Case:
    large = dict.fromkeys(("x_ptr", "v_ptr", "delta_ptr", "x_next_ptr"), f"*{dtype}")
    large["r_ptr"] = "*fp32"
    rest = {"s_ptr": "*fp32", "seed_ptr": "*i64", "sums_ptr": "*fp32", "offset": "i64"}
    return Case(
        flow_kernel,
        {**large, **_POINTERS, **rest, **_SIZES},
        {"HAS_DELTA": delta, "REPLAY": replay, "KEEP": replay, "BLOCK": BLOCK},
        WARPS,
        registers,
        divisible=(*large, "size"),
    )


def _backward_case(dtype: str, registers: int) -> Case:
    large = {"r_ptr": "*fp32", "dx_ptr": f"*{dtype}", "dv_ptr": f"*{dtype}"}
    return Case(
        backward_kernel,
        {**large, **_POINTERS, "slope_ptr": "*fp32", **_SIZES},
        {"WANT_DX": True, "WANT_DV": True, "BLOCK": BLOCK},
        WARPS,
        registers,
        divisible=(*large, "size"),
    )


BUDGET = [
    _case("bf16", replay=False, delta=False, registers=64),
    _case("fp32", replay=False, delta=True, registers=64),
    _case("bf16", replay=True, delta=True, registers=48),
    _case("fp32", replay=True, delta=False, registers=48),
    _backward_case("bf16", registers=48),
    _backward_case("fp32", registers=48),
]
