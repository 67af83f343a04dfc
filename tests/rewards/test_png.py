"""Images from strangers: lossless both ways, and nothing is unpacked that was not checked."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qirl_fast.rewards import png

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width=7, height=5, depth=8, color=2, packing=0, filters=0, interlaced=0) -> bytes:
    fields = (width, height, depth, color, packing, filters, interlaced)
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def made(*chunks: bytes) -> bytes:
    return png.SIGNATURE + b"".join(chunks)


PIXELS = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in IMAGE)))
END = chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (64, 64, 3), (3, 1024, 3)])
def test_pixels_come_back_bit_for_bit(shape):
    image = RNG.integers(0, 256, shape, np.uint8)
    data = png.encode(image)
    np.testing.assert_array_equal(png.decode(data), image)
    assert png.size(data) == shape[:2]


def test_a_view_and_a_transposed_image_come_back():
    for image in (IMAGE[::-1, ::2], IMAGE.transpose(1, 0, 2)):
        np.testing.assert_array_equal(png.decode(png.encode(image)), image)


def test_the_file_is_one_that_others_read():
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.encode(IMAGE)))), IMAGE)


def test_files_of_others_are_read():
    notes = chunk(b"tEXt", b"Comment\0hello")
    np.testing.assert_array_equal(png.decode(made(header(), notes, PIXELS, END)), IMAGE)
    np.testing.assert_array_equal(png.decode(saved(Image.fromarray(IMAGE), "PNG")), IMAGE)


@pytest.mark.parametrize(
    "image",
    [
        IMAGE.astype(np.float32),
        IMAGE[..., 0],
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        IMAGE.tolist(),
        None,
    ],
)
def test_what_is_no_image_is_not_encoded(image):
    with pytest.raises(png.BadImage, match=r"wanted a uint8 array \[H, W, 3\]"):
        png.encode(image)


SOLID = Image.fromarray(IMAGE)
REFUSED = {
    "nothing": (b"", "begin b''"),
    "a JPEG": (saved(SOLID, "JPEG"), "begin"),
    "a GIF": (saved(SOLID, "GIF"), "GIF89a|GIF87a"),
    "grey": (saved(SOLID.convert("L"), "PNG"), "colour type 0"),
    "alpha": (saved(SOLID.convert("RGBA"), "PNG"), "colour type 6"),
    "a palette": (saved(SOLID.convert("P"), "PNG"), "colour type 3"),
    "16 bits": (made(header(depth=16), PIXELS, END), "16 bits"),
    "interlaced": (made(header(interlaced=1), PIXELS, END), "interlaced"),
    "animated": (saved(SOLID, "PNG", save_all=True, append_images=[SOLID, SOLID]), "animated"),
    "transparent": (made(header(), chunk(b"tRNS", b"\0" * 6), PIXELS, END), "transparent"),
    "empty": (made(header(width=0), PIXELS, END), "0 x 5"),
    "cut": (made(header(), PIXELS, END)[:-5], "ends early"),
    "no end": (made(header(), PIXELS), "ends early"),
    "more after the end": (made(header(), PIXELS, END) + b"x", "after its end"),
    "no header": (made(PIXELS, END), "chunk 1 is"),
    "two headers": (made(header(), header(), PIXELS, END), "chunk 2 is"),
    "short header": (made(chunk(b"IHDR", b"\0" * 4), END), "header of 4 bytes"),
    "unknown": (made(header(), chunk(b"QIRL", b""), PIXELS, END), "unknown chunk b'QIRL'"),
    "a wrong checksum": (made(header(), PIXELS[:-1] + b"\0", END), "checksum"),
    "crumbs": (made(header(), *[chunk(b"IDAT", b"")] * 40, PIXELS, END), "more than"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_refused_before_they_are_unpacked(what, monkeypatch):
    data, text = REFUSED[what]
    monkeypatch.setattr(Image, "open", None)
    for function in (png.size, png.decode):
        with pytest.raises(png.BadImage, match=text) as caught:
            function(data)
        assert "wanted" in str(caught.value)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    bomb = made(header(30000, 30000), chunk(b"IDAT", zlib.compress(bytes(10**6))), END)
    with pytest.raises(png.TooManyPixels, match="30000 x 30000 = 900000000 pixels; at most 1000"):
        png.decode(bomb, 1000)
    with pytest.raises(png.TooManyPixels):
        png.decode(bomb)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        zlib.compress(b"\0" * 22),  # one row of five
        zlib.compress(b"\0" * 110 + b"x"),  # more than five rows
        zlib.compress(b"\7" * 110),  # no such filter
        PIXELS[8:-4] + b"x",  # something after the pixels
        PIXELS[8:-34],  # its last rows are missing
    ],
)
def test_damaged_pixels_are_a_bad_image(body):
    with pytest.raises(png.BadImage, match="cannot be read"):
        png.decode(made(header(), chunk(b"IDAT", body), END))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_whatever_the_pixels_are_only_bad_image_is_raised(body, packed):
    data = made(header(), chunk(b"IDAT", zlib.compress(body) if packed else body), END)
    with contextlib.suppress(png.BadImage):
        assert png.decode(data).shape == (5, 7, 3)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_is_changed_in_a_file_only_bad_image_is_raised(data):
    file = bytearray(made(header(), PIXELS, END))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(png.BadImage):
        np.testing.assert_array_equal(png.decode(bytes(file)), IMAGE)  # a byte onto itself
