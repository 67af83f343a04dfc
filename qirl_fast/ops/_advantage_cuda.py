"""Launcher of csrc/cuda/group_advantage.cu: the bits of the CPU kernel, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from qirl_fast.ops._cuda import cuda_module, device_of, stream_of

_MODES = ("zscore_sum", "sum_first", "gdpo")  # enum Mode of group_advantage.cu


def group_advantage_cuda(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel, csrc/cuda/group_advantage.cu. One launch; two with std 'global' or gdpo."""
    (n, k), m = rewards.shape, num_groups
    outputs = (
        rewards.new_empty((n,)),
        rewards.new_empty((n,), dtype=torch.bool),
        rewards.new_empty((m, k)),
        rewards.new_empty((m, k)),
        rewards.new_empty((m,)),
    )
    reals = rewards.new_empty(n + m * (2 * k + 3) + k + 1, dtype=torch.float64)
    integers = group.new_empty(n + m)
    with device_of(rewards):
        cuda_module().group_advantage(
            rewards,
            group,
            weights,
            valid,
            *outputs,
            reals,
            integers,
            n,
            k,
            m,
            _MODES.index(mode),
            std == "global",
            ddof,
            eps,
            std_floor,
            clamp,
            min_range,
            rewards.dtype == torch.float64,
            stream_of(rewards),
        )
    return outputs
