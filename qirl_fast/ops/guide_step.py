"""guide_step: guidance and one sampler step in one pass, with the bits of the two in turn.

    g      = guide(v_cond, v_uncond, scale, rescale), rounded to the dtype of v_cond
    mean   = a x + c g                                   frozen=False
    mean   = a x + c v_cond + delta                      frozen=True
    delta  = round to the dtype of x (c (g - v_cond))    the frozen guidance offset
    x'     = round to the dtype of x (mean + s noise),  logp as in flow_step

With frozen, delta is returned: flow_logp(x, x', v_cond, ..., delta=delta) gives logp again and runs
no unconditional branch (METHOD: frozen_offset). The two ops in turn read and write the velocity
and delta three times more.

Shapes: x, v_cond, v_uncond, x', delta [B, ...] (with rescale at least [B, D]); scale float or
float32 [B]; a, c, s, w, b, seed, logp [B].
Dtypes: x, and v_cond with v_uncond, float32 or bfloat16 each; coefficients and logp float32; seed
int64. Sums as in guide and flow_step; noise as in flow_step.
Gradients: none, as flow_step.
Sources: see guide and flow_step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    require_operands,
    require_per_row,
)
from qirl_fast.ops._cpp import cpu_launcher
from qirl_fast.ops._cuda import cuda_module, device_of, missing_cuda, stream_of
from qirl_fast.ops._flow_cuda import flow_scratch
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend
from qirl_fast.ops.flow_step import flow_step_reference
from qirl_fast.ops.guide import guidance_rows, guide_reference


# ---- reference ----------------------------------------------------------------------------------
def guide_step_reference(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor,
    scale_B: Tensor,
    rescale: bool,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    seed: Tensor,
    offset: int,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: the two ops in turn."""
    g = guide_reference(v_cond, v_uncond, scale_B, rescale)
    if not frozen:
        step = flow_step_reference(x, g, a, c, s, w, b, seed, offset, None)
        return *step, x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    c_B = c.to(wide).reshape(-1, *[1] * (x.ndim - 1))
    delta = (c_B * (g.to(wide) - v_cond.to(wide))).to(x.dtype)
    return *flow_step_reference(x, v_cond, a, c, s, w, b, seed, offset, delta), delta


# ---- cuda ---------------------------------------------------------------------------------------
def guide_step_cuda(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale_B: Tensor, rescale: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/guide_step.cu; `rest`: as the reference's."""
    *coefficients, seed, offset, frozen = rest
    x_next, logp, sums = x.new_empty(x.shape), scale_B.new_empty(x.shape[0]), flow_scratch(x)
    delta = x.new_empty(x.shape if frozen else 0)
    with device_of(x):
        cuda_module().guide_step(
            x,
            v_cond,
            v_uncond,
            scale_B,
            rescale,
            tuple(coefficients),
            seed,
            offset,
            sums,
            x_next,
            logp,
            delta,
            stream_of(x),
        )
    return x_next, logp, delta


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "guide_step",
    {
        "reference": Backend(guide_step_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(cpu_launcher("guide_step"), ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("guide_step", "guide_step"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(guide_step_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    default={"cpu": "cpu", "cuda": "reference"},
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logp = x.new_empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), logp, x.new_empty(x.shape if rest[-1] else 0)


_guide_step = OP.register(
    "(Tensor x, Tensor v_cond, Tensor v_uncond, Tensor scale_B, bool rescale, Tensor a, Tensor c,"
    " Tensor s, Tensor w, Tensor b, Tensor seed, SymInt offset, bool frozen)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    large=(0, 1, 2),
)


# ---- public -------------------------------------------------------------------------------------
def guide_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor,
    scale: float | Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    seed: Tensor,
    offset: int,
    rescale: bool = False,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x' [B, ...] in the dtype of x, its log-probability [B] and, with frozen, delta as x.

    x, v_cond, v_uncond: [B, ...] of one shape and device; both velocities of one dtype.
    scale, rescale: as guide's; a, c, s, w, b, seed, offset: as flow_step's.
    frozen: the step goes from v_cond and the guidance enters as delta; else delta is None.
    Returns constants: no gradient flows through any output.
    Raises ValueError for shapes, dtypes, devices or values outside this (on CUDA, values are not
    read: a non-finite coefficient gives non-finite results).
    """
    op = "guide_step"
    per_row = {"a": a, "c": c, "s": s, "w": w, "b": b}
    require_operands(op, {"x": x}, like={"v_cond": v_cond}, per_row=per_row)
    require_operands(op, {"v_cond": v_cond, "v_uncond": v_uncond})
    scale_B = guidance_rows(op, scale, v_cond, rescale)
    require_per_row(op, "seed", seed, x, torch.int64)
    if not 0 <= offset < 2**63:
        raise ValueError(f"{op}: offset must be in [0, 2^63); got {offset}.")
    with torch.no_grad():
        x_next, logp, delta = _guide_step(
            *(x, v_cond, v_uncond, scale_B, rescale, a, c, s, w, b, seed, offset, frozen),
            forced_backend(),
        )
    return x_next, logp, delta if frozen else None
