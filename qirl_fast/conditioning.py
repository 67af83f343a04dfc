"""What the model and the judges are given of prompt rows: embeddings, condition images, a size.

A row without images is the embedding of its text. A row with images is an editing row: its images
are decoded, encoded beside the text (`models.prefix.Conditioned`) and kept on disk by the hash of
their content; judges see them, over white and at the size of what is drawn, under SOURCES.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qirl_fast.batch import StepFailed
from qirl_fast.config import Config
from qirl_fast.data.buckets import bucket_of
from qirl_fast.data.embeddings import EmbeddingCache, fingerprint
from qirl_fast.data.images import MAX_SIDE, Decoder, ImageError, Size, header, over_white
from qirl_fast.data.prefetch import ImageLoader
from qirl_fast.data.prompts import Prompt
from qirl_fast.data.sampler import PromptSampler
from qirl_fast.data.sources import Source
from qirl_fast.distributed import World
from qirl_fast.models.adapter import Adapter
from qirl_fast.models.prefix import Conditioned
from qirl_fast.rewards.judge import SOURCES, Row, Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """Of P prompts that are drawn at one size.

    embeddings: P, for the model's prefix. null: the unconditional one of all prompts, or a list of
    one for each. rows: P, for the judges. height, width: of what is drawn, pixels.
    """

    embeddings: list[Any]
    null: Any
    rows: list[Row]
    height: int
    width: int


def shown_size(source: Source) -> Size:
    """(height, width) of a condition image as it is shown; ImageError where it is refused."""
    return _shown_size(source, source.state())


@lru_cache(maxsize=1 << 16)
def _shown_size(source: Source, state: object) -> Size:
    """`shown_size` of the file in this state."""
    found = header(source)
    return found.height, found.width


def target_size(cfg: Config, prompt: Prompt) -> Size:
    """(height, width) at which a prompt is drawn: with data.buckets that of its last image's."""
    if cfg.data.buckets is None or not prompt.images:
        return cfg.rollout.height, cfg.rollout.width
    return bucket_of(shown_size(prompt.images[-1]), cfg.data.buckets)


def condition_versions(
    cfg: Config, adapter: Adapter | type[Adapter], prompt: Prompt
) -> list[tuple[Size, ...]]:
    """Sizes of the versions that the model wants of each of a prompt's images.

    ImageError for an image that is refused, or that the model cannot serve.
    """
    height, width = target_size(cfg, prompt)
    pixels = cfg.data.condition_pixels or height * width
    found = []
    for source in prompt.images:
        size = shown_size(source)
        try:
            found.append(adapter.condition_sizes(size, pixels))
        except ValueError as error:
            raise ImageError(f"{source.name}: {error}") from error
        longest = max(side for version in found[-1] for side in version)
        if longest > MAX_SIDE:
            raise ImageError(
                f"{source.name}: {size[0]} x {size[1]} is so long that its side becomes {longest} "
                f"pixels for the model; wanted at most {MAX_SIDE}: crop it"
            )
    return found


