"""The embedding cache: one encoding per prompt and model, exact bits back, damage re-encoded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qirl_fast.data.embeddings import EmbeddingCache


class Encoder:
    """Counts its calls; the embedding is a function of the prompt, [len, 4]."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.seen: list[str] = []
        self.dtype = dtype

    def __call__(self, prompts: list[str]) -> list[torch.Tensor]:
        assert len(prompts) == 1
        self.seen += prompts
        generator = torch.Generator().manual_seed(sum(map(ord, prompts[0])))
        length = len(prompts[0]) + 1
        return [torch.randn(length, 4, generator=generator).to(self.dtype)]


def equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(got) == len(wanted) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_prompt_is_encoded_once_over_calls_and_processes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    encoder = Encoder(dtype)
    cache = EmbeddingCache(tmp_path, "model")
    prompts = ["a", "bb", "a", "", "bb"]
    first = cache.get(prompts, encoder)
    assert encoder.seen == ["a", "bb", ""]
    assert [list(t.shape) for t in first] == [[2, 4], [3, 4], [2, 4], [1, 4], [3, 4]]
    assert equal(cache.get(prompts, encoder), first)
    assert equal(EmbeddingCache(tmp_path, "model").get(prompts, encoder), first)
    assert encoder.seen == ["a", "bb", ""]
    assert len(list(tmp_path.iterdir())) == 3


def test_another_model_shares_nothing(tmp_path: Path) -> None:
    encoder = Encoder()
    EmbeddingCache(tmp_path, "one").get(["ab"], encoder)
    EmbeddingCache(tmp_path, "onea").get(["b"], encoder)
    EmbeddingCache(tmp_path, "two").get(["ab"], encoder)
    assert encoder.seen == ["ab", "b", "ab"]
    with pytest.raises(ValueError, match="empty key"):
        EmbeddingCache(tmp_path, "")


@pytest.mark.parametrize("kind", ["flipped", "header", "truncated", "empty", "other"])
def test_damaged_file_is_encoded_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder()
    cache = EmbeddingCache(tmp_path, "model")
    whole = cache.get(["abc"], encoder)
    file = cache.path("abc")
    data = bytearray(file.read_bytes())
    if kind == "flipped":
        data[-1] ^= 1
    if kind == "header":
        data[8] ^= 1
    cut = {"truncated": len(data) - 4, "empty": 0}.get(kind, len(data))
    file.write_bytes(data[:cut])
    if kind == "other":
        file.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    again = EmbeddingCache(tmp_path, "model")
    assert equal(again.get(["abc"], encoder), whole)
    assert encoder.seen == ["abc", "abc"]
    assert "is damaged" in caplog.text and str(file) in caplog.text
    assert equal(EmbeddingCache(tmp_path, "model").get(["abc"], encoder), whole)
    assert encoder.seen == ["abc", "abc"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    encoder = Encoder()
    cache = EmbeddingCache(tmp_path, "model", memory_bytes=2 * 2 * 4 * 4)  # two tensors [2, 4]
    first = cache.get(list("abc"), encoder)
    cache.path("a").unlink()
    cache.path("c").unlink()
    assert equal(cache.get(["c", "b"], encoder), [first[2], first[1]])
    assert encoder.seen == list("abc"), "b and c were in memory or on disk"
    cache.get(["a"], encoder)
    assert encoder.seen == list("abca"), "a was neither"


@pytest.mark.parametrize(
    ("result", "part"),
    [
        ([], "returned 0 tensors for one prompt"),
        ([torch.zeros(3)], r"returned shape \[3\], torch.float32"),
        ([torch.zeros(0, 3)], r"returned shape \[0, 3\]"),
        ([torch.zeros(2, 3, dtype=torch.int64)], "torch.int64"),
        ([torch.tensor([[1.0, float("nan")]])], "returned NaN or infinity for 'x'"),
    ],
)
def test_bad_encoder_is_refused_and_nothing_is_kept(
    tmp_path: Path, result: list[torch.Tensor], part: str
) -> None:
    cache = EmbeddingCache(tmp_path, "model")
    with pytest.raises(ValueError, match=part):
        cache.get(["x"], lambda prompts: result)
    assert not list(tmp_path.iterdir())


def test_stored_tensors_are_plain_and_separate(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    cache = EmbeddingCache(tmp_path, "model")
    (got,) = cache.get(["x"], lambda prompts: [(weight * 2).T])
    assert not got.requires_grad and got.is_contiguous()
    (back,) = EmbeddingCache(tmp_path, "model").get(["x"], lambda prompts: [])
    assert torch.equal(back, (weight * 2).T)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from qirl_fast.data import embeddings

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

whole = embeddings.save_file
if sys.argv[2] == "writing":
    embeddings.save_file = half
else:
    Path.replace = die
embeddings.EmbeddingCache(sys.argv[1], "model").get(["x"], lambda p: [torch.ones(500, 64)])
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_writing_leaves_no_half_file(
    tmp_path: Path, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    cache = EmbeddingCache(tmp_path, "model")
    (torn,) = tmp_path.iterdir()
    assert torn != cache.path("x"), "a young one could be another process's: it stays"
    encoder = Encoder()
    cache.get(["x"], encoder)
    assert encoder.seen == ["x"] and not caplog.records
    os.utime(torn, (0, 0))
    EmbeddingCache(tmp_path, "model")
    assert list(tmp_path.iterdir()) == [cache.path("x")]
