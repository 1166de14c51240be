"""Every observer keeps zero in range; each does what its name says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrate import observers
from calibrate.errors import CalibrationError
from calibrate.histogram import AVERAGING, Floats, Histogram


def propose(name: str, values: Tensor) -> tuple[list[tuple[float, float]], "Error"]:
    histogram = Histogram()
    histogram.add(values)
    error = Error(histogram)
    return observers.find(name)(histogram, error), error


class Error:
    """Mean squared quantization error of ranges over a histogram, as the calibration computes it."""

    def __init__(self, histogram: Histogram) -> None:
        self.histogram = histogram

    def __call__(self, lows: Floats, highs: Floats) -> Floats:
        return self.histogram.error(lows, highs, 256)

    def one(self, low: float, high: float) -> float:
        return float(self(np.array([low]), np.array([high]))[0])


def planted(outlier: float) -> Tensor:
    """100,000 standard normal values and one outlier."""
    return torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([outlier])])


@pytest.mark.parametrize("name", observers.names())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.sampled_from([-30.0, -1.0, 0.0, 2.0, 30.0]), count=st.integers(1, 300))
def test_every_proposal_holds_zero_and_is_no_wider_than_what_was_seen(
    name: str, seed: int, shift: float, count: int
) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) + shift
    found, _ = propose(name, values)
    assert found
    for low, high in found:
        assert min(float(values.min()), 0.0) <= low <= 0.0 <= high <= max(float(values.max()), 0.0)


@pytest.mark.parametrize("name", observers.names())
def test_every_observer_scales_with_its_data(name: str) -> None:
    once, _ = propose(name, planted(20.0))
    twice, _ = propose(name, 2 * planted(20.0))
    assert twice == [(2 * low, 2 * high) for low, high in once]


@pytest.mark.parametrize("name", observers.names())
def test_every_observer_says_in_its_first_line_what_it_does(name: str) -> None:
    module = __import__(f"calibrate.observers.{name}", fromlist=["ranges"])
    assert len((module.__doc__ or "").strip().splitlines()[0]) > 10


def test_minmax_clips_nothing() -> None:
    values = planted(500.0)
    assert propose("minmax", values)[0] == [(float(values.min()), 500.0)]


def test_percentile_clips_the_planted_outlier_on_its_side_only() -> None:
    for sign in (1.0, -1.0):
        found, _ = propose("percentile", sign * planted(500.0))
        low, high = found[1]  # 0.01 %: ten of the values, five at each end
        outer, inner = (high, -low) if sign > 0 else (-low, high)
        assert outer < 6
        assert inner > 3.5


def test_percentile_gives_one_range_per_share_the_smaller_share_the_wider() -> None:
    found, _ = propose("percentile", planted(500.0))
    widths = [high - low for low, high in found]
    assert len(widths) == 3
    assert widths == sorted(widths)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.sampled_from([1, 3, 5]))
def test_mse_is_never_worse_than_minmax_over_the_histogram(seed: int, power: int) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) ** power
    ((low, high),), error = propose("mse", values)
    ((whole_low, whole_high),), _ = propose("minmax", values)
    assert error.one(low, high) <= error.one(whole_low, whole_high)


def test_mse_clips_a_lone_outlier_and_only_at_its_end() -> None:
    ((low, high),), _ = propose("mse", planted(30.0))
    # Least (30 - c)^2 + n ((c - low) / 255)^2 / 12 for n = 100,000 is at c = 26.
    assert 25 < high < 27
    assert low < -3.5


def test_an_unknown_observer_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(CalibrationError, match=r"no observer 'entropy'; there are kl, minmax, moving_average, mse"):
        observers.find("entropy")


def test_the_moving_average_hardly_moves_for_one_far_batch() -> None:
    histogram = Histogram()
    calm = torch.linspace(-1, 1, 100)
    for batch in (calm, calm, 100 * calm, calm):
        histogram.add(batch)
    ((low, high),) = observers.find("moving_average")(histogram, Error(histogram))
    expected = 1 + AVERAGING * 99 * (1 - AVERAGING)  # the far batch, and one calm one after it
    assert (-low, high) == (pytest.approx(expected, rel=1e-5), pytest.approx(expected, rel=1e-5))
    assert observers.find("minmax")(histogram, Error(histogram)) == [(-100.0, 100.0)]  # the control


@pytest.mark.parametrize("sides", ["positive", "negative", "both"])
def test_kl_clips_the_sparse_tail_of_a_one_sided_and_of_a_two_sided_tensor(sides: str) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    values[:2] = torch.tensor([40.0, -40.0])
    values = {"positive": values.abs(), "negative": -values.abs(), "both": values}[sides]
    ((low, high),), _ = propose("kl", values)
    assert max(-low, high) < 10  # a quarter of the range, all but two values
    assert max(-low, high) > 2
    assert (low < 0) == (sides != "positive")
    assert (high > 0) == (sides != "negative")


def test_kl_keeps_the_whole_range_of_an_even_distribution() -> None:
    ((low, high),), _ = propose("kl", torch.linspace(-3, 3, 4001))
    assert (low, high) == pytest.approx((-3, 3), rel=0.1)


@pytest.mark.parametrize("name", observers.names())
def test_a_tensor_of_zeros_gets_the_empty_range_from_every_observer(name: str) -> None:
    found, _ = propose(name, torch.zeros(50))
    assert set(found) == {(0.0, 0.0)}


def test_the_sweep_holds_the_whole_range_and_each_end_alone() -> None:
    found, _ = propose("sweep", torch.tensor([-2.0, 1.0]))
    assert found[0] == (-2.0, 1.0)
    assert {(-1.0, 1.0), (-2.0, 0.5), (-1.0, 0.5)} <= set(found)
    assert {low for low, _ in propose("sweep", torch.tensor([0.0, 1.0]))[0]} == {0.0}
