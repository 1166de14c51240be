"""Opsets, half precision and TensorRT's rules."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import Recipe, capture, job, quantize
from torch import Tensor, nn

from targets import find
from targets._onnx_tensorrt import check_tensorrt
from targets.errors import TargetError

TARGET = find("onnx")
FLOAT_TOLERANCE = 1e-5  # float32 sums in another order, values of magnitude 1
HALF_TOLERANCE = 1e-2  # float16 has 11 bits; a few layers of values of magnitude 1


class Block(nn.Module):
    """LayerNorm, a split, a mean, an attention mask of -inf: what opsets and half precision trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(mask == 0, float("-inf"))
        return (scores.softmax(-1) @ v).mean(1)


@pytest.fixture(scope="module")
def block() -> tuple[torch.fx.GraphModule, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, 6, 8), "mask": torch.tensor([[[1, 1, 1, 1, 0, 0]]])}
    return capture(Block(), tuple(inputs.values())), inputs


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_every_opset_and_format_gives_the_graphs_numbers(block, opset: int, compute: str, tmp_path: Path) -> None:
    graph, inputs = block
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs, opset=opset, compute=compute), path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == opset
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    output = TARGET.open(path).run({k: v.numpy() for k, v in inputs.items()})["y"]
    tolerance = FLOAT_TOLERANCE if compute == "float32" else HALF_TOLERANCE
    np.testing.assert_allclose(output, graph(*inputs.values()).detach().numpy(), atol=tolerance, rtol=0)


def test_half_precision_stores_halves_and_names_the_saturated_mask(block, tmp_path: Path) -> None:
    graph, inputs = block
    path = tmp_path / "m.onnx"
    TARGET.lower(job(graph, inputs, compute="float16"), path)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert not any(a.dtype == np.float32 for a in constants.values())
    saturated = [a for name, a in constants.items() if "saturated" in name]
    assert [float(a.min()) for a in saturated] == [-65504.0]


def test_half_precision_leaves_codes_and_their_scales_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.GELU())
    graph = quantize(capture(model, (x,)), (x,), Recipe())
    work = job(graph, {"x": x}, compute="float16")
    TARGET.lower(work, path)
    placed = TARGET.placement(path, work)
    assert placed.kinds["int8 QLinearConv"] == 2
    assert placed.fallbacks == ()


@pytest.mark.parametrize(("opset", "message"), [(12, "oldest opset written is 13"), (None, "name no opset")])
def test_an_impossible_opset_is_refused(block, opset: int | None, message: str, tmp_path: Path) -> None:
    graph, inputs = block
    with pytest.raises(TargetError, match=message):
        TARGET.lower(job(graph, inputs, opset=opset), tmp_path / "m.onnx")


def test_an_operator_the_opset_lacks_is_named(tmp_path: Path) -> None:
    class Grid(nn.Module):
        def forward(self, x: Tensor, grid: Tensor) -> Tensor:
            return nn.functional.grid_sample(x, grid, align_corners=False)

    inputs = {"x": torch.randn(1, 2, 4, 4), "grid": torch.rand(1, 3, 3, 2)}
    graph = capture(Grid(), tuple(inputs.values()))
    with pytest.raises(TargetError, match="opset 13 has no GridSample"):
        TARGET.lower(job(graph, inputs, opset=13), tmp_path / "m.onnx")


def for_tensorrt(symmetric: bool, path: Path):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    recipe = Recipe(symmetric=symmetric, compute=("conv", "linear"), moves=(), outputs=False)
    graph = quantize(capture(model, (x,)), (x,), recipe)
    work = job(graph, {"x": x}, runtime="tensorrt", opset=17)
    TARGET.lower(work, path)
    return graph, work, x


def test_tensorrt_gets_symmetric_codes_float_biases_and_a_prediction(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    graph, work, x = for_tensorrt(True, path)
    check_tensorrt(path)
    constants = onnx.load(path).graph.initializer
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in constants)
    placed = TARGET.placement(path, work)
    assert placed.int8_ops == 3
    assert placed.fallbacks == ()
    assert all("predicted, not run on TensorRT" in kind for kind in placed.kinds)
    # ONNX Runtime runs these layers in float on dequantized numbers: float32 sums in another order.
    expected = graph(x).detach().numpy()
    np.testing.assert_allclose(TARGET.open(path).run({"x": x.numpy()})["y"], expected, atol=FLOAT_TOLERANCE, rtol=0)


def test_a_zero_point_is_refused_for_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"zero point -?\d+; symmetric int8 has 0"):
        for_tensorrt(False, tmp_path / "m.onnx")


def test_a_layer_with_one_float_operand_is_predicted_float(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    _, work, _ = for_tensorrt(True, path)
    model = onnx.load(path)
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    conv.input[0] = model.graph.input[0].name
    onnx.save(model, path)
    placed = TARGET.placement(path, work)
    assert placed.int8_ops == 2
    assert [f.node for f in placed.fallbacks] == [conv.name]
