"""Decoded condition images, made in a thread of their own while training goes on.

One thread decodes, in the order of the calls, so what comes back does not depend on what was
prefetched. Arrays used last stay in memory up to a limit. An image that cannot be used keeps its
ImageError like an array.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from qirl_fast.data.images import BATCH, Size, Versions
from qirl_fast.data.sources import ImageError, Source

Wanted = tuple[Source, Sequence[Size]]
# The second part changes with the file.
Key = tuple[Source, tuple[int, int] | None, tuple[Size, ...]]
Result = Versions | ImageError
Decode = Callable[[Sequence[Source], Sequence[Sequence[Size]]], list[Result]]


class ImageLoader:
    """Images as a Decoder gives them, read-only.

    decoder: called by the loader's thread alone. memory_bytes: of arrays kept beyond those that a
    call is returning; what is prefetched beyond it is decoded again when it is asked for.
    waited_s: seconds that `get` has blocked so far.
    """

    def __init__(self, decoder: Decode, *, memory_bytes: int = 1 << 30) -> None:
        self.waited_s = 0.0
        self.memory_bytes = memory_bytes
        self._decoder = decoder
        self._thread = ThreadPoolExecutor(1, "images")
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Future[Result]] = OrderedDict()
        self._bytes: dict[Key, int] = {}  # of those decoded

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """Begin to decode what is not there; returns at once."""
        self._futures(wanted)

    def get(self, wanted: Sequence[Wanted]) -> list[Result]:
        """For each source its versions, or its ImageError; equal requests share arrays.

        What the decoder raises besides, it raises here. RuntimeError after `close`.
        """
        futures = self._futures(wanted)
        start = time.perf_counter()
        try:
            return [future.result() for future in futures]
        finally:
            self.waited_s += time.perf_counter() - start

    def _futures(self, wanted: Sequence[Wanted]) -> list[Future[Result]]:
        keys = [(s, s.state(), tuple((h, w) for h, w in sizes)) for s, sizes in wanted]
        with self._lock:
            new = [key for key in dict.fromkeys(keys) if key not in self._kept]
            for start in range(0, len(new), BATCH):
                part = {key: Future[Result]() for key in new[start : start + BATCH]}
                self._thread.submit(self._decode, part)
                self._kept.update(part)
            for key in keys:
                self._kept.move_to_end(key)
            return [self._kept[key] for key in keys]

    def _decode(self, part: dict[Key, Future[Result]]) -> None:
        try:
            results = self._decoder([key[0] for key in part], [key[2] for key in part])
        except BaseException as error:  # it belongs to whoever asks for the images
            with self._lock:
                for key in part:
                    self._kept.pop(key, None)  # the next to ask tries again
            for future in part.values():
                future.set_exception(error)
            return
        with self._lock:
            for key, result in zip(part, results, strict=True):
                arrays = [] if isinstance(result, ImageError) else result
                for array in arrays:
                    array.flags.writeable = False
                self._bytes[key] = sum(array.nbytes for array in arrays)
            self._forget()
        for future, result in zip(part.values(), results, strict=True):
            future.set_result(result)

    def _forget(self) -> None:
        """Let go of those used longest ago, until the rest fits; what is in work stays."""
        held = sum(self._bytes.values())
        for key in list(self._kept):
            if held <= self.memory_bytes:
                break
            if self._bytes.get(key):
                del self._kept[key]
                held -= self._bytes.pop(key)

    def close(self) -> None:
        """End the thread after the batch it is at; images not decoded yet are given up."""
        self._thread.shutdown(cancel_futures=True)
        for future in self._kept.values():
            if not future.done():
                future.set_exception(RuntimeError("the image loader is closed"))

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
