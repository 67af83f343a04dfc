"""A disk that refuses tensors: an OSError, which entry points say in a line, whoever writes."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qirl_fast.batch import Batch, save_batch
from qirl_fast.data.embeddings import EmbeddingCache
from qirl_fast.data.prompts import Prompt
from qirl_fast.tensors import save_file

LARGE = torch.ones(100, 100)


@contextmanager
def refusing() -> Iterator[None]:
    """Inside, no file grows beyond 4 KiB: what a full disk does, under another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cached(folder: Path) -> None:
    EmbeddingCache(folder, "model").get(["x"], lambda prompts: [LARGE])


def kept_for_inspection(folder: Path) -> None:
    recorded = {"recorded": [0], "x": [LARGE], "x_next": [LARGE], "logp": [LARGE]}
    trajectory = SimpleNamespace(rows=range(1), **recorded)
    scores, status = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int8)
    images = np.zeros((1, 2, 2, 3), np.uint8)
    save_batch(Batch([Prompt("0", "x", None, {})], [trajectory], images, scores, status), folder)


def alone(folder: Path) -> None:
    save_file({"x": LARGE}, folder / "x.safetensors")


@pytest.mark.parametrize("write", [alone, cached, kept_for_inspection])
def test_a_refused_file_is_named_and_none_is_left(write, tmp_path: Path) -> None:
    with refusing(), pytest.raises(OSError, match="File too large") as error:
        write(tmp_path)
    assert error.value.errno == errno.EFBIG
    assert str(tmp_path) in str(error.value) and ".safetensors" in str(error.value)
    assert not list(tmp_path.glob("*.safetensors"))
    write(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
