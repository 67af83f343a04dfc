"""The embedding cache: one encoding per prompt and model, exact bits back, damage re-encoded."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qirl_fast.data.embeddings import TEXT_PARTS, EmbeddingCache, fingerprint


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


IMAGES = [("ab" * 32, [(384, 384), (1024, 1024)]), ("cd" * 32, [(384, 384)])]


class Maker:
    """Counts its calls; text, slots and latents as an adapter gives them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.calls = 0
        self.tensors = {
            "text": torch.randn(5, 4, generator=generator).to(torch.bfloat16),
            "slots": torch.tensor([True, False, True, False, False]),
            "latents": torch.randn(8, 3, generator=generator),
            "grids": torch.tensor([[2, 2], [2, 2]]),
            "scale": torch.tensor(2.5),
            "none": torch.zeros(0, 3),
        }

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return self.tensors


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and equal([got[n] for n in wanted], list(wanted.values()))


def test_conditioned_prompts_are_encoded_once(tmp_path: Path) -> None:
    make = Maker()
    cache = EmbeddingCache(tmp_path, "model")
    for each in (cache, cache, EmbeddingCache(tmp_path, "model")):
        assert same(each.conditioned("p", IMAGES, make), make.tensors)
    assert make.calls == 1 and list(tmp_path.iterdir()) == [cache.path("p", IMAGES)]


def test_what_decides_a_conditioned_prompt() -> None:
    """Prompt, model, each image's content and sizes, their order and number."""
    (one, sizes), two = IMAGES
    cache = EmbeddingCache("x", "model")
    others: list[list[tuple[str, list[tuple[int, int]]]]] = [
        *(IMAGES[::-1], IMAGES[:1], [], [*IMAGES, two]),
        [(one, sizes[:1]), two],
        [(one, sizes[::-1]), two],
        [("ef" * 32, sizes), two],
    ]
    paths = [cache.path("p", each) for each in (IMAGES, *others)]
    paths += [cache.path("q", IMAGES), cache.path("p"), EmbeddingCache("x", "n").path("p", IMAGES)]
    assert len(set(paths)) == len(paths)
    assert cache.path("p", [(one, [[384, 384], [1024, 1024]]), two]) == paths[0]  # type: ignore
    # A prompt that imitates what stands behind another one.
    assert cache.path(f"p {one} 384x384 1024x1024", []) != cache.path("p", IMAGES[:1])


@pytest.mark.parametrize("name", ["text", "slots", "grids"])
def test_damaged_conditioned_file_is_made_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker()
    file = EmbeddingCache(tmp_path, "model").path("p", IMAGES)
    EmbeddingCache(tmp_path, "model").conditioned("p", IMAGES, make)
    data = file.read_bytes()
    start, _ = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[name]["data_offsets"]
    at = 8 + int.from_bytes(data[:8], "little") + start
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    again = EmbeddingCache(tmp_path, "model")
    assert same(again.conditioned("p", IMAGES, make), make.tensors)
    assert make.calls == 2 and f"{file} is damaged" in caplog.text
    file.write_bytes(data.replace(b'"slots"', b'"stols"'))
    assert same(EmbeddingCache(tmp_path, "model").conditioned("p", IMAGES, make), make.tensors)
    assert make.calls == 3


def test_conditioned_prompts_share_the_memory_bound(tmp_path: Path) -> None:
    make = Maker()
    size = sum(tensor.nbytes for tensor in make.tensors.values())
    cache = EmbeddingCache(tmp_path, "model", memory_bytes=size)
    cache.conditioned("p", IMAGES, make)
    cache.get(["a"], Encoder())
    cache.path("p", IMAGES).unlink()
    cache.conditioned("p", IMAGES, make)
    assert make.calls == 2


def test_bad_conditioned_tensors_are_refused(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "model")
    for result, part in (
        ({}, "no tensors for 'p'"),
        ({"a": torch.tensor([float("inf")])}, r"NaN or infinity for 'p' \(a\)"),
    ):
        with pytest.raises(ValueError, match=part):
            cache.conditioned("p", IMAGES, lambda result=result: result)
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    parts = {"a": whole, "b": whole[2:], "c": whole.T}
    EmbeddingCache(tmp_path, "model").conditioned("p", IMAGES, lambda: parts)
    assert same(EmbeddingCache(tmp_path, "model").conditioned("p", IMAGES, Maker()), parts)


def test_a_file_of_an_earlier_version_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    cache = EmbeddingCache(tmp_path, "model")
    digest = hashlib.sha256(b"torch.float32[2, 3]" + tensor.numpy().tobytes()).hexdigest()
    name = hashlib.sha256(b"5:modelp").hexdigest()
    save_file({"embedding": tensor}, tmp_path / f"{name}.safetensors", {"sha256": digest})
    assert equal(cache.get(["p"], Encoder()), [tensor]) and not caplog.records


def test_the_fingerprint_is_of_the_parts_named(tmp_path: Path) -> None:
    for part in ("text_encoder", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "weights").write_bytes(b"1")
    text, both = fingerprint(tmp_path), fingerprint(tmp_path, (*TEXT_PARTS, "vae"))
    (tmp_path / "vae" / "weights").write_bytes(b"2")
    assert fingerprint(tmp_path) == text != both != fingerprint(tmp_path, (*TEXT_PARTS, "vae"))
