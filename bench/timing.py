"""Interleaved timing: all variants run once a round, so a busy neighbour disturbs them alike."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each variant over `rounds` rounds, after two rounds of warm-up."""
    times_ms: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times_ms[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times_ms.items()}


def copy_call(bytes_moved: int) -> Callable[[], object]:
    """A tensor copy that reads and writes `bytes_moved` bytes together."""
    source = torch.ones(max(1, bytes_moved // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
