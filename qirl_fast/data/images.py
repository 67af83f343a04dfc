"""Condition images: what a file's header says, its pixels, and its versions at the sizes wanted.

JPEG, PNG and WebP of 8 bits a channel, as they are shown: EXIF (or XMP) orientation is applied, a
palette or grey becomes RGB, transparency a fourth channel; colour profiles are not applied, as
in the stock pipelines. DALI and PIL give the same pixels, bit for bit, on the CPU. Both are resized
by PIL, with the Lanczos filter of diffusers' VaeImageProcessor (an alpha channel is premultiplied
meanwhile): DALI's own differs by up to 20 of 255 at edges, as it does not clip between its two
passes, and was no faster.

What is refused, each with an ImageError that names the file: another format than the name says,
no whole header, CMYK, 16 bits, animation, sides over MAX_SIDE, more than MAX_PIXELS pixels (both
read from the header, so nothing large is decoded), and pixels that end early.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from qirl_fast.data.dali import Dali
from qirl_fast.data.sources import ImageError, Source

MAX_SIDE = 16_384
MAX_PIXELS = 1 << 26  # 67 million: 200 MB decoded; the largest of most cameras has 50
BATCH = 16  # images decoded together: bounds the memory of a call
EXPECTED = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
MODES = ("1", "L", "P", "LA", "RGB", "RGBA")
ORIENTATION = 0x0112
# What shows an image of EXIF orientation 2 to 8 upright; 1 and other numbers: it is.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "a Photoshop file",
    b"<": "a web page or SVG",
}

log = logging.getLogger(__name__)

Size = tuple[int, int]  # height, width
Versions = list[np.ndarray]


@dataclass(frozen=True)
class Header:
    """height, width: in pixels, as shown. alpha: some pixel may be transparent."""

    height: int
    width: int
    alpha: bool
    format: str


def header(source: Source) -> Header:
    """What the file says of itself, without decoding it; ImageError: see the top of this file."""
    with source.open() as file:
        return _opened(source, file).header


@dataclass
class _Opened:
    header: Header
    image: Image.Image  # not loaded yet
    turn: Image.Transpose | None
    data: bytes = b""


def _opened(source: Source, file: BinaryIO) -> _Opened:
    wanted = EXPECTED.get(os.path.splitext(source.name)[1].lower())
    if wanted is None:
        raise ImageError(f"{source.name}: got this ending; wanted one of {', '.join(EXPECTED)}")
    found = _format(file.read(16))
    if found != wanted:
        raise ImageError(
            f"{source.name}: the content is {found}, the name says {wanted}; rename or convert it"
        )
    file.seek(0)
    try:
        image = Image.open(file, formats=(wanted,))
        turn = UPRIGHT.get(_orientation(image, file))
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{source.name}: {error}; wanted at most {_limit()}") from error
    except Exception as error:  # PIL raises whatever its parsers run into
        raise ImageError(
            f"{source.name}: the {wanted} header cannot be read ({error}); the file is cut off, "
            "damaged or of a rare kind: save it anew"
        ) from error
    problem = _problem(image, file, frames)
    if problem:
        raise ImageError(f"{source.name}: {problem}")
    height, width = image.height, image.width
    if turn in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8]):
        height, width = width, height
    alpha = image.mode in ("LA", "RGBA") or "transparency" in image.info
    return _Opened(Header(height, width, alpha, wanted), image, turn)


def _limit() -> str:
    return f"{MAX_SIDE} pixels a side and {MAX_PIXELS} in all: make it smaller"


def _problem(image: Image.Image, file: BinaryIO, frames: int) -> str:
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        return f"got {image.width} x {image.height} pixels; wanted at most {_limit()}"
    if image.mode == "CMYK":
        return "got CMYK colours; wanted RGB: convert it with its colour profile"
    file.seek(24)  # a PNG's bits a channel
    if image.mode not in MODES or (image.format == "PNG" and file.read(1) == b"\x10"):
        return f"got 16 bits a channel (mode {image.mode}); wanted 8: convert it"
    if frames > 1:
        return f"got an animation of {frames} frames; wanted one picture: save the frame meant"
    return ""


def _format(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return f"{head[8:12].decode('latin-1')} (HEIC, AVIF or a video)"
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "no known image")


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation, 1 where there is none."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        image.info["exif"] = _late_exif(file)  # else PIL would decode the image to look for it
    value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _late_exif(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG, which may lie behind the pixels; b"": none."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return b""
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return file.read(length)
        at += 12 + length


class Decoder:
    """Decodes with backend "pil" or "dali", on `threads` threads.

    device: "cpu"; with "cuda" DALI decodes JPEG on the GPU, where pixels differ a little. Images
    with transparency are left to PIL, as DALI fails on grey with alpha and on some palettes.
    RuntimeError: DALI is asked for and missing. ValueError: unknown backend, less than one thread.
    """

    def __init__(self, backend: str, *, device: str = "cpu", threads: int = 2) -> None:
        if backend not in ("pil", "dali"):
            raise ValueError(f"decoder: got {backend!r}; wanted 'dali' or 'pil'")
        if threads < 1:
            raise ValueError(f"decoder: got {threads} threads; wanted 1 or more")
        self.backend = backend
        self._dali = Dali(device, threads, BATCH) if backend == "dali" else None
        self._pool = ThreadPoolExecutor(threads, "decode")
        where = device if backend == "dali" else "cpu"
        log.info("images are decoded by %s on %s, %d threads", backend, where, threads)

    def __call__(
        self, sources: Sequence[Source], sizes: Sequence[Sequence[Size]]
    ) -> list[Versions | ImageError]:
        """Of each source one array for each (height, width) asked of it.

        uint8 [h, w, 4] where the file has transparency, else [h, w, 3]; the image's own size
        gives the decoded pixels untouched. A file that cannot be used has an ImageError in its
        place and leaves the others as they are. ValueError: sizes that do not fit the sources.
        """
        if len(sources) != len(sizes):
            raise ValueError(f"got sizes of {len(sizes)} images for {len(sources)}")
        if any(not 1 <= side <= MAX_SIDE for each in sizes for size in each for side in size):
            raise ValueError(f"got sizes {list(sizes)}; wanted sides of 1 to {MAX_SIDE} pixels")
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise RuntimeError(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which fills what is missing of an "
                "image with grey; set it to False"
            )
        results: list[Versions | ImageError] = []
        for start in range(0, len(sources), BATCH):
            part = slice(start, start + BATCH)
            opened = list(self._pool.map(_read, sources[part]))
            pixels = self._decoded(opened)
            results += self._pool.map(_versions, sources[part], opened, pixels, sizes[part])
        return results

    def _decoded(self, opened: Sequence[_Opened | ImageError]) -> list[np.ndarray | None]:
        """DALI's arrays, as stored; None where PIL is to decode, which also explains failures."""
        pixels: list[np.ndarray | None] = [None] * len(opened)
        if self._dali is not None:
            serve = {
                i: each.data
                for i, each in enumerate(opened)
                if not isinstance(each, ImageError) and not each.header.alpha
            }
            for i, array in zip(serve, self._dali(list(serve.values())), strict=True):
                pixels[i] = array
        return pixels


