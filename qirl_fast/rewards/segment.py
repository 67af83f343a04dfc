"""Flat coloured objects on a plain background: found, split by colour, for the image judges.

The background is the per-channel median of the image's border. A pixel is judged by its offset
from it: an anti-aliased or blurred edge is a mix background + alpha (colour - background), so the
DIRECTION of the offset names the colour and its length gives alpha; edges then need no class of
their own. A pixel is foreground when alpha >= ALPHA of the named colour its direction is within
ANGLE_DEG of, or, near no named direction, when it is further than UNNAMED from the background.
Foreground pixels are joined over their four neighbours; a component whose main colour holds less
than DOMINANT of it is several touching objects and is split into its colours. A part that fills
little of its bounding box or is long is split where it is thin, if wearing it down by at most
NECK of its size leaves several pieces: objects of one colour that touch at a corner.

Shapes: B images, H, W pixels, K named colours, N foreground pixels, h, w a bounding box.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage

from qirl_fast.tiny.scenes import COLORS

PALETTE_K3 = np.array(list(COLORS.values()), np.float32)
ALPHA = 0.45
ANGLE_DEG = 22.0
UNNAMED = 85.0
DOMINANT = 0.8
NECK = 0.12
MIN_AREA = 0.004
MAX_BLOBS = 16
MIN_SIDE = 16
CHUNK_PIXELS = 1 << 16
_BACKGROUND = -1
_JOIN_4 = np.zeros((3, 3, 3), bool)
_JOIN_4[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Blob:
    """One found object: `mask` bool [h, w] over the bounding box at rows top.., columns left...

    `inner` is the mask less its outermost pixels (the mask itself where nothing would be left),
    `rgb` float64 [3] the mean colour there and `spread` the root mean square distance from it,
    both in 8-bit levels; `purity` is the share of the pixels with the blob's main colour.
    """

    top: int
    left: int
    mask: np.ndarray
    area: int
    rgb: np.ndarray
    spread: float
    purity: float

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the bounding box, (x, y) in pixels, y down."""
        h, w = self.mask.shape
        return self.left + 0.5 * w, self.top + 0.5 * h


@dataclass(frozen=True)
class Segmented:
    """One image: float32 offsets [H, W, 3] from its background, bool object mask, blobs by area.

    The mask holds all objects; of confetti only the largest, some MAX_BLOBS, become blobs.
    """

    background_rgb: np.ndarray
    offset_HW3: np.ndarray
    object_HW: np.ndarray
    blobs: list[Blob]


def check_images(images_BHW3: np.ndarray, metadata: list[dict[str, Any]]) -> None:
    """Raise ValueError unless images are uint8 [B, H, W, 3] of at least 16 px, a row each."""
    shape = getattr(images_BHW3, "shape", None)
    dtype = getattr(images_BHW3, "dtype", None)
    if shape is None or len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"images are {dtype} {shape}; wanted a numpy uint8 array [B, H, W, 3]")
    if min(shape[1:3]) < MIN_SIDE:
        raise ValueError(f"images are {shape[1]} x {shape[2]}; wanted at least {MIN_SIDE} pixels")
    if len(metadata) != shape[0]:
        raise ValueError(f"{shape[0]} images came with {len(metadata)} metadata rows")


def resample(images_BHW3: np.ndarray, low: int, high: int) -> np.ndarray:
    """Bring the longest side into [low, high], high >= 2 low; uint8 [B, H, W, 3] -> float32.

    Larger images are averaged over square blocks of the smallest size that will do (edges are
    repeated where it does not divide a side), smaller ones are doubled by linear interpolation;
    images that need neither come back as they are.
    """
    _, height, width, _ = images_BHW3.shape
    f = -(-max(height, width) // high)
    if f == 1:
        if max(height, width) >= low:
            return images_BHW3
        x = images_BHW3.astype(np.float32)
        while max(x.shape[1:3]) < low:
            x = _double(_double(x, 1), 2)
        return x
    pad = ((0, 0), (0, -height % f), (0, -width % f), (0, 0))
    x = np.pad(images_BHW3, pad, mode="edge") if height % f or width % f else images_BHW3
    b, h, w, c = x.shape
    return x.reshape(b, h // f, f, w // f, f, c).mean(axis=(2, 4), dtype=np.float32)


def _double(x: np.ndarray, axis: int) -> np.ndarray:
    """Twice as many samples along an axis, linear between the old ones, constant at the ends."""
    n = x.shape[axis]
    before = np.take(x, np.maximum(np.arange(n) - 1, 0), axis)
    after = np.take(x, np.minimum(np.arange(n) + 1, n - 1), axis)
    pair = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return pair.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])


