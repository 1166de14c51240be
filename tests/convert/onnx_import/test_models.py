"""Whole models, exported from torch at several opsets, captured and held against ONNX Runtime."""

import functools
import operator
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from calibrate.graph import kind, layer_name, run
from calibrate.samples import InputSpec
from convert.capture import Captured, capture
from convert.capture_raw import max_abs
from convert.errors import TightfitError

# Two float32 evaluations of a few layers: 2^-24 relative, a few hundred sums.
ROUNDING_DB = 100.0


class Cnn(nn.Module):
    """Depthwise convolution, squeeze and excite, hard swish, pooling, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = F.silu(self.depthwise(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.max_pool2d(y * gate + x, 3, 2, 1)
        return self.head(y.mean((2, 3))), self.up(F.pad(y, (0, 1, 1, 0)))


class Vit(nn.Module):
    """Patches, a class token, one pre-norm block with fused qkv written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-1, -2)) * (d // 2) ** -0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, d))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class Bert(nn.Module):
    """Token ids and a mask in, a mean over the tokens that count out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(50, 12), nn.Embedding(16, 12)
        self.norm = nn.LayerNorm(12)
        self.block = nn.TransformerEncoderLayer(12, 2, 24, activation="gelu", batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])[None]
        x = self.norm(self.words(input_ids) + self.positions(places))
        x = self.block(x, src_key_padding_mask=attention_mask == 0)
        count = attention_mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * count).sum(1) / count.sum(1).clamp(min=1e-9))


@functools.cache
def written(name: str, opset: int, dynamic: bool, folder: Path) -> Path:
    torch.manual_seed(0)
    model = {"cnn": Cnn, "vit": Vit, "bert": Bert}[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    batch = 2 if dynamic else 1
    inputs = {"input_ids": torch.ones(batch, 8).long(), "attention_mask": torch.ones(batch, 8).long()}
    if name != "bert":
        inputs = {"x": torch.randn(batch, 3, 16, 16)}
    outputs = ["logits", "map"] if name == "cnn" else ["out"]
    axes = {n: {0: "batch"} for n in (*inputs, *outputs)} if dynamic else None
    path = folder / f"{name}_{opset}_{dynamic}.onnx"
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        path,
        dynamo=False,
        opset_version=opset,
        input_names=list(inputs),
        output_names=outputs,
        dynamic_axes=axes,
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("onnx")


def examples(name: str, count: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if name != "bert":
        return {"x": rng.standard_normal((count, 3, 16, 16)).astype(np.float32)}
    mask = (np.arange(8) < rng.integers(2, 9, (count, 1))).astype(np.int64)
    return {"input_ids": rng.integers(0, 50, (count, 8)), "attention_mask": mask}


def kinds(captured: Captured) -> Counter[str]:
    return Counter(kind(n) for n in captured.graph.graph.nodes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "opset"), [("cnn", 13), ("cnn", 17), ("vit", 13), ("vit", 17), ("bert", 14), ("bert", 17)]
)
def test_a_model_computes_what_onnx_runtime_computes(name: str, opset: int, folder: Path) -> None:
    path = written(name, opset, True, folder)
    captured = capture(str(path), examples=examples(name), work=folder)
    assert captured.check.sqnr_db >= ROUNDING_DB
    assert captured.check.samples == 3
    assert not captured.check.synthetic
    assert captured.check.against.startswith("ONNX Runtime")
    assert all(i.dynamic_batch and i.shape[0] == 1 for i in captured.inputs)
    assert all(kind(n) != "other" or n.target is operator.mul for n in captured.graph.graph.nodes)  # sizes multiplied


@pytest.mark.filterwarnings("ignore")
def test_layers_come_out_as_layers_whatever_the_opset_spells(folder: Path) -> None:
    old, new = (capture(str(written("vit", o, True, folder)), examples=examples("vit"), work=folder) for o in (13, 17))
    assert kinds(old) == kinds(new)
    assert kinds(old)["layer_norm"] == 2
    assert kinds(old)["gelu"] == 1
    assert kinds(old)["linear"] == 5
    assert old.fingerprint == new.fingerprint  # the layer norm of opset 13 is spelled in nine operators
    names = [layer_name(n) for n in old.graph.graph.nodes if kind(n) == "linear"]
    assert names == ["/qkv/MatMul", "/proj/MatMul", "/fc1/MatMul", "/fc2/MatMul", "/head/Gemm"]


@pytest.mark.filterwarnings("ignore")
def test_a_batch_fixed_at_one_becomes_dynamic_where_that_is_seen_to_work(folder: Path) -> None:
    captured = capture(str(written("cnn", 17, False, folder)), examples=examples("cnn"), work=folder)
    assert captured.inputs == (InputSpec("x", (1, 3, 16, 16), "float32", True),)
    got = run(captured.graph, [torch.randn(5, 3, 16, 16)])
    assert [len(g) for g in got] == [5, 5]
    assert captured.outputs == ("logits", "map")


@pytest.mark.filterwarnings("ignore")
def test_a_batch_baked_into_the_model_stays_fixed_and_is_noted(folder: Path) -> None:
    captured = capture(str(written("vit", 17, False, folder)), examples=examples("vit"), work=folder)
    assert not captured.inputs[0].dynamic_batch
    assert captured.inputs[0].shape == (1, 3, 16, 16)
    assert "the batch is fixed at 1" in captured.notes[0]
    assert captured.check.sqnr_db >= ROUNDING_DB


@pytest.mark.filterwarnings("ignore")
def test_weights_beside_the_model_are_read_and_missed_where_they_are_gone(folder: Path) -> None:
    model = onnx.load(written("cnn", 17, True, folder))
    path = folder / "outside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="outside.bin", size_threshold=0)
    inside = capture(str(written("cnn", 17, True, folder)), work=folder)
    assert capture(str(path), work=folder).fingerprint == inside.fingerprint
    (folder / "outside.bin").unlink()
    with pytest.raises(TightfitError, match=r"outside\.onnx keeps its weights in another file|damaged"):
        capture(str(path), work=folder)


@pytest.mark.filterwarnings("ignore")
def test_the_check_sees_one_wrong_weight(folder: Path) -> None:
    path = written("cnn", 17, True, folder)
    captured = capture(str(path), examples=examples("cnn"), work=folder)
    inputs = [torch.from_numpy(examples("cnn")["x"])]
    before = run(captured.graph, inputs)[0].numpy()
    name = next(n.target for n in captured.graph.graph.nodes if n.op == "get_attr" and "head_weight" in n.target)
    with torch.no_grad():
        getattr(captured.graph, name)[0, 0] += 1e-2
    assert max_abs(before, run(captured.graph, inputs)[0].numpy()) > 1e-4


@pytest.mark.filterwarnings("ignore")
def test_nan_in_an_initializer_is_refused_by_name(folder: Path) -> None:
    model = onnx.load(written("cnn", 17, True, folder))
    weight = next(i for i in model.graph.initializer if i.name == "head.weight")
    array = numpy_helper.to_array(weight).copy()
    array[0, 1] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, folder / "nan.onnx")
    with pytest.raises(TightfitError, match=r"'head\.weight' \(1 NaN of 40\)"):
        capture(str(folder / "nan.onnx"), work=folder)


@pytest.mark.filterwarnings("ignore")
def test_a_truncated_file_is_said_to_be_damaged(folder: Path) -> None:
    whole = written("cnn", 17, True, folder).read_bytes()
    (folder / "half.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TightfitError, match=r"half\.onnx is damaged or no ONNX model"):
        capture(str(folder / "half.onnx"), work=folder)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_shape_names_the_input_and_both_shapes(folder: Path) -> None:
    path = written("cnn", 17, True, folder)
    with pytest.raises(TightfitError, match=r"samples of shape \[3, 8, 16\], but the input 'x' takes \[3, 16, 16\]"):
        capture(str(path), examples={"x": np.zeros((2, 3, 8, 16), np.float32)}, work=folder)
    with pytest.raises(TightfitError, match=r"--input names 'y', but the inputs of .* are 'x'"):
        capture(str(path), inputs=[InputSpec("y", (1, 3, 16, 16), "float32")], work=folder)


def test_axes_of_any_length_are_fixed_by_the_data_or_by_input(folder: Path) -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "length", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "length", 4])
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", [x], [y])
    path = folder / "open.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(TightfitError, match=r"'x' of .*open\.onnx has axes of any length \(1xNx4\).*--input x:float32"):
        capture(str(path), work=folder)
    from_data = capture(str(path), examples={"": np.ones((2, 6, 4), np.float32)}, work=folder)
    assert from_data.inputs[0].shape == (1, 6, 4)
    assert capture(str(path), inputs=[InputSpec("x", (1, 5, 4), "float32")], work=folder).inputs[0].shape == (1, 5, 4)
