"""group_advantage in Triton. Math, shapes, bad values: qirl_fast/ops/group_advantage.py.

A program takes one group and scans the ids for its members; nothing waits for the host. One launch;
statistics of the batch (std 'global', gdpo) take a second one of one program. Arithmetic is
float64, but sums have Triton's order, fixed by N and the positions of the members: results agree
with the C++ kernels to a few float64 roundings, and those of a group may differ by as much with the
rows around it. Loops are `while`: the interpreter cannot count to a run-time bound under NumPy 2.4.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels import group_batch
from qirl_fast.kernels.group_batch import (
    BLOCK,
    MODES,
    WARPS,
    budget_case,
    row_states,
    spread_of,
    values_at,
    write_rows,
    zscore,
)


@triton.jit
def _group_column(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, g, first, count, n, k, column,
    SUM: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, spread, lowest and highest value of a column in group g."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = first + lane * 0
    x = values_at(rewards_ptr, weights_ptr, valid_ptr, at, lane == 0, k, column, SUM)
    anchor = tl.sum(tl.where(lane == 0, x, 0.0))
    sums = tl.zeros([BLOCK], tl.float64)
    low, high = sums + float("inf"), sums - float("inf")
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        x = values_at(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM)
        sums += tl.where(mine, x - anchor, 0.0)
        low = tl.where(mine & (x < low), x, low)
        high = tl.where(mine & (x > high), x, high)
        start += BLOCK
    mean = anchor + tl.sum(sums) / count
    squares = tl.zeros([BLOCK], tl.float64)
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        d = values_at(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM) - mean
        squares += tl.where(mine, d * d, 0.0)
        start += BLOCK
    return mean, spread_of(tl.sum(squares), count, DDOF), tl.max(high) - tl.min(low)


@triton.jit
def _add_scores(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, g, mean, spread, limits_ptr, n, k,
    column, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total += weight * z-score, for the rows of group g."""
    eps, std_floor = tl.load(limits_ptr), tl.load(limits_ptr + 1)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        x = values_at(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM)
        z = zscore(x, mean, spread, spread, std_floor, eps)
        if SUM:
            total = z
        else:
            weight = tl.load(weights_ptr + rows * k + column, mask=mine, other=0.0)
            total = tl.load(total_ptr + rows, mask=mine & (column > 0), other=0.0)
            total += tl.where(weight != 0.0, weight * z, 0.0)
        tl.store(total_ptr + rows, total, mask=mine)
        start += BLOCK
    tl.debug_barrier()  # what one thread wrote another may read


