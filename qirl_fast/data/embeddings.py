"""Text embeddings on disk: each prompt is encoded once per model, however often it is drawn.

One safetensors file per prompt, named by SHA-256 of prompt and model fingerprint, written beside
and renamed, so a killed process leaves a whole file or none. Each file holds the SHA-256 of its
tensor: one that does not match (safetensors itself loads a flipped bit without a word) is encoded
again, and that is logged. Tensors come back bit for bit in the dtype they were encoded in.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TORN_AGE_S = 3600.0

log = logging.getLogger(__name__)

EncodeFn = Callable[[list[str]], Sequence[Tensor]]


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
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        for torn in self.folder.glob(".*.tmp"):  # of a killed process, or of one that writes now
            with suppress(FileNotFoundError):
                if time.time() - torn.stat().st_mtime > TORN_AGE_S:
                    torn.unlink()

    def path(self, prompt: str) -> Path:
        """Return the file of this prompt."""
        text = f"{len(self.key)}:{self.key}{prompt}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def get(self, prompts: Sequence[str], encode_fn: EncodeFn) -> list[Tensor]:
        """Return one tensor [L_i, C] per prompt, on the CPU; equal prompts share one tensor.

        encode_fn([prompt]) returns [tensor]: finite, floating-point, [L, C]. It is called for one
        prompt at a time, and only for prompts not known yet: padding and batch size change the
        rounding, so batched embeddings would depend on what else was missing from the cache.
        Raises ValueError if it returns anything else. The tensors are not to be changed.
        """
        found: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            tensor = self._memory.get(prompt)
            if tensor is None:
                tensor = self._load(prompt)
            if tensor is None:
                tensor = _checked(encode_fn([prompt]), prompt)
                self._save(prompt, tensor)
            found[prompt] = tensor
            self._remember(prompt, tensor)
        return [found[prompt] for prompt in prompts]

    def _remember(self, prompt: str, tensor: Tensor) -> None:
        self._memory[prompt] = tensor
        self._memory.move_to_end(prompt)
        while sum(kept.nbytes for kept in self._memory.values()) > self.memory_bytes:
            self._memory.popitem(last=False)

    def _save(self, prompt: str, tensor: Tensor) -> None:
        path = self.path(prompt)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({"embedding": tensor}, beside, metadata={"sha256": _digest(tensor)})
        beside.replace(path)

    def _load(self, prompt: str) -> Tensor | None:
        path = self.path(prompt)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor("embedding")
                expected = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); the prompt is encoded again", path, error)
            return None
        if _digest(tensor) != expected:
            log.warning("%s is damaged (SHA-256 differs); the prompt is encoded again", path)
            return None
        return tensor


def _checked(encoded: Sequence[Tensor], prompt: str) -> Tensor:
    if len(encoded) != 1:
        raise ValueError(f"encode_fn returned {len(encoded)} tensors for one prompt; wanted one")
    tensor = encoded[0]
    if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise ValueError(
            f"encode_fn returned shape {list(tensor.shape)}, {tensor.dtype} for {prompt!r}; wanted "
            "a floating-point tensor [L, C]"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"encode_fn returned NaN or infinity for {prompt!r}")
    return tensor.detach().cpu().contiguous()


def _digest(tensor: Tensor) -> str:
    layout = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return hashlib.sha256(layout + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(folder: Path) -> str:
    """SHA-256 over what decides a text embedding: files of text encoder, processor, tokenizer."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "processor", "tokenizer"):
        for file in sorted((folder / part).iterdir()) if (folder / part).is_dir() else ():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
