"""Decoding: what PIL and the stock pipelines see, bit for bit, by PIL and by DALI alike.

There is no tolerance: DALI's pixels are PIL's, and both are resized by the same code.
"""

from __future__ import annotations

import logging
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from photos import arrays, encoded, expected, made, photo_bytes, photos
from PIL import Image, ImageFile

from qirl_fast.data import images
from qirl_fast.data.dali import Dali
from qirl_fast.data.images import Decoder, Header, header, over_white
from qirl_fast.data.sources import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that is served."""
    folder = tmp_path_factory.mktemp("images")
    for name, data in made().items():
        (folder / name).write_bytes(data)
    for path in photos():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def sources(folder: Path) -> list[Source]:
    return [Source(path.name, path) for path in sorted(folder.iterdir())]


def test_pixels_are_those_of_pil(decoder: Decoder, folder: Path) -> None:
    files = sources(folder)
    heads = [header(source) for source in files]
    results = decoder(files, [[(head.height, head.width)] for head in heads])
    assert len(files) == 32
    for source, head, result in zip(files, heads, results, strict=True):
        wanted = np.asarray(expected(source.read()))
        (got,) = arrays(result)
        assert got.dtype == np.uint8 and got.flags.c_contiguous
        assert np.array_equal(got, wanted), source.name
        kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
        kind = kinds[source.path.suffix.lower()]
        assert head == Header(*wanted.shape[:2], wanted.shape[2] == 4, kind), source.name
    assert {s.name for s, h in zip(files, heads, strict=True) if h.alpha} == {
        *("horse.png", "logo.png", "clear.png", "clear-gray.png", "clear-palette.png"),
        *("clear-color.png", "clear.webp", "clear-lossless.webp"),
    }


def test_dali_serves_what_has_no_transparency(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparison above would compare PIL with itself."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra 'dali')")
    decoder = Decoder("dali")
    served = []
    convert = Image.Image.convert

    def spy(image: Image.Image, *args: object) -> Image.Image:
        served.extend([image] * isinstance(image, ImageFile.ImageFile))
        return convert(image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "convert", spy)
    decoder(sources(folder), [[(8, 8)]] * 32)
    assert len(served) == 8


def test_dali_goes_on_after_a_bad_file() -> None:
    """Decoder would hide it: PIL decodes what DALI refuses."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra 'dali')")
    decode = Dali("cpu", 1, 4)
    good, bad = photo_bytes(0), photo_bytes(0)[:80_000]
    wanted = np.asarray(expected(good))
    for files in ([good], [good, bad, good, good, bad, good, good], [bad], [good, good]):
        results = decode(files)
        assert [array is None for array in results] == [data is bad for data in files]
        for array in results:
            assert array is None or (array.flags.owndata and np.array_equal(array, wanted))
    with pytest.raises(ValueError, match="got device 'meta'; wanted cpu or cuda"):
        Dali("meta", 1, 4)


def test_resize_is_that_of_the_stock_pipelines(decoder: Decoder, folder: Path) -> None:
    stock = VaeImageProcessor(vae_scale_factor=16)
    sizes = [(384, 384), (96, 200), (600, 40), (33, 47)]
    files = [s for s in sources(folder) if s.name in ("china.jpg", "text.png", "logo.png")]
    for source, result in zip(files, decoder(files, [sizes] * 3), strict=True):
        image = expected(source.read())
        for size, got in zip(sizes, arrays(result), strict=True):
            assert np.array_equal(got, np.asarray(stock.resize(image, *size))), (source, size)


