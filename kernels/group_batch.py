"""The parts of group_advantage's Triton kernels that both share, and the one for whole batches.

What it is and how it rounds: kernels/group_advantage.py.
"""

import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

BLOCK = 128  # rows taken together
WARPS = 4
MODES = {"zscore_sum": 0, "sum_first": 1, "gdpo": 2}


@triton.jit
def rewards_at(rewards_ptr, valid_ptr, at, mask):
    x = tl.load(rewards_ptr + at, mask=mask, other=0.0).to(tl.float64)
    valid = tl.load(valid_ptr + at, mask=mask, other=1) != 0
    return tl.where(valid, x, float("nan")), valid


@triton.jit
def values_at(rewards_ptr, weights_ptr, valid_ptr, rows, mask, k, column, SUM: tl.constexpr):
    """Reward `column` of each row; SUM: the weighted sum of the rewards that have a weight."""
    if SUM:
        sums = tl.zeros(rows.shape, tl.float64)
        j = k * 0
        while j < k:
            weight = tl.load(weights_ptr + rows * k + j, mask=mask, other=0.0)
            x, _ = rewards_at(rewards_ptr, valid_ptr, rows * k + j, mask)
            sums += tl.where(weight != 0.0, weight * x, 0.0)
            j += 1
        return sums
    x, _ = rewards_at(rewards_ptr, valid_ptr, rows * k + column, mask)
    return x


@triton.jit
def row_states(rewards_ptr, weights_ptr, valid_ptr, rows, mask, first, k):
    """Per row: 2 bad, 1 incomplete, 0 complete."""
    bad, incomplete, weighted = rows < 0, rows < 0, rows < 0
    j = k * 0
    while j < k:
        weight = tl.load(weights_ptr + rows * k + j, mask=mask, other=0.0)
        wanted = tl.load(weights_ptr + first * k + j)
        x, valid = rewards_at(rewards_ptr, valid_ptr, rows * k + j, mask)
        fine = (tl.abs(weight) <= 1e60) & (weight == wanted) & ((tl.abs(x) <= 1e60) | (valid == 0))
        bad = bad | (fine == 0)
        incomplete = incomplete | ((weight != 0.0) & (valid == 0))
        weighted = weighted | (weight != 0.0)
        j += 1
    state = tl.where(bad | (weighted == 0), 2, tl.where(incomplete, 1, 0))
    return tl.where(mask, state, 0)


@triton.jit
def spread_of(squares, count, DDOF: tl.constexpr):
    return tl.sqrt(squares / (count - DDOF))


@triton.jit
def zscore(x, mean, spread, used, std_floor, eps):
    divisor = tl.where(spread < std_floor, 0.0, used + eps)
    return tl.where(divisor > 0.0, (x - mean) / tl.where(divisor > 0.0, divisor, 1.0), 0.0)


@triton.jit
def write_rows(advantage_ptr, keep_ptr, rows, mask, total, state, span, limits_ptr):
    """Clamped advantages and keep flags; state per row or one for all, as total and span."""
    clamp, min_range = tl.load(limits_ptr + 2), tl.load(limits_ptr + 3)
    limit = tl.where(min_range > 0.0, min_range, float("-inf"))
    keep = (state == 0) & (span > limit)
    clamped = tl.where(total > clamp, clamp, tl.where(total < -clamp, -clamp, total))
    value = tl.where(state == 2, float("nan"), tl.where(keep, clamped, 0.0))
    value = value + tl.zeros(rows.shape, tl.float64)
    tl.store(advantage_ptr + rows, value.to(advantage_ptr.dtype.element_ty), mask=mask)
    tl.store(keep_ptr + rows, (keep & (rows >= 0)).to(tl.int8), mask=mask)


