"""group_advantage: rewards of groups of samples -> advantage, keep mask and group statistics.

N samples in M groups (a group: the samples of one prompt), K rewards. With R in float64,

    mean_mk, std_mk  of reward k over the members of group m, divisor n - ddof
    z_ik = (R_ik - mean_mk) / (std_mk + eps),  0 where std_mk < std_floor or the divisor is 0
    S_i  = sum_k w_ik R_ik

    mode 'zscore_sum'   A_i = sum_k w_ik z_ik            per reward and group (Qwen-Image-2.0-RL)
    mode 'sum_first'    A_i = z-score of S in its group  (Flow-GRPO, arXiv 2505.05470)
    mode 'gdpo'         A of zscore_sum, then (A - mean A) / (std A + eps) over the batch (GDPO)

    std 'global'        divides by the std of the whole batch around the batch mean instead (the
                        mean subtracted and the std_floor test stay those of the group)
    A_i clamped to [-clamp, clamp]; 0 where keep_i is false

A reward is a score, failed, or missing: `valid` false marks the last two, and a failed reward is
never read as 0. A group with an invalid reward of non-zero weight is dropped: keep false, advantage
0, reward_range NaN, and it enters no batch statistic (global std of reward k: rows of complete
groups whose w_k is not 0; gdpo: rows of complete groups). An invalid reward of weight 0 is not
needed and drops nothing. mean and std are NaN where a member's reward is invalid.
keep is false for groups whose range of S is <= min_range, if min_range > 0; 0 keeps flat groups
(their advantage is exactly 0). Such groups still enter the batch statistics.

Shapes: rewards [N, K] float32 or float64; group int64 [N] with ids 0..M-1 in any order, two members
or more each; weights [K] or [N, K], rows of one group equal (they need not sum to 1); valid bool
[N, K]. Sums run in float64 in row order: the same bits on every run and for any thread count, and
with std 'group' (but not gdpo) a group's result does not depend on the other groups. Outputs have
the dtype of rewards. No gradients. Differs from flow_grpo: equal rewards give exactly 0 even with
eps 0, because deviations are taken from a member before the mean is.

The cuda and triton backends do not wait for the device, so they cannot refuse values. A group with
a bad one (too few members; a valid reward or a weight that is NaN, infinite or beyond 1e60; weights
that differ or are all zero), and a row whose id is outside 0..M-1, get advantage NaN and keep
false, the group also NaN statistics. Where batch statistics enter (std 'global', gdpo), all rows
do: no number is made from part of a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qirl_fast import _cpu
from qirl_fast.ops._advantage_cuda import group_advantage_cuda
from qirl_fast.ops._checks import require_no_grad
from qirl_fast.ops._cuda import missing_cuda
from qirl_fast.ops._group_checks import check_group_values, require_group_inputs, require_options
from qirl_fast.ops._triton import missing_triton, triton_launcher
from qirl_fast.ops.dispatch import Backend, Op, forced_backend

MODES = ("zscore_sum", "sum_first", "gdpo")
STDS = ("group", "global")


class GroupAdvantage(NamedTuple):
    """advantage [N], keep bool [N], mean [M, K], std [M, K], reward_range [M]."""

    advantage: Tensor
    keep: Tensor
    mean: Tensor
    std: Tensor
    reward_range: Tensor


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# ---- reference ----------------------------------------------------------------------------------
def group_advantage_reference(
    rewards: Tensor,
    group: Tensor,
    weights: Tensor,
    valid: Tensor,
    num_groups: int,
    mode: str,
    std: str,
    ddof: int,
    eps: float,
    std_floor: float,
    clamp: float,
    min_range: float,
) -> _Outputs:
    """The definition, in float64, one group at a time."""
    check_group_values("group_advantage", rewards, group, weights, valid, num_groups)
    r_NK = rewards.double().masked_fill(~valid, math.nan)
    needed_NK = weights != 0
    s_N1 = torch.where(needed_NK, weights * r_NK, 0.0).sum(1, keepdim=True)
    members = [(group == m).nonzero().flatten() for m in range(num_groups)]
    complete_N = torch.empty_like(group, dtype=torch.bool)
    for rows in members:
        complete_N[rows] = (valid[rows] | ~needed_NK[rows]).all()

    scored, weight = (s_N1, torch.ones_like(s_N1)) if mode == "sum_first" else (r_NK, weights)
    a_N = torch.zeros_like(s_N1[:, 0])
    for x_N, w_N in zip(scored.T, weight.T, strict=True):
        used_N = complete_N & (w_N != 0)
        batch_std = _moments(x_N[used_N], ddof)[1]
        for rows in members:
            if not used_N[rows[0]]:
                continue
            mean, spread = _moments(x_N[rows], ddof)
            divisor = (batch_std if std == "global" else spread) + eps
            if spread >= std_floor and divisor > 0:
                a_N[rows] += w_N[rows] * (x_N[rows] - mean) / divisor
    if mode == "gdpo" and complete_N.any():
        mean, spread = _moments(a_N[complete_N], ddof)
        a_N = (a_N - mean) / (spread + eps) if spread + eps > 0 else torch.zeros_like(a_N)

    range_M = torch.stack([s_N1[rows].max() - s_N1[rows].min() for rows in members])
    keep_N = complete_N & (range_M[group] > min_range if min_range > 0 else True)
    a_N = torch.where(keep_N, a_N.clamp(-clamp, clamp), 0.0)
    columns = [[_moments(x_N[rows], ddof) for x_N in r_NK.T] for rows in members]
    mean_MK, std_MK = torch.stack(
        [torch.stack([torch.stack(pair) for pair in row]) for row in columns]
    ).unbind(-1)
    real = rewards.dtype
    return a_N.to(real), keep_N, mean_MK.to(real), std_MK.to(real), range_M.to(real)


def _moments(x: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; equal numbers have exactly that mean and exactly no spread."""
    if len(x) == 0:
        return x.new_zeros(()), x.new_zeros(())
    mean = x[0] + (x - x[0]).mean()
    return mean, ((x - mean).square().sum() / (len(x) - ddof)).sqrt()


