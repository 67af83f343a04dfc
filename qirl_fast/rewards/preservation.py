"""How well an edit left alone what it was not to touch, in [0, 1]: `kind: preservation`.

With S the edited picture (the last condition image), Y the result, and R the edited region,

    score = ssim_weight max(SSIM, 0) + (1 - ssim_weight) min(PSNR, psnr_db) / psnr_db

both outside R: CoCoEdit's 0.5 SSIM + 0.5 PSNR / 40. PSNR = 10 log10(255^2 / MSE) over the pixels
and channels outside R; equal pixels count as psnr_db. SSIM is Wang's of 2004: Gaussian windows of
11 pixels, sigma 1.5, K 0.01 and 0.03, population moments, each colour by itself; averaged over the
windows that lie wholly in the picture and wholly outside R, so no edited pixel enters. Without R
that is scikit-image's structural_similarity(gaussian_weights=True, use_sample_covariance=False).

R comes from the row, [x, y] from the top left:
- "region": boxes [[x0, y0, x1, y1], ...], fractions of width and height in 0..1; and / or
- "mask": {"size": [height, width], "counts": [n, ...]}, run lengths of COCO's uncompressed kind:
  column by column, the first run is outside. Any size: it is stretched over the picture.
A pixel that R covers in part is edited. A row with neither is missing, or with `whole` compared
everywhere. Rows without condition images, and those whose region leaves no window, are missing too.

An unchanged picture scores 1: never optimise this judge alone (`edits.py`).
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

import numpy as np
from pydantic import Field
from scipy.ndimage import correlate1d, minimum_filter

from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Row, Scored
from qirl_fast.rewards.segment import check_images
from qirl_fast.rewards.sources import condition_images, has_sources
from qirl_fast.section import Level, Positive, Section

RADIUS = 5  # of a window: 3.5 sigma, rounded
_TAPS = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / 1.5) ** 2)
TAPS = _TAPS / _TAPS.sum()
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
FULL = (
    "an unchanged picture scores 1, also where the instruction asks to change all of it; with "
    "without_region: whole such rows are paid for doing nothing"
)

log = logging.getLogger(__name__)


class Settings(Section):
    """A judge of what an edit should not have changed."""

    kind: Literal["preservation"] = Field(description="SSIM and PSNR outside the edited region")
    ssim_weight: Level = Field(default=0.5, description="weight of SSIM; PSNR has the rest")
    psnr_db: Positive = Field(default=40.0, description="PSNR that counts as unchanged, in dB")
    without_region: Literal["missing", "whole"] = Field(
        default="missing",
        description="rows that name no edited region: nothing to judge, or all of it is compared",
    )


class Judge:
    """The judge of `Settings`; numpy on the CPU whatever the device."""

    masks = True

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self.warnings = [FULL] if settings.without_region == "whole" else []
        self._told: set[str] = set()

    def check_row(self, row: Row) -> None:
        """ValueError for a row without condition images or region, or with a region of bad form."""
        condition_images(row)
        if not has_region(row) and self.settings.without_region == "missing":
            raise ValueError(
                "the row names no edited region, and what should stay is all outside it: give it "
                "'region': [[x0, y0, x1, y1], ...] in fractions or a 'mask', or set "
                "without_region: whole"
            )
        edited(row, 64, 64)

    def __call__(self, images: np.ndarray, metadata: list[Row]) -> Scored:
        """Score uint8 images [B, H, W, 3]; a bad region or source fails its row alone."""
        check_images(images, metadata)
        values = np.zeros(len(images), np.float32)
        status = np.full(len(images), MISSING, np.int8)
        reasons = {}
        for i, (image, row) in enumerate(zip(images, metadata, strict=True)):
            if self._nothing_to_judge(row):
                continue
            try:
                value = self._one(image, row)
            except ValueError as error:
                status[i], reasons[i] = FAILED, str(error)
                continue
            if value is not None:
                values[i], status[i] = value, SCORED
        return Scored(values, status, reasons)

    def _nothing_to_judge(self, row: Row) -> bool:
        if not has_sources(row):
            return self._tell("without condition images")
        if not has_region(row) and self.settings.without_region == "missing":
            return self._tell("without 'region' or 'mask'")
        return False

    def _one(self, image: np.ndarray, row: Row) -> float | None:
        source = condition_images(row)[-1]
        if source.shape != image.shape:
            raise ValueError(
                f"the source is {list(source.shape)} and the result {list(image.shape)}; wanted "
                "the last condition image at the result's size"
            )
        kept = ~edited(row, *image.shape[:2])
        similar, db = ssim(source, image, kept), psnr(source, image, kept)
        if similar is None or db is None:
            self._tell("whose region leaves no window of 11 pixels")
            return None
        s = self.settings
        return (
            s.ssim_weight * max(similar, 0.0) + (1 - s.ssim_weight) * min(db, s.psnr_db) / s.psnr_db
        )

    def _tell(self, what: str) -> bool:
        if what not in self._told:
            self._told.add(what)
            log.warning("preservation: rows %s are missing (nothing to judge)", what)
        return True


def has_region(row: Row) -> bool:
    """Whether the row names what was edited; an empty list of boxes does: nothing was."""
    return row.get("region") is not None or row.get("mask") is not None


def edited(row: Row, height: int, width: int) -> np.ndarray:
    """The edited pixels bool [height, width] of "region" and "mask" together; ValueError."""
    found = np.zeros((height, width), bool)
    boxes = row.get("region")
    if boxes is not None:
        for x0, y0, x1, y1 in _boxes(boxes):
            rows = slice(int(np.floor(y0 * height)), int(np.ceil(y1 * height)))
            found[rows, int(np.floor(x0 * width)) : int(np.ceil(x1 * width))] = True
    if row.get("mask") is not None:
        found |= _stretched(_unpacked(row["mask"]), height, width)
    return found


def _boxes(boxes: Any) -> np.ndarray:
    """Checked boxes float64 [n, 4]."""
    wanted = "wanted boxes [[x0, y0, x1, y1], ...] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
    try:
        array = np.array(boxes, np.float64).reshape(len(boxes), 4)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the row's region is {boxes!r}; {wanted}") from error
    if not ((array[:, :2] >= 0) & (array[:, :2] < array[:, 2:]) & (array[:, 2:] <= 1)).all():
        raise ValueError(f"the row's region is {boxes!r}; {wanted} (fractions, not pixels)")
    return array


def _unpacked(mask: Any) -> np.ndarray:
    """Bool [h, w] of run lengths."""
    wanted = (
        'wanted {"size": [height, width], "counts": [n, ...]}, whole numbers that sum to '
        "height * width"
    )
    given = mask if isinstance(mask, Mapping) else {}
    size, counts = given.get("size"), given.get("counts")
    if not _whole(size) or not _whole(counts) or len(size) != 2:
        raise ValueError(f"the row's mask is {str(mask)[:200]}; {wanted}")
    height, width = size
    if sum(counts) != height * width or not sum(counts):
        raise ValueError(
            f"the row's mask of {height} x {width} has {sum(counts)} pixels in its counts; {wanted}"
        )
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _stretched(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask at another size: a pixel that any of its pixels touches is edited."""
    h, w = mask.shape
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    top, left = np.arange(height) * h // height, np.arange(width) * w // width
    end_y, end_x = (
        -(-np.arange(1, height + 1) * h // height),
        -(-np.arange(1, width + 1) * w // width),
    )
    rows = sums[end_y] - sums[top]
    return rows[:, end_x] > rows[:, left]


def psnr(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float | None:
    """PSNR in dB of uint8 [H, W, 3] over the kept pixels; inf where equal, None where none is."""
    if not kept.any():
        return None
    squares = np.square(a.astype(np.int32) - b)[kept].mean()
    return float("inf") if squares == 0 else float(10 * np.log10(255.0**2 / squares))


def ssim(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float | None:
    """Mean SSIM of uint8 [H, W, 3] over windows wholly within `kept` [H, W]; None without any."""
    inner = slice(RADIUS, -RADIUS)
    whole = minimum_filter(kept.astype(np.uint8), 2 * RADIUS + 1)[inner, inner] == 1
    if not whole.any():
        return None
    x, y = (np.ascontiguousarray(z.transpose(2, 0, 1), np.float64) for z in (a, b))
    mx, my, squares, xy = (_blurred(z) for z in (x, y, x * x + y * y, x * y))
    means = mx * mx + my * my
    top = (2 * mx * my + C1) * (2 * (xy - mx * my) + C2)
    return float((top / ((means + C1) * (squares - means + C2)))[:, whole].mean())


def _blurred(x: np.ndarray) -> np.ndarray:
    """Windowed means [3, H - 10, W - 10]."""
    for axis in (1, 2):
        x = correlate1d(x, TAPS, axis)
    return x[:, RADIUS:-RADIUS, RADIUS:-RADIUS]
