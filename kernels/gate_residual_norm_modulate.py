"""gate_residual_norm_modulate and its gradients in Triton.

Math, shapes, dtypes: qirl_fast/ops/gate_residual_norm_modulate.py. One pass over the tokens a way
from the functions of kernels/norm_modulate.py and kernels/gate_residual.py. Rows above FUSED leave
no registers for the gate's sums in the backward: du and dgate then come from a second pass, over
dresidual as stored.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case
from qirl_fast.kernels.fp8_quantize import outputs, pointers, store_quantized, unit_of
from qirl_fast.kernels.gate_residual import factor_of, gate_residual_backward, tanh_slope
from qirl_fast.kernels.norm_modulate import (
    CHUNK,
    FP32,
    column_sums,
    marks,
    moments,
    norm_dx,
    plan,
    row_pointer,
    rows_t0,
)

FUSED = 4096


@triton.jit
def forward_kernel(
    residual_ptr,
    u_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    gate_t0_ptr,
    scale_t0_ptr,
    shift_t0_ptr,
    t0_ptr,
    y_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    q_ptr,
    q_scale_ptr,
    gate_stride,
    scale_stride,
    shift_stride,
    gate_t0_stride,
    scale_t0_stride,
    shift_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    eps,
    TANH: tl.constexpr,
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
    stored = tl.load((residual_ptr + row * width) + i, mask=inside, other=0.0)
    u = tl.load((u_ptr + row * width) + i, mask=inside, other=0.0).to(tl.float32)
    taken = 0
    if HAS_T0:
        taken = tl.load(t0_ptr + b * t0_sample + (row % tokens) * t0_token)
    gate_row = row_pointer(gate_ptr, gate_stride, gate_t0_ptr, gate_t0_stride, b, taken, HAS_T0)
    f = factor_of(tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32), TANH)
    out = (stored.to(tl.float32) + f * u).to(stored.dtype)
    tl.store((out_ptr + row * width) + i, out, mask=inside)
    scale_row = row_pointer(
        scale_ptr, scale_stride, scale_t0_ptr, scale_t0_stride, b, taken, HAS_T0
    )
    scale = tl.load(scale_row + i, mask=inside, other=0.0)
    x = out.to(tl.float32)  # as stored
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
    dout_ptr,
    out_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    gate_ptr,
    scale_ptr,
    gate_t0_ptr,
    scale_t0_ptr,
    t0_ptr,
    dresidual_ptr,
    du_ptr,
    partial_ptr,
    gate_stride,
    scale_stride,
    gate_t0_stride,
    scale_t0_stride,
    t0_sample,
    t0_token,
    tokens,
    width,
    chunks,
    TANH: tl.constexpr,
    RMS: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_T0: tl.constexpr,
    WANT_DU: tl.constexpr,
    WANT_GATE: tl.constexpr,
    WANT_MOD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Without sums to make, TOKENS is 1; programs of both groups then still run."""
    task = tl.program_id(0)
    group = tl.program_id(1)
    chunk = task.to(tl.int64)  # over all samples
    b = (task // chunks).to(tl.int64)
    first = (task % chunks) * TOKENS
    i = tl.arange(0, BLOCK)
    inside = i < width
    dgate = tl.zeros([BLOCK], tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    gate_row = row_pointer(gate_ptr, gate_stride, gate_t0_ptr, gate_t0_stride, b, group, HAS_T0)
    scale_row = row_pointer(
        scale_ptr, scale_stride, scale_t0_ptr, scale_t0_stride, b, group, HAS_T0
    )
    for k in range(TOKENS):  # the interpreter takes constant bounds only
        s = first + k
        mine = s < tokens
        if HAS_T0:
            mark = tl.load(t0_ptr + b * t0_sample + s * t0_token, mask=mine, other=0)
            mine = mine & ((mark != 0) == (group != 0))
        if mine:
            token = b * tokens + s
            row = token * width
            dy = tl.load((dy_ptr + row) + i, mask=inside, other=0.0).to(tl.float32)
            stored = tl.load((out_ptr + row) + i, mask=inside, other=0.0)
            scale = tl.load(scale_row + i, mask=inside, other=0.0).to(tl.float32)
            mean = 0.0
            if not RMS:
                mean = tl.load(mean_ptr + token)
            rstd = tl.load(rstd_ptr + token)
            dr, xhat = norm_dx(dy, stored.to(tl.float32), scale, mean, rstd, inside, width, RMS)
            if WANT_MOD:
                dscale += dy * xhat
                dshift += dy
            if HAS_DOUT:
                dr += tl.load((dout_ptr + row) + i, mask=inside, other=0.0).to(tl.float32)
            tl.store((dresidual_ptr + row) + i, dr.to(stored.dtype), mask=inside)
            if WANT_DU:
                gate = tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32)
                du = (factor_of(gate, TANH) * dr).to(du_ptr.dtype.element_ty)
                tl.store((du_ptr + row) + i, du, mask=inside)
            if WANT_GATE:
                u = tl.load((u_ptr + row) + i, mask=inside, other=0.0).to(tl.float32)
                dgate += dr * u
    all_chunks = tl.num_programs(0).to(tl.int64)
    at = (group * 3 * all_chunks + chunk) * width
    if WANT_GATE:
        if TANH:
            gate = tl.load(gate_row + i, mask=inside, other=0.0).to(tl.float32)
            dgate = dgate * tanh_slope(gate)
        tl.store((partial_ptr + at) + i, dgate, mask=inside)
    if WANT_MOD:
        at += all_chunks * width
        tl.store((partial_ptr + at) + i, dscale, mask=inside)
        tl.store((partial_ptr + at + all_chunks * width) + i, dshift, mask=inside)


# ---- launchers ----------------------------------------------------------------------------------
def gate_residual_norm_modulate(
    residual, u, gate, scale, shift, t0, gate_t0, scale_t0, shift_t0, tanh, rms, eps, quantize
):
    """(y, out, mean, rstd, q, scale of q)."""
    residual, u = residual.contiguous(), u.contiguous()
    samples, tokens, width = residual.shape
    block, warps = plan("gate_residual_norm_modulate", width, residual.element_size())
    y, out = torch.empty_like(residual), torch.empty_like(residual)
    rstd = residual.new_empty(samples, tokens, dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    q, q_scale = outputs(y, quantize)
    pairs = ((gate, gate_t0), (scale, scale_t0), (shift, shift_t0))
    first, second, strides, strides_t0 = zip(*(rows_t0(*p, residual) for p in pairs), strict=True)
    marked, *mark_strides = marks(t0, residual)
    forward_kernel[(samples * tokens,)](
        *(residual, u, *first, *second, marked, y, out, rstd if rms else mean, rstd),
        *pointers(q, q_scale, y),
        *(*strides, *strides_t0, *mark_strides, tokens, width, eps),
        TANH=tanh,
        RMS=rms,
        HAS_SHIFT=shift is not None,
        HAS_T0=t0 is not None,
        UNIT=unit_of(quantize, block),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y, out, mean, rstd, q, q_scale


def gate_residual_norm_modulate_backward(*inputs_and_flags):
    """(dresidual, du, dgate, dgate_t0, dscale, dshift, dscale_t0, dshift_t0)."""
    u, gate, t0, gate_t0 = (inputs_and_flags[k] for k in (3, 6, 8, 9))
    tanh, want_du, want_gate = (inputs_and_flags[k] for k in (11, 13, 14))
    if u.shape[-1] <= FUSED or not (want_du or want_gate):
        return fused_backward(*inputs_and_flags)
    norm_only = (*inputs_and_flags[:13], False, False, *inputs_and_flags[15:])
    dresidual, _, _, _, *mod = fused_backward(*norm_only)
    gates = gate_residual_backward(dresidual, u, gate, t0, gate_t0, tanh, want_du, want_gate)
    return (dresidual, *gates, *mod)


def fused_backward(
    dy,
    dout,
    out,
    u,
    mean,
    rstd,
    gate,
    scale,
    t0,
    gate_t0,
    scale_t0,
    tanh,
    rms,
    want_du,
    want_gate,
    want_mod,
    has_shift,
):
    dy, out, u = dy.contiguous(), out.contiguous(), u.contiguous()
    samples, tokens, width = out.shape
    block, warps = plan("gate_residual_norm_modulate", width, out.element_size())
    dresidual, absent = torch.empty_like(out), rstd.new_empty(0)
    du = torch.empty_like(u) if want_du else u.new_empty(0)
    pairs = ((gate, gate_t0), (scale, scale_t0))
    first, second, strides, strides_t0 = zip(*(rows_t0(*p, out) for p in pairs), strict=True)
    marked, *mark_strides = marks(t0, out)
    sums = want_gate or want_mod
    chunk = CHUNK if sums else 1
    chunks, groups = triton.cdiv(tokens, chunk), 1 if t0 is None else 2
    partial = rstd.new_empty(groups, 3, samples, chunks, width) if sums else absent
    backward_kernel[(samples * chunks, groups)](
        *(dy, dy if dout is None else dout.contiguous(), out, u, rstd if rms else mean, rstd),
        *(*first, *second, marked, dresidual, du if want_du else dresidual),
        *(partial if sums else rstd, *strides, *strides_t0, *mark_strides, tokens, width, chunks),
        TANH=tanh,
        RMS=rms,
        HAS_DOUT=dout is not None,
        HAS_T0=t0 is not None,
        WANT_DU=want_du,
        WANT_GATE=want_gate,
        WANT_MOD=want_mod,
        TOKENS=chunk,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )

    def total(group, k, wanted):
        there = wanted and group < groups
        return column_sums(partial[group, k]) if there else rstd.new_empty(0)

    kinds = ((0, want_gate),), ((1, want_mod), (2, want_mod and has_shift))
    return (dresidual, du, *(total(g, *k) for some in kinds for g in range(2) for k in some))


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, width, flags, registers, narrow=0):
    kinds = {}
    for name in kernel.arg_names:
        if name in FP32:
            kinds[name] = "*fp32"
        elif name.endswith("_ptr"):
            kinds[name] = "*u8" if name in ("t0_ptr", "q_ptr") else f"*{dtype}"
        elif name in ("tokens", "width", "chunks"):
            kinds[name] = "i32"
        elif name.islower():
            kinds[name] = "fp32" if name == "eps" else "i64"
    block, warps = plan("", width, 2 if dtype == "bf16" else 4)
    constexprs = {"TANH": True, "RMS": False, "HAS_T0": True, "BLOCK": block, **flags}
    aligned = [n for n in kinds if n.endswith(("_ptr", "_stride")) or n == "width"]
    return Case(
        kernel, kinds, constexprs, warps, registers, divisible=tuple(aligned), narrow=narrow
    )


_WANT = {"HAS_DOUT": True, "WANT_DU": True, "WANT_GATE": True, "WANT_MOD": True, "TOKENS": CHUNK}
_NORM = {**_WANT, "WANT_DU": False, "WANT_GATE": False}
BUDGET = []
for _dtype in ("bf16", "fp32"):
    for _width in (3072, 8192):
        _wanted = _WANT if _width <= FUSED else _NORM
        BUDGET.append(_case(backward_kernel, _dtype, _width, _wanted, 192))
        for _quantize in ("", "row", "block"):
            _unit = unit_of(_quantize, plan("", _width, 2)[0])
            _flags = {"HAS_SHIFT": True, "UNIT": _unit}
            BUDGET.append(
                _case(forward_kernel, _dtype, _width, _flags, 96, narrow=3 if _unit else 0)
            )
