"""Moving averages of the extremes of each batch: one far value counts little (arXiv 1712.05877, section 3.1)."""

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """[(average minimum, average maximum)] over batches, a new one weighted `AVERAGING`, widened to hold 0."""
    return [(min(histogram.average_low, 0.0), max(histogram.average_high, 0.0))]
