"""The default recipe on what breaks naive int8: outliers, masks, depthwise SiLU networks, post-LN and pre-LN."""

import pytest
import torch
from small_models import Samples, captured
from torch import Tensor, nn

from calibrate.graph import run
from calibrate.simulation import simulate
from convert.automatic import improve
from convert.compress import Builder, Compressed
from convert.planning import decide, family
from device_profiles import load


class Encoder(nn.Module):
    """A transformer encoder over 12 tokens of 32 numbers, mean-pooled; channel 3 of every norm may stand out."""

    def __init__(self, pre_norm: bool, outlier: float = 1.0, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=pre_norm, activation="gelu")
        self.layers = nn.ModuleList(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter[3] *= outlier
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.masked:  # additive, with the sentinels that transformers use: tokens whose first number is negative
            hidden = (x[:, None, None, :, 0] < -1.0).float() * torch.finfo(torch.float32).min
            mask = hidden.expand(-1, 4, 12, -1).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return x.mean(1)


class Depthwise(nn.Module):
    """Inverted residual blocks with SiLU and depthwise convolutions whose channels differ in range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.blocks = nn.ModuleList(self._block() for _ in range(2))
        self.head = nn.Linear(16, 10)

    @staticmethod
    def _block() -> nn.Module:
        depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        with torch.no_grad():
            depthwise.weight *= torch.logspace(-1, 1, 32).view(-1, 1, 1, 1)
        return nn.Sequential(
            nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.SiLU(), depthwise, nn.BatchNorm2d(32), nn.SiLU(),
            nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


TOKENS, IMAGES = (12, 32), (3, 16, 16)
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "planted outliers, post-LN": (Encoder(pre_norm=False, outlier=30.0), TOKENS),
    "planted outliers, pre-LN": (Encoder(pre_norm=True, outlier=30.0), TOKENS),
    "attention mask": (Encoder(pre_norm=False, masked=True), TOKENS),
    "depthwise SiLU": (Depthwise(), IMAGES),
    "post-LN": (Encoder(pre_norm=False), TOKENS),
    "pre-LN": (Encoder(pre_norm=True), TOKENS),
}


def made(name: str, target: str, recipe: str) -> tuple[Compressed, float]:
    """What a recipe makes of a model, and the mean cosine of its simulation with float on unseen samples."""
    module, shape = MODELS[name]
    model = captured(module, torch.randn(2, *shape))
    draw = torch.Generator().manual_seed(5)
    data = Samples(model.inputs[0].name, torch.randn(64, *shape, generator=draw).numpy())
    builder = Builder(model, data)
    decision = decide(model.graph, load("generic-x86"), target, recipe)
    result = improve(builder, decision, 20.0, "normal") if recipe == "auto" else builder.build(decision)
    x = torch.randn(64, *shape, generator=draw)
    (wanted,), (got,) = run(model.graph, [x]), simulate(result.graph)([x])
    return result, float(nn.functional.cosine_similarity(wanted, got).mean())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "tflite"])
@pytest.mark.parametrize("name", MODELS)
def test_the_default_recipe_keeps_the_function_and_says_what_it_did(name: str, target: str) -> None:
    result, cosine = made(name, target, "auto")
    assert cosine > 0.99
    assert any(e.action.startswith("int8") for e in result.ledger)
    assert any(e.step == "auto" for e in result.ledger)
    assert "dB" in result.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention mask", "post-LN", "pre-LN"])
def test_static_int8_of_an_encoder_does_not_collapse(name: str) -> None:
    """Post-LN encoders keep the residual stream in float by placement; a mask is no activation."""
    result, cosine = made(name, "onnx", "int8")
    assert family(result.graph) == "transformer"
    assert cosine > 0.98


def test_an_outlier_is_what_breaks_the_plain_recipe() -> None:
    """The negative control: without the search the planted outliers cost drift that auto wins back."""
    plain = made("planted outliers, pre-LN", "onnx", "int8-dynamic")[1]
    best = made("planted outliers, pre-LN", "onnx", "auto")[1]
    assert 1 - best < 0.7 * (1 - plain)
