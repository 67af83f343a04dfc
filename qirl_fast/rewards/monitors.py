"""Two monitors to watch and not to optimise: sharpness and grid artefacts of an image.

Both are judges without a reference: `f(images uint8 [B, H, W, 3], metadata) -> float32 [B]`, the
metadata not read, an image judged alone. They tell a person how a run changes the look of its
images; a policy paid for either learns noise or blur. Both are computed in float64 on the
luminance Y = 0.299 R + 0.587 G + 0.114 B in 8-bit levels, and adding a constant to all pixels
(without clipping) leaves them as they are.

Shapes: B images, H, W pixels.
"""

from typing import Any

import numpy as np

from qirl_fast.rewards.segment import check_images

LUMA = (0.299, 0.587, 0.114)
NOISE_LEVELS = 1.0
PERIODS = (8, 16, 32)
MIN_TILES = 4


def sharpness(images_BHW3: np.ndarray, metadata: list[dict[str, Any]]) -> np.ndarray:
    """Share of an image's contrast that is fine detail; float32 [B].

        mean(L^2) / (20 (var(Y) + NOISE_LEVELS^2)),  L = 4 Y - up - down - left - right inside

    0 for a flat image or a ramp, 1 for white noise, 3.2 for a chequerboard of pixels; falls with
    blur, does not change with contrast (but for the noise term, which keeps an almost flat image
    near 0). Photographs lie well below 1.
    """
    check_images(images_BHW3, metadata)
    return np.array([_sharpness(image) for image in images_BHW3], np.float32)


def grid_artefacts(images_BHW3: np.ndarray, metadata: list[dict[str, Any]]) -> np.ndarray:
    """How strongly an image's edges repeat with the patches of a DiT or a VAE; float32 [B].

    The profile of an axis is g[x] = mean over y of |Y[y, x + 1] - Y[y, x]|. Folded at period q it
    is m_q[k] = median over tiles t of g[t q + k], which a single edge does not move, and
    s_q = std over k of m_q. With p in PERIODS of which MIN_TILES whole tiles fit,

        grid = max over axes and p of max(0, s_p - max(s_(p-1), s_(p+1))) / (mean(g) + NOISE_LEVELS)

    About 0 without a grid, at most sqrt(p - 1) (5.6 for 32), which is where nothing but a grid is
    drawn. Both a pattern that repeats in every patch and steps between patches count; so do things
    that truly repeat every 8, 16 or 32 pixels, such as a brick wall or the blocks of JPEG. Small
    images give few tiles and so some chance hits (the tiny world's clean scenes of 64 pixels: 0.03
    on average): watch the mean of many images.

    ValueError for an image with a side below 33 pixels, where no period fits.
    """
    check_images(images_BHW3, metadata)
    least = PERIODS[0] * MIN_TILES + 1
    if min(images_BHW3.shape[1:3]) < least:
        raise ValueError(
            f"images are {images_BHW3.shape[1]} x {images_BHW3.shape[2]}; the grid monitor wants "
            f"at least {least} pixels a side; take it out of the recipe for smaller images"
        )
    return np.array([_grid(image) for image in images_BHW3], np.float32)


def _sharpness(image_HW3: np.ndarray) -> float:
    y = _luminance(image_HW3)
    inner = y[1:-1, 1:-1]
    laplacian = 4.0 * inner - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]
    return float(np.square(laplacian).mean() / (20.0 * (y.var() + NOISE_LEVELS**2)))


def _grid(image_HW3: np.ndarray) -> float:
    y = _luminance(image_HW3)
    return max(_axis_grid(np.abs(np.diff(y, axis=axis)).mean(1 - axis)) for axis in (0, 1))


def _axis_grid(profile: np.ndarray) -> float:
    strengths = [
        _folded(profile, p) - max(_folded(profile, p - 1), _folded(profile, p + 1))
        for p in PERIODS
        if len(profile) // p >= MIN_TILES
    ]
    return max(0.0, *strengths) / float(profile.mean() + NOISE_LEVELS)


def _folded(profile: np.ndarray, period: int) -> float:
    tiles = len(profile) // period
    return float(np.median(profile[: tiles * period].reshape(tiles, period), axis=0).std())


def _luminance(image_HW3: np.ndarray) -> np.ndarray:
    return image_HW3.astype(np.float64) @ np.array(LUMA)
