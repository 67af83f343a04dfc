"""Argument checks of group_advantage: metadata first, then, inside the op, the values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qirl_fast.ops._checks import require_tensor

_LARGEST = 1e60  # squares of weighted sums of numbers up to this stay finite in float64


def require_options(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """value is one of `allowed`."""
    if value not in allowed or isinstance(value, bool):
        wanted = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: {name} is {value!r}; want {wanted}.")


def require_group_inputs(
    op: str, rewards: Tensor, group: Tensor, weights: Tensor, valid: Tensor | None
) -> None:
    """Shapes, dtypes and devices. Reads metadata only."""
    for name, t in (("rewards", rewards), ("group", group), ("weights", weights)):
        require_tensor(op, name, t)
    if valid is not None:
        require_tensor(op, "valid", valid)
    if rewards.ndim != 2 or rewards.numel() == 0:
        raise ValueError(
            f"{op}: rewards needs shape [N, K] with at least one row and one reward; got "
            f"{tuple(rewards.shape)}."
        )
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: rewards must be float32 or float64; got {rewards.dtype}.")
    n, k = rewards.shape
    if group.shape != (n,) or group.dtype != torch.int64:
        raise ValueError(
            f"{op}: group must be int64 of shape [{n}], one id a row; got {group.dtype} of "
            f"shape {tuple(group.shape)}."
        )
    if weights.shape not in ((k,), (n, k)) or not weights.dtype.is_floating_point:
        raise ValueError(
            f"{op}: weights must be floating, of shape [{k}] or [{n}, {k}]; got {weights.dtype} of "
            f"shape {tuple(weights.shape)}."
        )
    if valid is not None and (valid.shape != (n, k) or valid.dtype != torch.bool):
        raise ValueError(
            f"{op}: valid must be bool of shape [{n}, {k}]; got {valid.dtype} of shape "
            f"{tuple(valid.shape)}."
        )
    for name, other in (("group", group), ("weights", weights), ("valid", valid)):
        if other is not None and other.device != rewards.device:
            raise ValueError(
                f"{op}: {name} must be on {rewards.device}, as rewards is; got {other.device}."
            )


def check_group_values(
    op: str, rewards: Tensor, group: Tensor, weights: Tensor, valid: Tensor, num_groups: int
) -> None:
    """Values: ids, group sizes, weights and every valid reward. Waits for a CUDA device."""
    outside = (group < 0) | (group >= num_groups)
    if outside.any():
        row = _first(outside)
        raise ValueError(
            f"{op}: group id {int(group[row])} in row {row}; want 0..{num_groups - 1}, numbered "
            f"without gaps."
        )
    counts = torch.bincount(group, minlength=num_groups)
    if (counts < 2).any():
        m = _first(counts < 2)
        size = "no member" if counts[m] == 0 else "one member"
        raise ValueError(
            f"{op}: group {m} has {size}; want two or more, an advantage compares members. Number "
            f"groups 0..M-1 without gaps and sample at least two a prompt."
        )
    _check_rewards(op, rewards, valid)
    _check_weights(op, weights, group, num_groups)


def _check_rewards(op: str, rewards: Tensor, valid: Tensor) -> None:
    bad = valid & ~(rewards.double().abs() <= _LARGEST)  # float32 would read the limit as inf
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{op}: the reward in row {row}, column {column} is {float(rewards[row, column])}; "
            f"want a finite score of at most {_LARGEST:g} in size. A failed or missing reward is "
            f"marked False in `valid`."
        )


def _check_weights(op: str, weights: Tensor, group: Tensor, num_groups: int) -> None:
    bad = ~(weights.double().abs() <= _LARGEST)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{op}: weights of row {row}, column {column} is {float(weights[row, column])}; want a "
            f"finite number of at most {_LARGEST:g} in size."
        )
    rows = torch.arange(len(group), device=group.device)
    first_M = rows.new_full((num_groups,), len(group)).scatter_reduce_(0, group, rows, "amin")
    differs = (weights != weights[first_M][group]).any(1)
    if differs.any():
        row = _first(differs)
        raise ValueError(
            f"{op}: weights differ inside group {int(group[row])}: row {row} has "
            f"{weights[row].tolist()}, row {int(first_M[group[row]])} has "
            f"{weights[first_M[group[row]]].tolist()}. Weights belong to a prompt's category."
        )
    empty = (weights == 0).all(1)
    if empty.any():
        row = _first(empty)
        raise ValueError(
            f"{op}: weights of group {int(group[row])} are all zero; want at least one reward with "
            f"a weight, or leave the group out."
        )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
