"""Levels of a row: the nearest one, the cost under second moments, and codes that stand for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.binarize import binarize, cost
from calibrate.binarized_codes import stored
from calibrate.levels import alphabet, descend, fit_scales, propagate, to_levels

WIDTH = 24


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 5, WIDTH, dtype=torch.float64, generator=random)
    x = torch.randn(100, WIDTH, dtype=torch.float64, generator=random).cumsum(1)
    return weight, (x.T @ x)[None]


@given(seed=st.integers(0, 10**6), name=st.sampled_from(["sign", "ternary", "planes", "salient"]))
@settings(max_examples=8, deadline=None)
def test_descending_and_fitting_scales_never_cost_more(seed: int, name: str) -> None:
    weight, h = problem(seed)
    made = binarize(name, weight)
    before = cost(made.values - weight, h)
    chosen = descend(weight, h, made.grid, made.scales, made.chosen, 2)
    after = cost(made.grid.values(chosen, made.scales) - weight, h)
    assert bool((after <= before * (1 + 1e-9)).all())
    scales = fit_scales(weight, h, made.grid, chosen, made.scales)
    assert bool((cost(made.grid.values(chosen, scales) - weight, h) <= after * (1 + 1e-9)).all())


def test_uncorrelated_inputs_leave_propagation_nothing_to_make_up_for() -> None:
    weight, _ = problem(1)
    made = binarize("planes", weight)
    plain = torch.eye(WIDTH, dtype=torch.float64)[None]
    assert torch.equal(propagate(weight, plain, made.grid, made.scales), made.grid.nearest(weight, made.scales))
    correlated = propagate(weight, problem(1)[1], made.grid, made.scales)
    assert not torch.equal(correlated, made.chosen)


@pytest.mark.parametrize(("largest", "bound"), [(127, 0.01), (63, 0.02), (7, 0.25)])
def test_codes_of_one_step_stand_for_two_scales(largest: int, bound: float) -> None:
    weight, h = problem(2)
    made = binarize("planes", weight, h)
    kept = stored(weight, h, made, largest)
    codes = kept.codes.to(torch.int8)[0]
    assert float(codes.abs().max()) <= largest
    assert torch.equal(codes.double(), kept.codes[0])
    assert alphabet(codes) is not None
    exact, snapped = (cost(v - weight, h).sum() for v in (made.values, kept.values))
    assert float(snapped) <= float(exact) * (1 + bound)


def test_signs_and_ternary_numbers_are_their_own_codes() -> None:
    weight, h = problem(3)
    for name, allowed in (("sign", {-1, 1}), ("ternary", {-1, 0, 1})):
        made = binarize(name, weight, h)
        kept = stored(weight, h, made, 127)
        assert set(kept.codes.int().flatten().tolist()) == allowed
        assert (kept.low, kept.high) == (-1, 1)
        torch.testing.assert_close(kept.values, made.values, rtol=1e-6, atol=1e-9)  # scales became float32


def test_an_alphabet_is_found_where_rows_use_few_codes_and_nowhere_else() -> None:
    signs = torch.tensor([[-1, 1] * 8, [1, 1] * 8, [-7, 7] * 8], dtype=torch.int8)
    found = alphabet(signs)
    assert found is not None
    assert found.tolist() == [[-1, 1], [1, 1], [-7, 7]]
    assert alphabet(torch.arange(32, dtype=torch.int8).view(2, 16)) is None
    assert alphabet(torch.ones(2, 8, dtype=torch.int8)) is None  # so short a row says nothing


def test_numbers_go_to_the_nearest_level_of_their_row() -> None:
    levels = torch.tensor([[-5.0, -1, 1, 5], [-2, -2, 2, 2]])
    numbers = torch.tensor([[-9.0, -2.9, 0, 3.1], [-9, -0.1, 0, 0.1]])
    assert to_levels(numbers, levels).tolist() == [[-5, -1, 1, 5], [-2, -2, 2, 2]]
