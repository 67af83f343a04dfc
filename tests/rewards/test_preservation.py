"""SSIM and PSNR outside the edited region: against scikit-image, by hand, and what is refused."""

import logging
import re

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, SOURCES
from qirl_fast.rewards.preservation import Judge, Settings, edited, psnr, ssim

ALL = np.ones((96, 80), bool)
LEFT = {"region": [[0.0, 0.0, 0.5, 1.0]]}


def photo(seed=0, height=96, width=80):
    """Smooth random colours, as a photograph has them: uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).normal(0, 400, (height, width, 3))
    return (128 + gaussian_filter(noise, (3, 3, 0))).clip(0, 255).astype(np.uint8)


def noisy(image, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def judge(**settings):
    return Judge(Settings(kind="preservation", **settings))


def score(result, source, row=LEFT, **settings):
    found = judge(**settings)(result[None], [{"prompt": "", SOURCES: [source], **row}])
    assert found.status.tolist() == [SCORED] and found.values.dtype == np.float32
    return float(found.values[0])


@pytest.mark.parametrize("sigma", [1.0, 8.0, 60.0])
def test_both_are_scikit_images(sigma):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = photo(), noisy(photo(), sigma)
    theirs = metrics.structural_similarity(
        a,
        b,
        gaussian_weights=True,
        use_sample_covariance=False,
        sigma=1.5,
        data_range=255,
        channel_axis=2,
    )
    # float64 sums of about 120 terms up to 255^2 in another order, against C2 = 58.5
    assert ssim(a, b, ALL) == pytest.approx(theirs, abs=1e-10)
    assert psnr(a, b, ALL) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255))


def test_ssim_by_its_definition_over_the_windows_outside():
    """Window by window, in plain loops, only those that hold no edited pixel."""
    a, b = photo(2, 32, 40), noisy(photo(2, 32, 40), 12)
    kept = ~edited({"region": [[0.5, 0.4, 0.6, 0.5]]}, 32, 40)
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(g, g)[..., None] / g.sum() ** 2
    found = []
    for top in range(22):
        for left in range(30):
            box = (slice(top, top + 11), slice(left, left + 11))
            if kept[box].all():
                x, y = a[box].astype(float), b[box].astype(float)
                mx, my = (w * x).sum((0, 1)), (w * y).sum((0, 1))
                vx, vy = (w * (x - mx) ** 2).sum((0, 1)), (w * (y - my) ** 2).sum((0, 1))
                cov = (w * (x - mx) * (y - my)).sum((0, 1))
                found.append(
                    (2 * mx * my + 2.55**2)
                    * (2 * cov + 7.65**2)
                    / ((mx**2 + my**2 + 2.55**2) * (vx + vy + 7.65**2))
                )
    assert 0 < len(found) < 22 * 30
    assert ssim(a, b, kept) == pytest.approx(np.mean(found), abs=1e-10)


def test_known_values():
    flat = np.full((96, 80, 3), 100, np.uint8)
    brighter = flat + 10
    # flat pictures: only the luminance term is left, and MSE is 100
    want_ssim = (2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025)
    want_psnr = 10 * np.log10(255**2 / 100)
    assert ssim(flat, brighter, ALL) == pytest.approx(want_ssim)
    assert psnr(flat, brighter, ALL) == pytest.approx(want_psnr)
    assert score(brighter, flat) == pytest.approx(0.5 * want_ssim + 0.5 * want_psnr / 40)
    assert score(brighter, flat, ssim_weight=0.2, psnr_db=50.0) == pytest.approx(
        0.2 * want_ssim + 0.8 * want_psnr / 50
    )
    assert score(flat, flat) == 1.0


def test_what_happens_inside_the_region_does_not_count():
    source = photo()
    result = source.copy()
    result[:, :40] = 255 - result[:, :40]
    assert score(result, source) == 1.0
    result[50, 40] ^= 128  # one pixel beside it
    assert 0.9 < score(result, source) < 1.0
    assert score(result, source, {"region": []}) < 0.6, "nothing was to be edited"


def test_more_damage_scores_lower_and_inverted_pictures_not_below_zero():
    source = photo()
    values = [score(noisy(source, s), source) for s in (0, 5, 12, 32, 128)]
    assert (np.diff(values) < -0.05).all(), values
    chequers = np.indices((96, 80)).sum(0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255
    assert ssim(chequers, 255 - chequers, ALL) < -0.9
    assert score(255 - chequers, chequers) == 0.0


def test_a_row_scores_alone_as_in_a_batch():
    images = np.stack([photo(0), noisy(photo(1), 9), photo(2)])
    rows = [{SOURCES: [photo(i)], **LEFT} for i in range(3)]
    together = judge()(images, rows).values
    assert together[1] == judge()(images[1:2], rows[1:2]).values[0]
    assert together[0] == together[2] == 1.0


def test_the_last_condition_image_is_the_edited_one():
    row = {SOURCES: [photo(5, 40, 30), photo(1)], **LEFT}
    assert judge()(photo(1)[None], [row]).values[0] == 1.0


def test_boxes_cover_the_pixels_they_touch():
    found = edited({"region": [[0.25, 0.5, 0.5, 1.0], [0.0, 0.0, 0.01, 0.01]]}, 6, 10)
    want = np.zeros((6, 10), bool)
    want[3:, 2:5] = True
    want[0, 0] = True
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(edited({"region": [[0, 0, 1, 1]]}, 6, 10), np.ones((6, 10)))


def test_masks_are_cocos_run_lengths_and_fit_any_size():
    # 3 high, 4 wide, column by column: 4 out, 2 in (column 1, rows 1 and 2), 6 out
    mask = {"size": [3, 4], "counts": [4, 2, 6]}
    want = np.zeros((3, 4), bool)
    want[1:, 1] = True
    np.testing.assert_array_equal(edited({"mask": mask}, 3, 4), want)
    np.testing.assert_array_equal(
        edited({"mask": mask}, 6, 8), want.repeat(2, axis=0).repeat(2, axis=1)
    )
    # smaller: a pixel that covers any edited one is edited
    np.testing.assert_array_equal(edited({"mask": mask}, 1, 2), [[True, False]])
    np.testing.assert_array_equal(edited({"mask": mask}, 2, 3), [[True, True, False]] * 2)
    both = edited({"mask": mask, "region": [[0.75, 0.0, 1.0, 0.1]]}, 3, 4)
    np.testing.assert_array_equal(both, want | (np.arange(12).reshape(3, 4) == 3))
    first = {"size": [1, 2], "counts": [0, 1, 1]}
    np.testing.assert_array_equal(edited({"mask": first}, 1, 2), [[True, False]])


def test_rows_with_nothing_to_judge_are_missing_and_told_once(caplog):
    image, caplog.handler.level = photo(), logging.WARNING
    rows = [
        {"prompt": "text to image", **LEFT},
        {SOURCES: [], **LEFT},
        {SOURCES: [image]},
        {SOURCES: [image], "region": [[0, 0, 1, 0.95]]},
        {SOURCES: [image], **LEFT},
    ]
    strict = judge()
    for _ in range(2):
        found = strict(np.stack([image] * 5), rows)
        assert found.status.tolist() == [MISSING] * 4 + [SCORED] and not found.reasons
    told = [record.message for record in caplog.records]
    assert len(told) == 3 and all("missing (nothing to judge)" in text for text in told)
    assert strict.warnings == []


def test_whole_compares_rows_without_a_region_everywhere():
    whole = judge(without_region="whole")
    assert "paid for doing nothing" in whole.warnings[0]
    source, result = photo(), noisy(photo(), 8)
    found = whole(result[None], [{SOURCES: [source]}])
    want = 0.5 * ssim(source, result, ALL) + 0.5 * psnr(source, result, ALL) / 40
    assert found.values[0] == pytest.approx(want) and found.status[0] == SCORED
    whole.check_row({SOURCES: [source]})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"region": [[0, 0, 300, 200]]}, "fractions, not pixels"),
        ({"region": [[0.5, 0, 0.5, 1]]}, "wanted boxes"),
        ({"region": [0, 0, 1, 1]}, "wanted boxes"),
        ({"region": [[0, 0, 1]]}, "wanted boxes"),
        ({"region": "all"}, "wanted boxes"),
        ({"region": 3}, "wanted boxes"),
        ({"region": [[0, 0, float("nan"), 1]]}, "wanted boxes"),
        ({"mask": "mask.png"}, "wanted {"),
        ({"mask": {"size": [2, 2]}}, "wanted {"),
        ({"mask": {"size": [2, 2], "counts": "abc"}}, "wanted {"),
        ({"mask": {"size": [2, 2], "counts": [5, -1]}}, "wanted {"),
        ({"mask": {"size": [2, 2], "counts": [1.0, 3.0]}}, "wanted {"),
        ({"mask": {"size": [2, 2], "counts": [1, 1]}}, "2 x 2 has 2 pixels"),
        ({"mask": {"size": [0, 2], "counts": []}}, "0 x 2"),
    ],
)
def test_bad_regions_fail_their_row_alone(row, words):
    bad = {SOURCES: [photo()], **row}
    with pytest.raises(ValueError, match=re.escape(words)):
        judge().check_row(bad)
    found = judge()(np.stack([photo()] * 2), [bad, {SOURCES: [photo()], **LEFT}])
    assert found.status.tolist() == [FAILED, SCORED]
    assert words in found.reasons[0]


def test_rows_are_refused_before_a_run():
    with pytest.raises(ValueError, match="no condition image in the row"):
        judge().check_row(LEFT)
    with pytest.raises(ValueError, match="names no edited region"):
        judge().check_row({SOURCES: [photo()]})
    judge().check_row({SOURCES: [photo()], **LEFT})


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([photo(0, 96, 64)], "the source is [96, 64, 3] and the result [96, 80, 3]"),
        ([photo().astype(float)], "got an image float64"),
        (photo(), "wanted a list of images"),
    ],
)
def test_bad_sources_fail(sources, words):
    found = judge()(photo()[None], [{SOURCES: sources, **LEFT}])
    assert found.status.tolist() == [FAILED] and words in found.reasons[0]


def test_bad_calls_and_settings():
    with pytest.raises(ValueError, match="wanted a numpy uint8 array"):
        judge()(photo()[None].astype(np.float32), [{}])
    assert judge()(np.zeros((0, 96, 80, 3), np.uint8), []).values.shape == (0,)
    for bad in ({"ssim_weight": 1.5}, {"psnr_db": 0.0}, {"without_region": "skip"}):
        with pytest.raises(ValidationError):
            judge(**bad)
    assert all(field.description for field in Settings.model_fields.values())
