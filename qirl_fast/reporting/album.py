"""Pictures inside a page, as small as its budget asks for.

A page asks for pictures while it is written and gets marks; when all is written, `embedded` puts
the pictures in their places, all in the first form of FORMS in which the whole page stays below
LIMIT. Nothing is enlarged and none is left out.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LIMIT = 8_000_000  # bytes of a page
SPARE = 2_000  # of them, for what is written when the form is known


@dataclass(frozen=True)
class Form:
    """How pictures are kept: no side over `side` pixels; WebP of this quality, None: lossless."""

    side: int
    quality: int | None

    def __str__(self) -> str:
        how = "without loss" if self.quality is None else f"as WebP of quality {self.quality}"
        return f"no side over {self.side} pixels, {how}"

    def encoded(self, pixels: NDArray[np.uint8]) -> str:
        """A data URI of an image uint8 [H, W, 3]."""
        picture, file = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        if self.quality is None:
            picture.save(file, "WEBP", lossless=True, quality=50, method=3)
        else:
            picture.save(file, "WEBP", quality=self.quality, method=3)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


FORMS = (
    Form(512, None),
    Form(384, 88),
    Form(320, 80),
    Form(256, 75),
    Form(192, 70),
    Form(128, 60),
    Form(96, 50),
    Form(64, 40),
    Form(32, 30),
)
MARK = re.compile("\0([0-9]+)\0")  # NUL is in no text of a page: it is no character of HTML


@dataclass
class Album:
    """The pictures of one page, each once however often it is shown."""

    images: list[NDArray[np.uint8]] = field(default_factory=list)
    _places: dict[bytes, int] = field(default_factory=dict)

    def mark(self, image: NDArray[np.uint8]) -> str:
        """What stands in a page's text for an image uint8 [H, W, 3]."""
        key = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
        if key not in self._places:
            self._places[key] = len(self.images)
            self.images.append(image)
        return f"\0{self._places[key]}\0"


def embedded(text: str, album: Album) -> tuple[str, Form]:
    """The page with its pictures, and the form they are in.

    Raises ValueError where even the smallest form, or the text alone, is too large.
    """
    uses = np.bincount([int(n) for n in MARK.findall(text)], minlength=len(album.images))
    room = LIMIT - SPARE - len(MARK.sub("", text).encode())
    for form in FORMS:
        found, total = [""] * len(album.images), 0
        for i, count in enumerate(uses.tolist()):
            found[i] = form.encoded(album.images[i]) if count else ""
            total += count * len(found[i])
            if total > room:
                break
        else:
            pieces = MARK.split(text)  # every second one is a number
            pieces[1::2] = [found[int(n)] for n in pieces[1::2]]
            return "".join(pieces), form
    raise ValueError(
        f"the page's text leaves {room} bytes of {LIMIT} for {int(uses.sum())} pictures, which is "
        "too little"
    )
