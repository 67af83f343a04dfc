"""Chunks of rows on several CPU cores, and in parts where memory does not suffice for a whole one.

Chunks are independent: rollout, decoding and the gradient of one need nothing of another. On a CPU
each runs on one thread, several side by side, which at small shapes beats splitting every matrix
product over the cores; results come back in order, so the bits do not depend on the number of
threads. On a GPU there is one worker and the calling thread does the work.

So are the rows of a chunk, but for the sum of their gradients. Work on a chunk that runs out of
memory is done again in halves, and halves of halves; how many rows went well is kept to, so that
the next chunk does not fail first. All forwards keep to one number: replay, which needs most, has
the shape of rollout again from the next update on.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
Kind = Literal["forward", "decode"]

logger = logging.getLogger(__name__)

# What PyTorch's allocator on a CPU, cuBLAS and the CUDA runtime say in a plain RuntimeError.
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


class StepFailed(RuntimeError):
    """A reward, loss or gradient is of no use, or there is none: the update is not applied.

    `batch` is the one it happened in, where it is known.
    """

    def __init__(self, message: str, batch: Any = None):
        super().__init__(message)
        self.batch = batch


class Workers:
    """`map(function, items)` on `count` threads, each of one intra-op thread; 1: the caller's.

    rows: the most rows of a chunk at a time by kind of work, where memory has set a limit; may be
    shared with others. `in_step`: other processes count on each forward, so a chunk stays whole.
    `release`: called before a second try, to free what can be made again.
    """

    def __init__(self, count: int, rows: dict[Kind, int] | None = None):
        self.count = count
        self.rows: dict[Kind, int] = {} if rows is None else rows
        self.in_step = False
        self.release: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
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

    def parts(self, work: Callable[[slice], R], rows: int, kind: Kind = "forward") -> list[R]:
        """`work` of all `rows` of a chunk, or, where that takes too much memory, of runs of them.

        Results are in the order of the rows. A part that fails has no effect but memory.
        StepFailed where one row alone is too much, or others count on the whole (`in_step`).
        """
        done: list[R] = []
        first = 0
        while first < rows:
            part = slice(first, min(rows, first + self.rows.get(kind, rows)))
            try:
                done.append(work(part))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            else:
                first = part.stop
                continue
            self._lower(kind, part.stop - part.start, said)  # the error's frames are gone
        return done

    def tensors(self, work: Callable[[Any], list[Tensor]], chunks: Iterable[Any]) -> Iterator[Any]:
        """Of each Trajectory the tensors [B, ...] that `work` gives of it, or of parts of it."""

        def of(chunk: Any) -> list[Tensor]:
            found = self.parts(lambda part: work(chunk.part(part)), len(chunk.rows))
            if len(found) == 1:
                return found[0]
            return [torch.cat(same) for same in zip(*found, strict=True)]

        return self.map(of, chunks)

    def _lower(self, kind: Kind, tried: int, said: str) -> None:
        """Keep to half of the rows that were tried; StepFailed where that cannot be."""
        less = "train.recompute_blocks or lower train.replay_steps"
        less = f"raise {less}" if kind == "forward" else "close what else uses the device"
        less += ", or set fewer `threads`" if self.count > 1 else ""
        if self.in_step and kind == "forward":
            raise StepFailed(
                f"out of memory with {tried} rows of a chunk at a time ({said}); processes that "
                "share out the transformer or tokens go in step, so no chunk is halved: lower "
                f"rollout.max_rows, {less}"
            )
        if tried == 1:
            raise StepFailed(
                f"out of memory with one row at a time ({said}): draw smaller images "
                f"(rollout.height, rollout.width), {less}"
            )
        half = -(-tried // 2)
        with self._lock:
            lower = half < self.rows.get(kind, tried)
            self.rows[kind] = min(half, self.rows.get(kind, half))
        if lower:
            logger.warning(
                "out of memory with %d rows of a chunk at a time, %s (%s): from now on %d, with "
                "the same result to rounding. To do without the tries: lower rollout.max_rows, %s",
                *(tried, kind, said, half, less),
            )
        self.release()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it was raised of, says that memory does not suffice."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def cpu_workers(threads: int | None) -> Workers:
    """One worker a thread (null: as many as PyTorch would use); PyTorch itself is set to one."""
    count = threads or torch.get_num_threads()
    torch.set_num_threads(1)
    return Workers(count)
