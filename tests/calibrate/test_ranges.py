"""Scales and zero points, the observers' candidates, and the race between them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import ISLANDS, capture, images, only
from torch import Tensor, nn

from calibrate import ranges
from calibrate.errors import CalibrationError
from calibrate.histogram import Histogram
from calibrate.placement import place
from calibrate.plan import Plan
from calibrate.ranges import candidates, fake_quantize, fill_histograms, qparams

REACH = st.floats(0, 2.0**66, width=32)
PLANS = st.builds(
    Plan,
    steps=st.just(()),
    activation=st.sampled_from(["int8", "uint8"]),
    symmetric=st.booleans(),
    half_scales=st.booleans(),
)


def histogram_of(values: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


@settings(max_examples=200, deadline=None)
@given(below=REACH, above=REACH, plan=PLANS)
def test_zero_is_a_code_and_comes_back_as_exactly_zero(below: float, above: float, plan: Plan) -> None:
    plan = Plan((), plan.activation, plan.symmetric)
    q = qparams(-below, above, plan)
    assert q.qmin <= q.zero_point <= q.qmax
    assert float(fake_quantize(torch.zeros(1), q)) == 0.0


@settings(max_examples=200, deadline=None)
@given(below=st.floats(0, 1e4), above=st.floats(0, 1e4), plan=PLANS)
def test_a_scale_is_a_number_the_runtime_can_store(below: float, above: float, plan: Plan) -> None:
    scale = qparams(-below, above, plan).scale
    stored = np.float16(scale) if plan.half_scales else np.float32(scale)
    assert float(stored) == scale > 0


@settings(max_examples=50, deadline=None)
@given(below=REACH, above=REACH, activation=st.sampled_from(["int8", "uint8"]))
def test_symmetric_means_zero_point_zero_and_signed_codes(below: float, above: float, activation: str) -> None:
    q = qparams(-below, above, Plan((), activation, symmetric=True))  # type: ignore[arg-type]
    assert (q.zero_point, q.dtype) == (0, "int8")


@settings(max_examples=100, deadline=None)
@given(below=st.floats(0.0, 1e3), above=st.floats(0.001, 1e3), symmetric=st.booleans())
def test_twice_the_range_has_twice_the_scale_and_the_same_zero_point(
    below: float, above: float, symmetric: bool
) -> None:
    plan = Plan((), symmetric=symmetric)
    once, twice = qparams(-below, above, plan), qparams(-2 * below, 2 * above, plan)
    assert twice.scale == 2 * once.scale
    assert twice.zero_point == once.zero_point


@settings(max_examples=100, deadline=None)
@given(below=REACH, above=REACH, plan=PLANS, seed=st.integers(0, 2**16))
def test_fake_quantization_twice_is_fake_quantization_once(below: float, above: float, plan: Plan, seed: int) -> None:
    q = qparams(-below, above, Plan((), plan.activation, plan.symmetric))
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * max(below, above)
    once = fake_quantize(x, q)
    assert bool(once.isfinite().all())
    assert torch.equal(fake_quantize(once, q), once)


@settings(max_examples=100, deadline=None)
@given(below=st.floats(0, 100), above=st.floats(0.01, 100), activation=st.sampled_from(["int8", "uint8"]))
def test_values_within_the_range_come_back_within_half_a_step(below: float, above: float, activation: str) -> None:
    q = qparams(-below, above, Plan((), activation))  # type: ignore[arg-type]
    x = torch.linspace(-below, above, 999)
    # The zero point was rounded too, so the ends may be clipped by half a step beside.
    assert float((fake_quantize(x, q) - x).abs().max()) <= q.scale * 1.001


def test_a_tensor_that_is_always_zero_gets_parameters_that_keep_it_zero() -> None:
    (q,) = candidates(histogram_of(torch.zeros(10)), ISLANDS)
    assert (q.scale, q.observer) == (1.0, "constant")
    assert torch.equal(fake_quantize(torch.zeros(3), q), torch.zeros(3))


@pytest.mark.parametrize("value", [3.7, -2.5, 1e-30])
def test_a_tensor_that_is_always_one_number_comes_back_as_it(value: float) -> None:
    x = torch.full((10,), value)
    for q in candidates(histogram_of(x), ISLANDS)[:1]:
        assert float((fake_quantize(x, q) - x).abs().max()) <= max(1e-6 * abs(value), ranges.SMALLEST_FLOAT)


def test_candidates_name_their_observer_and_begin_with_the_whole_range() -> None:
    values = torch.cat([torch.randn(10000, generator=torch.Generator().manual_seed(0)), torch.tensor([50.0])])
    found = candidates(histogram_of(values), ISLANDS)
    assert found[0].observer == "minmax"
    assert {q.observer for q in found} == set(ISLANDS.observers)
    assert len({(q.scale, q.zero_point) for q in found}) == len(found)


def test_no_batches_is_an_error_that_says_so() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        fill_histograms(graph, place(graph, ISLANDS), iter(()))


def test_histograms_see_every_sample_of_every_batch_and_progress_counts_them() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())
    seen: list[int] = []
    found = fill_histograms(graph, place(graph, ISLANDS), ([images(n, seed=n)] for n in (2, 5)), seen.append)
    assert seen == [2, 7]
    name = str(only(graph, "input").name)
    assert float(found[name].counts.sum()) == 7 * 3 * 8 * 8
    assert found[name].high == max(float(images(n, seed=n).max()) for n in (2, 5))


def test_the_histogram_of_a_fused_layer_is_taken_after_its_activation() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())
    found = fill_histograms(graph, place(graph, ISLANDS), [[images()]])
    assert found[str(only(graph, "relu").name)].low == 0.0
