"""The range whose 128 levels keep the histogram's shape best: least relative entropy, as TensorRT calibrates."""

import numpy as np

from calibrate.histogram import Floats, Histogram
from calibrate.observers import Quantizer

BINS = 2048
LEVELS = 128
# Thresholds tried: LEVELS bins and every STEP-th more.
STEP = 16


def ranges(histogram: Histogram, error: Quantizer) -> list[tuple[float, float]]:
    """One range: of the values' sizes, the threshold with the least divergence, at both ends, never wider than seen.

    Migacz, "8-bit inference with TensorRT", GTC 2017. A tensor of one sign uses its codes on that side alone; a tensor
    of two signs is judged by the sizes of its values, and its shorter end stays whole.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    reach = max(-low, high)
    if reach == 0:
        return [(low, high)]
    threshold = reach * _best(_sizes(histogram, reach)) / BINS
    return [(max(low, -threshold), min(high, threshold))]


def _sizes(histogram: Histogram, reach: float) -> Floats:
    """Counts of |x| in `BINS` equal bins over (0, reach]. Zeros are left out: they are a code whatever the range."""
    centers, counts = np.abs(histogram.centers.numpy()), histogram.counts.numpy().copy()
    zeros = counts.sum() * (1 - histogram.nonzero)
    middle = len(counts) // 2  # zeros lie in the bin that begins at 0
    counts[middle] = max(counts[middle] - zeros, 0.0)
    width, bins = 2 * histogram.limit / len(counts), reach / BINS
    # A bin of the histogram may be wider than one here: its counts are spread evenly over those it covers.
    edges = np.arange(BINS + 1) * bins
    order = np.argsort(centers, kind="stable")
    ends = centers[order] + width / 2
    total = np.concatenate([[0.0], np.cumsum(counts[order])])
    shared = np.interp(edges, np.concatenate([[0.0], ends[1::2]]), total[::2])
    return np.asarray(np.diff(shared))


def _best(counts: Floats) -> int:
    """How many of the first bins to keep."""
    tried = range(LEVELS, BINS + 1, STEP)
    return min(tried, key=lambda kept: (_divergence(counts, kept), -kept))


def _divergence(counts: Floats, kept: int) -> float:
    """Relative entropy of the clipped distribution and the same in `LEVELS` levels, nats; inf when nothing is kept."""
    inside = counts[:kept]
    wanted = inside.copy()
    wanted[-1] += counts[kept:].sum()
    level = np.arange(kept) * LEVELS // kept
    filled = inside > 0
    mass = np.bincount(level, inside, LEVELS)
    holders = np.bincount(level, filled, LEVELS)
    made = np.where(filled, (mass / np.maximum(holders, 1))[level], 0.0)
    if made.sum() == 0 or wanted.sum() == 0:
        return float("inf")
    wanted, made = wanted / wanted.sum(), made / made.sum()
    used = wanted > 0
    # A bin that holds clipped values alone has no probability of its own; the least positive one stands in for it.
    floor = float(made[made > 0].min()) * 1e-3
    return float((wanted[used] * np.log(wanted[used] / np.maximum(made[used], floor))).sum())
