"""Traces of the grid that a picture was made on: steps at every 8th or 16th pixel.

A decoder's stride and a transformer's patches leave lines at multiples of PERIOD pixels, which
stand as peaks in the spectrum of how much neighbours differ: d(x) = mean over y and channels of
|I(x + 1, y) - I(x, y)|, and the same down the columns. Its power at the multiples of 1 / PERIOD
(those of a period of 8, 4 and 2 among them) is divided by that at all other frequencies but 0.
Lines anywhere else, and noise, give about 1; what the scenes themselves have at these places is in
both pictures when a model is compared with what it was before.

Source: the blockiness of Wang, Sheikh, Bovik (ICIP 2002), with all harmonics in place of a cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PERIOD = 16  # pixels a token spans in the models served; see models.qwenimage21.PIXELS_PER_TOKEN
FLOOR = 1e-3  # grey levels^2: a flat picture has no spectrum, and so ratio 1


def gridness(image: NDArray[np.uint8]) -> float:
    """Power of an image uint8 [H, W, 3] at the grid's frequencies over that at the others, both
    axes together; NaN where a side has under two periods.
    """
    if min(image.shape[:2]) < 2 * PERIOD:
        return float("nan")
    pixels = image.astype(np.float64)
    ratios = [_ratio(np.abs(np.diff(pixels, axis=axis)).mean((1 - axis, 2))) for axis in (0, 1)]
    return float(np.sqrt(ratios[0] * ratios[1]))


def _ratio(steps: NDArray[np.float64]) -> float:
    """Of the steps [n - 1] between n pixels, cut to whole periods."""
    length = len(steps) // PERIOD * PERIOD
    power = np.abs(np.fft.rfft(steps[:length] - steps[:length].mean())) ** 2 / length
    grid = np.arange(len(power)) % (length // PERIOD) == 0
    grid[0] = False
    others = ~grid
    others[0] = False
    return float((power[grid].mean() + FLOOR) / (power[others].mean() + FLOOR))
