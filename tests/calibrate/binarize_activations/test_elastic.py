"""Elastic signs: the scale is the best for its thresholds, and the offset leaves no mean error."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.binarize_activations import find
from calibrate.surrogates import sign


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["channel", "tensor", "zero"]))
def test_no_other_scale_and_no_mean_is_left(seed: int, nonnegative: bool, threshold: str) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, 4, 4, generator=random) * (1 + torch.rand(5, 1, 1, generator=random))
    x = x.relu() if nonnegative else x
    found = find("elastic").fit([x[:3], x[3:]], (5, 1, 1), {"threshold": threshold})
    signs = sign(x - found.threshold)
    made = found.scale * signs + found.offset.float().view(5, 1, 1)
    torch.testing.assert_close((x - made).mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    best = float(((x - found.threshold) * signs).mean())
    assert abs(found.scale - best) <= 1e-5 * max(1.0, best)
    if nonnegative and threshold == "channel":
        assert bool((signs.amin((0, 2, 3)) == -1).all())  # zeros behind a ReLU and the rest are told apart
        assert bool((signs.amax((0, 2, 3)) == 1).all())


def test_a_constant_input_has_a_scale_that_serves() -> None:
    found = find("elastic").fit([torch.zeros(4, 3)], (3,), {"threshold": "channel"})
    assert found.scale == 1.0
    assert torch.equal(found.offset, torch.full((3,), -1.0, dtype=torch.float64))