def test_versions_come_in_the_order_asked(decoder: Decoder, folder: Path) -> None:
    files = sources(folder)[:2] * 10  # more than a batch, files more than once
    sizes = [[(i + 1, j + 7) for j in range(i % 4)] for i in range(20)]
    results = decoder(files, sizes)
    assert [[a.shape[:2] for a in arrays(r)] for r in results] == sizes
    assert decoder([], []) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_orientation(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    photo = Image.open(photos()[0]).crop((0, 0, 60, 40))
    files = []
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(photo, kind, exif=exif)
        path = tmp_path / f"{orientation}.{kind.lower()}"
        path.write_bytes(data)
        files.append(Source(path.name, path))
        turned = orientation in (5, 6, 7, 8)
        assert (header(files[-1]).height, header(files[-1]).width) == ((60, 40), (40, 60))[
            not turned
        ]
    results = decoder(files, [[(h.height, h.width), (20, 30)] for h in map(header, files)])
    for source, result in zip(files, results, strict=True):
        image = expected(source.read())
        assert np.array_equal(arrays(result)[0], np.asarray(image))
        small = image.resize((30, 20), Image.Resampling.LANCZOS)
        assert np.array_equal(arrays(result)[1], np.asarray(small)), "turned, then resized"


def test_orientation_behind_the_pixels_of_a_png(decoder: Decoder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.open(photos()[0]).crop((0, 0, 60, 40))
    data = encoded(photo, "PNG")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "late.png").write_bytes(data[:-12] + chunk + data[-12:])
    source = Source("late.png", tmp_path / "late.png")
    assert header(source) == Header(60, 40, False, "PNG")
    (result,) = decoder([source], [[(60, 40)]])
    assert np.array_equal(arrays(result)[0], np.asarray(photo.transpose(Image.ROTATE_270)))


def test_several_pictures_in_one_jpeg(decoder: Decoder, tmp_path: Path) -> None:
    """Phones save a second picture (depth, gain map) behind the first; the first is meant."""
    photo = Image.open(photos()[0])
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((32, 32))])
    (tmp_path / "phone.jpg").write_bytes(data)
    source = Source("phone.jpg", tmp_path / "phone.jpg")
    assert header(source) == Header(427, 640, False, "JPEG")
    (result,) = decoder([source], [[(427, 640)]])
    assert np.array_equal(arrays(result)[0], np.asarray(expected(data)))


def test_members_of_a_shard(decoder: Decoder, tmp_path: Path) -> None:
    data = b"".join(photo_bytes(i) for i in (0, 5))
    (tmp_path / "s.tar").write_bytes(b"head" + data + b"tail")
    first, second = len(photo_bytes(0)), len(photo_bytes(5))
    files = [
        Source("s.tar:a.jpg", tmp_path / "s.tar", 4, first),
        Source("s.tar:b.png", tmp_path / "s.tar", 4 + first, second),
    ]
    assert [header(source).width for source in files] == [640, 512]
    for result, index in zip(decoder(files, [[(427, 640)], [(512, 512)]]), (0, 5), strict=True):
        assert np.array_equal(arrays(result)[0], np.asarray(expected(photo_bytes(index))))


def test_what_is_asked_wrongly(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("china.jpg", photos()[0])
    with pytest.raises(ValueError, match="sizes of 0 images for 1"):
        decoder([source], [])
    for size in ((0, 4), (4, 16_385)):
        with pytest.raises(ValueError, match="wanted sides of 1 to 16384"):
            decoder([source], [[size]])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is set"):
        decoder([source], [[(4, 4)]])


def test_the_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=images.__name__):
        Decoder("pil", threads=3)
    assert caplog.messages == ["images are decoded by pil on cpu, 3 threads"]
    with pytest.raises(ValueError, match="got 'turbo'; wanted 'dali' or 'pil'"):
        Decoder("turbo")
    with pytest.raises(ValueError, match="got 0 threads"):
        Decoder("pil", threads=0)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(RuntimeError, match=r"pip install 'qirl-fast\[dali\]'"):
        Decoder("dali")


def test_over_white() -> None:
    color = np.array([0, 1, 100, 200, 255], np.uint8)
    alpha = np.array([0, 1, 127, 128, 254, 255], np.uint8)
    image = np.zeros((5, 6, 4), np.uint8)
    image[..., :3] = color[:, None, None]
    image[..., 3] = alpha
    share = alpha[None, :, None] / 255.0
    wanted = np.rint(image[..., :3] * share + 255 * (1 - share))
    assert np.array_equal(over_white(image), wanted)
    assert over_white(image[..., :3]) is not None
    assert np.array_equal(over_white(image[..., :3]), image[..., :3])
    for bad in (image[..., 0], image.astype(np.float32), image[..., :2]):
        with pytest.raises(ValueError, match="wanted uint8"):
            over_white(bad)
