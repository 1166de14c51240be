"""A histogram loses no count however its range grows, and takes constant memory."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrate.histogram import BINS, Histogram

VALUES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 200), elements=VALUES)


def of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(torch.from_numpy(array))
    return histogram


@settings(max_examples=60, deadline=None)
@given(first=ARRAYS, second=ARRAYS)
def test_growth_loses_no_count_and_the_extremes_are_exact(first: np.ndarray, second: np.ndarray) -> None:
    histogram, both = of(first, second), np.concatenate([first, second])
    assert float(histogram.counts.sum()) == both.size
    assert (histogram.low, histogram.high) == (both.min(), both.max())
    assert histogram.limit >= np.abs(both).max()


@settings(max_examples=60, deadline=None)
@given(first=ARRAYS, second=ARRAYS)
def test_merging_two_histograms_is_one_over_both(first: np.ndarray, second: np.ndarray) -> None:
    merged, whole = of(first), of(first, second)
    merged.merge(of(second))
    assert (merged.low, merged.high, merged.limit) == (whole.low, whole.high, whole.limit)
    # A value on the edge of a bin may fall to either side of it after growth; the cumulative counts are off by those.
    off = (merged.counts.cumsum(0) - whole.counts.cumsum(0)).abs()
    on_edge = np.isclose((np.concatenate([first, second]) / (2 * whole.limit / BINS)) % 1, [[0], [1]], atol=1e-3).sum()
    assert float(off.max()) <= on_edge


@settings(max_examples=60, deadline=None)
@given(values=ARRAYS)
def test_every_value_is_counted_in_the_bin_it_lies_in(values: np.ndarray) -> None:
    histogram = of(values)
    width = 2 * histogram.limit / BINS
    filled = histogram.centers[histogram.counts > 0].numpy()
    distance = np.abs(values[:, None].astype(np.float64) - filled).min(1)
    # Adding `limit` in float32 may carry a value on an edge, by limit * 2^-23, into the next bin.
    assert distance.max() <= width * (0.5 + 1e-3)


def test_memory_does_not_grow_with_the_data() -> None:
    histogram = Histogram()
    for exponent in range(-10, 20):
        histogram.add(torch.randn(1000) * 2.0**exponent)
        assert histogram.counts.shape == (BINS,)


def test_infinities_and_nan_are_noticed_and_not_counted() -> None:
    for bad in (float("inf"), float("-inf"), float("nan"), -3e38):
        histogram = of(np.array([1.0, 2.0], np.float32), np.array([0.5, bad], np.float32))
        assert not histogram.finite
        assert float(histogram.counts.sum()) == 2


def test_a_histogram_that_saw_an_infinity_makes_the_merged_one_not_finite() -> None:
    merged = of(np.ones(3, np.float32))
    assert merged.finite
    merged.merge(of(np.array([np.inf], np.float32)))
    assert not merged.finite
    assert (merged.low, merged.high) == (1.0, 1.0)


def test_twice_the_values_fill_the_same_bins_of_twice_the_range() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).numpy()
    once, twice = of(values), of(2 * values)
    assert twice.limit == 2 * once.limit
    assert torch.equal(once.counts, twice.counts)


@settings(max_examples=60, deadline=None)
@given(values=ARRAYS, ends=hnp.arrays(np.float64, (2, 3), elements=st.floats(-2e6, 2e6)), sign=st.sampled_from([-1, 1]))
def test_the_cost_of_clipping_is_the_sum_over_all_bins_beyond_the_end(
    values: np.ndarray, ends: np.ndarray, sign: int
) -> None:
    histogram = of(values)
    energy, share = histogram.beyond(ends, sign)
    assert energy.shape == share.shape == ends.shape
    centers, counts = histogram.centers.numpy(), histogram.counts.numpy()
    for end, got, clipped in zip(ends.reshape(-1), energy.reshape(-1), share.reshape(-1), strict=True):
        distance = np.maximum((centers - end) * sign, 0.0)
        extreme = max((histogram.high - end) if sign > 0 else (end - histogram.low), 0.0)
        expected = max(float(counts @ distance**2), extreme**2) / values.size
        # Three sums of squares of up to (2^12 bins)^2 or the end itself cancel in float64.
        assert abs(got - expected) <= 1e-12 * (histogram.limit**2 + end**2) + 1e-9 * expected
        assert clipped >= float(counts[distance > 0].sum()) / values.size
        assert clipped <= max(float(counts[distance > 0].sum()), 1.0) / values.size
