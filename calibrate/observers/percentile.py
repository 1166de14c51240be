"""Ranges that clip a fixed share of the values at both ends: 0.1 %, 0.01 % and 0.001 %."""

import torch

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHARES = (1e-3, 1e-4, 1e-5)


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """One range per share in `SHARES`, never wider than what was seen."""
    below = histogram.counts.cumsum(0) / histogram.counts.sum()
    half = histogram.centers[1] - histogram.centers[0]
    found = []
    for share in SHARES:
        first = int(torch.searchsorted(below, torch.tensor(share / 2, dtype=torch.float64)))
        last = int(torch.searchsorted(below, torch.tensor(1 - share / 2, dtype=torch.float64)))
        low = float(histogram.centers[first] - half / 2)
        high = float(histogram.centers[min(last, len(below) - 1)] + half / 2)
        found.append((min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)))
    return found
