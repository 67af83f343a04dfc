"""Tensors that processes share out, in a file for each, read again at any number of processes.

    <checkpoint>/shards/part-00000.safetensors    what process 0 of a copy holds, and so on

They are shards in the safetensors format of torch.distributed.checkpoint: the header says where in
the whole each lies (`DCP_SHARDING_INFO`), and DCP's reader gives every process what it will hold.
DCP's writer is not used: its processes unpickle what they hear of each other, and it makes a
second copy of a file in memory. Here each writes by itself, beside the next steps.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Shard

from qirl_fast.checkpoint.manifest import CheckpointError, sync
from qirl_fast.tensors import save_file

SHARDS = "shards"
INFO, VERSION = "DCP_SHARDING_INFO", {"DCP_VERSION": "1.0", "format": "pt"}


@dataclass(frozen=True)
class Part:
    """What one process writes of shared tensors: copies on the CPU; where in the whole they lie."""

    name: str
    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]

    @classmethod
    def of(cls, shared: Mapping[str, DTensor]) -> Part:
        """This process's, a snapshot; empty where another copy's process has the same."""
        tensors, offsets, number = {}, {}, 0
        for name, value in shared.items():
            assert value.placements[-1] == Shard(0), f"{name}: {value.placements}"
            *copy, number = value.device_mesh.get_coordinate() or []
            local = value.to_local()
            if any(copy) or not local.numel():
                continue
            rows = -(-value.shape[0] // value.device_mesh.size(-1))
            tensors[name] = local.to("cpu", copy=True).contiguous()
            offsets[name] = [rows * number] + [0] * (value.dim() - 1)
        return cls(f"{SHARDS}/part-{number:05}.safetensors", tensors, offsets)


def write_part(folder: Path, part: Part) -> Path:
    """Write it into the checkpoint's folder, to the disk; a part of nothing is no file."""
    path = folder / part.name
    info = {name: {"saved_offsets": offsets} for name, offsets in part.offsets.items()}
    if part.tensors:
        save_file(part.tensors, path, metadata={INFO: json.dumps(info), **VERSION})
        sync(path)
    return path


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors, whole, on the CPU. Raises as `fill_from`."""
    known: dict[str, Any] = (
        dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    )
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in known.items()}
    fill_from(folder, tensors)
    return tensors


def fill_from(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or shared out, in place by their names.

    CheckpointError where one is not there, or has another shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process's: each reads its own
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except (CheckpointException, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{folder} does not fit this model: {reason}") from error
