"""policy_loss in Triton: one program takes the rows, BLOCK at a time, in float64.

Row i goes to lane i % BLOCK; lanes are added in the order Triton gives BLOCK values, which is the
same on every run. Math, shapes, dtypes: qirl_fast/ops/policy_loss.py.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

BLOCK = 256
WARPS = 4


@triton.jit
def policy_kernel(
    logp_ptr,
    logp_old_ptr,
    advantage_ptr,
    loss_ptr,
    ratio_ptr,
    clip_fraction_ptr,
    approx_kl_ptr,
    grad_ptr,
    rows,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The clip interval [LOW, HIGH] is a constant of a run: compiled in, in float64.

    tl.full, as a comparison would take a bare number in float32.
    """
    loss = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    outside = tl.zeros([BLOCK], tl.float64)
    low, high = tl.full([BLOCK], LOW, tl.float64), tl.full([BLOCK], HIGH, tl.float64)
    dtype = loss_ptr.dtype.element_ty
    first = 0
    while first < rows:
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        logp = tl.load(logp_ptr + row, mask=inside, other=0.0).to(tl.float64)
        log_ratio = logp - tl.load(logp_old_ptr + row, mask=inside, other=0.0).to(tl.float64)
        advantage = tl.load(advantage_ptr + row, mask=inside, other=0.0).to(tl.float64)
        ratio = tl.exp(log_ratio)
        # As csrc/math/policy_loss.h: every comparison with a NaN is false.
        above, below = ratio > high, ratio < low
        clipped = tl.where(above, high, tl.where(below, low, ratio))
        flat = (above & (advantage > 0)) | (below & (advantage < 0))
        free = -advantage * ratio
        loss += tl.where(flat, -advantage * clipped, free)
        squares += log_ratio * log_ratio
        outside += tl.where((above | below) & inside, 1.0, 0.0)
        tl.store(ratio_ptr + row, ratio.to(dtype), mask=inside)
        tl.store(grad_ptr + row, (tl.where(flat, 0.0, free) / rows).to(dtype), mask=inside)
        first += BLOCK
    tl.store(loss_ptr, (tl.sum(loss) / rows).to(dtype))
    tl.store(clip_fraction_ptr, (tl.sum(outside) / rows).to(dtype))
    tl.store(approx_kl_ptr, (tl.sum(squares) * 0.5 / rows).to(dtype))


# ---- launchers ----------------------------------------------------------------------------------
def policy_loss(logp, logp_old, advantage, clip_low, clip_high):
    """(loss, ratio, clip_fraction, approx_kl, dloss/dlogp); arguments as the op's."""
    scalars = [logp.new_empty(()) for _ in range(3)]
    ratio, grad = logp.new_empty(logp.shape), logp.new_empty(logp.shape)
    policy_kernel[(1,)](
        logp.contiguous(),
        logp_old.contiguous(),
        advantage.contiguous(),
        scalars[0],
        ratio,
        scalars[1],
        scalars[2],
        grad,
        len(logp),
        LOW=1.0 - clip_low,
        HIGH=1.0 + clip_high,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return scalars[0], ratio, scalars[1], scalars[2], grad


# ---- budget -------------------------------------------------------------------------------------
def _case(dtype: str) -> Case:
    names = [n for n in policy_kernel.arg_names if n.endswith("_ptr")]
    return Case(
        policy_kernel,
        {**dict.fromkeys(names, f"*{dtype}"), "rows": "i32"},
        {"LOW": 0.9999, "HIGH": 1.0001, "BLOCK": BLOCK},
        WARPS,
        registers=96,
        width=32,
        divisible=tuple(names),
    )


BUDGET = [_case("fp32"), _case("fp64")]