def segment(images_BHW3: np.ndarray) -> Iterator[Segmented]:
    """Segment every image, in order; in chunks, so that memory does not grow with the batch.

    The last few chunks are kept: a second judge of the same small uint8 images finds them done.
    """
    b, height, width, _ = images_BHW3.shape
    step = max(1, CHUNK_PIXELS // (height * width))
    for i in range(0, b, step):
        part = images_BHW3[i : i + step]
        if part.dtype == np.uint8 and height * width <= CHUNK_PIXELS:
            yield from _kept_chunk(part.tobytes(), part.shape)
        else:
            yield from _segment_chunk(part.astype(np.float32))


@lru_cache(maxsize=16)
def _kept_chunk(data: bytes, shape: tuple[int, ...]) -> tuple[Segmented, ...]:
    images = np.frombuffer(data, np.uint8).reshape(shape)
    return tuple(_segment_chunk(images.astype(np.float32)))


def _segment_chunk(images_BHW3: np.ndarray) -> Iterator[Segmented]:
    background_B3 = _border_median(images_BHW3)
    offset_BHW3 = images_BHW3 - background_B3[:, None, None]
    color_BHW = _color_index(offset_BHW3, background_B3)
    part_BHW, n_parts = ndimage.label(color_BHW > _BACKGROUND, _JOIN_4)
    min_area = max(6, round(MIN_AREA * color_BHW[0].size))
    area_P = np.bincount(part_BHW.ravel(), minlength=n_parts + 1)
    area_P[0] = 0
    boxes = ndimage.find_objects(part_BHW)
    blobs: list[list[Blob]] = [[] for _ in images_BHW3]
    for part in np.argsort(-area_P, kind="stable")[: int((area_P >= min_area).sum())]:
        image, *box = boxes[part - 1]
        b, where = image.start, (image.start, *box)
        if len(blobs[b]) >= MAX_BLOBS:
            continue
        blobs[b] += [
            _blob(offset_BHW3[where], piece, box, purity, background_B3[b])
            for piece, purity in _pieces(part_BHW[where] == part, color_BHW[where], min_area)
        ]
    object_BHW = (area_P >= min_area)[part_BHW]
    for b, found in enumerate(blobs):
        found.sort(key=lambda blob: -blob.area)
        yield Segmented(background_B3[b], offset_BHW3[b], object_BHW[b], found)


def _border_median(images_BHW3: np.ndarray) -> np.ndarray:
    """Per-channel median of the outermost 1/32 of the image: the background colour [B, 3]."""
    b, height, width, _ = images_BHW3.shape
    t = max(1, min(height, width) // 32)
    sides = [
        images_BHW3[:, :t],
        images_BHW3[:, -t:],
        images_BHW3[:, t:-t, :t],
        images_BHW3[:, t:-t, -t:],
    ]
    return np.median(np.concatenate([s.reshape(b, -1, 3) for s in sides], axis=1), axis=1)


def _color_index(offset_BHW3: np.ndarray, background_B3: np.ndarray) -> np.ndarray:
    """Per pixel: index of the named colour, K for an unnamed one, -1 for background; int8."""
    n_named = len(PALETTE_K3)
    toward_BK3 = PALETTE_K3 - background_B3[:, None]
    reach_BK = np.maximum(np.linalg.norm(toward_BK3, axis=-1), 1.0)
    toward_BK3 /= reach_BK[..., None]
    hidden_BK = reach_BK < UNNAMED
    toward_BK3[hidden_BK] = 0.0
    distance2_BHW = squared(offset_BHW3)
    faintest2 = min(UNNAMED, ALPHA * float(reach_BK[~hidden_BK].min(initial=UNNAMED))) ** 2
    flat_N = np.flatnonzero(distance2_BHW > faintest2)
    image_N = flat_N // distance2_BHW[0].size
    offset_N3 = offset_BHW3.reshape(-1, 3)[flat_N]
    ends = np.searchsorted(image_N, np.arange(len(offset_BHW3) + 1))
    along_NK = np.concatenate(
        [offset_N3[ends[b] : ends[b + 1]] @ toward.T for b, toward in enumerate(toward_BK3)]
    )
    best_N = along_NK.argmax(1)
    along_N = np.take_along_axis(along_NK, best_N[:, None], 1)[:, 0]
    distance_N = np.sqrt(distance2_BHW.ravel()[flat_N])
    named_N = along_N >= np.cos(np.radians(ANGLE_DEG)) * distance_N
    solid_N = np.where(named_N, along_N >= ALPHA * reach_BK[image_N, best_N], distance_N > UNNAMED)
    color_BHW = np.full(distance2_BHW.shape, _BACKGROUND, np.int8)
    color_BHW.ravel()[flat_N] = np.where(solid_N, np.where(named_N, best_N, n_named), _BACKGROUND)
    return color_BHW


def squared(offset_BHW3: np.ndarray) -> np.ndarray:
    """Squared length of the last axis (3), any leading shape; summed in one fixed order."""
    r, g, b = (offset_BHW3[..., c] for c in range(3))
    return r * r + g * g + b * b


def _pieces(mask: np.ndarray, color: np.ndarray, min_area: int) -> list[tuple[np.ndarray, float]]:
    """The objects inside a connected `mask` bool [h, w], each with its share of one colour.

    Between two colours lies a seam of their mixtures: pieces of at most two pixels' width go.
    """
    counts = np.bincount(color[mask])
    share = float(counts.max() / counts.sum())
    if share >= DOMINANT:
        return [(piece, share) for piece in _cut_necks(mask, min_area)]
    pieces = []
    for value in np.flatnonzero(counts >= min_area):
        part, n = ndimage.label(mask & (color == value))
        area = np.bincount(part.ravel(), minlength=n + 1)
        large = [part == i for i in range(1, n + 1) if area[i] >= min_area]
        thick = [piece for piece in large if _worn(np.pad(piece, 1)).any()]
        pieces += [(whole, 1.0) for piece in thick for whole in _cut_necks(piece, min_area)]
    return pieces or [(mask, share)]


def _cut_necks(mask: np.ndarray, min_area: int) -> list[np.ndarray]:
    """Split a part at its thinnest places, or return it whole."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    area = int(mask.sum())
    if area >= 0.65 * h * w and max(h, w) <= 1.5 * min(h, w):
        return [mask]
    core = np.pad(mask, 1)
    for _ in range(max(1, round(NECK * float(np.sqrt(area))))):
        core = _worn(core)
        part, n = ndimage.label(core)
        size = np.bincount(part.ravel(), minlength=n + 1)
        large = [i for i in range(1, n + 1) if size[i] >= max(min_area, 0.1 * area)]
        if len(large) > 1:
            kept = np.where(np.isin(part, large), part, 0)
            near = ndimage.distance_transform_edt(
                kept == 0, return_distances=False, return_indices=True
            )
            owner = kept[tuple(near)][1:-1, 1:-1]
            return [mask & (owner == i) for i in large]
    return [mask]


def _worn(mask: np.ndarray) -> np.ndarray:
    """The mask less the pixels on its edge, the array's border among them."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return inner


def _blob(
    offset_hw3: np.ndarray,
    mask: np.ndarray,
    box: list[slice],
    purity: float,
    background_rgb: np.ndarray,
) -> Blob:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y, x = rows[0], columns[0]
    tight = mask[y : rows[-1] + 1, x : columns[-1] + 1]
    inner = _worn(tight)
    h, w = tight.shape
    values_N3 = offset_hw3[y : y + h, x : x + w][inner if inner.any() else tight]
    mean = values_N3.mean(0, dtype=np.float64)
    spread = float(np.sqrt(np.square(values_N3 - mean).sum(1).mean()))
    top, left = box[0].start + int(y), box[1].start + int(x)
    area = int(tight.sum())
    return Blob(top, left, tight, area, mean + background_rgb, spread, float(purity))
