"""What a step's line of timings.jsonl says beside seconds: memory, and how much of the device a run
uses, its model FLOPs per second against the most there are (MFU).

Peaks are NVIDIA's for bfloat16 without sparsity, from its data sheets; fp8 counts against the same.
For every other device and dtype the peak is what a matrix product reaches, measured at the start.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qirl_fast.rollout.workers import Workers

logger = logging.getLogger(__name__)

# TFLOP/s by what the device's name holds; the first that fits.
BFLOAT16 = {
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "H800": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.1,
}


@dataclass(frozen=True)
class Speed:
    """done: model FLOPs of this process so far; peak: FLOP/s of its device."""

    done: Callable[[], int]
    peak: float


def peak_flops(device: str, dtype: torch.dtype, workers: Workers) -> float:
    """FLOP/s of this process's device at most, logged with where the number is from."""
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    known = next((peak for part, peak in BFLOAT16.items() if part in name), None)
    if known is not None and dtype == torch.bfloat16:
        peak, source = known * 1e12, "its data sheet, without sparsity"
    else:
        peak, source = measured(device, dtype, workers), "a matrix product, measured"
    logger.info("MFU is of %.4g TFLOP/s: %s, %s, %s", peak / 1e12, name, dtype, source)
    return peak


def measured(device: str, dtype: torch.dtype, workers: Workers) -> float:
    """FLOP/s of matrix products on all workers at a time, the best of five."""
    size = 4096 if device == "cuda" else 384
    a = torch.ones(size, size, dtype=dtype, device=device)

    def product(_: int) -> None:
        a @ a

    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        list(workers.map(product, range(workers.count)))
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 * workers.count / best


def memory_mib() -> dict[str, float]:
    """MiB: `process`, resident now; `gpu`, the most that PyTorch held on this GPU so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"process": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def device_use(
    speed: Speed | None, flops: Mapping[str, int], seconds: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """`tflop`: model TFLOPs of each phase; `mfu`: their share of what the device could have done in
    the phase's seconds. Of `step` too: all phases but evaluation. Nothing where none was counted.
    """
    if speed is None or not any(flops.values()):
        return {}
    done = {name: count for name, count in flops.items() if count}
    times = {name: seconds[name] for name in done}
    step = [name for name in seconds if name != "evaluate"]
    done["step"] = sum(flops.get(name, 0) for name in step)
    times["step"] = sum(seconds[name] for name in step)
    mfu = {name: done[name] / (s * speed.peak) for name, s in times.items() if s > 0}
    return {"tflop": {name: count / 1e12 for name, count in done.items()}, "mfu": mfu}


def flat_clock(clock: Mapping[str, Any]) -> dict[str, float]:
    flat = {f"time/{name}_s": value for name, value in clock["phases_s"].items()}
    flat |= {f"time/{name}_beside_s": v for name, v in clock.get("beside_s", {}).items()}
    if "images_per_s" in clock:
        flat["time/images_per_s"] = clock["images_per_s"]
    for group in ("mfu", "judges"):
        flat |= {f"{group}/{name}": value for name, value in clock.get(group, {}).items()}
    return flat | {f"memory/{name}_mib": v for name, v in clock.get("memory_mib", {}).items()}
