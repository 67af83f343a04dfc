"""A face brought to the standard place: 112 x 112 pixels, by the similarity of five points.

The points are the eyes, the tip of the nose and the corners of the mouth, the left one in the
picture first. The similarity x -> s R x + t that comes nearest to TEMPLATE in least squares
(Umeyama 1991, without reflection) maps them; pixels are interpolated linearly, black outside.
TEMPLATE is that of ArcFace (insightface's `face_align.py`), which AdaFace and SFace share. The
interpolation is OpenCV's up to its rounding of coordinates to 1/32 pixel.
"""

import numpy as np
from scipy.ndimage import map_coordinates

SIDE = 112
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity(points: np.ndarray, to: np.ndarray = TEMPLATE) -> np.ndarray:
    """The matrix [2, 3] of the similarity that maps points [N, 2] (x, y) nearest to `to`.

    ValueError for points that are not finite or all in one place.
    """
    points = np.asarray(points, np.float64)
    if points.shape != to.shape or not np.isfinite(points).all():
        raise ValueError(f"landmarks are {points.tolist()}; wanted {len(to)} finite points [x, y]")
    mean, mean_to = points.mean(0), to.mean(0)
    a, b = points - mean, to - mean_to
    if not np.square(a).sum() > 1e-8:
        raise ValueError(f"landmarks {points.tolist()} are all in one place")
    # Complex numbers are the similarities of the plane: least squares of one of them.
    z, w = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
    k = (z.conj() @ w) / (z.conj() @ z).real
    turn = np.array([[k.real, -k.imag], [k.imag, k.real]])
    return np.column_stack([turn, mean_to - turn @ mean])


def aligned(image_HW3: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The face float32 [112, 112, 3], 0..255, of a uint8 image; ValueError as `similarity`."""
    turn, shift = np.split(similarity(points), [2], axis=1)
    if abs(np.linalg.det(turn)) < 1e-12:
        raise ValueError(
            f"landmarks {np.asarray(points).tolist()} are no face: nothing is its size"
        )
    v, u = np.mgrid[:SIDE, :SIDE].reshape(2, -1)
    x, y = np.linalg.solve(turn, np.stack([u, v]) - shift)
    # Only what is read is converted: the box of the face and one pixel around it.
    h, w = image_HW3.shape[:2]
    left, top = (int(np.clip(np.floor(z.min()) - 1, 0, n - 1)) for z, n in ((x, w), (y, h)))
    right, low = (int(np.clip(np.ceil(z.max()) + 2, 1, n)) for z, n in ((x, w), (y, h)))
    box = image_HW3[top:low, left:right].astype(np.float32)
    where = np.stack([y - top, x - left])
    planes = [map_coordinates(box[..., c], where, order=1, mode="grid-constant") for c in range(3)]
    return np.stack(planes, 1).reshape(SIDE, SIDE, 3)
