"""The clipped range with the least mean squared quantization error over the histogram."""

from calibrate.histogram import Histogram
from calibrate.observers import Quantizer

SHRINKS = tuple(1 - step / 50 for step in range(45))


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """The best of `SHRINKS` of the range seen: both ends alike, then each alone, twice over (coordinate descent)."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best = min(((error(low * s, high * s), low * s, high * s) for s in SHRINKS), key=lambda t: t[0])
    for _ in range(2):
        _, left, right = best
        trials = [(low * s, right) for s in SHRINKS] + [(left, high * s) for s in SHRINKS]
        best = min([best, *((error(a, b), a, b) for a, b in trials)], key=lambda t: t[0])
    return [(best[1], best[2])]
