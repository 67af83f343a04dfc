"""Monitors on images whose blur and grid are known, on a photograph and on the tiny world."""

import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from qirl_fast.rewards.monitors import PERIODS, grid_artefacts, sharpness
from qirl_fast.tiny import scenes

PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
BOTH = pytest.mark.parametrize("monitor", [sharpness, grid_artefacts])


def one(monitor, image):
    """The score of one image [H, W, 3] or [H, W]."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return float(monitor(np.clip(np.rint(image), 0, 255).astype(np.uint8)[None], [{}])[0])


@pytest.fixture(scope="module")
def photo():
    """A photograph [256, 256, 3] in float64, far enough from 0 and 255 to add to.

    Halved, so that the grid of 8 pixels that JPEG has left in the file is none of the periods.
    """
    image = Image.open(PHOTO).convert("RGB").crop((0, 40, 512, 552)).resize((256, 256), Image.BOX)
    return 40.0 + 0.6 * np.asarray(image, np.float64)


def grid(side, period, offset=3):
    """Lines of one level, every `period` pixels both ways [side, side, 1]."""
    lines = np.zeros((side, side, 1))
    lines[offset::period] = lines[:, offset::period] = 1.0
    return lines


def test_sharpness_of_known_images():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:128, 0:128]
    assert one(sharpness, np.full((128, 128), 77.0)) == 0.0
    assert one(sharpness, 2.0 * x) < 1e-3
    assert one(sharpness, rng.integers(0, 256, (128, 128))) == pytest.approx(1.0, abs=0.05)
    assert one(sharpness, 255.0 * ((x + y) % 2)) == pytest.approx(3.2, abs=0.01)
    # a plane wave of w rad a pixel is scaled by 2 - 2 cos w; the noise term is 1 level^2
    w = 2 * np.pi / 8
    wave = 120.0 + 100.0 * np.cos(w * x)
    want = (2 - 2 * np.cos(w)) ** 2 * 5000 / (20 * 5001)
    assert one(sharpness, wave) == pytest.approx(want, rel=0.03)


def test_an_almost_flat_image_is_not_sharp():
    noise = np.random.default_rng(0).integers(100, 102, (64, 64))
    assert one(sharpness, noise) < 0.25


def test_sharpness_falls_with_blur_and_not_with_contrast(photo):
    scores = [
        one(sharpness, gaussian_filter(photo, (s, s, 0)) if s else photo) for s in (0, 0.5, 1, 2, 4)
    ]
    assert all(a > 1.5 * b for a, b in itertools.pairwise(scores)), scores
    assert one(sharpness, 100 + 0.5 * photo) == pytest.approx(scores[0], rel=0.05)


@pytest.mark.parametrize("period", PERIODS)
def test_the_grid_monitor_rises_with_the_grid(photo, period):
    scores = [one(grid_artefacts, photo + a * grid(256, period)) for a in (0, 4, 8, 16, 32)]
    assert scores[0] < 0.02
    assert all(b > 1.2 * a + 0.005 for a, b in itertools.pairwise(scores)), scores


def test_steps_between_patches_count_too(photo):
    rng = np.random.default_rng(1)
    steps = np.kron(rng.normal(size=(16, 16)), np.ones((16, 16)))[..., None]
    scores = [one(grid_artefacts, photo + a * steps) for a in (0, 4, 8, 16)]
    assert all(b > 1.2 * a + 0.01 for a, b in itertools.pairwise(scores)), scores


def test_a_grid_alone_has_the_stated_strength():
    teeth = np.tile(100.0 * ((np.arange(256) // 32) % 2), (256, 1))
    profile_mean = 100.0 * 7 / 255
    want = 100.0 * np.sqrt(31) / 32 / (profile_mean + 1.0)
    assert one(grid_artefacts, teeth) == pytest.approx(want, rel=0.01)
    assert one(grid_artefacts, teeth.T) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("period", [5, 7, 9, 11, 13, 17, 20])
def test_other_periods_and_plain_texture_are_no_grid(photo, period):
    assert one(grid_artefacts, photo + 16 * grid(256, period)) < 0.05
    assert one(grid_artefacts, np.random.default_rng(0).integers(0, 256, (256, 256))) < 0.02


def test_a_single_edge_is_no_grid():
    image = np.full((128, 128), 60.0)
    image[:, 64:] = 200.0
    image[40:] += 30.0
    assert one(grid_artefacts, image) == 0.0


def test_jpeg_blocks_are_found(photo):
    def compressed(quality):
        file = io.BytesIO()
        Image.fromarray(photo.astype(np.uint8)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    fine, coarse = one(grid_artefacts, compressed(95)), one(grid_artefacts, compressed(10))
    assert fine < 0.05 < 0.2 < coarse


@BOTH
def test_brightness_does_not_matter(photo, monitor):
    image = np.rint(photo + 8 * grid(256, 16))
    assert one(monitor, image + 30) == pytest.approx(one(monitor, image), rel=1e-6)


@BOTH
def test_a_row_does_not_depend_on_its_batch(photo, monitor):
    rng = np.random.default_rng(0)
    images = np.stack([photo.astype(np.uint8), rng.integers(0, 256, (256, 256, 3), np.uint8)])
    batch = monitor(images, [{}, {}])
    assert batch.dtype == np.float32 and batch.shape == (2,)
    for image, score in zip(images, batch, strict=True):
        assert monitor(image[None], [{"prompt": "x"}])[0] == score
    assert monitor(images[:0], []).shape == (0,)


@BOTH
def test_images_need_not_be_square_or_contiguous(photo, monitor):
    wide = photo[:97, :211].astype(np.uint8)
    assert monitor(wide[None], [{}]) == monitor(np.ascontiguousarray(wide)[None], [{}])


def test_the_tiny_world_is_sharp_and_has_no_grid():
    rng = np.random.default_rng(0)
    rows = [scenes.all_rows()[i] for i in rng.choice(len(scenes.all_rows()), 48)]
    images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in rows])
    blurred = np.rint(gaussian_filter(images.astype(float), (0, 1, 1, 0))).astype(np.uint8)
    assert (sharpness(images, rows) > 5 * sharpness(blurred, rows)).all()
    stained = np.clip(images + 20 * grid(64, 16), 0, 255).astype(np.uint8)
    clean, dirty = grid_artefacts(images, rows), grid_artefacts(stained, rows)
    assert clean.mean() < 0.05 and dirty.mean() > 10 * clean.mean()


@BOTH
@pytest.mark.parametrize(
    ("images", "rows", "words"),
    [
        (np.zeros((1, 64, 64, 3)), [{}], "wanted a numpy uint8 array"),
        (np.zeros((1, 64, 64), np.uint8), [{}], r"\[B, H, W, 3\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), [{}], "2 images came with 1"),
        (np.zeros((1, 8, 64, 3), np.uint8), [{}], "at least 16 pixels"),
    ],
)
def test_bad_images(monitor, images, rows, words):
    with pytest.raises(ValueError, match=words):
        monitor(images, rows)


def test_an_image_too_small_for_any_period_is_refused():
    with pytest.raises(ValueError, match="24 x 64; the grid monitor wants at least 33 pixels"):
        grid_artefacts(np.zeros((1, 24, 64, 3), np.uint8), [{}])
    assert grid_artefacts(np.zeros((1, 33, 33, 3), np.uint8), [{}]) == 0.0
