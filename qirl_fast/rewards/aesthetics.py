"""How cleanly an image of flat shapes on a plain background is drawn, in [0, 1].

A reference-free rule-based judge, of craft and not of content: the metadata are not read.
- flatness: exp(-d / FLAT_LEVELS), d the root mean square distance of the background's pixels from
  the background colour, in 8-bit RGB levels, each at most OUTLIER (a stray speck counts, but no
  more than that); 0 to full over the background's share of the image in ROOM. The background is
  what lies further than BAND pixels from every object.
- edges: exp(-excess / EDGE_PIXELS) exp(-roughness / ROUGH). The excess is that of the edge's mean
  width over SHARP, in pixels: with alpha in [0, 1] the mix of background and object colour at a
  pixel, the width is the sum of 4 alpha (1 - alpha) in and around the object over the
  circumference of a circle of its area: about 0.75 for an anti-aliased edge, 2.3 s for one blurred
  by a Gaussian of s pixels. The roughness is the length of the outline along pixel sides over that
  of the bounding box, less 1: exactly 0 for a shape without dents or holes.
- purity: exp(-s / PURE_LEVELS) times the share of its main colour, s the root mean square distance
  of the object's inner pixels from their mean colour.
score = flatness (BLANK + (1 - BLANK) quality), quality = sqrt(edges purity), mean over objects by
area, and 0 without objects. So a blank image scores BLANK, and removing every object never pays
as long as what is left is the same background.

Shapes: B images, H, W pixels, h, w an object's box.
"""

import math
from typing import Any

import numpy as np

from qirl_fast.rewards.segment import Blob, Segmented, check_images, segment, squared

BLANK = 0.35
FLAT_LEVELS = 20.0
OUTLIER = 100.0
ROOM = (0.0, 0.2)
BAND = 3
SHARP = 1.0
EDGE_PIXELS = 1.5
ROUGH = 0.5
PURE_LEVELS = 30.0


def score(images_BHW3: np.ndarray, metadata: list[dict[str, Any]]) -> np.ndarray:
    """Craft of uint8 images [B, H, W, 3], judged at their own size; float32 [B]."""
    check_images(images_BHW3, metadata)
    return np.array([_judge(scene)["score"] for scene in segment(images_BHW3)], np.float32)


def explain(image_HW3: np.ndarray) -> dict[str, float]:
    """The score of one image and its parts, for people to read."""
    check_images(image_HW3[None], [{}])
    (scene,) = segment(image_HW3[None])
    return _judge(scene)


def _judge(scene: Segmented) -> dict[str, float]:
    flatness = _flatness(scene)
    parts = [(blob.area, *_object_quality(scene, blob)) for blob in scene.blobs]
    total = sum(area for area, _, _ in parts)
    quality = sum(area * math.sqrt(edges * purity) for area, edges, purity in parts)
    return {
        "score": flatness * (BLANK + (1.0 - BLANK) * quality / max(total, 1)),
        "flatness": flatness,
        "edges": sum(area * edges for area, edges, _ in parts) / max(total, 1),
        "purity": sum(area * purity for area, _, purity in parts) / max(total, 1),
    }


def _flatness(scene: Segmented) -> float:
    away = ~_grown(scene.object_HW, BAND)
    squares = squared(scene.offset_HW3)[away]
    share = squares.size / away.size
    if share <= ROOM[0]:
        return 0.0
    deviation = math.sqrt(float(np.minimum(squares, OUTLIER**2).mean(dtype=np.float64)))
    room = min(1.0, (share - ROOM[0]) / (ROOM[1] - ROOM[0]))
    return room * math.exp(-deviation / FLAT_LEVELS)


def _object_quality(scene: Segmented, blob: Blob) -> tuple[float, float]:
    """(edges, purity) of one object."""
    height, width = scene.object_HW.shape
    h, w = blob.mask.shape
    rows = slice(max(0, blob.top - BAND), min(height, blob.top + h + BAND))
    columns = slice(max(0, blob.left - BAND), min(width, blob.left + w + BAND))
    own = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
    y, x = blob.top - rows.start, blob.left - columns.start
    own[y : y + h, x : x + w] = blob.mask
    near = _grown(own, BAND) & (own | ~scene.object_HW[rows, columns])
    toward = blob.rgb - scene.background_rgb
    alpha = scene.offset_HW3[rows, columns][near] @ (toward / (toward @ toward))
    alpha = np.minimum(np.maximum(alpha, 0.0), 1.0)
    edge_width = 4.0 * float((alpha - alpha * alpha).sum()) / math.sqrt(4.0 * math.pi * blob.area)
    excess = max(0.0, edge_width - SHARP) / EDGE_PIXELS
    edges = math.exp(-excess - _roughness(blob.mask) / ROUGH)
    return edges, math.exp(-blob.spread / PURE_LEVELS) * blob.purity


def _roughness(mask: np.ndarray) -> float:
    """Outline of a mask that fills its box [h, w], along pixel sides, over the box's, less 1."""
    padded = np.pad(mask, 1)
    sides = np.count_nonzero(padded[1:] != padded[:-1])
    sides += np.count_nonzero(padded[:, 1:] != padded[:, :-1])
    return sides / (2.0 * sum(mask.shape)) - 1.0


def _grown(mask_HW: np.ndarray, by: int) -> np.ndarray:
    """The mask and everything within `by` pixels of it, diagonals included."""
    for _ in range(by):
        grown = mask_HW.copy()
        grown[1:] |= mask_HW[:-1]
        grown[:-1] |= mask_HW[1:]
        mask_HW = grown.copy()
        mask_HW[:, 1:] |= grown[:, :-1]
        mask_HW[:, :-1] |= grown[:, 1:]
    return mask_HW
