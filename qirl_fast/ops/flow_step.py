"""flow_step: one step of any sampler dynamics: its noise, its rounding, its log-probability.

    mean = a x + c v + delta
    x'   = round to the dtype of x (mean + s noise)
    logp = mean over the N elements of a row of (-w (x' - mean)^2) - b

a, c, s, w, b are one number a row and make the dynamics (ODE, Langevin, Flow-GRPO, DanceGRPO,
CPS). x' is rounded BEFORE it is scored, and that value is what the next step continues from. A row
without density has s = w = b = 0 and gets logp 0. delta is the frozen guidance offset; absent: 0.

noise is a function of (seed of the row, offset, element index) alone, see _noise.py: the same bits
for any batch, position in it, thread count or instruction set.

Shapes: x, v, delta, x' [B, ...]; a, c, s, w, b, seed, logp [B].
Dtypes: x, v, delta float32 or bfloat16 each; coefficients and logp float32; seed int64. Products
and sums are rounded to float32 one by one, never contracted; squares are added in blocks of 1024
elements in float32, the blocks in float64.
Gradients: none. A sample is a constant for the policy gradient; flow_logp gives the gradient.
Sources: Flow-GRPO (arXiv 2505.05470), sde_step_with_logprob, whose noise comes from a torch
Generator and which scores x' before it is rounded to storage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast import _cpu
from qirl_fast.ops._checks import (
    LARGE_DTYPES,
    REFERENCE_DTYPES,
    given,
    require_finite,
    require_operands,
    require_per_row,
)
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._flow_cuda import flow_step_cuda
from qirl_fast.ops._noise import reference_noise
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend


# ---- reference ----------------------------------------------------------------------------------
def flow_step_reference(
    x: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    seed: Tensor,
    offset: int,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 x)."""
    if x.device.type == "cpu":
        for name, value in (("a", a), ("c", c), ("s", s), ("w", w), ("b", b)):
            require_finite("flow_step", name, value)
    wide = torch.promote_types(x.dtype, torch.float32)
    a, c, s, w, b = (t.to(wide)[:, None] for t in (a, c, s, w, b))
    mean = a * x.flatten(1).to(wide) + c * v.flatten(1).to(wide)
    if delta is not None:
        mean = mean + delta.flatten(1).to(wide)
    noise = reference_noise(seed, offset, mean.shape[1]).to(wide)
    x_next = (mean + s * noise).to(x.dtype)
    r = x_next.to(wide) - mean
    logp = (0.0 - w * r.square().mean(dim=1, keepdim=True) - b).squeeze(1)
    return x_next.reshape(x.shape), logp


# ---- cpu ----------------------------------------------------------------------------------------
def flow_step_cpu(
    x: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    seed: Tensor,
    offset: int,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """C++ kernel, csrc/cpu/flow_step.inl.cpp."""
    return _cpu.flow_step(x, v, delta, a, c, s, w, b, seed, offset, torch.get_num_threads())


# ---- registration -------------------------------------------------------------------------------
OP = Op(
    "flow_step",
    {
        "reference": Backend(flow_step_reference, ("cpu", "cuda"), REFERENCE_DTYPES),
        "cpu": Backend(flow_step_cpu, ("cpu",), LARGE_DTYPES),
        "triton": Backend(
            triton_launcher("flow_step", "flow_step"), ("cuda",), LARGE_DTYPES, missing_triton
        ),
        "cuda": Backend(flow_step_cuda, ("cuda",), LARGE_DTYPES, missing_cuda),
    },
    default={"cpu": "cpu", "cuda": "reference"},
)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=wide)


_flow_step = OP.register(
    "(Tensor x, Tensor v, Tensor a, Tensor c, Tensor s, Tensor w, Tensor b, Tensor seed,"
    " SymInt offset, Tensor? delta) -> (Tensor, Tensor)",
    _fake,
    large=(0, 1, 9),
)


# ---- public -------------------------------------------------------------------------------------
def flow_step(
    x: Tensor,
    v: Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    seed: Tensor,
    offset: int,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x' [B, ...] in the dtype of x and its log-probability [B]; see the module docstring.

    x, v, delta: [B, ...] of one shape and device; a, c, s, w, b: float32 [B], finite.
    seed: int64 [B], any value, one a row; offset: 0 <= offset < 2^63, e.g. the step index.
    Returns constants: no gradient flows through either output.
    Raises ValueError for shapes, dtypes, devices or values outside this (on CUDA, values are not
    read: a non-finite coefficient gives non-finite results).
    """
    require_operands(
        "flow_step",
        {"x": x},
        like={"v": v, **given(delta=delta)},
        per_row={"a": a, "c": c, "s": s, "w": w, "b": b},
    )
    require_per_row("flow_step", "seed", seed, x, torch.int64)
    if not 0 <= offset < 2**63:
        raise ValueError(f"flow_step: offset must be in [0, 2^63); got {offset}.")
    with torch.no_grad():
        return _flow_step(x, v, a, c, s, w, b, seed, offset, delta, forced_backend())
