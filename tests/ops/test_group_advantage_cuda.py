"""The CUDA kernels of group_advantage on the host: the CPU kernel's bits, and bad values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from qirl_fast import ops

MODES = ["zscore_sum", "sum_first", "gdpo"]
STDS = ["group", "global"]


def batch(sizes, columns, dtype=torch.float32, seed=0):
    """Rewards [N, K], shuffled group ids [N] and weights [N, K], some zero, equal in a group."""
    g = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=g)]
    rewards = torch.randn(len(group), columns, generator=g, dtype=torch.float64).to(dtype)
    weights = torch.rand(len(sizes), columns, generator=g) + 0.1
    if columns > 1:
        weights[::2, 0] = 0.0
    return rewards, group, weights[group]


def same(got, wanted):
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(got, wanted, strict=True)
    )


def both(*arguments, **options):
    out = []
    for backend in ("cuda", "cpu"):
        with ops.use_backend(backend):
            out.append(ops.group_advantage(*arguments, **options))
    return out


@pytest.mark.parametrize("sizes", [[2], [3, 2, 17, 5], [150, 2, 131], [4] * 30])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("std", STDS)
def test_bits_are_those_of_the_cpu_kernel(
    emulated_cuda, poisoned, sizes, columns, dtype, mode, std
):
    rewards, group, weights = batch(sizes, columns, dtype)
    options = {"mode": mode, "std": std, "num_groups": len(sizes)}
    assert same(*both(rewards, group, weights, **options))
    rewards[group == 0] = 0.1  # a flat group
    valid = torch.ones_like(rewards, dtype=torch.bool)
    if len(sizes) > 1:
        valid[(group == 1).nonzero()[0]] = False
        rewards[~valid] = math.nan
    for ddof, clamp in itertools.product((0, 1), (None, 0.7)):
        more = {"ddof": ddof, "clamp": clamp, "eps": 0.0, "std_floor": 0.01, "min_range": 1e-3}
        assert same(*both(rewards, group, weights, valid=valid, **options, **more))


def test_many_rewards(emulated_cuda, poisoned):
    rewards, group, weights = batch([3, 4], 200)
    assert same(*both(rewards, group, weights, mode="zscore_sum"))


def test_group_does_not_depend_on_the_others(emulated_cuda):
    rewards, group, weights = batch([5, 9, 4], 2)
    with ops.use_backend("cuda"):
        together = ops.group_advantage(rewards, group, weights)
        rows = group == 1
        alone = ops.group_advantage(rewards[rows], group[rows] * 0, weights[rows])
    assert torch.equal(together.advantage[rows], alone.advantage)
    assert torch.equal(together.std[1], alone.std[0])


def spoil(kind, rewards, group, weights):
    """Puts one bad value into group 1; returns the rows that must come out as NaN."""
    member = int((group == 1).nonzero()[1])
    affected = group == 1
    if kind == "nan reward":
        rewards[member, 1] = math.nan
    elif kind == "infinite reward":
        rewards[member, 0] = -math.inf  # of weight 0 or not: bad, since it is said to be valid
    elif kind == "large reward":
        rewards[member, 1] = 2e60
    elif kind == "nan weight":
        weights[member, 1] = math.nan
    elif kind == "nan weights":
        weights[affected] = math.nan
    elif kind == "weights differ":
        weights[member, 1] += 1.0
    elif kind == "weights all zero":
        weights[affected] = 0.0
    elif kind == "one member":
        weights[affected] = weights[group == 0][0]
        group[affected] = 0
        group[member] = 1
        affected = group == 1
    else:
        group[member] = {"negative id": -1, "large id": 3, "huge id": 2**62}[kind]
        affected = torch.arange(len(group)) == member
    return affected


KINDS = [
    *("nan reward", "infinite reward", "large reward", "nan weight", "nan weights"),
    *("weights differ", "weights all zero", "one member", "negative id", "large id", "huge id"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("std", STDS)
def test_bad_values_give_nan_and_no_number(emulated_cuda, poisoned, kind, mode, std):
    rewards, group, weights = batch([4, 5, 3], 2, torch.float64)
    affected = spoil(kind, rewards, group, weights)
    options = {"mode": mode, "std": std, "num_groups": 3}
    with ops.use_backend("cuda"):
        got = ops.group_advantage(rewards, group, weights, **options)
    if std == "global" or mode == "gdpo":
        affected = torch.ones_like(affected)
    assert torch.equal(got.advantage.isnan(), affected)
    assert not bool(got.keep[affected].any()) and bool(got.keep[~affected].all())
    if "id" not in kind:
        statistics = (got.mean, got.std, got.reward_range[:, None])
        for value in statistics:
            assert torch.equal(value.isnan().all(1), torch.tensor([False, True, False]))
            assert torch.equal(value.isnan().any(1), torch.tensor([False, True, False]))
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="group_advantage"):
        ops.group_advantage(rewards, group, weights, **options)


def test_a_group_without_members_is_nan(emulated_cuda, poisoned):
    rewards, group, weights = batch([4, 3], 2)
    with ops.use_backend("cuda"):
        got = ops.group_advantage(rewards, group * 2, weights, num_groups=3)
    assert torch.equal(got.mean.isnan().any(1), torch.tensor([False, True, False]))
    assert bool(got.keep.all()) and bool(got.advantage.isfinite().all())
