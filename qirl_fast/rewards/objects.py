"""What a found object is: soft credits for each shape and colour of the tiny world.

Each blob (`segment.py`) gets
- a size: its area, ramped over SIZE_RAMP of the image, so that specks are nothing;
- a presence: its size, less where it fits no shape at all (best fit ramped over SOLID_FIT) or is
  not of one colour (spread ramped down over SPREAD_RAMP): texture is not an object;
- shape credits: intersection over union with each ideal shape fitted to its bounding box, as the
  margin over the best other shape ramped over SHAPE_MARGIN, times the fit ramped over SHAPE_FIT,
  times the box's aspect ramped over ASPECT_RAMP;
- colour credits: the OKLab distance (Ottosson 2020) of its mean colour to each named one, as the
  margin over the nearest other one ramped over COLOR_MARGIN, times the distance ramped down over
  COLOR_RAMP, times its purity.

Shapes: S shapes, K colours, h, w a bounding box.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from qirl_fast.rewards.segment import Blob
from qirl_fast.tiny.scenes import COLORS

SIZE_RAMP = (0.004, 0.010)
SHAPE_MARGIN = (-0.08, 0.08)
SHAPE_FIT = (0.55, 0.82)
SOLID_FIT = (0.45, 0.65)
SPREAD_RAMP = (45.0, 90.0)
ASPECT_RAMP = (0.4, 0.7)
COLOR_RAMP = (0.13, 0.26)
TIP = 0.15
COLOR_MARGIN = (-0.4, 0.4)


@dataclass(frozen=True)
class Found:
    """Credits of one object, its shape [S] and color [K], and its box's centre and half sides."""

    size: float
    present: float
    shape_S: np.ndarray
    color_K: np.ndarray
    center: tuple[float, float]
    half: tuple[float, float]


def ramp(value: Any, span: tuple[float, float]) -> Any:
    """0 below the span, 1 above it, linear inside."""
    return np.minimum(np.maximum((value - span[0]) / (span[1] - span[0]), 0.0), 1.0)


def measure(blob: Blob, pixels: int) -> Found:
    """Credits of a blob in an image of `pixels` pixels."""
    h, w = blob.mask.shape
    fit_S = _shape_fit(blob)
    size = float(ramp(blob.area / pixels, SIZE_RAMP))
    texture = ramp(blob.spread, SPREAD_RAMP)
    present = size * float(ramp(fit_S.max(), SOLID_FIT) * (1.0 - texture))
    return Found(
        size, present, _shape_credit(blob, fit_S), _color_credit(blob), blob.center, (w / 2, h / 2)
    )


@lru_cache(maxsize=2048)
def _templates(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Ideal shapes filling an h x w box, float32 [10, h * w], and their areas.

    Circle, square, then triangles pointing up, down, left and right. A tip narrower than a pixel
    is lost in drawing and more of it in a blur, so the tip lies outside the box, by half a pixel
    or by TIP of the height: one template for each.
    """

    def tip_up(rows: int, columns: int, beyond: float) -> np.ndarray:
        y, x = np.mgrid[0:rows, 0:columns] + 0.5
        return np.abs(x - columns / 2) <= columns / 2 * (y + beyond) / (rows + beyond)

    y, x = np.mgrid[0:h, 0:w] + 0.5
    shapes = [np.hypot((2 * x - w) / w, (2 * y - h) / h) <= 1.0, np.ones((h, w), bool)]
    for up in (tip_up(h, w, 0.5), tip_up(h, w, TIP * h)):
        shapes += [up, up[::-1]]
    for left in (tip_up(w, h, 0.5).T, tip_up(w, h, TIP * w).T):
        shapes += [left, left[:, ::-1]]
    flat = np.stack([shape.ravel() for shape in shapes]).astype(np.float32)
    return flat, flat.sum(1)


def _shape_fit(blob: Blob) -> np.ndarray:
    """Intersection over union with each of SHAPES, its best template; float64 [S]."""
    template, area = _templates(*blob.mask.shape)
    inside = template @ blob.mask.ravel().astype(np.float32)
    iou = (inside / (area + blob.area - inside)).tolist()
    return np.array([iou[0], iou[1], max(iou[2:])])


def _shape_credit(blob: Blob, fit_S: np.ndarray) -> np.ndarray:
    """Credit for being each of SHAPES, float64 [S]."""
    h, w = blob.mask.shape
    second, best = np.sort(fit_S)[-2:]
    margin_S = fit_S - np.where(fit_S == best, second, best)
    aspect = ramp(min(h, w) / max(h, w), ASPECT_RAMP)
    return ramp(margin_S, SHAPE_MARGIN) * ramp(fit_S, SHAPE_FIT) * aspect


_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab of 8-bit sRGB, any leading shape."""
    s = rgb / 255.0
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


_LAB_K3 = _oklab(np.array(list(COLORS.values()), np.float64))
_APART_KK = np.linalg.norm(_LAB_K3[:, None] - _LAB_K3, axis=-1) + np.diag([np.inf] * len(COLORS))


def _color_credit(blob: Blob) -> np.ndarray:
    """Credit for being each of COLORS, float64 [K]; the margin is 1 at a colour, -1 at another."""
    distance_K = np.linalg.norm(_oklab(blob.rgb) - _LAB_K3, axis=-1)
    margin_K = (distance_K - distance_K[:, None]) / _APART_KK
    np.fill_diagonal(margin_K, 1.0)
    near_K = 1.0 - ramp(distance_K, COLOR_RAMP)
    return ramp(margin_K.min(1), COLOR_MARGIN) * near_K * blob.purity
