"""Rotations are orthogonal, keep the vector of ones, pass through LayerNorm and spread a channel over all."""

import pytest
import torch

from calibrate.rotation import hadamard, rotation

# float64 sums of at most 1536 products.
EXACT = 1e-10


@pytest.mark.parametrize("size", [1, 2, 12, 20, 64, 96, 192, 384, 30, 7])
def test_a_rotation_is_orthogonal_and_keeps_the_ones(size: int) -> None:
    turn = rotation(size, seed=3)
    assert float((turn @ turn.T - torch.eye(size)).abs().max()) < EXACT
    assert float((turn @ torch.ones(size, dtype=torch.float64) - 1).abs().max()) < EXACT
    assert torch.equal(turn, rotation(size, seed=3))


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 24, 40, 96, 160, 768])
def test_hadamard_matrices_have_rows_at_right_angles_and_a_first_column_of_ones(size: int) -> None:
    h = hadamard(size)
    assert h is not None
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(h[:, 0], torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 30, 100])
def test_sizes_that_have_none_are_said_to_have_none(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [30, 96])
def test_layer_norm_commutes_with_such_a_rotation_and_with_no_other(size: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64) * 3 + 1
    turn = rotation(size, 0)

    def norm(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(v, [size])

    assert float((norm(x @ turn) - norm(x) @ turn).abs().max()) < EXACT
    other = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    assert float((norm(x @ other) - norm(x) @ other).abs().max()) > 1e-2


def test_one_loud_channel_is_spread_over_all() -> None:
    x = torch.zeros(96, dtype=torch.float64)
    x[5] = 40.0
    assert float((x @ rotation(96, 0)).abs().max()) < 20.0
