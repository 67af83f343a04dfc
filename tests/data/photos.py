"""Real photographs of the wheels of scikit-learn and scikit-image, and files made from one."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from qirl_fast.data.sources import ImageError

PHOTOS = {
    "sklearn.datasets": ("images/china.jpg", "images/flower.jpg"),
    "skimage": (
        *("data/rocket.jpg", "data/hubble_deep_field.jpg", "data/retina.jpg"),
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/camera.png"),
        *("data/text.png", "data/horse.png", "data/logo.png", "data/color.png"),
    ),
}


def photos() -> list[Path]:
    """JPEG in colour, PNG in colour, in grey, and with transparency (horse, logo)."""
    import skimage
    import sklearn.datasets

    roots = {"sklearn.datasets": sklearn.datasets.__file__, "skimage": skimage.__file__}
    return [Path(roots[part]).parent / name for part, names in PHOTOS.items() for name in names]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def made() -> dict[str, bytes]:
    """Name -> bytes of a photograph in every kind of file that is served."""
    with Image.open(photos()[0]) as file:
        photo = file.convert("RGB")
    clear = photo.convert("RGBA")
    clear.putalpha(photo.convert("L"))
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
    corner = photo.getpixel((0, 0))
    return {
        "plain.jpeg": encoded(photo, "JPEG", quality=90),
        "progressive.jpg": encoded(photo, "JPEG", progressive=True, quality=90),
        "gray.jpg": encoded(photo.convert("L"), "JPEG"),
        "444.JPG": encoded(photo, "JPEG", subsampling=0),
        "422.jpg": encoded(photo, "JPEG", subsampling=1),
        "odd.jpg": encoded(photo.crop((0, 0, 333, 257)), "JPEG"),
        "restarts.jpg": encoded(photo, "JPEG", restart_marker_blocks=3),
        "lossy.webp": encoded(photo, "WEBP", quality=80),
        "lossless.webp": encoded(photo, "WEBP", lossless=True, method=0),
        "palette.png": encoded(palette, "PNG"),
        "bits.png": encoded(photo.convert("1"), "PNG"),
        "gray.png": encoded(photo.convert("L"), "PNG"),
        "one.png": encoded(photo.crop((5, 5, 6, 6)), "PNG"),
        "clear.png": encoded(clear, "PNG"),
        "clear-gray.png": encoded(clear.convert("LA"), "PNG"),
        "clear-palette.png": encoded(palette, "PNG", transparency=7),
        "clear-color.png": encoded(photo, "PNG", transparency=corner),
        "clear.webp": encoded(clear, "WEBP", quality=80),
        "clear-lossless.webp": encoded(clear, "WEBP", lossless=True, method=0, exact=True),
    }


def photo_bytes(index: int) -> bytes:
    return photos()[index].read_bytes()


def expected(data: bytes) -> Image.Image:
    """The image as PIL shows it."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    alpha = image.mode in ("RGBA", "LA") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB")


def arrays(result: list[np.ndarray] | ImageError) -> list[np.ndarray]:
    assert not isinstance(result, ImageError), result
    return result
