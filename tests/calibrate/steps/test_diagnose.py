"""What int8 will break is found, named with the step that helps, and not found where it is not."""

import pytest
import torch
from small_graphs import ISLANDS, capture, context, images
from torch import Tensor, nn

from calibrate import steps
from calibrate.plan import Entry


def examined(model: nn.Module, *batches: Tensor) -> list[Entry]:
    return steps.apply("diagnose", capture(model, batches[0]), context(ISLANDS, *[[b] for b in batches]))


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(seed))


def encoder(gain: float) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(32)
    with torch.no_grad():
        norm.weight[5] = gain
    return nn.Sequential(norm, nn.Linear(32, 8))


def test_a_planted_outlier_channel_is_named_with_its_number() -> None:
    (found,) = [e for e in examined(encoder(40.0), tokens()) if e.action == "smooth"]
    assert "1 of 32 input channels, most 5" in found.reason
    assert found.layer == "1"


def test_a_model_without_outliers_has_none() -> None:
    assert [e.action for e in examined(encoder(1.0), tokens())] == ["nothing found"]


def test_one_far_value_asks_for_clipped_ranges() -> None:
    torch.manual_seed(0)
    x = images(8, 3, 32)
    x[0, 0, 0, 0] = 400.0
    found = examined(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    assert any(e.action == "clip ranges" and "400" in e.reason for e in found)


def test_input_channels_of_uneven_weights_ask_for_equalization() -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        second.weight[:, 2] *= 100
    found = examined(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), second), images())
    assert [e.layer for e in found if e.action == "equalize"] == ["2"]


class Attention(nn.Module):
    """One head that may be made to look at the first token alone."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.v = gain, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        first = torch.cat([q[:, :, :1] * 0 + self.gain, torch.zeros_like(q[:, :, 1:])], 2)
        v = self.v(x).unflatten(-1, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q.abs() + 0.1, first, v)


@pytest.mark.parametrize(("gain", "expected"), [(20.0, True), (0.0, False)])
def test_heads_that_look_at_one_token_are_found(gain: float, expected: bool) -> None:
    torch.manual_seed(0)
    found = [e for e in examined(Attention(gain), tokens()) if e.action == "keep attention float"]
    assert bool(found) == expected
    assert all("heads 0, 1" in e.reason for e in found)


def test_a_layer_that_int8_ruins_by_itself_is_to_have_more_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 1)
    x = tokens()
    x[..., 0] = 3000 + x[..., 0]
    with torch.no_grad():
        layer.weight[:, 0] = 0.0
    found = examined(nn.Sequential(layer), x)
    assert any(e.action == "more bits" and e.layer == "0" for e in found)
