"""What every lowered ONNX file keeps: names, numbers, bytes; and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import Recipe, capture, job, quantize
from torch import nn

from calibrate import qdq
from targets import find
from targets.errors import TargetError

TARGET = find("onnx")
FLOAT_TOLERANCE = 1e-5  # float32 sums in another order, values of magnitude 1

torch.manual_seed(0)


class TwoWays(nn.Module):
    """Integer and float inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.attend(self.table(ids) + shift, src_key_padding_mask=mask == 0)
        return self.head(x[:, 0]), x


class Qkv(nn.Module):
    """Three dynamic linears on one tensor."""

    def __init__(self, scheme: str = "tensor_uint8") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.scheme = scheme
        for name in "qkv":
            # 7 bits: x86 without VNNI sums products with uint8 in 16 bits, which 8 bits overflow
            codes = torch.randint(-63, 64, (12, 16), dtype=torch.int8, generator=generator)
            self.register_buffer(f"codes_{name}", codes)
            self.register_buffer(f"scales_{name}", torch.rand(12, generator=generator) * 0.01 + 0.001)
            self.register_buffer(f"bias_{name}", torch.randn(12, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                qdq.DYNAMIC_LINEAR(
                    x,
                    getattr(self, f"codes_{n}"),
                    getattr(self, f"scales_{n}"),
                    getattr(self, f"bias_{n}"),
                    self.scheme,
                )
                for n in "qkv"
            ],
            -1,
        )


class WeightOnly(nn.Module):
    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half_weight = half
        weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
        scales = weight.abs().amax(1) / 127
        self.register_buffer("stored", weight.half() if half else torch.round(weight / scales[:, None]).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(32, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.half_weight:
            return nn.functional.linear(x, self.stored.to(torch.float32))
        weight = qdq.DEQUANTIZE_CHANNEL(self.stored, self.scales, self.zeros, 0, -127, 127, torch.int8)
        return nn.functional.linear(x, weight)


@pytest.fixture(scope="module")
def two_ways() -> tuple[torch.fx.GraphModule, dict[str, torch.Tensor]]:
    inputs = {
        "ids": torch.tensor([[3, 1, 4, 1]]),
        "mask": torch.tensor([[1, 1, 1, 0]]),
        "shift": torch.randn(1, 4, 8),
    }
    return capture(TwoWays(), tuple(inputs.values())), inputs


@pytest.fixture(scope="module")
def small_cnn() -> tuple[torch.fx.GraphModule, dict[str, torch.Tensor]]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x = torch.randn(1, 3, 8, 8)
    return quantize(capture(model, (x,)), (x,), Recipe()), {"x": x}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


def test_names_order_and_values_of_inputs_and_outputs_are_kept(two_ways, tmp_path: Path) -> None:
    graph, inputs = two_ways
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs, ("logits", "tokens")), path)
    model = onnx.load(path)
    assert [i.name for i in model.graph.input] == ["ids", "mask", "shift"]
    assert [o.name for o in model.graph.output] == ["logits", "tokens"]
    onnx.checker.check_model(model, full_check=True)
    outputs = TARGET.open(path).run(arrays(inputs))
    for name, expected in zip(("logits", "tokens"), graph(*inputs.values()), strict=True):
        np.testing.assert_allclose(outputs[name], expected.detach().numpy(), atol=FLOAT_TOLERANCE, rtol=0)


def test_a_bound_call_runs_and_the_executor_names_its_version(small_cnn, tmp_path: Path) -> None:
    graph, inputs = small_cnn
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs), path)
    session = TARGET.open(path)
    session.bind(arrays(inputs))()
    assert session.executor.startswith("ONNX Runtime 1.")
    assert "CPUExecutionProvider" in session.executor


def test_nothing_is_printed_and_nothing_machine_specific_is_written(small_cnn, tmp_path: Path, capfd) -> None:
    graph, inputs = small_cnn
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs), path)
    assert capfd.readouterr() == ("", "")
    content = path.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b".py" not in content
    assert not onnx.load(path).graph.value_info


LOWER_ALONE = """
import sys, torch
from pathlib import Path
from torch import nn
from onnx_graphs import capture, job
from targets import find
torch.manual_seed(3)
x = torch.ones(1, 3, 8, 8)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
find("onnx").lower(job(capture(net, (x,)), {"x": x}), Path(sys.argv[1]))
"""


