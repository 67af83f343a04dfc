"""gate_residual and its gradients in Triton. Math, shapes, dtypes: qirl_fast/ops/gate_residual.py.

No reduction along a row: programs take blocks of columns of one token (forward) or of a chunk of
tokens of one sample that read the same gate row (backward, as in kernels/norm_modulate.py).
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.norm_modulate import CHUNK, column_sums, marks, row_pointer, rows_t0

BLOCK = 1024
WARPS = 4


@triton.jit
def factor_of(gate, TANH: tl.constexpr):
    """gate or tanh(gate): a fraction below 0.625, where 1 - 2 / (exp + 1) would cancel."""
    f = gate
    if TANH:
        size = tl.abs(gate)
        q = gate * gate
        small = gate * ((945.0 + q * (105.0 + q)) / (945.0 + q * (420.0 + q * 15.0)))
        near = tl.where(size > 15.0, 15.0, size)  # a NaN stays
        large = 1.0 - 2.0 / (tl.exp(2.0 * near) + 1.0)
        f = tl.where(size < 0.625, small, tl.where(gate < 0.0, -large, large))
    return f


@triton.jit
def tanh_slope(gate):
    """1 - tanh(gate)^2, which cancels far from 0; there 4 e / (1 + e)^2, e = exp(-2 |gate|)."""
    f = factor_of(gate, True)
    e = tl.exp(-2.0 * tl.abs(gate))
    return tl.where(tl.abs(gate) < 0.55, 1.0 - f * f, 4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def forward_kernel(
    residual_ptr,
    u_ptr,
    gate_ptr,
    gate_t0_ptr,
    t0_ptr,
    out_ptr,
    gate_stride,
    gate_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    blocks,
    TANH: tl.constexpr,
    HAS_T0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    task = tl.program_id(0).to(tl.int64)
    row = task // blocks
    b = row // tokens
    i = (task % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    stored = tl.load((residual_ptr + row * width) + i, mask=inside, other=0.0)
    u = tl.load((u_ptr + row * width) + i, mask=inside, other=0.0).to(tl.float32)
    taken = 0
    if HAS_T0:
        taken = tl.load(t0_ptr + b * t0_sample + (row % tokens) * t0_token)
    gate_row = row_pointer(gate_ptr, gate_stride, gate_t0_ptr, gate_t0_stride, b, taken, HAS_T0)
    f = factor_of(tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32), TANH)
    out = stored.to(tl.float32) + f * u
    tl.store((out_ptr + row * width) + i, out.to(stored.dtype), mask=inside)


@triton.jit
def backward_kernel(
    dout_ptr,
    u_ptr,
    gate_ptr,
    gate_t0_ptr,
    t0_ptr,
    du_ptr,
    partial_ptr,
    gate_stride,
    gate_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    chunks,
    blocks,
    TANH: tl.constexpr,
    HAS_T0: tl.constexpr,
    WANT_DU: tl.constexpr,
    WANT_GATE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    task = tl.program_id(0)
    group = tl.program_id(1)
    chunk = (task // blocks).to(tl.int64)  # over all samples
    b = ((task // blocks) // chunks).to(tl.int64)
    first = ((task // blocks) % chunks) * TOKENS
    i = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate_row = row_pointer(gate_ptr, gate_stride, gate_t0_ptr, gate_t0_stride, b, group, HAS_T0)
    f = factor_of(tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32), TANH)
    dgate = tl.zeros([BLOCK], tl.float32)
    for k in range(TOKENS):  # the interpreter takes constant bounds only
        s = first + k
        mine = s < tokens
        if HAS_T0:
            mark = tl.load(t0_ptr + b * t0_sample + s * t0_token, mask=mine, other=0)
            mine = mine & ((mark != 0) == (group != 0))
        if mine:
            row = (b * tokens + s) * width
            dout = tl.load((dout_ptr + row) + i, mask=inside, other=0.0).to(tl.float32)
            if WANT_DU:
                du = (f * dout).to(du_ptr.dtype.element_ty)
                tl.store((du_ptr + row) + i, du, mask=inside)
            if WANT_GATE:
                u = tl.load((u_ptr + row) + i, mask=inside, other=0.0).to(tl.float32)
                dgate += dout * u
    if WANT_GATE:
        if TANH:  # loaded again, from the first-level cache: fewer registers
            gate = tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32)
            dgate = dgate * tanh_slope(gate)
        samples = tl.num_programs(0) // (chunks * blocks)
        at = ((group * samples).to(tl.int64) * chunks + chunk) * width
        tl.store((partial_ptr + at) + i, dgate, mask=inside)


# ---- launchers ----------------------------------------------------------------------------------
def gate_residual(residual, u, gate, t0, gate_t0, tanh):
    """residual + f(gate) u."""
    residual, u = residual.contiguous(), u.contiguous()
    samples, tokens, width = residual.shape
    out = torch.empty_like(residual)
    gate, gate_t0, *strides = rows_t0(gate, gate_t0, residual)
    marked, *mark_strides = marks(t0, residual)
    blocks = triton.cdiv(width, BLOCK)
    forward_kernel[(samples * tokens * blocks,)](
        *(residual, u, gate, gate_t0, marked, out, *strides, *mark_strides, tokens, width, blocks),
        TANH=tanh,
        HAS_T0=t0 is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out


def gate_residual_backward(dout, u, gate, t0, gate_t0, tanh, want_du, want_dgate):
    """(du, dgate, dgate_t0)."""
    dout, u = dout.contiguous(), u.contiguous()
    samples, tokens, width = u.shape
    du = torch.empty_like(u) if want_du else u.new_empty(0)
    gate, gate_t0, *strides = rows_t0(gate, gate_t0, u)
    marked, *mark_strides = marks(t0, u)
    blocks, chunks = triton.cdiv(width, BLOCK), triton.cdiv(tokens, CHUNK)
    groups = 1 if t0 is None else 2
    shape = (groups, samples, chunks, width) if want_dgate else (0,)
    partial = u.new_empty(shape, dtype=torch.float32)
    backward_kernel[(samples * chunks * blocks, groups)](
        *(dout, u, gate, gate_t0, marked, du, partial, *strides, *mark_strides),
        *(tokens, width, chunks, blocks),
        TANH=tanh,
        HAS_T0=t0 is not None,
        WANT_DU=want_du,
        WANT_GATE=want_dgate,
        TOKENS=CHUNK,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    sums = [*column_sums(partial)] if want_dgate else []
    return (du, *sums, *(partial.new_empty(0) for _ in range(2 - len(sums))))


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, large, flags, sizes):
    pointers = (*large, "gate_ptr", "gate_t0_ptr")
    kinds = {**dict.fromkeys(pointers, f"*{dtype}"), "t0_ptr": "*u8", "partial_ptr": "*fp32"}
    kinds |= dict.fromkeys(("gate_stride", "gate_t0_stride", "t0_sample", "t0_token"), "i64")
    kinds |= dict.fromkeys(("tokens", "width", *sizes, "blocks"), "i32")
    kinds = {name: kinds[name] for name in kernel.arg_names if name in kinds}
    constexprs = {"TANH": True, "HAS_T0": True, "BLOCK": BLOCK, **flags}
    aligned = [n for n in kinds if n.endswith(("_ptr", "_stride")) or n == "width"]
    return Case(kernel, kinds, constexprs, WARPS, registers=64, divisible=tuple(aligned))


_FLAGS = {"WANT_DU": True, "WANT_GATE": True, "TOKENS": CHUNK}
BUDGET = []
for _dtype in ("bf16", "fp32"):
    BUDGET += [
        _case(forward_kernel, _dtype, ("residual_ptr", "u_ptr", "out_ptr"), {}, ()),
        _case(backward_kernel, _dtype, ("dout_ptr", "u_ptr", "du_ptr"), _FLAGS, ("chunks",)),
    ]
