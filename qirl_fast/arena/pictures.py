"""Pictures as raters get them: nothing but pixels, under a name that tells nothing.

A file's name, dates, format and metadata could say whose it is. What is served is the decoded
picture as a PNG without any of that, under the HMAC of (prompt, model) with the database's secret.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image

from qirl_fast.arena.study import Item, Prompt, Study
from qirl_fast.data.images import Decoder, Size, header, over_white
from qirl_fast.data.sources import ImageError, Source

CACHED = 64  # PNG files held in memory

log = logging.getLogger(__name__)


class Pictures:
    """The pictures of a study by their hidden names."""

    def __init__(self, study: Study, secret: bytes) -> None:
        self._secret, self._study = secret, study
        self._decoder = Decoder("pil", threads=1)
        self._files: dict[str, tuple[Source, Prompt]] = {}
        self._said: set[str] = set()
        for prompt in study.prompts.values():
            for model, source in prompt.images.items():
                self._files[self.name(prompt.id, model)] = (source, prompt)
            if prompt.source is not None:
                self._files[self.name(prompt.id, None)] = (prompt.source, prompt)
        self._digests = study.digests()
        self._png = lru_cache(CACHED)(self._encoded)

    def name(self, prompt: str, model: str | None) -> str:
        """The hidden name of a model's picture, or of the prompt's source (None)."""
        text = "\0".join(("source", prompt) if model is None else ("image", prompt, model))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def png(self, name: str) -> bytes | None:
        """The picture as it is served; None for no such name. Raises ImageError."""
        return self._png(name) if name in self._files else None

    def usable(self, item: Item) -> bool:
        """Whether both pictures of a question, and what was edited, can be shown now."""
        prompt = self._study.prompts.get(item.prompt)
        if prompt is None or not {item.a, item.b} <= set(prompt.images):
            return False
        names = [self.name(prompt.id, model) for model in (item.a, item.b)]
        names += [] if prompt.source is None else [self.name(prompt.id, None)]
        try:
            for name in names:
                self._files[name][0].open().close()  # it may be gone since it was encoded
                self._png(name)
        except (ImageError, OSError) as error:
            self._warn(f"prompt {prompt.id!r} is not shown: {error}")
            return False
        for model in (item.a, item.b):
            if prompt.images[model].sha256() != self._digests[prompt.id, model]:
                self._warn(f"prompt {prompt.id!r} is not shown: {model}'s picture has changed")
                return False
        return True

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    @property
    def broken(self) -> int:
        """How many different faults of pictures came since the start."""
        return len(self._said)

    def array(self, name: str) -> np.ndarray:
        """uint8 [h, w, 3], over white, at the prompt's size; a source at its own."""
        source, prompt = self._files[name]
        size = prompt.size
        if source is prompt.source:
            head = header(source)  # refuses what is too large before it is decoded
            size = (head.height, head.width)
        return self._decoded(source, size)

    def source_for_judges(self, prompt: Prompt) -> np.ndarray:
        """uint8 [h, w, 3]: what was edited, at the size of what was drawn."""
        assert prompt.source is not None
        return self._decoded(prompt.source, prompt.size)

    def _decoded(self, source: Source, size: Size) -> np.ndarray:
        found = self._decoder([source], [[size]])[0]
        if isinstance(found, ImageError):
            raise found
        return over_white(found[0])

    def _encoded(self, name: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.array(name)).save(file, "PNG", compress_level=1)
        return file.getvalue()
