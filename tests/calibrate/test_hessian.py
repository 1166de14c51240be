"""Rounding under second moments: against plain rounding, against the eager update, and where H is singular."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrate.hessian import cost, damped, descend, factor, gptq, gram, importance_order, ridge

LOW, HIGH = -4, 3


def correlated(rows: int, width: int, seed: int, groups: int = 1) -> Tensor:
    """Inputs float32 [groups, rows, width] whose columns share a few causes, as activations do."""
    random = torch.Generator().manual_seed(seed)
    causes = torch.randn(groups, rows, max(width // 4, 1), generator=random)
    mixed = causes @ torch.randn(groups, max(width // 4, 1), width, generator=random)
    return mixed + 0.3 * torch.randn(groups, rows, width, generator=random)


def weights(out: int, width: int, seed: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Weights float64 [groups, out, width] and a step for 3 bits in the same shape."""
    weight = torch.randn(groups, out, width, generator=torch.Generator().manual_seed(seed + 1)).double()
    return weight, (weight.abs().amax(2, keepdim=True) / -LOW).expand_as(weight).clone()


def nearest(weight: Tensor, step: Tensor) -> Tensor:
    return torch.round(weight / step).clamp(LOW, HIGH)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 40), st.sampled_from([1, 3]))
def test_on_correlated_inputs_it_costs_less_than_rounding_to_nearest(seed: int, width: int, groups: int) -> None:
    h = gram(correlated(256, width, seed, groups))
    weight, step = weights(12, width, seed, groups)
    codes, _ = gptq(weight, h, step, LOW, HIGH, order=importance_order(h, None))
    assert float(codes.min()) >= LOW
    assert float(codes.max()) <= HIGH
    assert torch.equal(codes, codes.round())
    assert float(cost(codes * step - weight, h).sum()) < float(cost(nearest(weight, step) * step - weight, h).sum())


def test_on_inputs_that_share_nothing_it_rounds_to_nearest() -> None:  # the negative control: nothing to make up with
    h = torch.diag_embed(torch.rand(1, 16, dtype=torch.float64) + 0.5)
    weight, step = weights(8, 16, 0)
    codes, _ = gptq(weight, h, step, LOW, HIGH, order=importance_order(h, None))
    assert torch.equal(codes, nearest(weight, step))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 31))
def test_lazy_blocks_give_the_codes_of_the_eager_update(seed: int, width: int, block: int) -> None:
    h = gram(correlated(128, width, seed))
    weight, step = weights(6, width, seed)
    order = importance_order(h, None)
    lazy, _ = gptq(weight, h, step, LOW, HIGH, order=order, block=block)
    assert torch.equal(lazy, _eager(weight[0], h[0], step[0], order[0])[None])


def _eager(weight: Tensor, h: Tensor, step: Tensor, order: Tensor) -> Tensor:
    """Optimal brain surgeon as the paper's equation 2 writes it: H of the open columns inverted anew at each."""
    w, codes = weight.clone(), torch.zeros_like(weight)
    h = damped(h[None], 0.01)[0]
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, column] = torch.round(w[:, column] / step[:, column]).clamp(LOW, HIGH)
        error = (w[:, column] - codes[:, column] * step[:, column]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return codes


def test_a_column_that_no_sample_used_is_rounded_to_nearest_and_touches_no_other() -> None:
    x = correlated(64, 12, 0)
    x[:, :, 5] = 0
    weight, step = weights(8, 12, 0)
    codes, _ = gptq(weight, gram(x), step, LOW, HIGH)
    assert torch.equal(codes[:, :, 5], nearest(weight, step)[:, :, 5])
    others = [i for i in range(12) if i != 5]
    alone, _ = gptq(weight[:, :, others], gram(x[:, :, others]), step[:, :, others], LOW, HIGH, damping=0.01 * 11 / 12)
    # One column less changes the mean of the diagonal and so the damping by an eleventh: 0.01 * 11/12 * 12/11 with the
    # dead column's 1 against a diagonal of hundreds; a code in a tie may differ.
    assert float((alone != codes[:, :, others]).double().mean()) < 0.05


def test_fewer_rows_than_columns_are_no_obstacle_and_what_is_not_finite_is_refused() -> None:
    x = correlated(4, 32, 0)
    h = gram(x)
    assert int(torch.linalg.matrix_rank(h[0], rtol=1e-5)) <= 4
    weight, step = weights(8, 32, 0)
    codes, _ = gptq(weight, h, step, LOW, HIGH)
    assert float(cost(codes * step - weight, h).sum()) < float(cost(nearest(weight, step) * step - weight, h).sum())
    with pytest.raises(ValueError, match="not finite"):
        factor(torch.full((1, 4, 4), torch.nan, dtype=torch.float64))


def test_damping_grows_until_the_factor_exists() -> None:
    h = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]], dtype=torch.float64)  # indefinite: rounding errors can make such an H
    upper, share = factor(h, 0.01)
    assert share > 1
    assert torch.allclose(
        upper.transpose(1, 2) @ upper @ damped(h, share), torch.eye(2, dtype=torch.float64), atol=1e-9
    )
    _, plain = factor(torch.eye(3, dtype=torch.float64)[None], 0.01)
    assert plain == 0.01


