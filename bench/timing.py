"""Interleaved timing: all variants run once a round, so a busy neighbour disturbs them alike.

Each round has an order of its own, or one variant would always find the inputs in the cache that
the one before it has read.

On CUDA a variant is captured into a graph where it can be, so that device time is measured and not
Python's; the L2 cache is overwritten before each run, and events are read once a round.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
WARM_UP = 2
L2_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Times:
    """Milliseconds: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def quantiles(times_ms: list[float]) -> Times:
    if len(times_ms) == 1:
        return Times(*times_ms * 3)
    cuts = statistics.quantiles(times_ms, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(times_ms), cuts[7])


def interleaved(
    variants: dict[str, Call], rounds: int, device: str = "cpu", seconds: float = 20.0
) -> dict[str, Times]:
    """Quantiles of each variant's interleaved_ms()."""
    times_ms = interleaved_ms(variants, rounds, device, seconds)
    return {name: quantiles(values) for name, values in times_ms.items()}


def interleaved_ms(
    variants: dict[str, Call], rounds: int, device: str = "cpu", seconds: float = 20.0
) -> dict[str, list[float]]:
    """Times of each variant after the warm-up, over `rounds` rounds or those of the first second.

    No more than 20 times `rounds`, and none begins after `seconds`.
    """
    run = _cuda_round if device == "cuda" else _cpu_round
    times_ms: dict[str, list[float]] = {name: [] for name in variants}
    shuffle, order = random.Random(0).shuffle, list(variants)
    start = time.perf_counter()
    for turn in range(20 * rounds + WARM_UP):
        shuffle(order)
        for name, value in run({name: variants[name] for name in order}).items():
            if turn >= WARM_UP:
                times_ms[name].append(value)
        spent = time.perf_counter() - start
        enough = turn + 1 >= rounds + WARM_UP and spent > 1.0
        if enough or (turn >= WARM_UP + 2 and spent > seconds):
            break
    return times_ms


def _cpu_round(variants: dict[str, Call]) -> dict[str, float]:
    times = {}
    for name, call in variants.items():
        start = time.perf_counter()
        result = call()
        times[name] = 1e3 * (time.perf_counter() - start)
        del result  # freeing is not part of the time
    return times


def _cuda_round(variants: dict[str, Call]) -> dict[str, float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events = {}
    for name, call in variants.items():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        call()
        after.record()
        events[name] = before, after
    torch.cuda.synchronize()
    return {name: before.elapsed_time(after) for name, (before, after) in events.items()}


def captured(call: Call) -> Call:
    """`call` as a CUDA graph, which is run by the returned function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_call(bytes_moved: int, device: str = "cpu") -> Call:
    """A tensor copy that reads and writes `bytes_moved` bytes together."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_gbps(device: str) -> float:
    """GB/s, read and write together, of a copy far larger than any cache."""
    moved = 2**32 if device == "cuda" else 2**29
    ms = interleaved({"copy": copy_call(moved, device)}, 9, device)["copy"].p50
    return moved / ms / 1e6


@contextmanager
def _silenced() -> Iterator[None]:
    """Without standard error, where the profiler's library writes two lines a run."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Call, device: str) -> int:
    """Most bytes of tensors that the call held at one time beyond those there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silenced(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
