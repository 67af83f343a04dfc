"""Crash-safe checkpoints: safetensors and JSON only, verified by SHA-256, exact to the bit."""

from qirl_fast.checkpoint.journal import truncate_metrics
from qirl_fast.checkpoint.lora import lora_state
from qirl_fast.checkpoint.manifest import CheckpointError, entry
from qirl_fast.checkpoint.rng import rng_state, set_rng_state
from qirl_fast.checkpoint.shards import Part, fill_from, write_part
from qirl_fast.checkpoint.store import (
    Checkpoint,
    begin_checkpoint,
    beside_of,
    find_latest,
    finish_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from qirl_fast.checkpoint.tree import pack, unpack

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Part",
    "begin_checkpoint",
    "beside_of",
    "entry",
    "fill_from",
    "find_latest",
    "finish_checkpoint",
    "load_checkpoint",
    "lora_state",
    "pack",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "truncate_metrics",
    "unpack",
    "write_part",
]
