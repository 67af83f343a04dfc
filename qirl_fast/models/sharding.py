"""A transformer's weights spread over processes, by PyTorch's FSDP2 (`fully_shard`).

A unit's weights (a block's; what lies outside the blocks is one more unit) are whole while its
forward or backward runs, and spread again after it. What is not spread lies on every process whole:
a LoRA, which is small, and whose gradients so stay what they are without sharding.

Processes have to enter units in one order and equally often, or they wait for each other for ever.
Inside `gathered` all units are whole, and each may run forwards as it likes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """Over whom: a mesh (shard,), or (replicate, shard). offload: what is not in use lies in CPU
    memory.
    """

    mesh: DeviceMesh
    offload: bool = False


def run_inside(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`: as a method of a unit, a forward of it."""
    return run(*args)


class Units:
    """The units of a transformer, spread from here on; the last is what lies outside the others.

    parts: modules, none in another but the deeper ones first; kept: parameters that stay whole;
    dtype: of the forward, where sums of gradients are float32.
    """

    def __init__(
        self,
        transformer: nn.Module,
        parts: Sequence[nn.Module],
        sharding: Sharding,
        kept: set[nn.Parameter],
        dtype: torch.dtype,
    ):
        self.units: list[Any] = [*parts, transformer]
        precision = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy() if sharding.offload else OffloadPolicy()
        for unit in self.units:
            fully_shard(
                unit,
                mesh=sharding.mesh,
                mp_policy=precision,
                offload_policy=offload,
                ignored_params=kept,
            )
            unit.set_force_sum_reduction_for_comms(True)  # gradients are summed, not averaged:
            unit.set_gradient_divide_factor(1.0)  # losses are already shares of the whole
            unit.inside = run_inside
            register_fsdp_forward_method(unit, "inside")
        self.units[-1].inside(lambda: None)  # FSDP takes the first that is entered for the root
        self.units[-1].reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All: inside, all weights are whole. They are not to change there."""
        root = self.units[-1]
        root.set_reshard_after_forward(False)
        for unit in self.units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: memory shared with it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole value that all processes have, spread as `like` is; without a word between them."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
