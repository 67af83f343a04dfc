"""Image files of a training set: what is accepted, checked from the header before decoding."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000


class BadImage(ValueError):
    """An image file that cannot be judged; the message says why, without the path."""


def read_image(path: Path) -> np.ndarray:
    """Decode one still image to uint8 [h, w, 3], turned as its EXIF says, over white where it is
    transparent. Raises BadImage: missing, unreadable, truncated, animated, above MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            with Image.open(path) as image:
                _check(image)
                image.load()
                upright = ImageOps.exif_transpose(image)
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage("no such file") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image in a known format; convert it to PNG or JPEG") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(f"unreadable or truncated ({error}); write it again") from error
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, rgba)
    if upright.mode.startswith(("I", "F")):
        raise BadImage(f"mode {upright.mode}, more than 8 bits a channel; convert it to 8-bit RGB")
    return np.array(upright.convert("RGB"))


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} = {width * height:,} pixels; at most {MAX_PIXELS:,}: scale it down"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadImage(f"{frames} frames, animated; wanted one still image")
