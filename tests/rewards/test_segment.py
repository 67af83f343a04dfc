"""The segmentation under both judges: where objects are, what colour, and what is background."""

import numpy as np
import pytest

from qirl_fast.rewards.segment import resample, segment
from qirl_fast.tiny import scenes
from qirl_fast.tiny.scenes import COLORS, Shape


def blobs(shapes):
    (scene,) = segment(scenes.render(shapes)[None])
    return scene.blobs


def test_place_size_and_colour_of_an_object():
    (blob,) = blobs([Shape("square", "green", 20, 40, 10)])
    side = 2 * 0.88 * 10
    assert blob.center == pytest.approx((20, 40), abs=0.5)
    assert blob.mask.shape == pytest.approx((side, side), abs=1)
    assert blob.area == blob.mask.sum() == pytest.approx(side**2, rel=0.05)
    assert blob.rgb == pytest.approx(COLORS["green"], abs=1)
    assert blob.spread < 1 and blob.purity == 1.0


def test_background_is_found_whatever_it_is():
    image = scenes.render([Shape("circle", "blue", 30, 30, 12)]).astype(int)
    (scene,) = segment(np.where(image > 200, (255, 250, 210), image).astype(np.uint8)[None])
    assert scene.background_rgb.tolist() == [255, 250, 210]
    assert len(scene.blobs) == 1
    (scene,) = segment(np.full((1, 64, 64, 3), COLORS["red"], np.uint8))
    assert scene.blobs == [] and not scene.object_HW.any()


def test_specks_are_not_objects_and_unnamed_colours_are():
    image = scenes.render([])
    image[10:13, 10:13] = 0
    assert next(segment(image[None])).blobs == []
    image[30:40, 30:40] = 90
    (blob,) = next(segment(image[None])).blobs
    assert blob.rgb == pytest.approx((90, 90, 90)) and blob.area == 100


def test_touching_objects_come_apart():
    two_colors = [Shape("square", "red", 22, 32, 12), Shape("square", "blue", 42, 32, 12)]
    x = sorted(b.center[0] for b in blobs(two_colors))
    assert x == pytest.approx([21, 42], abs=1)
    corners = [Shape("square", "red", 22, 22, 11), Shape("square", "red", 41, 41, 11)]
    assert len(blobs(corners)) == 2
    # A side of 19.4 pixels covers 19 to 21 of them by 45 %: up to 0.11 more area in all.
    assert sum(b.area for b in blobs(corners)) == pytest.approx(2 * (2 * 0.88 * 11) ** 2, rel=0.11)


def test_images_of_a_batch_do_not_touch_each_other():
    full = scenes.render([Shape("circle", "red", 32, 32, 14)])
    counts = [len(s.blobs) for s in segment(np.stack([full, full, scenes.render([]), full]))]
    assert counts == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("size", "longest"),
    [(16, 64), (32, 64), (63, 126), (64, 64), (128, 128), (129, 65), (512, 128)],
)
def test_resample_keeps_the_mean_and_brings_the_side_into_range(size, longest):
    image = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    out = resample(image, 64, 128)
    assert out.dtype == (np.uint8 if size in (64, 128) else np.float32)
    assert out.shape == (2, longest, longest, 3)
    # Repeating an edge to fill the last block weighs it more: 1 / 65 of a 50-level edge mean error.
    assert out.mean() == pytest.approx(image.mean(), abs=1.0)


def test_doubling_is_linear_inside():
    row = np.arange(32, dtype=np.uint8)[:, None] * 4
    image = np.broadcast_to(row, (1, 32, 32, 3))
    assert np.allclose(np.diff(resample(image, 64, 128)[0, 5, 1:-1, 0]), 2.0)
    turned = resample(image.transpose(0, 2, 1, 3), 64, 128)
    assert np.array_equal(turned, resample(image, 64, 128).transpose(0, 2, 1, 3))
