"""How much the images of one prompt differ, without any network.

An image is reduced to the mean colours of SIDE x SIDE equal parts, in CIE Lab (D65): what is
where, and in which colour, but no texture. The distance of two images is the root mean square of
the colour differences (Delta E 1976) of their parts, so about 2 is a difference that can just be
seen and 100 is black against white. The measure is the mean over prompts of the root mean square
distance of their images' pairs, which needs no pairs: it is the root of twice the unbiased
variance, summed over channels and averaged over parts.

Sums of pixels are whole numbers, so the features do not depend on threads or processes.
Shapes: B images, H, W pixels, F = 3 SIDE^2 features (fewer of images under SIDE pixels).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 8
# Linear sRGB to XYZ relative to the white of D65 (IEC 61966-2-1); rows sum to 1.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
TO_XYZ /= TO_XYZ.sum(1, keepdims=True)


def coarse_lab(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features [B, F] of images uint8 [B, H, W, 3]; F = 0 of images without pixels."""
    count, height, width, _ = images.shape
    rows, columns = min(SIDE, height), min(SIDE, width)
    if not rows * columns:
        return np.empty((count, 0), np.float32)
    tops, lefts = (np.arange(n) * size // n for n, size in ((rows, height), (columns, width)))
    heights, widths = np.diff(tops, append=height), np.diff(lefts, append=width)
    down = [
        images[:, top : top + size].sum(1, dtype=np.uint32)
        for top, size in zip(tops, heights, strict=True)
    ]
    sums = np.add.reduceat(np.stack(down, axis=1), lefts, axis=2)
    areas = heights[:, None] * widths
    return lab(sums / areas[:, :, None]).reshape(count, -1).astype(np.float32)


def lab(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE Lab of sRGB colours 0..255, [..., 3]."""
    value = np.asarray(colours, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    r, g, b = (linear[..., i] for i in range(3))
    # Not a matrix product: its bits may depend on the number of rows.
    x, y, z = (m[0] * r + m[1] * g + m[2] * b for m in TO_XYZ)
    x, y, z = (
        np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29) for t in (x, y, z)
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def mean_distance(features: NDArray[np.float32], group: int) -> float:
    """Mean over groups of the root mean square distance of two images of one group.

    features: [B, F], B a multiple of group >= 2, group by group.
    """
    each = features.astype(np.float64).reshape(-1, group, features.shape[1])
    variance = each.var(1, ddof=1)  # [groups, F]
    return float(np.sqrt(2 * 3 * variance.mean(1)).mean())
