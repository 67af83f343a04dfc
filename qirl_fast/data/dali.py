"""NVIDIA DALI as a decoder of JPEG, PNG and WebP files; imported only where it is asked for.

One pipeline, built once: bytes -> uint8 [h, w, 3], as stored (orientation is images.py's). On the
CPU it needs neither GPU nor driver. With a GPU, `mixed` decodes JPEG there and the rest on the CPU.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

INSTALL = "pip install 'qirl-fast[dali]'"

log = logging.getLogger(__name__)


class Dali:
    """files: bytes of up to `batch` images -> their pixels; None where DALI refuses a file.

    RuntimeError: DALI is missing or does not load. ValueError: a device that is neither cpu nor
    cuda.
    """

    def __init__(self, device: str, threads: int, batch: int) -> None:
        try:
            dali: Any = importlib.import_module("nvidia.dali")
        except ImportError as error:
            raise RuntimeError(
                f"decoder: DALI was asked for and cannot be imported ({error}); {INSTALL}, or "
                "choose the decoder 'pil'"
            ) from error
        place = torch.device(device)
        if place.type not in ("cpu", "cuda"):
            raise ValueError(f"decoder: got device {device!r}; wanted cpu or cuda")
        self._mixed = place.type == "cuda"
        self._batch = batch

        @dali.pipeline_def(
            batch_size=batch,
            num_threads=threads,
            device_id=(place.index or 0) if self._mixed else None,
            exec_async=False,  # a run returns the batch it was fed
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        def decode() -> Any:
            data = dali.fn.external_source(name="files", device="cpu")
            kind = "mixed" if self._mixed else "cpu"
            return dali.fn.decoders.image(
                data, device=kind, output_type=dali.types.RGB, adjust_orientation=False
            )

        self._make = decode
        self._lock = threading.Lock()
        self._pipeline: Any = None

    def __call__(self, files: Sequence[bytes]) -> list[np.ndarray | None]:
        """uint8 [h, w, 3] of each file, or None; a bad file leaves the others as they are."""
        with self._lock:
            return [
                pixels
                for start in range(0, len(files), self._batch)
                for pixels in self._run(files[start : start + self._batch])
            ]

    def _run(self, files: Sequence[bytes]) -> list[np.ndarray | None]:
        """One run; where it fails, its halves, as DALI loses a batch with one bad file."""
        if self._pipeline is None:
            self._pipeline = self._make()
            self._pipeline.build()
        try:
            self._pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in files])
            (images,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # it cannot be used again
            if len(files) == 1:
                log.warning("DALI refuses an image, which PIL then decides on: %s", _reason(error))
                return [None]
            half = len(files) // 2
            return self._run(files[:half]) + self._run(files[half:])
        if self._mixed:
            images = images.as_cpu()
        return [images.at(i) for i in range(len(files))]  # copies


def _reason(error: RuntimeError) -> str:
    """The part of DALI's message that is about the image."""
    return " ".join(str(error).rpartition("encountered:")[2].split())[:200]
