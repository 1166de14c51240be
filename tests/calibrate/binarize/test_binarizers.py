"""Every binarizer: never worse than rounding to the nearest of its own class, and better when it knows the inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrate import binarize as binarizers
from calibrate.binarize import binarize
from calibrate.errors import CalibrationError

# Sums of a few hundred float64 squares, solved for and summed in other orders.
EXACT = 1e-9


def weights(seed: int, rows: int = 6, width: int = 36, heavy: bool = False) -> Tensor:
    """[1, rows, width], bell-shaped or with heavy tails and columns of different sizes."""
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(1, rows, width, dtype=torch.float64, generator=random)
    return found * found.abs() * torch.rand(width, dtype=torch.float64, generator=random) if heavy else found


def moments(seed: int, width: int = 36, rows: int = 200) -> Tensor:
    """Second moments [1, k, k] of correlated inputs."""
    random = torch.Generator().manual_seed(seed + 1000)
    mix = torch.randn(width, width, dtype=torch.float64, generator=random)
    x = torch.randn(rows, width, dtype=torch.float64, generator=random) @ mix
    return (x.T @ x)[None]


def error(name: str, weight: Tensor, **options: object) -> float:
    return float((binarize(name, weight, options=options).values - weight).square().sum())


def nearest_signs(weight: Tensor) -> float:
    """Squared error of mean |w| times the sign."""
    scale = weight.abs().mean(2, keepdim=True)
    return float((torch.where(weight >= 0, 1.0, -1.0) * scale - weight).square().sum())


def test_the_folder_is_the_registry() -> None:
    assert binarizers.names() == ["elastic", "kernels", "onebit", "planes", "salient", "sign", "ternary"]
    with pytest.raises(CalibrationError, match="there is no binarizer 'signs'"):
        binarizers.find("signs")


@pytest.mark.parametrize("name", ["sign", "onebit", "planes", "salient", "ternary"])
@given(seed=st.integers(0, 10**6), heavy=st.booleans())
@settings(max_examples=8, deadline=None)
def test_none_errs_more_than_signs_with_a_mean_scale(name: str, seed: int, heavy: bool) -> None:
    weight = weights(seed, heavy=heavy)
    assert error(name, weight) <= nearest_signs(weight) * (1 + EXACT)


@given(seed=st.integers(0, 10**6), heavy=st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_searched_ternary_errs_no_more_than_twn_and_bitnet(seed: int, heavy: bool) -> None:
    weight = weights(seed, heavy=heavy)
    kept = (weight.abs() > 0.7 * weight.abs().mean(2, keepdim=True)).double()
    scale = (weight.abs() * kept).sum(2, keepdim=True) / kept.sum(2, keepdim=True)
    twn = float((torch.where(weight >= 0, 1.0, -1.0) * kept * scale - weight).square().sum())
    assert error("ternary", weight) <= twn * (1 + EXACT)
    assert error("ternary", weight) <= error("ternary", weight, rule="absmean") * (1 + EXACT)


@given(seed=st.integers(0, 10**6), heavy=st.booleans())
@settings(max_examples=8, deadline=None)
def test_two_refined_planes_err_no_more_than_a_greedy_second_plane(seed: int, heavy: bool) -> None:
    weight = weights(seed, heavy=heavy)
    signs = torch.where(weight >= 0, 1.0, -1.0)
    rest = weight - signs * weight.abs().mean(2, keepdim=True)
    greedy = (rest - torch.where(rest >= 0, 1.0, -1.0) * rest.abs().mean(2, keepdim=True)).square().sum()
    assert error("planes", weight) <= float(greedy) * (1 + EXACT)


@given(seed=st.integers(0, 10**6), bits=st.sampled_from([1, 1.58, 2]))
@settings(max_examples=8, deadline=None)
def test_elastic_errs_no_more_than_the_largest_weight_as_the_scale(seed: int, bits: float) -> None:
    weight = weights(seed)
    factors = {1: [-1.0, 1.0], 1.58: [-1.0, 0.0, 1.0], 2: [-3.0, -1.0, 1.0, 3.0]}[bits]
    scale = weight.abs().amax(2, keepdim=True) / max(factors)
    levels = scale[..., None] * torch.tensor(factors, dtype=torch.float64)
    nearest = (weight[..., None] - levels).abs().amin(-1).square().sum()
    assert error("elastic", weight, bits=bits) <= float(nearest) * (1 + EXACT)


@pytest.mark.parametrize("name", binarizers.names())
@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_knowing_the_inputs_never_costs_more_at_the_output(name: str, seed: int) -> None:
    weight, h = weights(seed), moments(seed)
    blind, told = binarize(name, weight).values - weight, binarize(name, weight, h).values - weight
    # Without inputs the fit is another: it weighs all columns alike. Signs with second-order compensation win anyway.
    weighed = binarizers.cost(told, h).sum()
    assert float(weighed) <= float(binarizers.cost(blind, h).sum()) * (1 + EXACT)


def test_compensation_is_worth_more_than_half_the_error_on_correlated_inputs() -> None:
    weight, h = weights(3, 16, 64), moments(3, 64, 400)
    for name in ("sign", "ternary", "planes"):
        blind, told = (binarizers.cost(binarize(name, weight, m).values - weight, h).sum() for m in (None, h))
        assert float(told) < 0.5 * float(blind), name


def test_zero_counts_as_plus_one_and_codes_are_signs() -> None:
    weight = torch.tensor([[[0.0, -0.0, 1.0, -1.0, 2.0, -3.0] * 3]], dtype=torch.float64)
    for name in ("sign", "onebit", "salient"):
        made = binarize(name, weight)
        assert bool((made.planes.sum(0)[weight == 0] == 1).all()), name
        assert set(made.planes.sum(0).flatten().tolist()) == {-1.0, 1.0}, name
    assert float(binarize("sign", torch.zeros_like(weight)).values.abs().max()) == 0.0


def test_planes_are_signs_and_ternary_planes_hold_zeros() -> None:
    weight = weights(1)
    assert set(binarize("planes", weight).planes.flatten().tolist()) == {-1.0, 1.0}
    assert len(binarize("planes", weight).planes) == 2
    assert set(binarize("ternary", weight).planes.flatten().tolist()) == {-1.0, 0.0, 1.0}


def test_columns_of_different_sizes_are_what_column_scales_are_for() -> None:
    even, uneven = weights(5, 32, 36), weights(5, 32, 36) * torch.linspace(0.1, 3, 36, dtype=torch.float64)
    assert error("onebit", uneven) < 0.8 * error("sign", uneven)
    assert error("planes", uneven, columns=True) < 0.8 * error("planes", uneven)
    assert error("onebit", even) > 0.9 * error("sign", even)  # where columns are alike there is nothing to gain


def test_kernels_come_from_few_patterns_and_fewer_patterns_err_more() -> None:
    weight = weights(2, 32, 90)
    seen = []
    for count in (4, 32, 512):
        made = binarize("kernels", weight, options={"count": count})
        assert len(made.planes.reshape(-1, 9).unique(dim=0)) <= count
        seen.append(float((made.values - weight).square().sum()))
    assert seen[0] > seen[1] > seen[2]
    assert seen[2] == pytest.approx(nearest_signs(weight), rel=EXACT)


def test_salient_columns_get_a_magnitude_of_their_own() -> None:
    weight = weights(4, 16, 40)
    weight[:, :, 7] *= 8
    made = binarize("salient", weight)
    assert bool(made.grid.classes[7] == 1)
    assert error("salient", weight) < 0.8 * error("sign", weight)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ternary", {"rule": "median"}, "use searched or absmean"),
        ("elastic", {"bits": 3}, "use 1, 1.58 or 2"),
        ("kernels", {"count": 1}, "2 to 2\\^size patterns"),
        ("salient", {"shares": (2.0,)}, "shares from 0 to 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        binarize(name, weights(0), options=options)
