"""Gradients of signs: values stay exact signs, and the way back is the one that each paper gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate.surrogates import FREQUENCY, SURROGATES, bireal, periodic, straight

NUMBERS = st.floats(-3, 3, width=32)


def at(function, x: float) -> tuple[float, float]:
    """Value and gradient."""
    point = torch.tensor(x, requires_grad=True)
    value = function(point)
    value.backward()
    return float(value), float(point.grad)


@given(NUMBERS)
def test_straight_passes_what_is_inside(x: float) -> None:
    value, slope = at(straight, x)
    assert (value, slope) == (1.0 if x >= 0 else -1.0, 1.0 if abs(x) <= 1 else 0.0)


@given(NUMBERS)
def test_bireal_falls_off_towards_the_edge(x: float) -> None:
    value, slope = at(bireal, x)
    assert value == (1.0 if x >= 0 else -1.0)
    assert slope == pytest.approx(max(0.0, 2 - 2 * abs(x)), abs=1e-6)


@given(NUMBERS)
def test_periodic_has_the_slope_of_its_wave(x: float) -> None:
    value, slope = at(lambda t: periodic(t, 3.0), x)
    wave = float(torch.sin(torch.tensor(3.0) * torch.tensor(x)))
    assert value == (1.0 if wave >= 0 else -1.0)
    assert slope == pytest.approx(3 * math.cos(3.0 * x), abs=1e-4)


def test_latent_weights_start_on_their_own_side_where_there_is_a_slope() -> None:
    for surrogate in SURROGATES.values():
        if surrogate.weight is not None:
            for side in (-1.0, 1.0):
                value, slope = at(surrogate.weight, side * surrogate.start)
                assert value == side
                assert slope > FREQUENCY / 2
