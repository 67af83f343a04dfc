"""Aspect-ratio buckets: the few sizes (height, width) that the images of an editing run take.

All samples of an update have one size, so each condition image is given the nearest of a short
list. Nearest: the least |log(h / w) - log(H / W)|, compared exactly, as fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]  # height, width

# width / height of the default list, the square first.
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))


def default_buckets(pixels: int, multiple: int) -> list[Size]:
    """Sizes of about `pixels` pixels for RATIOS, their sides multiples of `multiple`.

    Ratios that round to the same size give one. ValueError: less than one multiple a side.
    """
    if multiple < 1 or pixels < multiple**2:
        raise ValueError(
            f"buckets: got {pixels} pixels and sides in multiples of {multiple}; wanted a "
            "multiple of 1 or more, and room for one each way"
        )
    sizes = []
    for across, down in RATIOS:
        height = math.sqrt(pixels * down / across)
        width = pixels / height
        sizes.append(
            (
                max(1, round(height / multiple)) * multiple,
                max(1, round(width / multiple)) * multiple,
            )
        )
    return list(dict.fromkeys(sizes))


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket nearest to an image of this (height, width); of equally near ones the first.

    ValueError: no buckets, or a side under 1.
    """
    if not buckets or min(min(each) for each in (size, *buckets)) < 1:
        raise ValueError(
            f"buckets: got size {size} and buckets {list(buckets)}; wanted (height, width) of 1 "
            "or more, and at least one bucket"
        )

    def distance(bucket: Size) -> Fraction:
        ratio = Fraction(size[0] * bucket[1], size[1] * bucket[0])
        return max(ratio, 1 / ratio)

    return min(buckets, key=distance)
