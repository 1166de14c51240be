"""8-bit floats, 16-bit activations and palettes: written where a runtime has them, refused or named where not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import capture, job
from torch import Tensor, nn

from calibrate import qdq
from calibrate.simulation import simulate
from targets import find
from targets.errors import TargetError

TARGET = find("onnx")


class Float8(nn.Module):
    """A linear whose input and weight are 8-bit floats."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        largest = torch.finfo(qdq.FLOAT8[kind]).max
        self.kind = kind
        self.register_buffer("scales", weight.abs().amax(1) / largest)
        self.register_buffer("codes", qdq.quantize_float8(weight, self.scales, kind))
        self.register_buffer("scale", torch.tensor(3.0 / largest))

    def forward(self, x: Tensor) -> Tensor:
        x = qdq.DEQUANTIZE_FLOAT8(qdq.QUANTIZE_FLOAT8(x, self.scale, self.kind), self.scale)
        return nn.functional.linear(x, qdq.DEQUANTIZE_FLOAT8(self.codes, self.scales))


class Wide(nn.Module):
    """A linear between 16-bit activations."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("codes", torch.randint(-63, 64, (8, 16), dtype=torch.int8, generator=generator))
        self.register_buffer("scales", torch.rand(8, generator=generator) * 0.01 + 0.001)
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        weight = qdq.DEQUANTIZE_CHANNEL(self.codes, self.scales, self.zeros, 0, -63, 63, torch.int8)
        return self.coded(torch.relu(nn.functional.linear(self.coded(x), weight)))

    def coded(self, x: Tensor) -> Tensor:
        codes = qdq.QUANTIZE(x, 2.0**-13, 0, -32768, 32767, torch.int16)
        return qdq.DEQUANTIZE(codes, 2.0**-13, 0, -32768, 32767, torch.int16)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2))


def test_tensorrt_gets_8_bit_floats_that_saturate_and_round_as_simulated(x: Tensor, tmp_path: Path) -> None:
    x[0, 0, 0] = 100.0  # beyond the scale's reach
    graph, path = capture(Float8("float8_e4m3"), (x,)), tmp_path / "m.onnx"
    work = job(graph, {"x": x}, runtime="tensorrt", opset=17)
    TARGET.lower(work, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 19
    weight = next(t for t in model.graph.initializer if np.prod(t.dims) == 8 * 16)
    assert weight.data_type == onnx.TensorProto.FLOAT8E4M3FN
    output = TARGET.open(path).run({"x": x.numpy()})["y"]
    # The runtime multiplies the dequantized numbers in float32, 16 products of magnitude 10 in its own order.
    np.testing.assert_allclose(output, simulate(graph)([x])[0].numpy(), atol=1e-5, rtol=0)
    assert np.abs(output - nn.functional.linear(x, graph(x).new_zeros(8, 16)).numpy()).max() > 0.1  # not nothing


class Float8Chain(nn.Module):
    """Convolutions on 8-bit floats with what runtimes like to fuse or move between them: relu, max_pool, a reshape."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("first", (8, 3, 3, 3)), ("second", (8, 8, 3, 3)), ("head", (5, 8 * 16))):
            weight = torch.randn(shape, generator=generator) / 3
            scales = weight.flatten(1).abs().amax(1) / 448
            self.register_buffer(f"{name}_codes", qdq.quantize_float8(weight, scales, "float8_e4m3"))
            self.register_buffer(f"{name}_scales", scales)
        self.register_buffer("bias", torch.randn(8, generator=generator))
        self.register_buffer("scale", torch.tensor(6.0 / 448))

    def coded(self, x: Tensor) -> Tensor:
        return qdq.DEQUANTIZE_FLOAT8(qdq.QUANTIZE_FLOAT8(x, self.scale, "float8_e4m3"), self.scale)

    def weight(self, name: str) -> Tensor:
        return qdq.DEQUANTIZE_FLOAT8(getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(nn.functional.conv2d(self.coded(x), self.weight("first"), self.bias, padding=1))
        y = self.activation(nn.functional.conv2d(self.coded(y), self.weight("second"), self.bias, padding=1))
        y = self.coded(nn.functional.max_pool2d(y, 2)).flatten(1)
        return nn.functional.linear(self.coded(y), self.weight("head"))


@pytest.mark.parametrize("activation", [torch.relu, nn.functional.relu6])
def test_a_runtime_that_fuses_integers_does_not_take_8_bit_floats_for_such(
    activation: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    graph, path = capture(Float8Chain(activation), (x,)), tmp_path / "m.onnx"
    work = job(graph, {"x": x}, runtime="tensorrt", opset=20)
    TARGET.lower(work, path)
    expected = simulate(graph)([x])[0].numpy()
    # A sum in another order may tip a value to the next of 8 numbers per power of two: of 128 inputs of the last layer
    # a few, by 0.5 at most, times weights of 0.3.
    got = TARGET.open(path).run({"x": x.numpy()})["y"]
    assert np.abs(got - expected).max() < 0.3
    placed = TARGET.placement(path, work)
    assert (placed.int8_ops, placed.fallbacks) == (3, ())
    assert placed.kinds["float8 Conv (predicted, not run on TensorRT)"] == 2

    monkeypatch.setattr("targets._onnx_session.holds_float8", lambda path: False)
    if activation is torch.relu:
        wrong = TARGET.open(path).run({"x": x.numpy()})["y"]
        assert np.abs(wrong - expected).max() > 1  # the relus are gone
    else:
        with pytest.raises(TargetError, match="Unexpected data type for QuantizeLinear"):
            TARGET.open(path)


def test_tensorrt_has_no_8_bit_floats_of_the_other_kind(x: Tensor, tmp_path: Path) -> None:
    work = job(capture(Float8("float8_e5m2"), (x,)), {"x": x}, runtime="tensorrt", opset=19)
    with pytest.raises(TargetError, match="codes of float8_e5m2, not of int8, int4, float8_e4m3fn"):
        TARGET.lower(work, tmp_path / "m.onnx")


def test_8_bit_floats_are_refused_for_a_cpu(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="8-bit floats are computed by TensorRT"):
        TARGET.lower(job(capture(Float8("float8_e4m3"), (x,)), {"x": x}), tmp_path / "m.onnx")


def test_16_bit_activations_run_in_float_within_one_step_and_are_named(x: Tensor, tmp_path: Path) -> None:
    graph, path = capture(Wide(), (x,)), tmp_path / "m.onnx"
    work = job(graph, {"x": x})
    TARGET.lower(work, path)
    output, expected = TARGET.open(path).run({"x": x.numpy()})["y"], simulate(graph)([x])[0].numpy()
    assert np.abs(output - expected).max() <= 2.0**-13  # float sums may round to the neighbouring code
    assert np.mean(output == expected) > 0.8
    placed = TARGET.placement(path, work)
    assert placed.int8_ops == 0
    assert ["no integer kernels for 16-bit activations" in f.reason for f in placed.fallbacks] == [True]
    assert onnx.load(path).opset_import[0].version == 21


def test_a_palette_is_refused(tmp_path: Path) -> None:
    class Palette(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            indices = torch.zeros(4, 16, dtype=torch.uint8)
            return nn.functional.linear(x, qdq.LOOKUP(indices, torch.ones(4)))

    x = torch.randn(1, 16)
    with pytest.raises(TargetError, match="palettes are a Core ML format"):
        TARGET.lower(job(capture(Palette(), (x,)), {"x": x}), tmp_path / "m.onnx")
