"""Chunks of rows on several CPU cores.

Chunks are independent: rollout, decoding and the gradient of one need nothing of another. On a CPU
each runs on one thread, several side by side, which at small shapes beats splitting every matrix
product over the cores; results come back in order, so the bits do not depend on the number of
threads. On a GPU there is one worker and the calling thread does the work.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`map(function, items)` on `count` threads, each of one intra-op thread; 1: the caller's."""

    def __init__(self, count: int):
        self.count = count
        self._pool = (
            ThreadPoolExecutor(count, "chunks", initializer=torch.set_num_threads, initargs=(1,))
            if count > 1
            else None
        )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items; the first error is raised where its result is due.

        The caller's grad mode is not inherited: functions set their own.
        """
        if self._pool is None:
            return map(function, items)
        return self._pool.map(function, items)


def cpu_workers(threads: int | None) -> Workers:
    """One worker a thread (null: as many as PyTorch would use); PyTorch itself is set to one."""
    count = threads or torch.get_num_threads()
    torch.set_num_threads(1)
    return Workers(count)