# ---- cpu ----------------------------------------------------------------------------------------
def group_advantage_cpu(
    rewards: Tensor,
    group: Tensor,
    weights: Tensor,
    valid: Tensor,
    num_groups: int,
    mode: str,
    std: str,
    ddof: int,
    eps: float,
    std_floor: float,
    clamp: float,
    min_range: float,
) -> _Outputs:
    """C++ kernel, csrc/cpu/group_advantage.inl.cpp."""
    check_group_values("group_advantage", rewards, group, weights, valid, num_groups)
    outputs = _empty_outputs(rewards, num_groups)
    _cpu.group_advantage(
        rewards,
        group,
        weights,
        valid,
        *outputs,
        *rewards.shape,
        num_groups,
        MODES.index(mode),
        std == "global",
        ddof,
        eps,
        std_floor,
        clamp,
        min_range,
        rewards.dtype == torch.float64,
    )
    return outputs


def _empty_outputs(rewards: Tensor, num_groups: int) -> _Outputs:
    n, k = rewards.shape
    return (
        rewards.new_empty((n,)),
        rewards.new_empty((n,), dtype=torch.bool),
        rewards.new_empty((num_groups, k)),
        rewards.new_empty((num_groups, k)),
        rewards.new_empty((num_groups,)),
    )


# ---- registration -------------------------------------------------------------------------------
_REALS = (torch.float32, torch.float64)
OP = Op(
    "group_advantage",
    {
        "reference": Backend(group_advantage_reference, ("cpu", "cuda"), _REALS),
        "cpu": Backend(group_advantage_cpu, ("cpu",), _REALS),
        "triton": Backend(
            triton_launcher("group_advantage", "group_advantage"), ("cuda",), _REALS, missing_triton
        ),
        "cuda": Backend(group_advantage_cuda, ("cuda",), _REALS, missing_cuda),
    },
    {"cpu": "cpu", "cuda": "reference"},
)


_group_advantage = OP.register(
    "(Tensor rewards, Tensor group, Tensor weights, Tensor valid, SymInt num_groups, str mode,"
    " str std, int ddof, float eps, float std_floor, float clamp, float min_range)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda rewards, group, weights, valid, num_groups, *_: _empty_outputs(rewards, num_groups),
)


# ---- public -------------------------------------------------------------------------------------
def group_advantage(
    rewards: Tensor,
    group: Tensor,
    weights: Tensor,
    *,
    std: str = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    std_floor: float = 0.0,
    clamp: float | None = 5.0,
    min_range: float = 0.0,
    mode: str = "zscore_sum",
    valid: Tensor | None = None,
    num_groups: int | None = None,
) -> GroupAdvantage:
    """Advantages of N rewarded samples; see the module docstring for the math and the shapes.

    std: 'group' or 'global'; ddof: 0 or 1; eps >= 0; std_floor >= 0; min_range >= 0.
    clamp: > 0; None or inf leaves the advantage as it is.
    valid: bool [N, K], False = failed or missing; None means all are scores.
    num_groups: M, where it is known: without it M is read from `group`, which waits for a CUDA
        device and breaks a torch.compile graph.
    Raises ValueError for shapes, dtypes, devices or options outside this; a NaN, infinite or
    beyond-1e60 reward that is valid (naming row and column); a group id outside 0..M-1, an id
    without members, a group of one member (its advantage is undefined); weights that are not
    finite, all zero, or differ inside a group.
    """
    require_group_inputs("group_advantage", rewards, group, weights, valid)
    require_options("group_advantage", "mode", mode, MODES)
    require_options("group_advantage", "std", std, STDS)
    require_options("group_advantage", "ddof", ddof, (0, 1))
    limit = math.inf if clamp is None else clamp
    if not limit > 0:
        raise ValueError(f"group_advantage: clamp is {clamp}; want > 0, or None for no clamp.")
    for name, value in (("eps", eps), ("std_floor", std_floor), ("min_range", min_range)):
        if not 0 <= value < math.inf:
            raise ValueError(f"group_advantage: {name} is {value}; want a finite number >= 0.")
    if num_groups is None:
        num_groups = int(group.max()) + 1
    if num_groups < 1:
        raise ValueError(
            f"group_advantage: num_groups is {num_groups}; want >= 1, the group ids being "
            f"0..num_groups-1."
        )
    require_no_grad("group_advantage", "an advantage has no gradient", rewards=rewards)
    require_no_grad("group_advantage", "an advantage has no gradient", weights=weights)
    valid_NK = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    weights_NK = weights.double().expand(rewards.shape)
    outputs = _group_advantage(
        rewards,
        group,
        weights_NK,
        valid_NK,
        num_groups,
        mode,
        std,
        ddof,
        eps,
        std_floor,
        limit,
        min_range,
        forced_backend(),
    )
    return GroupAdvantage(*outputs)
