"""Bad images: each is named with what came, in both decoders, and the others are decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photos import arrays, encoded, made, photo_bytes, photos
from PIL import Image

from qirl_fast.data.images import Decoder, header
from qirl_fast.data.sources import ImageError, Source


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0x55 for b in data[middle : middle + 30]) + data[middle + 30 :]


def frames(kind: str) -> bytes:
    photo = Image.open(photos()[0]).resize((40, 30))
    return encoded(photo, kind, save_all=True, append_images=[photo.rotate(90)])


def wide(width: int, height: int) -> bytes:
    """A PNG's header alone says its size; the pixels are never asked for."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + b"x" * 13


def sixteen(mode: str) -> bytes:
    if mode == "I;16":
        return encoded(Image.fromarray(np.full((4, 4), 300, np.uint16)), "PNG")
    data = bytearray(wide(4, 4))
    data[24] = 16
    body = bytes(data[12:29])
    return bytes(data[:29]) + struct.pack(">I", zlib.crc32(body)) + bytes(data[33:])


AT_THE_HEADER = {
    "empty.png": (lambda: b"", "the file is empty (0 bytes)"),
    "head.jpg": (lambda: photo_bytes(0)[:60], "the JPEG header cannot be read"),
    "head.png": (lambda: photo_bytes(5)[:20], "the PNG header cannot be read"),
    "head.webp": (lambda: made()["lossy.webp"][:60], "the WEBP header cannot be read"),
    "cut.webp": (lambda: made()["lossy.webp"][:-40], "the WEBP header cannot be read"),
    "cmyk.jpg": (lambda: encoded(Image.open(photos()[0]).convert("CMYK"), "JPEG"), "got CMYK"),
    "deep.png": (lambda: sixteen("I;16"), "got 16 bits a channel (mode I;16); wanted 8"),
    "deep-color.png": (lambda: sixteen("RGB"), "got 16 bits a channel (mode RGB); wanted 8"),
    "moving.png": (lambda: frames("PNG"), "got an animation of 2 frames"),
    "moving.webp": (lambda: frames("WEBP"), "got an animation of 2 frames"),
    "wide.png": (lambda: wide(30_000, 10), "got 30000 x 10 pixels; wanted at most 16384"),
    "large.png": (lambda: wide(30_000, 30_000), "wanted at most 16384 pixels a side"),
    "many.png": (lambda: wide(9_000, 9_000), "got 9000 x 9000 pixels; wanted at most 16384"),
    "bomb.png": (lambda: wide(10_000, 10_000), "67108864 in all"),
    "real.png": (lambda: photo_bytes(0), "the content is JPEG, the name says PNG"),
    "real.jpg": (lambda: photo_bytes(5), "the content is PNG, the name says JPEG"),
    "gif.png": (lambda: encoded(Image.new("P", (4, 4)), "GIF"), "the content is GIF"),
    "page.jpg": (lambda: b"<html>404</html>", "the content is a web page or SVG"),
    "noise.jpg": (lambda: b"\x13" * 999, "the content is no known image"),
    "phone.jpg": (lambda: b"\0\0\0\x18ftypheic" * 9, "the content is heic"),
    "photo.tiff": (lambda: photo_bytes(0), "got this ending; wanted one of .jpg"),
    "photo": (lambda: photo_bytes(0), "got this ending; wanted one of .jpg"),
    "gone.jpg": (None, "cannot be read (No such file or directory)"),
}
AT_THE_PIXELS = {
    "cut.jpg": lambda: photo_bytes(0)[:-40],
    "half.jpg": lambda: photo_bytes(0)[:80_000],
    "half-progressive.jpg": lambda: made()["progressive.jpg"][:40_000],
    "cut.png": lambda: photo_bytes(5)[:-40],
    "half.png": lambda: photo_bytes(5)[:300_000],
    "half-clear.png": lambda: made()["clear.png"][:100_000],
    "flipped.png": lambda: flipped(photo_bytes(5)),
}


def put(folder: Path, name: str, make: Callable[[], bytes] | None) -> Source:
    if make is not None:
        (folder / name).write_bytes(make())
    return Source(f"set/{name}", folder / name)


@pytest.mark.filterwarnings("error")  # PIL's warning of a bomb would come before our message
@pytest.mark.parametrize("name", AT_THE_HEADER)
def test_refused_from_the_header(tmp_path: Path, name: str) -> None:
    make, part = AT_THE_HEADER[name]
    source = put(tmp_path, name, make)
    with pytest.raises(ImageError) as caught:
        header(source)
    assert str(caught.value).startswith(f"set/{name}: ") and part in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_bad_file_does_not_spoil_the_others(decoder: Decoder, tmp_path: Path) -> None:
    good = Source("china.jpg", photos()[0])
    (alone,) = decoder([good], [[(64, 64)]])
    bad = [put(tmp_path, name, make) for name, (make, _) in AT_THE_HEADER.items()]
    bad += [put(tmp_path, name, make) for name, make in AT_THE_PIXELS.items()]
    files = [source for each in bad for source in (each, good)]
    results = decoder(files, [[(64, 64)]] * len(files))
    for source, result in zip(files, results, strict=True):
        if source is good:
            assert np.array_equal(arrays(result)[0], arrays(alone)[0])
        else:
            assert isinstance(result, ImageError), source.name
            assert str(result).startswith(f"{source.name}: ")
            if source.path.name in AT_THE_PIXELS:
                assert header(source).height and "the pixels cannot be decoded" in str(result)
    assert np.array_equal(arrays(decoder([good], [[(64, 64)]])[0])[0], arrays(alone)[0])
