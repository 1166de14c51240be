"""The whole range and shares of it, each end alone: a grid for the race, whatever the histogram says."""

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """Every pair of a share of the minimum with a share of the maximum; `SHARES` of the one where the other is 0."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    lows = [low * s for s in SHARES] if low < 0 else [0.0]
    highs = [high * s for s in SHARES] if high > 0 else [0.0]
    return [(a, b) for a in lows for b in highs]
