"""Weights of few bits: packed in the file, exact beside the simulation, on integer kernels where there are any."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import capture, job
from torch import Tensor, nn

from calibrate import qdq
from calibrate.simulation import simulate
from targets import Placement, find
from targets._onnx_bits import _block
from targets.errors import TargetError

TARGET = find("onnx")
OUT, IN = 48, 64
STORED = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}
OPSET = {8: 18, 4: 21, 2: 25}
# A linear in float32 sums in another order than torch: values of magnitude 10, 64 products each.
FLOAT_TOLERANCE = 1e-5


def code_range(bits: int) -> tuple[int, int]:
    return (-63, 63) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Coded(nn.Module):
    """A weight of `bits` bits, its scales per channel or per `group`; `reader` says what reads it."""

    def __init__(self, bits: int, group: int | None = None, reader: str = "linear") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(bits)
        self.bits, self.group, self.reader = bits, group, reader
        low, high = code_range(bits)
        self.register_buffer("codes", torch.randint(low, high + 1, (OUT, IN), dtype=torch.int8, generator=generator))
        shape = (OUT, IN // group) if group else (OUT,)
        self.register_buffer("scales", torch.rand(shape, generator=generator) * 0.01 + 0.001)
        self.register_buffer("zeros", torch.zeros(OUT, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(OUT, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        if self.reader == "dynamic":
            return qdq.DYNAMIC_LINEAR(x, self.codes, self.scales, self.bias, "tensor_uint8", self.bits)
        low, high = code_range(self.bits)
        if self.group:
            weight = qdq.DEQUANTIZE_GROUP(
                self.codes, self.scales, None, low, high, torch.int8, self.group, torch.float32
            )
        else:
            weight = qdq.DEQUANTIZE_CHANNEL(self.codes, self.scales, self.zeros, 0, low, high, torch.int8)
        if self.reader == "table":
            return nn.functional.embedding(x, weight)
        if self.reader == "static":
            x = qdq.DEQUANTIZE(qdq.QUANTIZE(x, 0.02, 128, 0, 255, torch.uint8), 0.02, 128, 0, 255, torch.uint8)
        return nn.functional.linear(x, weight)


def lower(model: nn.Module, x: Tensor, path: Path, **rules: object) -> tuple[np.ndarray, np.ndarray, Placement]:
    """(the artifact's output, the simulation's, placement); the file passes onnx's checker."""
    graph = capture(model, (x,))
    work = job(graph, {"x": x}, **rules)
    TARGET.lower(work, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    output = TARGET.open(path).run({"x": x.numpy()})["y"]
    return output, simulate(graph)([x])[0].numpy(), TARGET.placement(path, work)


def weight_bytes(path: Path) -> int:
    """Bytes of the tensors with as many elements as the weight, or its halves packed two in a byte."""
    tensors = onnx.load(path).graph.initializer
    return sum(len(t.raw_data) for t in tensors if t.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 5, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[3, 0, 47, 3, 11]])


@pytest.mark.parametrize("bits", [4, 2])
def test_dynamic_weights_of_few_bits_run_on_the_int8_kernel_bit_for_bit(bits: int, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected, placed = lower(Coded(bits, reader="dynamic"), x, path)
    np.testing.assert_array_equal(output, expected)
    assert placed.kinds == {"int8 DynamicQuantizeMatMul": 1, f"weights int{bits}": 1}
    assert weight_bytes(path) == OUT * IN * bits // 8
    assert onnx.load(path).opset_import[0].version == OPSET[bits]  # raised: the profile said 18


def test_a_static_convolution_with_weights_of_4_bits_runs_on_codes(tmp_path: Path) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (8, 4, 3, 3), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(8) * 0.01 + 0.01)
            self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            def coded(v: Tensor) -> Tensor:
                codes = qdq.QUANTIZE(v, 0.03, 128, 0, 255, torch.uint8)
                return qdq.DEQUANTIZE(codes, 0.03, 128, 0, 255, torch.uint8)

            weight = qdq.DEQUANTIZE_CHANNEL(self.codes, self.scales, self.zeros, 0, -8, 7, torch.int8)
            return coded(nn.functional.conv2d(coded(x), weight))

    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    output, expected, placed = lower(Conv(), torch.randn(1, 4, 6, 6), path)
    np.testing.assert_array_equal(output, expected)
    assert placed.kinds["int8 QLinearConv"] == 1
    assert placed.kinds["weights int4"] == 1
    assert placed.fallbacks == ()


