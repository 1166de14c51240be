"""What the roofline is fed: the work of float and quantized graphs, and the peaks of a profile."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import Samples, captured
from torch import Tensor, nn

import targets
from calibrate.samples import InputSpec
from convert import estimate_fit as fits
from convert.capture import Captured
from convert.compress import Builder
from convert.estimate import estimate
from convert.estimate_data import nets, pairs
from convert.estimate_machine import DOT, NO_DOT, Processor, processor
from convert.estimate_work import Work, work
from convert.planning import decide
from convert.report.runs import Estimate
from device_profiles import DeviceProfile, load
from device_profiles.schema import Limit

# Multiply-accumulates in 10^6 and weights in 10^6, as the networks' papers give them.
PAPERS = {
    "mobilenet_v1": (569, 4.2),
    "mobilenet_v2": (300, 3.4),
    "mobilenet_v3_large": (219, 5.4),
    "resnet18": (1800, 11.7),
    "resnet50": (4100, 25.5),
    "vgg16": (15500, 138),
    "vit_b16": (17600, 86),
}


class Net(nn.Module):
    """A convolution with batch norm and relu, a depthwise one, a residual add, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.depthwise(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> Captured:
    torch.manual_seed(0)
    return captured(Net(), torch.zeros(2, 3, 16, 16))


def lowered(model: Captured, device: str, target: str, recipe: str) -> tuple[targets.Job, DeviceProfile]:
    """The job of a recipe on a device, and its profile."""
    profile = load(device)
    decision = decide(model.graph, profile, target, recipe)
    x = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)
    (spec,) = model.inputs
    made = Builder(model, Samples(spec.name, x)).build(decision)
    inputs = (InputSpec(spec.name, (1, 3, 16, 16), "float32", False),)
    return targets.Job("net", made.graph, inputs, ("output",), decision.rules, decision.compute), profile


def guess(model: Captured, device: str, target: str, recipe: str, threads: int = 4) -> Estimate | str:
    """The estimate, as if the file had become what was asked for."""
    job, profile = lowered(model, device, target, recipe)
    return estimate(job, model.graph, targets.Placement(5, 0, 0), profile, threads)


def test_a_float_network_is_its_layers_and_no_more(model: Captured) -> None:
    found = work(model.graph, (InputSpec("x", (1, 3, 16, 16), "float32", False),))
    assert [one.macs for one in found] == [256 * 8 * 27, 256 * 8 * 9, 0, 0, 32]  # norm and relu are in the first
    assert [one.depthwise for one in found] == [False, True, False, False, False]
    assert [one.square for one in found] == [True, False, False, False, False]
    assert found[0].weight_bytes == 4 * (8 * 27 + 8)
    assert found[0].numbers == 256 * (3 + 8)
    assert {one.format for one in found} == {"float32"}


def test_a_quantized_one_computes_on_codes_between_two_conversions(model: Captured) -> None:
    job, _ = lowered(model, "raspberry-pi-4b", "tflite", "int8")
    found = work(job.graph, job.inputs)
    layers = [one for one in found if one.macs]
    assert [one.format for one in layers] == ["int8", "int8", "int8"]
    assert layers[0].bytes < 0.3 * 4 * (8 * 27 + 8 + 256 * 11)
    assert sum(one.conversion for one in found) == 2  # the input's, the output's


def test_a_layer_that_fell_back_is_float_and_needs_conversions(model: Captured) -> None:
    job, _ = lowered(model, "raspberry-pi-4b", "tflite", "int8")
    found = work(job.graph, job.inputs, stayed_float={"depthwise"})
    assert [one.format for one in found if one.macs] == ["int8", "float32", "int8"]
    assert sum(one.conversion for one in found) > 2


def test_dynamic_layers_convert_their_inputs(model: Captured) -> None:
    job, _ = lowered(model, "raspberry-pi-4b", "onnx", "int8-dynamic")
    found = work(job.graph, job.inputs)
    narrow = sum(one.format == "int8" for one in found)
    assert narrow
    assert sum(one.conversion for one in found) == narrow


def test_the_stored_networks_are_those_of_the_papers() -> None:
    for name, (macs, weights) in PAPERS.items():
        found = nets()[name]
        assert sum(one.macs * one.count for one in found) / 1e6 == pytest.approx(macs, rel=0.03), name
        assert sum(one.weight_bytes * one.count for one in found) / 4e6 == pytest.approx(weights, rel=0.03), name


