"""PNG images from strangers: what a file claims is checked before anything is unpacked.

Only still, opaque, plain 8-bit RGB is taken, as that is what a judge sees; anything else would have
to be changed silently. Chunks are walked as in w3.org/TR/png-3, Pillow unpacks the pixels.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = {b"IHDR", b"IDAT", b"IEND"}  # all that pixels come from; the rest is notes about them
ANIMATED = {b"acTL", b"fcTL", b"fdAT"}
MAX_PIXELS = 2**26  # of one image, the most that may be allowed; below Pillow's own alarm
WANTED = "wanted a still, plain 8-bit RGB PNG"


class BadImage(ValueError):
    """An image that is not taken; the message says what came and what is wanted."""


class TooManyPixels(BadImage):
    """An image whose header claims more pixels than are allowed."""


def check_pixels(image_HW3: object) -> None:
    """BadImage for anything but a uint8 array [H, W, 3], H and W at least 1."""
    if not isinstance(image_HW3, np.ndarray):
        raise BadImage(f"got a {type(image_HW3).__name__}; wanted a uint8 array [H, W, 3]")
    shape = image_HW3.shape
    if image_HW3.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise BadImage(f"got {image_HW3.dtype} {list(shape)}; wanted a uint8 array [H, W, 3]")


def encode(image_HW3: np.ndarray) -> bytes:
    """Lossless PNG of uint8 [H, W, 3], H and W at least 1; BadImage for anything else."""
    check_pixels(image_HW3)
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "PNG", compress_level=1)
    return file.getvalue()


def size(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a PNG whose every chunk was checked, and nothing unpacked.

    Raises TooManyPixels, and BadImage for another format, damage, animation or transparency.
    """
    return _walked(memoryview(data), max_pixels)[0]


def decode(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels, uint8 [H, W, 3]. Raises as `size` does, and BadImage where they are damaged."""
    (height, width), kept = _walked(memoryview(data), max_pixels)
    try:
        _check_length(kept, height * (1 + 3 * width))
        with Image.open(io.BytesIO(b"".join([SIGNATURE, *kept])), formats=["PNG"]) as image:
            image_HW3 = np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadImage(f"got a PNG whose pixels cannot be read ({error}); {WANTED}") from error
    if image_HW3.dtype != np.uint8 or image_HW3.shape != (height, width, 3):
        raise BadImage(f"the PNG unpacks to {image_HW3.dtype} {image_HW3.shape}; {WANTED}")
    return image_HW3


def _walked(data: memoryview, max_pixels: int) -> tuple[tuple[int, int], list[memoryview]]:
    """(height, width) and the chunks that pixels come from."""
    if data[:8] != SIGNATURE:
        raise BadImage(f"got {len(data)} bytes that begin {bytes(data[:8])!r}; {WANTED}")
    kept: list[memoryview] = []
    found: tuple[int, int] | None = None
    most = 16 + len(data) // 1024  # no writer cuts a file finer; a hostile one costs time
    start, kind, chunks = 8, b"", 0
    while start < len(data):
        kind, body, end = _chunk(data, start)
        chunks += 1
        if kind == b"IEND" and end != len(data):
            raise BadImage(f"got a PNG with {len(data) - end} bytes after its end; {WANTED}")
        if chunks > most:
            raise BadImage(f"got a PNG cut into more than {most} chunks; {WANTED}")
        if (kind == b"IHDR") != (found is None):
            raise BadImage(f"got a PNG whose chunk {chunks} is {kind!r}; {WANTED}")
        if found is None:
            found = _header(body, max_pixels)
        _refuse_strange(kind)
        if kind in KEPT:
            kept.append(data[start:end])
        start = end
    if found is None or kind != b"IEND":
        raise BadImage(f"got a PNG that ends early, after {len(data)} bytes; {WANTED}")
    return found, kept


def _check_length(kept: list[memoryview], expected: int) -> None:
    """ValueError or zlib.error unless `expected` bytes are packed: Pillow makes up missing rows."""
    unpacker = zlib.decompressobj()
    packed = b"".join(part[8:-4] for part in kept if part[4:8] == b"IDAT")
    came = len(unpacker.decompress(packed, expected + 1))
    if came != expected or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"{came} bytes are packed in it, {expected} wanted, or it is cut")


def _chunk(data: memoryview, start: int) -> tuple[bytes, memoryview, int]:
    """(kind, content, where the next one begins) of the chunk at `start`."""
    if start + 12 > len(data):
        raise BadImage(f"got a PNG that ends early, after {len(data)} bytes; {WANTED}")
    (length,) = struct.unpack_from(">I", data, start)
    end = start + 12 + length
    if end > len(data):
        raise BadImage(f"got a PNG that ends early, after {len(data)} of {end} bytes; {WANTED}")
    (expected,) = struct.unpack_from(">I", data, end - 4)
    if zlib.crc32(data[start + 4 : end - 4]) != expected:
        raise BadImage(f"got a damaged PNG: a checksum differs at byte {start}; {WANTED}")
    return bytes(data[start + 4 : start + 8]), data[start + 8 : end - 4], end


def _header(body: memoryview, max_pixels: int) -> tuple[int, int]:
    if len(body) != 13:
        raise BadImage(f"got a PNG with a header of {len(body)} bytes; {WANTED}")
    width, height, depth, color, packing, filters, interlaced = struct.unpack(">IIBBBBB", body)
    if (depth, color, packing, filters, interlaced) != (8, 2, 0, 0, 0):
        kind = f"colour type {color}, {depth} bits{', interlaced' if interlaced else ''}"
        raise BadImage(f"got a PNG of {kind}; {WANTED}")
    if not 0 < width < 2**31 or not 0 < height < 2**31:
        raise BadImage(f"got a PNG of {width} x {height}; wanted at least 1 x 1")
    if width * height > max_pixels:
        raise TooManyPixels(
            f"got a PNG of {width} x {height} = {width * height} pixels; at most {max_pixels} "
            "are allowed"
        )
    return height, width


def _refuse_strange(kind: bytes) -> None:
    if kind in ANIMATED:
        raise BadImage(f"got an animated PNG; {WANTED}: send one frame")
    if kind == b"tRNS":
        raise BadImage(f"got a PNG with a transparent colour; {WANTED}")
    critical = not kind[0] & 0x20  # the case of the first letter says who may skip the chunk
    if critical and kind not in KEPT and kind != b"PLTE":
        raise BadImage(f"got a PNG with the unknown chunk {kind!r}; {WANTED}")