def test_groups_are_visited_one_after_the_other_and_columns_stay_in_theirs() -> None:
    h = torch.diag_embed(torch.tensor([[1.0, 5.0, 2.0, 9.0, 3.0, 4.0]], dtype=torch.float64))
    assert importance_order(h, 2).tolist() == [[3, 2, 1, 0, 5, 4]]
    assert importance_order(h, None).tolist() == [[3, 1, 5, 4, 2, 0]]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_steps_fitted_at_each_group_are_the_steps_its_codes_have(seed: int, block: int) -> None:
    h = gram(correlated(256, 32, seed))
    weight, step = weights(8, 32, seed)
    seen: list[list[int]] = []

    def refit(current: Tensor, columns: Tensor) -> Tensor:
        seen.append(columns.tolist())
        return current.abs().amax(1) / -LOW

    codes, steps = gptq(weight, h, step, LOW, HIGH, order=importance_order(h, 8), group=8, refit=refit, block=block)
    assert sorted(sorted(columns) for columns in seen) == [list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    parts = steps.unflatten(2, (4, 8))
    assert torch.equal(parts, parts[..., :1].expand_as(parts))
    plain = weight.unflatten(2, (4, 8)).abs().amax(3, keepdim=True).div(-LOW).expand(1, 8, 4, 8).flatten(2)
    errors = [float(cost(q * s - weight, h).sum()) for q, s in ((codes, steps), (nearest(weight, plain), plain))]
    assert errors[0] < errors[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
def test_coordinate_descent_never_costs_more_and_ends_where_no_single_code_would_help(seed: int, groups: int) -> None:
    h = gram(correlated(128, 10, seed, groups))
    weight, step = weights(4, 10, seed, groups)
    start = nearest(weight, step)
    low, high = torch.full_like(start, LOW), torch.full_like(start, HIGH)
    codes, moved = descend(start, weight, h, step, low, high, passes=50)
    before, after = cost(start * step - weight, h), cost(codes * step - weight, h)
    assert bool((after <= before * (1 + 1e-12)).all())
    assert (moved > 0) == (not torch.equal(codes, start))
    for i in range(10):
        for change in (-1, 1):
            other = codes.clone()
            other[:, :, i] = (other[:, :, i] + change).clamp(LOW, HIGH)
            assert bool((cost(other * step - weight, h) >= after * (1 - 1e-9)).all())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_ridge_finds_the_change_and_the_bias_that_were_made(seed: int) -> None:
    x = torch.randn(2, 400, 6, generator=torch.Generator().manual_seed(seed)) + 1.5
    truth = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed + 1))
    missing = x @ truth.transpose(1, 2) + 0.7
    change, bias = ridge(x, missing, 1e-9)
    assert torch.allclose(change, truth.double(), atol=1e-4)  # float32 sums over 400 rows
    assert torch.allclose(bias, torch.full_like(bias, 0.7), atol=1e-4)
    held_back, _ = ridge(x, missing, 10.0)
    assert float(held_back.norm()) < 0.2 * float(truth.norm())
