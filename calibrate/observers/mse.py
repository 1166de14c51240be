"""The clipped range with the least mean squared quantization error over the histogram."""

import numpy as np

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHRINKS = 1 - np.arange(45) / 50


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """The best of `SHRINKS` of the range seen: both ends alike, then each alone, twice over (coordinate descent)."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    lows, highs = low * SHRINKS, high * SHRINKS
    best = int(np.argmin(error(lows, highs)))
    left, right = best, best
    for _ in range(2):
        left = int(np.argmin(error(lows, np.full_like(lows, highs[right]))))
        right = int(np.argmin(error(np.full_like(highs, lows[left]), highs)))
    return [(float(lows[left]), float(highs[right]))]
