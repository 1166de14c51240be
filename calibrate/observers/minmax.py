"""The whole range seen: nothing is clipped."""

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """[(min, max)], widened to hold 0."""
    return [(min(histogram.low, 0.0), max(histogram.high, 0.0))]
