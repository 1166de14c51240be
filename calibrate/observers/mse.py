"""The clipped range with the least mean squared quantization error over the histogram."""

import numpy as np

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHRINKS = 1 - np.arange(45) / 50


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """The best pair of one of `SHRINKS` of the minimum seen and one of the maximum."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    lows, highs = low * SHRINKS, high * SHRINKS
    left, right = divmod(int(np.argmin(error(lows[:, None], highs[None, :]))), len(SHRINKS))
    return [(float(lows[left]), float(highs[right]))]