def _read(source: Source) -> _Opened | ImageError:
    try:
        data = source.read()
        opened = _opened(source, io.BytesIO(data))
    except ImageError as error:
        return error
    opened.data = data
    return opened


def _versions(
    source: Source, opened: _Opened | ImageError, pixels: np.ndarray | None, sizes: Sequence[Size]
) -> Versions | ImageError:
    if isinstance(opened, ImageError):
        return opened
    stored = (opened.image.height, opened.image.width)
    if pixels is None or pixels.shape[:2] != stored:
        try:
            image = opened.image.convert("RGBA" if opened.header.alpha else "RGB")
        except Exception as error:  # as above
            return ImageError(
                f"{source.name}: the pixels cannot be decoded ({error}); the file is cut off or "
                "damaged: copy it again, or take the row out"
            )
    elif opened.turn is None and all(tuple(size) == stored for size in sizes):
        return [pixels for _ in sizes]
    else:
        image = Image.fromarray(pixels)
    if opened.turn is not None:
        image = image.transpose(opened.turn)
    return [
        np.array(image if image.size == (w, h) else image.resize((w, h), Image.Resampling.LANCZOS))
        for h, w in sizes
    ]


def over_white(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of uint8 [h, w, 4 or 3]: x a + 255 (1 - a), rounded to nearest."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"got {list(image.shape)}, {image.dtype}; wanted uint8 [h, w, 3 or 4]")
    if image.shape[2] == 3:
        return image
    color, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