def test_the_same_job_gives_the_same_bytes_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, child = tmp_path / "here.onnx", tmp_path / "child.onnx"
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(LOWER_ALONE, {})
    search = os.pathsep.join((str(Path(__file__).parents[2]), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": search}
    subprocess.run([sys.executable, "-c", LOWER_ALONE, str(child)], check=True, env=environment, capture_output=True)
    assert here.read_bytes() == child.read_bytes()


def test_dynamic_linears_equal_the_simulation_bit_for_bit_and_share_one_quantization(tmp_path: Path) -> None:
    x = torch.randn(1, 5, 16)
    graph, path = capture(Qkv(), (x,)), tmp_path / "m.onnx"
    work = job(graph, {"x": x})
    TARGET.lower(work, path)
    model = onnx.load(path)
    assert [n.op_type for n in model.graph.node].count("DynamicQuantizeLinear") == 1
    for scale in (0.1, 1.0, 30.0):
        output = TARGET.open(path).run({"x": (x * scale).numpy()})["y"]
        assert np.array_equal(output, graph(x * scale).numpy())
    placed = TARGET.placement(path, work)
    assert placed.int8_ops == 3
    assert placed.fallbacks == ()


def test_a_dynamic_linear_alone_becomes_one_fused_kernel(tmp_path: Path) -> None:
    class One(Qkv):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return qdq.DYNAMIC_LINEAR(x, self.codes_q, self.scales_q, self.bias_q, self.scheme)

    x = torch.randn(1, 5, 16)
    work, path = job(capture(One(), (x,)), {"x": x}), tmp_path / "m.onnx"
    TARGET.lower(work, path)
    assert TARGET.placement(path, work).kinds == {"int8 DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize(("half", "stored"), [(False, onnx.TensorProto.INT8), (True, onnx.TensorProto.FLOAT16)])
def test_compressed_weights_are_compressed_on_disk(half: bool, stored: int, tmp_path: Path) -> None:
    x = torch.randn(1, 5, 16)
    graph, path = capture(WeightOnly(half), (x,)), tmp_path / "m.onnx"
    TARGET.lower(job(graph, {"x": x}), path)
    weights = [t for t in onnx.load(path).graph.initializer if np.prod(t.dims) == 32 * 16]
    assert [t.data_type for t in weights] == [stored]
    assert TARGET.placement(path, job(graph, {"x": x})).kinds.get("weights float16", 0) == int(half)
    output = TARGET.open(path).run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(output, graph(x).numpy(), atol=FLOAT_TOLERANCE, rtol=0)


def test_one_changed_byte_of_a_weight_changes_the_outputs(small_cnn, tmp_path: Path) -> None:
    graph, inputs = small_cnn
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs), path)
    before = TARGET.open(path).run(arrays(inputs))["y"]
    model = onnx.load(path)
    codes = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4)
    at = path.read_bytes().index(codes.raw_data) + 7
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)
    assert not np.array_equal(before, TARGET.open(path).run(arrays(inputs))["y"])


def test_quantization_per_row_is_refused_with_the_runtime_as_reason(tmp_path: Path) -> None:
    x = torch.randn(1, 5, 16)
    with pytest.raises(TargetError, match=r"ONNX Runtime quantizes per tensor at run time; .* 'row_int8'"):
        TARGET.lower(job(capture(Qkv("row_int8"), (x,)), {"x": x}), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_a_dynamic_convolution_is_refused(tmp_path: Path) -> None:
    class Conv(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            codes = torch.ones(4, 3, 3, 3, dtype=torch.int8)
            return qdq.DYNAMIC_CONV2D(x, codes, torch.ones(4), None, [1, 1], [0, 0], [1, 1], 1, "tensor_uint8")

    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(TargetError, match="ConvInteger is several times slower"):
        TARGET.lower(job(capture(Conv(), (x,)), {"x": x}), tmp_path / "m.onnx")


def test_an_input_of_another_name_or_shape_is_refused(small_cnn, tmp_path: Path) -> None:
    graph, inputs = small_cnn
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs), path)
    session = TARGET.open(path)
    with pytest.raises(TargetError, match="input 'x' is not among image"):
        session.run({"image": inputs["x"].numpy()})
    with pytest.raises(TargetError, match=r"input 'x' has the shape \[1, 3, 8, 8\], not \[2, 3, 8, 8\]"):
        session.run({"x": np.zeros((2, 3, 8, 8), np.float32)})


def test_a_truncated_file_is_refused_by_name(small_cnn, tmp_path: Path) -> None:
    graph, inputs = small_cnn
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TargetError, match=r"can't load m\.onnx"):
        TARGET.open(path)