def test_a_processor_is_what_its_profile_states_and_what_follows() -> None:
    four, five = processor(load("raspberry-pi-4b")), processor(load("raspberry-pi-5"))
    assert isinstance(four, Processor)
    assert isinstance(five, Processor)
    assert four.peaks == {"float32": 48.0, NO_DOT: 96.0}
    assert "int8 peak derived" in four.derived[0]
    assert five.peaks == {"float32": 153.6, "float16": 307.2, DOT: 614.4}
    assert not five.derived
    assert (four.number_class("float16"), five.number_class("float16")) == ("float32", "float16")
    nano = processor(load("jetson-nano"))
    assert isinstance(nano, Processor)
    assert nano.peaks["float32"] == pytest.approx(4 * 1.48 * 8)
    assert "recalled" in nano.derived[0]


@pytest.mark.parametrize(
    ("device", "words"),
    [("generic-x86", "no clock"), ("pixel-tensor", "no clock"), ("raspberry-pi-3b-plus", "bandwidth")],
)
def test_what_no_one_states_is_not_guessed(device: str, words: str) -> None:
    found = processor(load(device))
    assert isinstance(found, str)
    assert words in found


def test_more_work_fewer_cores_and_no_dot_product_take_longer(model: Captured) -> None:
    four, five = (guess(model, f"raspberry-pi-{name}", "tflite", "int8") for name in ("4b", "5"))
    one = guess(model, "raspberry-pi-4b", "tflite", "int8", threads=1)
    assert isinstance(four, Estimate)
    assert isinstance(five, Estimate)
    assert isinstance(one, Estimate)
    assert five.mid_ms < four.mid_ms < one.mid_ms
    assert four.float_mid_ms is not None
    assert four.mid_ms < four.float_mid_ms
    assert (four.threads, one.threads) == (4, 1)
    chip = processor(load("raspberry-pi-4b"))
    assert isinstance(chip, Processor)
    layer = Work("float32", False, False, 10**8, 1e5, 10**5)
    fitted = fits.fitted("processors")
    small, large = (
        fitted.seconds(fits.on_processor([replace(layer, macs=m)], chip, "litert", 4)) for m in (10**8, 10**9)
    )
    assert large > 5 * small


def test_a_float_artifact_takes_what_its_float_model_takes(model: Captured) -> None:
    found = guess(model, "raspberry-pi-4b", "tflite", "float32")
    assert isinstance(found, Estimate)
    assert found.mid_ms == pytest.approx(found.float_mid_ms)


def test_conversions_that_only_the_file_has_are_counted(model: Captured) -> None:
    job, profile = lowered(model, "raspberry-pi-4b", "tflite", "int8")
    few, many = (estimate(job, model.graph, targets.Placement(5, 0, n), profile, 4) for n in (2, 40))
    assert isinstance(few, Estimate)
    assert isinstance(many, Estimate)
    assert many.mid_ms > few.mid_ms


def test_what_was_measured_nowhere_has_a_reason_and_no_number(model: Captured) -> None:
    words = {
        ("jetson-orin-nano", "onnx", "int8"): "tensorrt on jetson-orin-nano",
        ("iphone-a15", "coreml", "float16"): "coreml on iphone-a15",
        ("raspberry-pi-5", "tflite", "w8a16"): "int16",
        ("generic-x86", "onnx", "int8"): "no clock",
        ("coral-edgetpu", "tflite", "float32"): "float",
    }
    for (device, target, recipe), expected in words.items():
        found = guess(model, device, target, recipe)
        assert isinstance(found, str), device
        assert found.startswith("no estimate: ")
        assert expected in found


def test_an_npu_that_cannot_take_an_operator_has_no_estimate(model: Captured) -> None:
    job, profile = lowered(model, "snapdragon-8-elite", "tflite", "int8")
    whole = estimate(job, model.graph, targets.Placement(5, 0, 0), profile, 4)
    assert isinstance(whole, Estimate)
    assert whole.threads is None
    broken = replace(job, rules=job.rules.model_copy(update={"unsupported": (Limit(op="conv", reason="it cannot"),)}))
    found = estimate(broken, model.graph, targets.Placement(5, 0, 0), profile, 4)
    assert isinstance(found, str)
    assert "does not run there" in found


def test_the_page_of_errors_is_about_the_stored_pairs() -> None:
    """A pair that was added or changed needs `python benchmarks/estimate.py` again."""
    page = (Path(__file__).parents[2] / "benchmarks" / "estimate_results.md").read_text(encoding="utf-8")
    for pair in pairs():
        assert any(
            f"| {pair.device} | {pair.runtime} |" in row and f"| {pair.net} |" in row and f"| {pair.ms:.3g} |" in row
            for row in page.splitlines()
        ), pair
