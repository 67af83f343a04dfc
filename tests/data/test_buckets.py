"""Buckets: sizes near the area and of the multiple; the nearest, the first of equals."""

from __future__ import annotations

import pytest

from qirl_fast.data.buckets import bucket_of, default_buckets


@pytest.mark.parametrize(("pixels", "multiple"), [(1024**2, 32), (512**2, 16), (64**2, 16)])
def test_default_list(pixels: int, multiple: int) -> None:
    buckets = default_buckets(pixels, multiple)
    side = round(pixels**0.5)
    assert buckets[0] == (side, side) and len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0 and (width, height) in buckets
        # Each side is off by at most half a multiple, and the shortest is 3/4 of the square's.
        assert abs(height * width / pixels - 1) <= 1.5 * multiple / (0.75 * side)


def test_what_is_frozen() -> None:
    """A change would give the rows of a resumed run other sizes."""
    assert default_buckets(1024**2, 32) == [
        *((1024, 1024), (896, 1184), (1184, 896), (832, 1248), (1248, 832)),
        *((768, 1376), (1376, 768)),
    ]
    assert default_buckets(48**2, 16) == [(48, 48), (32, 64), (64, 32)]


def test_nearest_by_the_logarithm_of_the_ratio() -> None:
    buckets = [(100, 100), (100, 200), (200, 100)]
    assert bucket_of((427, 640), buckets) == (100, 200)
    # sqrt(2) lies half-way between 1 and 2; 7:5 below it, 10:7 above.
    assert bucket_of((5, 7), buckets) == (100, 100)
    assert bucket_of((7, 10), buckets) == (100, 200)
    assert bucket_of((10, 7), buckets) == (200, 100)
    assert bucket_of((1, 10_000), buckets) == (100, 200)


def test_of_equally_near_ones_the_first() -> None:
    assert bucket_of((50, 50), [(1, 3), (3, 1)]) == (1, 3)
    assert bucket_of((50, 50), [(3, 1), (1, 3)]) == (3, 1)
    assert bucket_of((4, 3), [(2, 2), (1, 1)]) == (2, 2)


def test_bad_values() -> None:
    for pixels, multiple in ((100, 0), (100, 11)):
        with pytest.raises(ValueError, match=f"got {pixels} pixels"):
            default_buckets(pixels, multiple)
    for size, buckets in (((4, 4), []), ((0, 4), [(1, 1)]), ((4, 4), [(1, 0)])):
        with pytest.raises(ValueError, match=r"wanted \(height, width\) of 1"):
            bucket_of(size, buckets)
