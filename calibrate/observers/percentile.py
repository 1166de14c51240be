"""Ranges that clip a fixed share of the values at both ends: 0.1 %, 0.01 % and 0.001 %."""

import numpy as np

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHARES = (1e-3, 1e-4, 1e-5)


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """One range per share in `SHARES`, never wider than what was seen."""
    below = histogram.moments[0] / max(histogram.moments[0, -1], 1.0)  # share below each edge of a bin
    halves = np.array(SHARES) / 2
    # From the lower edge of the bin in which a share is reached to the upper edge of the one in which it is left.
    firsts, lasts = (np.searchsorted(below[1:], part) for part in (halves, 1 - halves))
    lows = (firsts - (len(below) - 1) / 2) * histogram.width
    highs = (np.minimum(lasts, len(below) - 2) + 1 - (len(below) - 1) / 2) * histogram.width
    ends = zip(lows.tolist(), highs.tolist(), strict=True)
    return [(min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)) for low, high in ends]
