"""Static int8: what ONNX Runtime fuses, that its numbers are the simulation's, and that what stays float is named."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import Recipe, capture, job, quantize
from torch import Tensor, nn

from calibrate import qdq
from calibrate.graph import add_constant, finish
from calibrate.simulation import simulate
from calibrate.weights import store_half
from targets import find
from targets._onnx_int8 import bias_codes

TARGET = find("onnx")
INT8, UINT8 = torch.int8, torch.uint8


class Residual(nn.Module):
    """Convolutions, a strided and padded shortcut, a pool, a mean, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.a, self.b = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.b(torch.relu(self.a(x)))
        y = torch.relu(y + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(nn.functional.max_pool2d(y, 2).mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise and pointwise convolutions with relu6, a squeeze and excitation block, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.depth(nn.functional.relu6(self.expand(x))))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * torch.sigmoid(gate)
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return torch.relu(self.last(x)).flatten(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def lowered(model: nn.Module, x: Tensor, recipe: Recipe, path: Path, **rules: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    graph = quantize(capture(model, (x,)), (x,), recipe)
    work = job(graph, {"x": x}, **rules)
    TARGET.lower(work, path)
    return graph, work


@pytest.mark.parametrize("activation", [INT8, UINT8])
def test_a_residual_network_runs_wholly_on_codes(activation: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    graph, work = lowered(Residual(), x, Recipe(activation=activation), path)
    placed = TARGET.placement(path, work)
    assert placed.fallbacks == ()
    assert placed.float_ops == 0
    assert placed.conversions == 1  # the input becomes codes; the head writes floats itself
    assert placed.kinds["int8 QLinearConv"] == 3
    assert {"int8 QLinearAdd", "int8 QLinearGlobalAveragePool", "int8 QGemm", "int8 MaxPool"} <= placed.kinds.keys()
    session = TARGET.open(path)
    for _ in range(5):  # bit-equal but for sums within float32 rounding of a tie, which these seeds don't meet
        x = torch.randn(1, 3, 8, 8)
        np.testing.assert_array_equal(session.run({"x": x.numpy()})["y"], simulate(graph)([x])[0].numpy())


def test_depthwise_gates_and_concatenation_run_on_codes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    recipe = Recipe(compute=("conv", "linear", "add", "mean", "cat", "mul", "sigmoid"))
    _, work = lowered(Mobile(), x, recipe, path)
    placed = TARGET.placement(path, work)
    assert placed.fallbacks == ()
    assert placed.float_ops == 0
    assert {"int8 QLinearConcat", "int8 QLinearMul", "int8 QLinearSigmoid"} <= placed.kinds.keys()


def test_linears_of_three_axes_become_qgemm_and_equal_the_simulation(tmp_path: Path) -> None:
    torch.manual_seed(2)
    x, path = torch.randn(1, 6, 16), tmp_path / "m.onnx"
    graph, work = lowered(Tokens(), x, Recipe(compute=("linear",), moves=(), outputs=False), path)
    placed = TARGET.placement(path, work)
    assert placed.kinds["int8 QGemm"] == 2
    assert placed.fallbacks == ()
    output = TARGET.open(path).run({"x": x.numpy()})["y"]
    # LayerNorm and GELU sum in another order than torch: 1e-5 of magnitude 1 is far below one code of 0.02.
    np.testing.assert_allclose(output, simulate(graph)([x])[0].numpy(), atol=1e-5, rtol=0)


def test_biases_are_int32_codes_that_give_the_rounded_bias_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    lowered(Residual(), torch.randn(1, 3, 8, 8), Recipe(), path)
    biases = [t for t in onnx.load(path).graph.initializer if t.name.endswith("bias_codes")]
    assert len(biases) == 4
    assert all(t.data_type == onnx.TensorProto.INT32 for t in biases)


def test_a_bias_off_its_step_stays_float_instead_of_being_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    lowered(Residual(), torch.randn(1, 3, 8, 8), Recipe(int32_bias=False), path)
    assert not [t for t in onnx.load(path).graph.initializer if t.name.endswith("bias_codes")]


def test_a_convolution_whose_output_stays_float_is_named_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3))
    graph = capture(model, (x,))
    for node in graph.graph.nodes:
        if node.name == "conv2d":
            node.meta["layer"] = "stem.conv"
    graph = quantize(graph, (x,), Recipe(outputs=False))
    work = job(graph, {"x": x})
    TARGET.lower(work, path)
    placed = TARGET.placement(path, work)
    assert [f.node for f in placed.fallbacks] == ["conv2d_1", "stem.conv"]
    assert "Conv in float" in placed.fallbacks[0].reason
    assert placed.int8_ops == 0


@pytest.mark.parametrize("half", [False, True])
def test_a_float_layer_between_quantized_ones_is_not_quantized_by_the_runtime(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    model = Residual()
    model.a.weight.data[0] *= 20  # one scale for all of them leaves the others few codes
    graph = quantize(capture(model, (x,)), (x,), Recipe())
    node = next(n for n in graph.graph.nodes if n.name == "conv2d_1")
    weight = add_constant(graph, "float_weight", model.a.weight.detach(), node)
    node.args = (node.args[0], store_half(graph, weight) if half else weight, *node.args[2:])
    work = job(finish(graph), {"x": x})
    TARGET.lower(work, path)
    placed, expected = TARGET.placement(path, work), simulate(graph)([x])[0].numpy()
    assert placed.kinds["float Conv"] == 1
    assert placed.kinds["int8 QLinearConv"] == 2
    np.testing.assert_array_equal(TARGET.open(path).run({"x": x.numpy()})["y"], expected)

    monkeypatch.setattr("targets._onnx_int8.float_layers_stay_float", lambda model: None)
    TARGET.lower(work, path)
    assert TARGET.placement(path, work).kinds["int8 QLinearConv"] == 3  # the runtime's own idea
    assert not np.array_equal(TARGET.open(path).run({"x": x.numpy()})["y"], expected)


def test_a_layer_nobody_quantized_is_no_fallback(tmp_path: Path) -> None:
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    work = job(capture(nn.Conv2d(3, 4, 3), (x,)), {"x": x})
    TARGET.lower(work, path)
    placed = TARGET.placement(path, work)
    assert (placed.int8_ops, placed.float_ops, placed.fallbacks) == (0, 1, ())


def test_codes_of_a_narrower_range_are_refused(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes = qdq.QUANTIZE(x, 0.1, 0, -127, 127, INT8)
            return qdq.DEQUANTIZE(codes, 0.1, 0, -127, 127, INT8)

    x = torch.randn(1, 4)
    with pytest.raises(Exception, match=r"no codes of INT8 in \[-127, 127\]"):
        TARGET.lower(job(capture(Narrow(), (x,)), {"x": x}), tmp_path / "m.onnx")


@settings(max_examples=50, deadline=None)
@given(
    codes=st.lists(st.integers(-(2**23), 2**23), min_size=1, max_size=8),
    step=st.floats(2.0**-20, 1.0, width=32),
)
def test_bias_codes_are_found_again_from_the_float_bias(codes: list[int], step: float) -> None:
    steps = np.full(len(codes), step, np.float32)
    bias = (np.array(codes, np.float32) * steps).astype(np.float32)
    assert bias_codes(bias, steps).tolist() == codes


def test_a_bias_between_two_steps_or_beyond_int32_has_no_codes() -> None:
    step = np.array([0.25], np.float32)
    assert bias_codes(np.array([0.3], np.float32), step) is None
    assert bias_codes(np.array([1e10], np.float32), step) is None
    assert bias_codes(np.array([np.nan], np.float32), step) is None
