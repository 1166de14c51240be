"""Weights of two to four levels in ONNX: bytes on disk, what the runtime keeps in memory, and exact kernels."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import capture, job
from torch import Tensor, nn

from calibrate import qdq
from calibrate.simulation import simulate
from targets import find
from targets._onnx_levels import EACH, LEVELS, SIGNS, TERNARY, form_of, pack, table_of

TARGET = find("onnx")
OUT, IN = 96, 128
BITS = {SIGNS: 1.0, TERNARY: 1.6, LEVELS: 2.0}
# A linear in float32 sums in another order than torch: values of magnitude 10, 128 products each.
FLOAT_TOLERANCE = 1e-5
# The shared table, the layer's nodes and their names, and the rest of a graph of one layer.
OVERHEAD = {SIGNS: 5200, TERNARY: 4400, LEVELS: 4400}


def codes_of(form: str, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(0)
    if form == LEVELS:
        row = torch.tensor([-60, -20, 20, 60]) + torch.arange(shape[0])[:, None] % 3 * torch.tensor([-1, -1, 1, 1])
        picked = torch.randint(0, 4, (shape[0], int(np.prod(shape[1:]))), generator=random)
        return row.gather(1, picked).reshape(shape).to(torch.int8)
    signs = torch.randint(0, 2, shape, generator=random) * 2 - 1
    return (signs if form == SIGNS else torch.randint(-1, 2, shape, generator=random)).to(torch.int8)


class Layer(nn.Module):
    """A linear or a convolution whose codes have few levels; `how`: dynamic, static or beside float activations."""

    def __init__(self, form: str, how: str, conv: bool = False, width: int = IN) -> None:
        super().__init__()
        shape = (OUT, 32, 3, 3) if conv else (OUT, width)
        self.how, self.conv, self.few = how, conv, form != LEVELS
        self.register_buffer("codes", codes_of(form, shape))
        self.register_buffer("scales", torch.rand(OUT, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001)
        self.register_buffer("zeros", torch.zeros(OUT, dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(OUT))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dynamic":
            return qdq.DYNAMIC_LINEAR(x, self.codes, self.scales, self.bias, "tensor_uint8", 1 if self.few else 8)
        low, high = (-1, 1) if self.few else (-63, 63)
        weight = qdq.DEQUANTIZE_CHANNEL(self.codes, self.scales, self.zeros, 0, low, high, torch.int8)
        if self.how == "static":
            x = qdq.DEQUANTIZE(qdq.QUANTIZE(x, 0.02, 128, 0, 255, torch.uint8), 0.02, 128, 0, 255, torch.uint8)
        y = nn.functional.conv2d(x, weight, padding=1) if self.conv else nn.functional.linear(x, weight)
        if self.how == "static":
            y = qdq.DEQUANTIZE(qdq.QUANTIZE(y, 0.05, 128, 0, 255, torch.uint8), 0.05, 128, 0, 255, torch.uint8)
        return y


def input_of(layer: Layer) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randn((1, 32, 6, 6) if layer.conv else (3, layer.codes.shape[1]), generator=random)


def lowered(layer: Layer, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(the artifact's output, the simulation's); the file passes onnx's checker."""
    x = input_of(layer)
    graph = capture(layer, (x,))
    TARGET.lower(job(graph, {"x": x}), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return TARGET.open(path).run({"x": x.numpy()})["y"], simulate(graph)([x])[0].numpy()


def optimised(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """The constants that ONNX Runtime holds once it has optimised the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = onnx.load(folder / "optimised.onnx").graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in found}


@pytest.mark.parametrize("form", [SIGNS, TERNARY, LEVELS])
@pytest.mark.parametrize(("how", "conv"), [("dynamic", False), ("static", False), ("static", True), ("float", False)])
def test_a_file_has_the_bits_asked_for_and_computes_what_the_simulation_does(
    form: str, how: str, conv: bool, tmp_path: Path
) -> None:
    layer, path = Layer(form, how, conv), tmp_path / "layer.onnx"
    got, expected = lowered(layer, path)
    np.testing.assert_allclose(got, expected, rtol=0, atol=0 if how == "static" else FLOAT_TOLERANCE)
    count = layer.codes.numel()
    scales = OUT * (4 + 4 * (form == LEVELS) + 4 * (how != "float" and how != "dynamic"))
    predicted = count * BITS[form] / 8 + scales
    assert path.stat().st_size <= predicted + OVERHEAD[form]
    assert path.stat().st_size >= predicted
    assert {o.version for o in onnx.load(path).opset_import if not o.domain} == {18}


@pytest.mark.parametrize("form", [SIGNS, TERNARY, LEVELS])
@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_what_stays_in_memory_is_a_byte_per_weight_where_activations_are_codes(
    form: str, how: str, tmp_path: Path
) -> None:
    layer, path = Layer(form, how), tmp_path / "layer.onnx"
    lowered(layer, path)
    held = [a for a in optimised(path, tmp_path).values() if a.size == layer.codes.numel()]
    assert [a.dtype for a in held] == [np.int8]


def test_beside_float_activations_it_is_a_float_per_weight_as_the_documentation_says(tmp_path: Path) -> None:
    layer, path = Layer(SIGNS, "float"), tmp_path / "layer.onnx"
    lowered(layer, path)
    held = [a for a in optimised(path, tmp_path).values() if a.size == layer.codes.numel()]
    assert [a.dtype for a in held] == [np.float32]
    assert path.stat().st_size < held[0].nbytes / 8


def test_rows_that_are_no_multiple_of_a_byte_come_back_whole(tmp_path: Path) -> None:
    for form in (SIGNS, TERNARY, LEVELS):
        got, expected = lowered(Layer(form, "dynamic", width=131), tmp_path / f"{form}.onnx")
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT_TOLERANCE)


def test_a_changed_byte_of_the_signs_changes_the_output(tmp_path: Path) -> None:
    layer, path = Layer(SIGNS, "dynamic"), tmp_path / "layer.onnx"
    got, _ = lowered(layer, path)
    model = onnx.load(path)
    (signs,) = [t for t in model.graph.initializer if t.name.endswith("_signs") and t.dims[0] > 256]
    signs.raw_data = bytes([signs.raw_data[0] ^ 1]) + signs.raw_data[1:]
    onnx.save(model, path)
    other = TARGET.open(path).run({"x": input_of(layer).numpy()})["y"]
    assert (np.abs(other - got) > FLOAT_TOLERANCE).any(0).sum() == 1  # one weight, so one output neuron


def test_weights_of_many_levels_are_left_as_they_are() -> None:
    random = np.random.default_rng(0)
    assert form_of(random.integers(-63, 64, (16, 32), dtype=np.int8)) is None
    assert form_of(random.integers(-2, 2, (16, 32), dtype=np.int8)) == LEVELS
    assert form_of(codes_of(LEVELS, (16, 32)).numpy()) == LEVELS
    assert form_of(np.ascontiguousarray(codes_of(LEVELS, (16, 32)).numpy().T)) == LEVELS


@given(st.data(), st.sampled_from([SIGNS, TERNARY, LEVELS]), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_bytes_say_what_was_packed(data: st.DataObject, form: str, count: int) -> None:
    base = {SIGNS: 2, TERNARY: 3, LEVELS: 4}[form]
    digits = np.array(data.draw(st.lists(st.integers(0, base - 1), min_size=count, max_size=count)), np.int64)
    meaning = {SIGNS: 2 * digits - 1, TERNARY: digits - 1, LEVELS: digits}[form]
    packed = pack(digits, form)
    assert len(packed) == -(-count // EACH[form])
    assert np.array_equal(table_of(form)[packed].reshape(-1)[:count], meaning)
