"""Embeddings on disk: each prompt is encoded once per model, however often it is drawn.

One safetensors file per prompt, named by SHA-256 of prompt and model fingerprint, and of the
content and sizes of its condition images, written beside and renamed, so a killed process leaves
a whole file or none. Each file holds the SHA-256 of its tensors: one that does not match
(safetensors itself loads a flipped bit without a word) is encoded again, and that is logged.
Tensors come back bit for bit in the dtype they were encoded in.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qirl_fast.tensors import save_file

TORN_AGE_S = 3600.0

log = logging.getLogger(__name__)

EncodeFn = Callable[[list[str]], Sequence[Tensor]]
# Of a condition image: SHA-256 of its file, (height, width) of its versions.
ImageKey = tuple[str, Sequence[tuple[int, int]]]


class EmbeddingCache:
    """Embeddings of prompts under one model.

    folder: where the files lie; made when needed. key: the model's fingerprint; anything that
    changes an embedding (weights, template, dtype) must change it. memory_bytes: tensors used last
    are kept in memory up to this size, the rest are read again.
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: str, *, memory_bytes: int = 1 << 30
    ) -> None:
        if not key:
            raise ValueError("embedding cache: got an empty key; wanted the model's fingerprint")
        self.folder = Path(folder)
        self.key = key
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        for torn in self.folder.glob(".*.tmp"):  # of a killed process, or of one that writes now
            with suppress(FileNotFoundError):
                if time.time() - torn.stat().st_mtime > TORN_AGE_S:
                    torn.unlink()

    def path(self, prompt: str, images: Sequence[ImageKey] | None = None) -> Path:
        """Return the file of this prompt, or of this prompt with these condition images."""
        text = f"{len(self.key)}:{self.key}{prompt}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if images is None:
            return self.folder / f"{digest}.safetensors"
        for sha256, sizes in images:
            digest += f" {sha256}" + "".join(f" {h}x{w}" for h, w in sizes)
        digest = hashlib.sha256(digest.encode()).hexdigest()
        return self.folder / f"images-{digest}.safetensors"

    def get(self, prompts: Sequence[str], encode_fn: EncodeFn) -> list[Tensor]:
        """Return one tensor [L_i, C] per prompt, on the CPU; equal prompts share one tensor.

        encode_fn([prompt]) returns [tensor]: finite, floating-point, [L, C]. It is called for one
        prompt at a time, and only for prompts not known yet: padding and batch size change the
        rounding, so batched embeddings would depend on what else was missing from the cache.
        Raises ValueError if it returns anything else. The tensors are not to be changed.
        """

        def one(prompt: str) -> Tensor:
            def make() -> dict[str, Tensor]:
                return _embedding(encode_fn([prompt]), prompt)

            return self._get(self.path(prompt), make, prompt)["embedding"]

        found = {prompt: one(prompt) for prompt in dict.fromkeys(prompts)}
        return [found[prompt] for prompt in prompts]

    def conditioned(
        self, prompt: str, images: Sequence[ImageKey], make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of a prompt with condition images, on the CPU.

        images: of each its content and sizes, in order: what decides the tensors besides prompt
        and model. make() is called where they are not known yet; it returns tensors by name, of
        any shape and dtype, floating-point ones finite. Raises ValueError if it returns anything
        else. The tensors are not to be changed.
        """
        return dict(self._get(self.path(prompt, images), make, prompt))

    def _get(
        self, path: Path, make: Callable[[], Mapping[str, Tensor]], prompt: str
    ) -> dict[str, Tensor]:
        tensors = self._memory.get(path) or self._load(path)
        if tensors is None:
            tensors = _checked(make(), prompt)
            self._save(path, tensors)
        self._memory[path] = tensors
        self._memory.move_to_end(path)
        while sum(t.nbytes for kept in self._memory.values() for t in kept.values()) > (
            self.memory_bytes
        ):
            self._memory.popitem(last=False)
        return tensors

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # machines may share the folder
        save_file(tensors, beside, metadata={"sha256": _digest(tensors)})
        beside.replace(path)

    def _load(self, path: Path) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); the prompt is encoded again", path, error)
            return None
        if _digest(tensors) != expected:
            log.warning("%s is damaged (SHA-256 differs); the prompt is encoded again", path)
            return None
        return tensors


def _embedding(encoded: Sequence[Tensor], prompt: str) -> dict[str, Tensor]:
    if len(encoded) != 1:
        raise ValueError(f"encode_fn returned {len(encoded)} tensors for one prompt; wanted one")
    tensor = encoded[0]
    if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise ValueError(
            f"encode_fn returned shape {list(tensor.shape)}, {tensor.dtype} for {prompt!r}; wanted "
            "a floating-point tensor [L, C]"
        )
    return {"embedding": tensor}


def _checked(tensors: Mapping[str, Tensor], prompt: str) -> dict[str, Tensor]:
    if not tensors:
        raise ValueError(f"the encoder returned no tensors for {prompt!r}; wanted one or more")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the encoder returned NaN or infinity for {prompt!r} ({name})")
    # Of their own memory: safetensors refuses tensors that share it.
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits; a text embedding's name is left out."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        named = "" if tensors.keys() == {"embedding"} else f"\n{name}:"
        whole.update(f"{named}{tensor.dtype}{list(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


TEXT_PARTS = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "processor",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
)


def fingerprint(folder: Path, parts: Sequence[str] = TEXT_PARTS) -> str:
    """SHA-256 over the files of these parts of a model folder: what decides an embedding.

    With condition images "vae" is one of the parts.
    """
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((folder / part).iterdir()) if (folder / part).is_dir() else ():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
