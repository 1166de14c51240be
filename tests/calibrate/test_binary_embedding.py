"""The rotation behind binary embeddings: orthonormal, closer to signs than where it began, the same every time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrate.binary_embedding import default_bits, fit, sign
from calibrate.errors import CalibrationError
from calibrate.packed_codes import neighbours, pack, recall, search


def clusters(count: int, width: int, seed: int = 0) -> Tensor:
    """Vectors around a mean far from zero, more spread along some axes than others."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.2, width)
    centres = torch.randn(12, width, generator=random) * spread
    noise = torch.randn(count, width, generator=random) * spread * 0.5
    return centres[torch.randint(12, (count,), generator=random)] + noise + 3


@given(st.integers(2, 20), st.sampled_from([8, 16, 24]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_rotation_has_orthonormal_rows_or_columns(width: int, bits: int, seed: int) -> None:
    weight = fit(clusters(50, width, seed), bits, seed=seed).weight
    product = weight.T @ weight if bits >= width else weight @ weight.T
    torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-9)


def test_itq_loses_less_to_the_sign_than_the_rotation_it_began_with() -> None:
    x = clusters(400, 16)

    def lost(rounds: int) -> float:
        code = fit(x, 16, rounds=rounds)
        y = x.double() @ code.weight.T + code.bias
        return float((y - sign(y)).square().sum())

    assert lost(50) < 0.9 * lost(0)


def test_a_fitted_code_finds_more_neighbours_than_signs_alone_and_two_planes_more_than_one() -> None:
    fitted, held = clusters(1200, 32)[:800], clusters(1200, 32)[800:]
    wanted = neighbours(held.numpy(), held.numpy(), 10)

    def found(codes: Tensor, planes: int = 1) -> float:
        packed = pack(codes.numpy())
        return recall(search(packed, packed, 10, planes)[0], wanted)

    one, two = fit(fitted, 32), fit(fitted, 32, planes=2)
    shares = found(sign(held)), found(one.codes(held)), found(two.codes(held), 2)
    assert shares[0] + 0.05 < shares[1] < shares[2] - 0.05, shares


def test_zeros_of_either_sign_are_plus_one() -> None:
    assert sign(torch.tensor([0.0, -0.0, -1e-30, 1e-30])).tolist() == [1, 1, -1, 1]


def test_the_second_plane_codes_what_the_first_leaves() -> None:
    x = clusters(100, 8)
    code = fit(x, 8, planes=2)
    made = code.codes(x)
    y = x.double() @ code.weight.T + code.bias
    assert torch.equal(made[:, :8], sign(y))
    assert torch.equal(made[:, 8:], sign(y - y.abs().mean(0) * sign(y)))
    assert torch.equal(made, fit(x, 8, planes=2).codes(x))


def test_bits_default_to_the_width_in_whole_bytes() -> None:
    assert [default_bits(n) for n in (2, 8, 9, 384)] == [8, 8, 16, 384]


@pytest.mark.parametrize(
    ("given_", "said"),
    [({"bits": 12}, "multiple of 8"), ({"bits": 0}, "multiple of 8"), ({"bits": 8, "planes": 3}, "1 or 2")],
)
def test_wishes_that_cannot_be_are_refused(given_: dict[str, int], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        fit(clusters(40, 8), **given_)


def test_embeddings_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        fit(clusters(40, 8) / 0 * 0, 8)