@pytest.mark.parametrize(("bits", "group"), [(4, None), (2, None), (8, 16), (2, 16), (4, 8)])
def test_weights_alone_are_dequantized_at_load(bits: int, group: int | None, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected, placed = lower(Coded(bits, group), x, path)
    np.testing.assert_allclose(output, expected, atol=FLOAT_TOLERANCE, rtol=0)
    assert placed.kinds["float MatMul"] == 1
    assert placed.float_ops == 1  # nothing is left of the Cast and the scales: folded
    assert weight_bytes(path) == OUT * IN * bits // 8
    assert placed.fallbacks == ()


def test_groups_of_4_bits_stay_packed_in_memory_and_are_multiplied_in_float(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected, placed = lower(Coded(4, 16), x, path)
    np.testing.assert_allclose(output, expected, atol=FLOAT_TOLERANCE, rtol=0)
    assert placed.kinds == {"float MatMulNBits": 1, "weights int4": 1}
    assert weight_bytes(path) == OUT * IN // 2
    model = onnx.load(path)
    level = next(a for a in model.graph.node[0].attribute if a.name == "accuracy_level")
    level.i = 4  # quantizes the activation: the tolerance must notice
    onnx.save(model, path)
    rough = TARGET.open(path).run({"x": x.numpy()})["y"]
    assert np.abs(rough - expected).max() > 100 * FLOAT_TOLERANCE


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (2, None), (8, 16), (4, 16), (4, 8)])
def test_tables_are_looked_up_as_codes(bits: int, group: int | None, ids: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected, _ = lower(Coded(bits, group, "table"), ids, path)
    np.testing.assert_array_equal(output, expected)
    assert weight_bytes(path) == OUT * IN * bits // 8
    from targets._onnx_placement import optimised

    at_run_time = optimised(path).graph.initializer
    floats = [t for t in at_run_time if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) >= OUT * IN]
    assert floats == []  # the table is nowhere float


def test_groups_beside_static_activations_are_named_as_float(x: Tensor, tmp_path: Path) -> None:
    output, expected, placed = lower(Coded(4, 16, "static"), x, tmp_path / "m.onnx")
    np.testing.assert_allclose(output, expected, atol=FLOAT_TOLERANCE, rtol=0)
    assert placed.int8_ops == 0
    assert [f.reason for f in placed.fallbacks] == [
        f"ONNX Runtime {find_version()} runs it in float: it has no integer kernel for weights with one scale per group"
    ]


def find_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def test_groups_beside_dynamic_activations_are_refused(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="one scale per channel, or weights only"):
        TARGET.lower(job(capture(Coded(4, 16, "dynamic"), (x,)), {"x": x}), tmp_path / "m.onnx")


def test_tensorrt_gets_blocks_of_int4_and_no_2_bits(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected, placed = lower(Coded(4, 16), x, path, runtime="tensorrt", opset=17)
    np.testing.assert_allclose(output, expected, atol=FLOAT_TOLERANCE, rtol=0)
    model = onnx.load(path)
    assert model.opset_import[0].version == 21
    assert [n.op_type for n in model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.INT4, onnx.TensorProto.FLOAT}
    assert any(kind.startswith("weights DequantizeLinear") for kind in placed.kinds)
    with pytest.raises(TargetError, match="TensorRT has no weights of 2 bits"):
        TARGET.lower(job(capture(Coded(2, 16), (x,)), {"x": x}, runtime="tensorrt"), path)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 20_000), groups=st.integers(1, 64))
def test_a_block_holds_a_whole_group_or_there_is_none(width: int, groups: int) -> None:
    block = _block(width * groups, groups)
    if block is None:
        assert groups > 1 or width > 1 << 14
    elif groups == 1:
        assert block >= width
    else:
        assert block == width
    assert block is None or block & (block - 1) == 0
