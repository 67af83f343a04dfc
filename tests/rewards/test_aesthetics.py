"""Clean renderings score near 1; every kind of damage costs, and more of it costs more."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qirl_fast.rewards import aesthetics
from qirl_fast.tiny import scenes
from qirl_fast.tiny.scenes import Shape


def clean(n, seed, size=64):
    rng = np.random.default_rng(seed)
    rows = scenes.all_rows()
    picked = [rows[rng.integers(len(rows))] for _ in range(n)]
    return np.stack([scenes.render(scenes.sample_scene(row, rng), size) for row in picked])


def score(images):
    return aesthetics.score(images, [{}] * len(images))


def as_bytes(x):
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def noise(images, sigma):
    return as_bytes(images + np.random.default_rng(0).normal(0, sigma, images.shape))


def blur(images, sigma):
    return gaussian_filter(images, (0, sigma, sigma, 0)) if sigma else images


def blotches(images, levels):
    """A smooth stain over the whole image, `levels` in standard deviation."""
    shape = images.shape[:3]
    field = gaussian_filter(np.random.default_rng(0).normal(size=shape), (0, 5, 5))
    return as_bytes(images + levels * (field / field.std())[..., None])


def specks(images, n):
    rng = np.random.default_rng(0)
    images = images.copy()
    for image in images:
        for _ in range(n):
            y, x = rng.integers(0, image.shape[0] - 2, 2)
            image[y : y + 2, x : x + 2] = rng.integers(0, 256, 3)
    return images


def ragged(images, pixels):
    """Every row of pixels shifted sideways by up to `pixels`."""
    shift = np.random.default_rng(0).integers(-pixels, pixels + 1, images.shape[:2])
    columns = (np.arange(images.shape[2]) - shift[..., None]) % images.shape[2]
    return np.take_along_axis(images, columns[..., None], axis=2)


SEVERITIES = {
    noise: (0, 2, 4, 8, 16, 32),
    blur: (0, 0.5, 1.0, 1.5, 2.0, 3.0),
    blotches: (0, 3, 6, 12, 24, 48),
    specks: (0, 2, 4, 8, 16, 32),
    ragged: (0, 1, 2, 3, 4),
}


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_rendered_scenes_are_near_one(size):
    score_B = score(clean(100 if size < 128 else 20, size, size))
    assert score_B.dtype == np.float32
    assert score_B.min() >= 0.95 and score_B.max() <= 1.0


@pytest.mark.parametrize("damage", SEVERITIES, ids=lambda f: f.__name__)
def test_more_damage_scores_less(damage):
    images = clean(40, 1)
    means = [score(damage(images, amount)).mean() for amount in SEVERITIES[damage]]
    assert (np.diff(means) < -0.02).all()
    assert means[-1] < 0.6


def test_uniform_noise_is_worst():
    rng = np.random.default_rng(2)
    assert score(rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)).max() < 0.05


def test_a_blank_image_scores_below_a_mildly_imperfect_scene():
    images = clean(40, 3)
    blank = score(np.full((1, 64, 64, 3), 236, np.uint8))[0]
    assert blank == pytest.approx(aesthetics.BLANK)
    for imperfect in (noise(images, 4), blur(images, 1.0), specks(images, 2), blotches(images, 3)):
        assert score(imperfect).min() > blank


@pytest.mark.parametrize("sigma", [0, 4, 8])
def test_deleting_every_object_never_pays(sigma):
    images = noise(blur(clean(20, 4), 1.0), sigma)
    empty = noise(np.full_like(images, scenes.BACKGROUND), sigma)
    assert (score(images) > score(empty).max()).all()


def test_an_object_of_two_colours_is_less_pure():
    image = scenes.render([Shape("square", "red", 32, 32, 14)])
    two = image.copy()
    two[32:44, 21:26] = scenes.COLORS["blue"]
    pure, mixed = aesthetics.explain(image), aesthetics.explain(two)
    assert pure["purity"] > 0.98 and mixed["purity"] < 0.6
    assert mixed["flatness"] == pure["flatness"] == 1.0
    assert mixed["score"] < 0.9 * pure["score"]


def test_the_terms_answer_to_their_own_damage():
    (image,) = clean(1, 5)
    hurt = {f: aesthetics.explain(f(image[None], s)[0]) for f, s in ((blur, 1.5), (blotches, 6))}
    assert hurt[blur]["flatness"] > 0.9 and hurt[blur]["edges"] < 0.5
    assert hurt[blotches]["flatness"] < 0.7 < hurt[blotches]["edges"]
    torn = aesthetics.explain(ragged(image[None], 2)[0])
    assert torn["flatness"] > 0.9 and torn["edges"] < 0.6 and torn["purity"] > 0.95


def test_deterministic_finite_and_alone_as_in_a_batch():
    images = np.concatenate([noise(clean(20, 6), 12), np.zeros((2, 64, 64, 3), np.uint8)])
    score_B = score(images)
    assert np.isfinite(score_B).all()
    assert np.array_equal(score_B, score(images))
    assert np.array_equal(score_B, [score(image[None])[0] for image in images])


def test_bad_images_are_named():
    with pytest.raises(ValueError, match="float64"):
        score(np.zeros((1, 64, 64, 3)))
