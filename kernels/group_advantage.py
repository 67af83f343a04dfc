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

from qirl_fast.kernels.budget import Case

BLOCK = 128  # rows taken together
WARPS = 4
MODES = {"zscore_sum": 0, "sum_first": 1, "gdpo": 2}


@triton.jit
def _reward(rewards_ptr, valid_ptr, at, mask):
    x = tl.load(rewards_ptr + at, mask=mask, other=0.0).to(tl.float64)
    valid = tl.load(valid_ptr + at, mask=mask, other=1) != 0
    return tl.where(valid, x, float("nan")), valid


@triton.jit
def _values(rewards_ptr, weights_ptr, valid_ptr, rows, mask, k, column, SUM: tl.constexpr):
    """Reward `column` of each row; SUM: the weighted sum of the rewards that have a weight."""
    if SUM:
        sums = tl.zeros(rows.shape, tl.float64)
        j = k * 0
        while j < k:
            weight = tl.load(weights_ptr + rows * k + j, mask=mask, other=0.0)
            x, _ = _reward(rewards_ptr, valid_ptr, rows * k + j, mask)
            sums += tl.where(weight != 0.0, weight * x, 0.0)
            j += 1
        return sums
    x, _ = _reward(rewards_ptr, valid_ptr, rows * k + column, mask)
    return x


@triton.jit
def _state(rewards_ptr, weights_ptr, valid_ptr, rows, mask, first, k):
    """Per row: 2 bad, 1 incomplete, 0 complete."""
    bad, incomplete, weighted = rows < 0, rows < 0, rows < 0
    j = k * 0
    while j < k:
        weight = tl.load(weights_ptr + rows * k + j, mask=mask, other=0.0)
        wanted = tl.load(weights_ptr + first * k + j)
        x, valid = _reward(rewards_ptr, valid_ptr, rows * k + j, mask)
        fine = (tl.abs(weight) <= 1e60) & (weight == wanted) & ((tl.abs(x) <= 1e60) | (valid == 0))
        bad = bad | (fine == 0)
        incomplete = incomplete | ((weight != 0.0) & (valid == 0))
        weighted = weighted | (weight != 0.0)
        j += 1
    state = tl.where(bad | (weighted == 0), 2, tl.where(incomplete, 1, 0))
    return tl.where(mask, state, 0)


@triton.jit
def _spread(squares, count, DDOF: tl.constexpr):
    return tl.sqrt(squares / (count - DDOF))


@triton.jit
def _zscore(x, mean, spread, used, std_floor, eps):
    divisor = tl.where(spread < std_floor, 0.0, used + eps)
    return tl.where(divisor > 0.0, (x - mean) / tl.where(divisor > 0.0, divisor, 1.0), 0.0)


@triton.jit
def _write(advantage_ptr, keep_ptr, rows, mask, total, state, span, limits_ptr):
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
def _group_column(
    rewards_ptr, group_ptr, weights_ptr, valid_ptr, g, first, count, n, k, column,
    SUM: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, spread, lowest and highest value of a column in group g."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = first + lane * 0
    x = _values(rewards_ptr, weights_ptr, valid_ptr, at, lane == 0, k, column, SUM)
    anchor = tl.sum(tl.where(lane == 0, x, 0.0))
    sums = tl.zeros([BLOCK], tl.float64)
    low, high = sums + float("inf"), sums - float("inf")
    start = n * 0
    while start < n:
        rows = start + lane
        mine = tl.load(group_ptr + rows, mask=rows < n, other=-1) == g
        x = _values(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM)
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
        d = _values(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM) - mean
        squares += tl.where(mine, d * d, 0.0)
        start += BLOCK
    return mean, _spread(tl.sum(squares), count, DDOF), tl.max(high) - tl.min(low)


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
        x = _values(rewards_ptr, weights_ptr, valid_ptr, rows, mine, k, column, SUM)
        z = _zscore(x, mean, spread, spread, std_floor, eps)
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
        state = _state(rewards_ptr, weights_ptr, valid_ptr, rows, mine, first, k)
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
            _write(advantage_ptr, keep_ptr, rows, mine, total, state, span, limits_ptr)
            stray = (rows < n) & ((ids < 0) | (ids >= m)) & (g == 0)
            _write(advantage_ptr, keep_ptr, rows, stray, total, state * 0 + 2, span, limits_ptr)
            start += BLOCK


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
                x = _values(
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
                x = _values(
                    rewards_ptr, weights_ptr, valid_ptr, at, lane >= 0, k, column, KIND == 1
                )
            anchor = tl.sum(tl.where(lane == 0, x, 0.0))
        if step == 1:
            mean = anchor + tl.sum(sums) / count
        if step == 2:
            squares = tl.sum(sums)
    return tl.where(count > 0, mean, 0.0), tl.where(count > 0, _spread(squares, count, DDOF), 0.0)


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
        x = _values(rewards_ptr, weights_ptr, valid_ptr, rows, inside, k, column, SUM)
        z = _zscore(x, mean, spread, used if GLOBAL else spread, std_floor, eps)
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
            total = _zscore(total, mean, spread, spread, spread * 0.0, tl.load(limits_ptr))
        _write(advantage_ptr, keep_ptr, rows, rows < n, total, state, span, limits_ptr)
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
        batch_kernel[(1,)](
            *inputs, *rows, total, means64, stds64, span64, state, limits, n, k, m,
            GLOBAL=std == "global", **options,
        )  # fmt: skip
    return advantage, keep, means, stds, span


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, mode, registers, **flag):
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


BUDGET = [
    *(_case(groups_kernel, "fp32", mode, 96, BATCH=mode == "gdpo") for mode in MODES),
    *(_case(batch_kernel, "fp32", mode, 128, GLOBAL=mode != "gdpo") for mode in MODES),
]