@triton.jit
def _batch_moments(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, state_ptr, n, k, column,
    KIND: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and spread over rows of complete groups. KIND 0: a reward with a weight, 1: S, 2: A."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    counts = tl.zeros([BLOCK], tl.float64)
    mean = tl.sum(counts)
    squares = mean
    anchor = mean
    for step in tl.static_range(3):  # the first row that counts, the mean, the squares
        firsts = lane * 0 + n
        sums = tl.zeros([BLOCK], tl.float64)
        counts = tl.zeros([BLOCK], tl.float64)
        start = n * 0
        while start < n:
            rows = start + lane
            inside = rows < n
            ids = tl.load(group_ptr + rows, mask=inside, other=0)
            counted = inside & (tl.load(state_ptr + ids, mask=inside, other=1) == 0)
            if KIND == 2:
                x = tl.load(total_ptr + rows, mask=counted, other=0.0)
            else:
                x = values_at(
                    rewards_ptr, weights_ptr, valid_ptr, rows, counted, k, column, KIND == 1
                )
            if KIND == 0:
                weight = tl.load(weights_ptr + rows * k + column, mask=inside, other=0.0)
                counted = counted & (weight != 0.0)
            firsts = tl.where(counted & (rows < firsts), rows, firsts)
            counts += counted.to(tl.float64)
            if step == 1:
                sums += tl.where(counted, x - anchor, 0.0)
            if step == 2:
                sums += tl.where(counted, (x - mean) * (x - mean), 0.0)
            start += BLOCK
        count = tl.sum(counts)
        if step == 0:
            found = tl.min(firsts)
            at = tl.where(found < n, found, 0) + lane * 0
            if KIND == 2:
                x = tl.load(total_ptr + at)
            else:
                x = values_at(
                    rewards_ptr, weights_ptr, valid_ptr, at, lane >= 0, k, column, KIND == 1
                )
            anchor = tl.sum(tl.where(lane == 0, x, 0.0))
        if step == 1:
            mean = anchor + tl.sum(sums) / count
        if step == 2:
            squares = tl.sum(sums)
    return tl.where(count > 0, mean, 0.0), tl.where(count > 0, spread_of(squares, count, DDOF), 0.0)


@triton.jit
def _add_batch_scores(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, mean64_ptr, spread64_ptr, limits_ptr,
    used, n, k, column, SUM: tl.constexpr, GLOBAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    eps, std_floor = tl.load(limits_ptr), tl.load(limits_ptr + 1)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    start = n * 0
    while start < n:
        rows = start + lane
        inside = rows < n
        at = tl.load(group_ptr + rows, mask=inside, other=0) * (k + 1) + column
        mean = tl.load(mean64_ptr + at, mask=inside, other=0.0)
        spread = tl.load(spread64_ptr + at, mask=inside, other=0.0)
        x = values_at(rewards_ptr, weights_ptr, valid_ptr, rows, inside, k, column, SUM)
        z = zscore(x, mean, spread, used if GLOBAL else spread, std_floor, eps)
        if SUM:
            total = z
        else:
            weight = tl.load(weights_ptr + rows * k + column, mask=inside, other=0.0)
            total = tl.load(total_ptr + rows, mask=inside & (column > 0), other=0.0)
            total += tl.where(weight != 0.0, weight * z, 0.0)
        tl.store(total_ptr + rows, total, mask=inside)
        start += BLOCK
    tl.debug_barrier()  # what one thread wrote another may read


@triton.jit
def batch_kernel(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, advantage_ptr, keep_ptr, total_ptr, mean64_ptr,
    spread64_ptr, range64_ptr, state_ptr, limits_ptr, n, k, m,
    MODE: tl.constexpr, GLOBAL: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the rows, with statistics of the batch. One bad value makes all of them NaN."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    bad = lane * 0
    start = n * 0
    while start < n:
        ids = tl.load(group_ptr + start + lane, mask=start + lane < n, other=0)
        outside = (ids < 0) | (ids >= m)
        known = (start + lane < n) & (outside == 0)
        state = tl.load(state_ptr + ids, mask=known, other=0)
        bad = tl.where(outside | (state == 2), 1, bad)
        start += BLOCK
    start = n * 0
    while start < m:
        state = tl.load(state_ptr + start + lane, mask=start + lane < m, other=0)
        bad = tl.where(state == 2, 1, bad)
        start += BLOCK
    fine = tl.max(bad) == 0
    mean = tl.sum(tl.zeros([BLOCK], tl.float64))
    spread = mean
    if fine:
        column = k * 0 + (k if MODE == 1 else 0)
        while column < k + (1 if MODE == 1 else 0):
            if GLOBAL:
                _, spread = _batch_moments(
                    rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, state_ptr, n, k,
                    column, 1 if MODE == 1 else 0, DDOF, BLOCK,
                )  # fmt: skip
            _add_batch_scores(
                rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, mean64_ptr, spread64_ptr,
                limits_ptr, spread, n, k, column, MODE == 1, GLOBAL, BLOCK,
            )  # fmt: skip
            column += 1
        if MODE == 2:
            mean, spread = _batch_moments(
                rewards_ptr, group_ptr, weights_ptr, valid_ptr, total_ptr, state_ptr, n, k,
                column, 2, DDOF, BLOCK,
            )  # fmt: skip
    start = n * 0
    while start < n:
        rows = start + lane
        inside = (rows < n) & fine
        ids = tl.load(group_ptr + rows, mask=inside, other=0)
        state = tl.load(state_ptr + ids, mask=inside, other=2)
        span = tl.load(range64_ptr + ids, mask=inside, other=0.0)
        total = tl.load(total_ptr + rows, mask=inside, other=0.0)
        if MODE == 2:
            total = zscore(total, mean, spread, spread, spread * 0.0, tl.load(limits_ptr))
        write_rows(advantage_ptr, keep_ptr, rows, rows < n, total, state, span, limits_ptr)
        start += BLOCK


# ---- budget -------------------------------------------------------------------------------------
def budget_case(kernel, dtype, mode, registers, **flag):
    large = ("rewards_ptr", "advantage_ptr", "mean_ptr", "std_ptr", "range_ptr")
    types = {
        **dict.fromkeys(large, f"*{dtype}"),
        **dict.fromkeys(("group_ptr", "state_ptr"), "*i64"),
        **dict.fromkeys(("valid_ptr", "keep_ptr"), "*i8"),
        **dict.fromkeys(("n", "k", "m"), "i32"),
    }
    constexprs = {"MODE": MODES[mode], "DDOF": 0, "BLOCK": BLOCK, **flag}
    names = [name for name in kernel.arg_names if name not in constexprs]
    # A batch is a few thousand numbers in columns: widths do not matter, spills would.
    return Case(
        kernel,
        {name: types.get(name, "*fp64") for name in names},
        constexprs,
        WARPS,
        registers,
        width=8,
    )


BUDGET = [budget_case(batch_kernel, "fp32", mode, 128, GLOBAL=mode != "gdpo") for mode in MODES]