class Conditioning:
    """Gives model and judges what they need; every text and image is encoded once per model."""

    def __init__(self, cfg: Config, model: Any, folder: Path, world: World) -> None:
        self.cfg, self.model, self.world = cfg, model, world
        kept, texts = Path(cfg.output) / "embeddings", fingerprint(folder)
        self.texts = EmbeddingCache(kept, f"{texts}-{cfg.model.dtype}")
        # The pipelines' encoding of images is not settled (diffusers issue 14194), and nvJPEG, with
        # which DALI decodes on a GPU, rounds in its own way.
        versions = "-".join(version(name) for name in ("diffusers", "transformers"))
        mixed = cfg.data.decoder == "dali" and model.device.type == "cuda"
        images = f"{fingerprint(folder, ('vae',))}-{versions}{'-mixed' if mixed else ''}"
        self.edits = EmbeddingCache(kept, f"{texts}-{images}-{cfg.model.dtype}")
        scales = (cfg.rollout.guidance, cfg.evaluation.guidance)
        self.guided = cfg.algorithm.guides or any(scale != 1 for scale in scales)
        try:
            self.loader = ImageLoader(Decoder(cfg.data.decoder, device=str(model.device)))
        except RuntimeError as error:  # DALI is not there
            raise ValueError(f"data.{error}") from error

    def close(self) -> None:
        """Stop decoding ahead."""
        self.loader.close()

    def target(self, prompt: Prompt) -> Size:
        """(height, width) at which the prompt is drawn: see `target_size`."""
        return target_size(self.cfg, prompt)

    def _wanted(self, prompt: Prompt) -> list[tuple[Source, list[Size]]]:
        """Versions of each of the prompt's images: those the model wants, then the judges'."""
        return [
            (source, [*versions, self.target(prompt)])
            for source, versions in zip(
                prompt.images, condition_versions(self.cfg, self.model, prompt), strict=True
            )
        ]

    def draw(self, sampler: PromptSampler) -> list[Prompt]:
        """The sampler's next prompts, their images decoded; those of the batch after are begun.

        Rows whose images cannot be used raise StepFailed, or are left out for good and others take
        their place, as data.bad_images says.
        """
        while True:
            before = sampler.state_dict()
            prompts = next(sampler)
            own = self.world.own(len(prompts))
            try:
                with self.world.agreed(OSError):
                    found = self.faults([prompts[i] for i in own])
            except OSError as failure:  # a disk or a network that may come back: no row's fault
                sampler.load_state_dict(before)
                raise StepFailed(f"condition images cannot be read: {failure}") from failure
            told = self.world.gather([[own[i], str(error)] for i, error in found.items()])
            faults = dict(sorted((i, text) for part in told for i, text in part))
            if not faults:
                coming = sampler.peek()
                self.prefetch([coming[i] for i in own])
                return prompts
            sampler.load_state_dict(before)
            for error in faults.values():
                if self.cfg.data.bad_images == "stop":
                    raise StepFailed(f"{error}; or leave such rows out with data.bad_images=skip")
                log.warning("this row is left out for good: %s", error)
            try:
                sampler.drop([prompts[i] for i in faults])
            except ValueError as error:
                raise StepFailed(f"images that cannot be used were left out: {error}") from error

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Begin to decode the prompts' images; what is refused is refused when it is asked for."""
        wanted = []
        for prompt in prompts:
            with suppress(ImageError):
                wanted += self._wanted(prompt)
        self.loader.prefetch(wanted)

    def faults(self, prompts: Sequence[Prompt]) -> dict[int, ImageError]:
        """The first fault of each prompt whose images cannot be used; the others are decoded and
        encoded.
        """
        self.prefetch(prompts)  # together
        found: dict[int, ImageError] = {}
        for i, prompt in enumerate(prompts):
            if not prompt.images:
                continue
            try:
                self._edit(prompt)
            except ImageError as error:
                found[i] = error
        return found

    def sources(self, prompts: Sequence[Prompt]) -> list[np.ndarray] | None:
        """The pictures that editing rows edit, uint8 [H, W, 3] as drawn; None without such rows.

        A row among them that edits nothing has an empty white picture.
        """
        if not any(p.images for p in prompts):
            return None
        blank = [np.full((*target_size(self.cfg, p), 3), 255, np.uint8) for p in prompts]
        return [
            over_white(self._decoded(p)[-1][-1]) if p.images else white
            for p, white in zip(prompts, blank, strict=True)
        ]

    def _decoded(self, prompt: Prompt) -> list[list[np.ndarray]]:
        decoded = []
        for images in self.loader.get(self._wanted(prompt)):
            if isinstance(images, ImageError):
                raise images
            decoded.append(images)
        return decoded

    def of(self, prompts: Sequence[Prompt]) -> Given:
        """What is given of prompts of one target size. ImageError for an image of no use."""
        sizes = {self.target(p) for p in prompts}
        if len(sizes) != 1:
            raise ValueError(f"prompts are drawn at {sorted(sizes)}; wanted one size")
        ((height, width),) = sizes
        texts = self._texts([p.prompt for p in prompts if not p.images])
        null = self._texts([""])[0] if texts else None
        if len(texts) == len(prompts):
            return Given(texts, null, [p.metadata for p in prompts], height, width)
        embeddings: list[Any] = []
        nulls: list[Any] = []
        rows: list[Row] = []
        for prompt in prompts:
            if not prompt.images:
                embeddings.append(texts.pop(0))
                nulls.append(null)
                rows.append(prompt.metadata)
                continue
            embedding, unconditional, sources = self._edit(prompt)
            embeddings.append(embedding)
            nulls.append(unconditional)
            rows.append(prompt.metadata | {SOURCES: sources})
        return Given(embeddings, nulls, rows, height, width)

    @torch.no_grad()
    def _edit(self, prompt: Prompt) -> tuple[Conditioned, Conditioned | None, Sources]:
        """Of a prompt with images: itself and, where anything is guided, the unconditional one;
        what judges see of the images. ImageError for an image of no use.
        """
        decoded = self._decoded(prompt)
        versions = [images[:-1] for images in decoded]
        embedding = self._conditioned(prompt, prompt.prompt, versions)
        null = self._conditioned(prompt, "", versions) if self.guided else None
        return embedding, null, Sources(over_white(images[-1]) for images in decoded)

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """All: tokens of each prompt's text and condition images, whoever encodes them.

        ValueError, OSError in all for an image of no use, or that cannot be read.
        """
        own = [prompts[i] for i in self.world.own(len(prompts))]
        with self.world.agreed(OSError, ValueError):
            found = [tokens_of(given) for given in self.of(own).embeddings] if own else []
        return [length for part in self.world.gather(found) for length in part]

    def _texts(self, prompts: Sequence[str]) -> list[Tensor]:
        with torch.no_grad():
            return self.texts.get(prompts, self.model.encode)

    def _conditioned(
        self, prompt: Prompt, text: str, versions: Sequence[Sequence[np.ndarray]]
    ) -> Conditioned:
        """The text and the prompt's images, encoded once for what they hold."""
        shown = [
            (source.sha256(), [(v.shape[0], v.shape[1]) for v in own])
            for source, own in zip(prompt.images, versions, strict=True)
        ]

        def encoded() -> dict[str, Tensor]:
            try:
                return as_tensors(self.model.condition(text, versions))
            except ValueError as error:  # a size, or a shape, that the encoder does not take
                names = ", ".join(source.name for source in prompt.images)
                raise ImageError(f"{names}: {error}") from error

        return from_tensors(self.edits.conditioned(text, shown, encoded))


def tokens_of(prompt: Tensor | Conditioned) -> int:
    """Tokens of an embedding [L, C], or of a prompt with its condition images' latents."""
    if isinstance(prompt, Tensor):
        return len(prompt)
    return len(prompt.text) - int(prompt.slots.sum()) + len(prompt.latents)


def as_tensors(prompt: Conditioned) -> dict[str, Tensor]:
    """A conditioned prompt as tensors alone, to be kept on disk."""
    grids = torch.tensor(prompt.grids, dtype=torch.int64)
    return {"text": prompt.text, "slots": prompt.slots, "latents": prompt.latents, "grids": grids}


def from_tensors(kept: Mapping[str, Tensor]) -> Conditioned:
    """The prompt that `as_tensors` took apart."""
    grids = tuple((int(h), int(w)) for h, w in kept["grids"].tolist())
    return Conditioned(kept["text"], kept["slots"], kept["latents"], grids)
