"""Chunks side by side: order, errors, and the same bits for any number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qirl_fast.rollout.workers import Workers, cpu_workers


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    def late_first(i: int) -> int:
        time.sleep(0.02 * (3 - i))
        return i * i

    assert list(Workers(count).map(late_first, range(4))) == [0, 1, 4, 9]
    assert list(Workers(count).map(late_first, [])) == []


def test_two_run_at_the_same_time_on_one_intra_op_thread_each() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def meet(_: int) -> int:
        meeting.wait()
        return torch.get_num_threads()

    assert list(Workers(2).map(meet, range(2))) == [1, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_is_raised_in_its_place(count: int) -> None:
    def fail(i: int) -> int:
        if i >= 1:
            raise ValueError(f"chunk {i}")
        return i

    results = Workers(count).map(fail, range(4))
    assert next(results) == 0
    with pytest.raises(ValueError, match="chunk 1"):
        next(results)


def test_a_worker_a_thread() -> None:
    before = torch.get_num_threads()
    try:
        assert cpu_workers(3).count == 3 and torch.get_num_threads() == 1
        torch.set_num_threads(2)
        assert cpu_workers(None).count == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_has_the_same_bits_on_any_number_of_threads(
    finished: Callable[..., Path], read_jsonl
) -> None:
    """Four chunks on one thread and on three: metrics, weights and pictures are equal."""
    one = finished("chunks-on-1", "rollout.max_rows=2", "threads=1")
    three = finished("chunks-on-3", "rollout.max_rows=2", "threads=3")
    assert read_jsonl(one / "metrics.jsonl") == read_jsonl(three / "metrics.jsonl")
    for name in (
        "checkpoints/latest/pytorch_lora_weights.safetensors",
        "samples/before_after.png",
    ):
        assert (one / name).read_bytes() == (three / name).read_bytes(), name
