"""lora_linear in Triton: the rank-r products; the base product stays torch's GEMM.

down    t = x A^T (also u = dy B): one program a block of tokens and ranks, looping over the width
up      y += s t B^T in place (also dx += s u A): one program a block of tokens and outputs
weight  t^T dy and u^T x over chunks of CHUNK tokens, summed in order of chunks afterwards

Sums are in float32, each program's in the order of its loop; chunks depend on the shape alone.
Blocks are fixed by `rank_block` and `width_block`. Math, shapes, dtypes:
qirl_fast/ops/lora_linear.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from qirl_fast.kernels.budget import Case

TOKENS = 64  # tokens a block
CHUNK = 1024  # tokens a weight-gradient program sums
WARPS = 8


def rank_block(rank: int) -> int:
    """Ranks a block: a power of two that tl.dot takes, at most 64; larger ranks take several."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def width_block(bytes_each: int) -> int:
    """Input or output channels a block: 128 bytes of them."""
    return 128 // bytes_each


@triton.jit
def down_kernel(
    x_ptr,
    a_ptr,
    t_ptr,
    tokens,
    width,
    rank,
    x_row,
    a_rank,
    a_width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """t [tokens, rank] = x [tokens, width] times A [rank, width] transposed, A of any strides."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    r = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    k = tl.arange(0, WIDTH)
    sums = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for step in range(STEPS):
        first = step * WIDTH
        inside = first + k < width
        x = tl.load(
            x_ptr + n[:, None] * x_row + (first + k)[None, :],
            mask=(n < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + r[None, :] * a_rank + (first + k).to(tl.int64)[:, None] * a_width,
            mask=(r < rank)[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(x, a, sums, input_precision="ieee")
    at = n[:, None] * rank + r[None, :]
    tl.store(
        t_ptr + at, sums.to(t_ptr.dtype.element_ty), mask=(n < tokens)[:, None] & (r < rank)[None]
    )


@triton.jit
def up_kernel(
    y_ptr,
    t_ptr,
    b_ptr,
    scale,
    tokens,
    width,
    rank,
    b_width,
    b_rank,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y [tokens, width] += scale t [tokens, rank] times B [width, rank] transposed, in place."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    r = tl.arange(0, RANKS)
    sums = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for step in range(STEPS):
        first = step * RANKS
        inside = first + r < rank
        t = tl.load(
            t_ptr + n[:, None] * rank + (first + r)[None, :],
            mask=(n < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[None, :] * b_width + (first + r).to(tl.int64)[:, None] * b_rank,
            mask=(k < width)[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(t, b, sums, input_precision="ieee")
    at = n[:, None] * width + k[None, :]
    mask = (n < tokens)[:, None] & (k < width)[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, (y.to(tl.float32) + scale * sums).to(y.dtype), mask=mask)


@triton.jit
def weight_kernel(
    t_ptr,
    x_ptr,
    sums_ptr,
    tokens,
    width,
    rank,
    x_row,
    sums_rank,
    sums_width,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
):
    """sums [chunk, rank, width] = t^T x over one chunk of tokens, in float32."""
    k = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    r = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    chunk = tl.program_id(2).to(tl.int64)
    last = tl.minimum(tokens, (chunk + 1) * CHUNK)
    sums = tl.zeros((RANKS, WIDTH), dtype=tl.float32)
    for first in range(0, CHUNK, TOKENS):
        n = chunk * CHUNK + first + tl.arange(0, TOKENS)
        t = tl.load(
            t_ptr + n[None, :] * rank + r[:, None],
            mask=(n < last)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + n[:, None] * x_row + k[None, :],
            mask=(n < last)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        sums = tl.dot(t, x, sums, input_precision="ieee")
    at = chunk * rank * width + r[:, None] * sums_rank + k[None, :] * sums_width
    tl.store(sums_ptr + at, sums, mask=(r < rank)[:, None] & (k < width)[None, :])


# ---- launchers ----------------------------------------------------------------------------------
def _down(x: Tensor, a_RK: Tensor) -> Tensor:
    """x a^T; x [tokens, width] with contiguous rows, a [rank, width] of any strides."""
    (tokens, width), rank = x.shape, a_RK.shape[0]
    t, ranks, block = x.new_empty(tokens, rank), rank_block(rank), width_block(x.itemsize)
    down_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(rank, ranks))](
        x,
        a_RK,
        t,
        tokens,
        width,
        rank,
        x.stride(0),
        a_RK.stride(0),
        a_RK.stride(1),
        TOKENS=TOKENS,
        WIDTH=block,
        RANKS=ranks,
        STEPS=triton.cdiv(width, block),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return t


def _up_(y: Tensor, t: Tensor, b_KR: Tensor, scale: float) -> None:
    """y += scale t b^T in place; y [tokens, width] contiguous, b [width, rank] of any strides."""
    (tokens, width), rank = y.shape, t.shape[1]
    ranks, block = rank_block(rank), width_block(y.itemsize)
    up_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(width, block))](
        y,
        t,
        b_KR,
        scale,
        tokens,
        width,
        rank,
        b_KR.stride(0),
        b_KR.stride(1),
        TOKENS=TOKENS,
        WIDTH=block,
        RANKS=ranks,
        STEPS=triton.cdiv(rank, ranks),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _weight_gradient(t: Tensor, x: Tensor, scale: float, like: Tensor, transposed: bool) -> Tensor:
    """scale t^T x [rank, width] (transposed: [width, rank]) in the dtype of `like`."""
    (tokens, width), rank = x.shape, t.shape[1]
    chunks, ranks, block = triton.cdiv(tokens, CHUNK), rank_block(rank), width_block(x.itemsize)
    sums = x.new_empty(chunks, *like.shape, dtype=torch.float32)
    weight_kernel[(triton.cdiv(width, block), triton.cdiv(rank, ranks), chunks)](
        t,
        x,
        sums,
        tokens,
        width,
        rank,
        x.stride(0),
        1 if transposed else width,
        rank if transposed else 1,
        CHUNK=CHUNK,
        TOKENS=TOKENS // 2,
        WIDTH=block,
        RANKS=ranks,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    total = sums[0]
    for part in sums[1:]:
        total += part
    return total.mul_(scale).to(like.dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [tokens, width] with contiguous rows, a copy only where it must be."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def lora_linear(x, weight, bias, a, b, scale):
    """(y, [t_i]); arguments as the op's, already checked."""
    x_NI = _rows(x)
    y, ts = F.linear(x_NI, weight, bias), []
    for a_i, b_i, s in zip(a, b, scale, strict=True):
        ts.append(_down(x_NI, a_i.to(x.dtype)))
        _up_(y, ts[-1], b_i.to(x.dtype), s)
    return y.view(*x.shape[:-1], -1), ts


def lora_linear_backward(dy, x, weight, a, b, t, scale, want):
    """[dx, dweight, dbias, dA_i ..., dB_i ...]; an unwanted one is an empty tensor."""
    g, n = _rows(dy), len(a)
    x_NI = None if x is None else _rows(x)
    grads = [dy.new_empty(0) for _ in want]
    if want[0]:
        grads[0] = g @ weight
    if want[1]:
        grads[1] = g.T @ x_NI
    if want[2]:
        grads[2] = g.sum(0)
    for i, s in enumerate(scale):
        if want[0] or want[3 + i]:
            u = _down(g, b[i].to(g.dtype).T)
            if want[0]:
                _up_(grads[0], u, a[i].to(g.dtype).T, s)
            if want[3 + i]:
                grads[3 + i] = _weight_gradient(u, x_NI, s, a[i], transposed=False)
        if want[3 + n + i]:
            grads[3 + n + i] = _weight_gradient(t[i], g, s, b[i], transposed=True)
    if want[0]:
        grads[0] = grads[0].view(*dy.shape[:-1], -1)
    return grads


# ---- budget -------------------------------------------------------------------------------------
_SIZES = {"tokens": "i32", "width": "i32", "rank": "i32"}


def _cases(dtype: str, registers: tuple[int, int, int]) -> list[Case]:
    width = width_block({"*bf16": 2, "*fp32": 4}[dtype])
    blocks = {"TOKENS": TOKENS, "WIDTH": width, "RANKS": 64}
    down = {"x_ptr": dtype, "a_ptr": dtype, "t_ptr": dtype, **_SIZES, "x_row": "i32"}
    up = {"y_ptr": dtype, "t_ptr": dtype, "b_ptr": dtype, "scale": "fp32", **_SIZES}
    weight = {"t_ptr": dtype, "x_ptr": dtype, "sums_ptr": "*fp32", **_SIZES, "x_row": "i32"}
    return [
        Case(
            down_kernel,
            {**down, "a_rank": "i32"},
            {"a_width": 1, **blocks, "STEPS": 3072 // width},
            WARPS,
            registers[0],
            divisible=(*down, "a_rank"),
        ),
        Case(
            up_kernel,
            {**up, "b_width": "i32"},
            {"b_rank": 1, **blocks, "STEPS": 1},
            WARPS,
            registers[1],
            divisible=(*[name for name in up if name != "scale"], "b_width"),
        ),
        Case(
            weight_kernel,
            {**weight, "sums_rank": "i32"},
            {"sums_width": 1, **blocks, "TOKENS": TOKENS // 2, "CHUNK": CHUNK},
            WARPS,
            registers[2],
            divisible=(*weight, "sums_rank"),
        ),
    ]


BUDGET = [*_cases("*bf16", (64, 48, 56)), *_cases("*fp32", (80, 128, 64))]