@triton.jit
def groups_kernel(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, advantage_ptr, keep_ptr, mean_ptr, std_ptr,
    range_ptr, total_ptr, mean64_ptr, spread64_ptr, range64_ptr, state_ptr, limits_ptr, n, k, m,
    MODE: tl.constexpr, BATCH: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group: its statistics and, unless BATCH, its rows."""
    g = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    counts, firsts = lane * 0, lane * 0 + n
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        counts += mine.to(tl.int64)
        firsts = tl.where(mine & (rows < firsts), rows, firsts)
        start += BLOCK
    size, first = tl.sum(counts), tl.min(firsts)
    first = tl.where(size > 0, first, 0)
    worst = lane * 0
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        state = row_states(rewards_ptr, weights_ptr, valid_ptr, rows, mine, first, k)
        worst = tl.where(state > worst, state, worst)
        start += BLOCK
    state = tl.where(size < 2, 2, tl.max(worst))
    tl.store(state_ptr + g, state)
    count = size.to(tl.float64)
    column = k * 0
    while column < k:
        mean, spread, _ = _group_column(rewards_ptr, group_ptr, weights_ptr, valid_ptr, g, first,
                                        count, n, k, column, False, DDOF, BLOCK)  # fmt: skip
        mean = tl.where(state == 2, float("nan"), mean)
        spread = tl.where(state == 2, float("nan"), spread)
        tl.store(mean_ptr + g * k + column, mean.to(mean_ptr.dtype.element_ty))
        tl.store(std_ptr + g * k + column, spread.to(std_ptr.dtype.element_ty))
        tl.store(mean64_ptr + g * (k + 1) + column, mean)
        tl.store(spread64_ptr + g * (k + 1) + column, spread)
        if (MODE != 1) and (not BATCH):
            _add_scores(rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, g, mean, spread,
                        limits_ptr, n, k, column, False, BLOCK)  # fmt: skip
        column += 1
    mean, spread, span = _group_column(rewards_ptr, group_ptr, weights_ptr, valid_ptr, g, first,
                                       count, n, k, column, True, DDOF, BLOCK)  # fmt: skip
    tl.store(mean64_ptr + g * (k + 1) + k, mean)
    tl.store(spread64_ptr + g * (k + 1) + k, spread)
    tl.store(range64_ptr + g, span)
    shown = tl.where(state == 0, span, float("nan"))
    tl.store(range_ptr + g, shown.to(range_ptr.dtype.element_ty))
    if not BATCH:
        if MODE == 1:
            _add_scores(rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, g, mean, spread,
                        limits_ptr, n, k, column, True, BLOCK)  # fmt: skip
        tl.debug_barrier()
        start = n * 0
        while start < n:
            rows = start + lane
            ids = tl.load(group_ptr + rows, mask=rows < n, other=0)
            mine = (rows < n) & (ids == g)
            total = tl.load(total_ptr + rows, mask=mine, other=0.0)
            write_rows(advantage_ptr, keep_ptr, rows, mine, total, state, span, limits_ptr)
            stray = (rows < n) & ((ids < 0) | (ids >= m)) & (g == 0)
            write_rows(advantage_ptr, keep_ptr, rows, stray, total, state * 0 + 2, span, limits_ptr)
            start += BLOCK


# ---- launchers ----------------------------------------------------------------------------------
def group_advantage(
    rewards, group, weights, valid, num_groups, mode, std, ddof, eps, std_floor, clamp, min_range
):
    """(advantage, keep, mean, std, reward_range); arguments as the op's."""
    (n, k), m = rewards.shape, num_groups
    rewards, group, weights = rewards.contiguous(), group.contiguous(), weights.contiguous()
    valid, keep = valid.contiguous(), rewards.new_empty(n, dtype=torch.bool)
    advantage, span = rewards.new_empty(n), rewards.new_empty(m)
    means, stds = rewards.new_empty((m, k)), rewards.new_empty((m, k))
    total, span64 = (rewards.new_empty(size, dtype=torch.float64) for size in (n, m))
    means64, stds64 = (rewards.new_empty((m, k + 1), dtype=torch.float64) for _ in range(2))
    state = group.new_empty(m)
    # float64 options reach a kernel by memory: a scalar argument would be float32. One by one,
    # without a copy from the host.
    limits = rewards.new_empty(4, dtype=torch.float64)
    for i, value in enumerate((eps, std_floor, clamp, min_range)):
        limits[i].fill_(value)
    inputs = (rewards, group, weights, valid.view(torch.int8))
    rows = (advantage, keep.view(torch.int8))
    batch = std == "global" or mode == "gdpo"
    options = {"MODE": MODES[mode], "DDOF": ddof, "BLOCK": BLOCK, "num_warps": WARPS}
    options["enable_fp_fusion"] = False
    groups_kernel[(m,)](
        *inputs, *rows, means, stds, span, total, means64, stds64, span64, state, limits, n, k, m,
        BATCH=batch, **options,
    )  # fmt: skip
    if batch:
        group_batch.batch_kernel[(1,)](
            *inputs, *rows, total, means64, stds64, span64, state, limits, n, k, m,
            GLOBAL=std == "global", **options,
        )  # fmt: skip
    return advantage, keep, means, stds, span


# ---- budget -------------------------------------------------------------------------------------
BUDGET = [budget_case(groups_kernel, "fp32", mode, 96, BATCH=mode == "gdpo") for mode in MODES]
