"""The TFLite target: what it writes computes what the graph computes, in the format the graph asks for."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from tflite_graphs import batch, capture, job, make_dynamic, quantize, store_codes, store_halves

from calibrate import graph as graphs
from calibrate.simulation import simulate
from targets import Job
from targets._tflite_file import TFLiteFile
from targets._tflite_lower import refuse_foreign_codes
from targets._tflite_prepare import prepare
from targets.errors import TargetError
from targets.tflite import TARGET


class Residual(nn.Module):
    """A depthwise-separable residual block, a shortcut by slice and pad, a mean over H and W, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.pointwise(F.relu6(self.depthwise(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(x.mean((2, 3)))


class Text(nn.Module):
    """Token ids and a mask in, a pooled embedding and all embeddings out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(200, 32), nn.Embedding(8, 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        n, t = ids.shape
        h = self.norm(self.tokens(ids) + self.positions(torch.arange(t)[None]))
        q, k, v = self.qkv(h).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = h + self.out(y.transpose(1, 2).reshape(n, t, 32))
        weight = mask[..., None].float()
        return (h * weight).sum(1) / weight.sum(1).clamp(min=1e-9), h


IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = (torch.arange(8)[None] * 7, torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]))


def _model(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def _int8_residual(keep_float: tuple[str, ...] = ()) -> Job:
    return job(quantize(capture(_model(Residual), IMAGE), IMAGE, keep_float=keep_float), IMAGE)


def _images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 3, 12, 12, generator=generator) for _ in range(count)]


def _lowered(case: Job, folder: Path) -> Path:
    path = folder / "model.tflite"
    TARGET.lower(case, path)
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    case = _int8_residual()
    return case, _lowered(case, tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    case = job(make_dynamic(capture(_model(Residual), IMAGE)), IMAGE)
    return case, _lowered(case, tmp_path_factory.mktemp("dynamic"))


def test_a_static_int8_residual_network_equals_the_simulation_bit_for_bit(int8: tuple[Job, Path]) -> None:
    case, path = int8
    session, reference = TARGET.open(path), simulate(case.graph)
    for image in _images(16):
        np.testing.assert_array_equal(session.run(batch(image))["result0"], reference((image,))[0].numpy(), strict=True)


def test_every_layer_of_a_fully_quantized_network_runs_in_int8(int8: tuple[Job, Path]) -> None:
    case, path = int8
    placement = TARGET.placement(path, case)
    assert placement.fallbacks == ()
    assert placement.float_ops == 0
    assert placement.conversions == 2  # the interface is float: one Q at the input, one DQ at the output
    wanted = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MEAN", "PAD")
    assert {name for name in wanted if f"int8 {name}" in placement.kinds} == set(wanted)


def test_the_codes_and_scales_in_the_file_are_those_of_the_graph(int8: tuple[Job, Path]) -> None:
    case, path = int8
    file = TFLiteFile.read(path)
    constants = dict(case.graph.named_buffers())
    stored = {_name(name): value.numpy() for name, value in constants.items() if name.endswith("_codes")}
    layouts = {"conv2d": (0, 2, 3, 1), "conv2d_1": (1, 2, 3, 0), "conv2d_2": (0, 2, 3, 1), "linear": (0, 1)}
    found = {}
    for tensor in range(len(file.graph.tensors)):
        codes = file.constant(tensor) if file.dtype(tensor) == "INT8" else None
        for name, layout in layouts.items():
            if codes is not None and np.array_equal(codes, stored[name].transpose(layout)):
                found[name] = file.scales(tensor)
    assert found.keys() == layouts.keys()
    for name, scales in found.items():
        np.testing.assert_array_equal(scales, constants[f"{name}_scales"].numpy())


def _name(buffer: str) -> str:
    return buffer.removesuffix("_codes")


def test_a_layer_left_float_is_counted_and_one_that_fell_back_is_named(tmp_path: Path) -> None:
    case = _int8_residual(keep_float=("conv2d_2",))
    placement = TARGET.placement(_lowered(case, tmp_path), case)
    assert placement.float_ops == 1
    assert placement.kinds["float32 CONV_2D"] == 1
    assert placement.fallbacks == ()  # nobody asked for int8 there
    claimed = _int8_residual()
    assert [f.node for f in TARGET.placement(tmp_path / "model.tflite", claimed).fallbacks] == ["conv2d_2"]


def test_a_layer_whose_output_stays_float_is_named_as_fallback(tmp_path: Path) -> None:
    case = _int8_residual()
    linear = next(n for n in case.graph.graph.nodes if graphs.kind(n) == "linear")
    output = next(n for n in case.graph.graph.nodes if n.op == "output")
    output.args = ((linear,),)
    linear.meta["layer"] = "head"
    graphs.finish(case.graph)
    fallback = TARGET.placement(_lowered(case, tmp_path), case).fallbacks
    assert [f.node for f in fallback] == ["head"]
    assert "float" in fallback[0].reason


def test_dynamic_int8_equals_its_simulation(dynamic: tuple[Job, Path]) -> None:
    case, path = dynamic
    session, reference = TARGET.open(path), simulate(case.graph)
    for image in _images(8):
        wanted = reference((image,))[0].numpy()
        # Integer products are equal; scaling them back is float32 arithmetic in another order (a few ulp), which
        # the next layer's run-time quantization may turn into one step of its codes: 1/255 of a row's range.
        np.testing.assert_allclose(session.run(batch(image))["result0"], wanted, atol=np.ptp(wanted) / 255)
    placement = TARGET.placement(path, case)
    assert placement.fallbacks == ()
    assert placement.int8_ops == 4


def test_a_gain_beside_a_dynamic_layer_is_not_merged_into_its_weight(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)
            self.gain = nn.Parameter(torch.rand(8))
            nn.init.uniform_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) * self.gain

    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    case = job(make_dynamic(capture(_model(Scaled), x)), x)
    path = _lowered(case, tmp_path)
    assert TARGET.placement(path, case).fallbacks == ()
    wanted = simulate(case.graph)((x,))[0].numpy()
    # One layer: the LayerNorm's few ulp do not move a code of these samples, the rest is float32 rounding.
    np.testing.assert_allclose(TARGET.open(path).run(batch(x))["result0"], wanted, atol=1e-6)


def test_dynamic_int8_is_not_the_float_model(dynamic: tuple[Job, Path]) -> None:
    _, path = dynamic
    exact = graphs.run(capture(_model(Residual), IMAGE), (IMAGE,))[0].numpy()
    assert np.abs(TARGET.open(path).run(batch(IMAGE))["result0"] - exact).max() > 1e-5


def test_a_scheme_that_no_kernel_has_is_refused(tmp_path: Path) -> None:
    case = job(make_dynamic(capture(_model(Residual), IMAGE), "tensor_uint8"), IMAGE)
    with pytest.raises(TargetError, match=r"conv2d.*tensor_uint8.*row_int8"):
        TARGET.lower(case, tmp_path / "model.tflite")


def test_small_weights_shrink_the_file_and_keep_the_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(500, 256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    ids = torch.arange(6)[None]
    sizes = {}
    for form, store in (("float", None), ("int8", store_codes), ("float16", store_halves)):
        graph = capture(model, ids)
        for node in list(graph.graph.nodes) if store else ():
            if graphs.kind(node) in ("linear", "embedding"):
                store(graph, node, 1 if graphs.kind(node) == "linear" else 0)
        case = job(graphs.finish(graph), ids)
        path = _lowered(case, tmp_path)
        sizes[form] = path.stat().st_size
        wanted = graphs.run(case.graph, (ids,))[0].numpy()
        # The same float32 weights in the same operators: only the order of summation may differ.
        np.testing.assert_allclose(TARGET.open(path).run(batch(ids))["result0"], wanted, atol=1e-5)
        assert TARGET.placement(path, case).float_ops == 2
    assert 3.5 < sizes["float"] / sizes["int8"] < 4
    assert 1.9 < sizes["float"] / sizes["float16"] < 2


def test_computing_in_float16_stores_every_constant_as_float16(tmp_path: Path) -> None:
    case = job(capture(_model(Residual), IMAGE), IMAGE, compute="float16")
    path = _lowered(case, tmp_path)
    file = TFLiteFile.read(path)
    wide = [t for t in range(len(file.graph.tensors)) if file.dtype(t) == "FLOAT32" and file.constant(t) is not None]
    assert wide == []
    exact = graphs.run(case.graph, (IMAGE,))[0].numpy()
    # Weights rounded to 11 bits: relative 2^-11 each, averaged over sums; 1 % of the largest output is ample.
    np.testing.assert_allclose(TARGET.open(path).run(batch(IMAGE))["result0"], exact, atol=0.01 * np.abs(exact).max())


def test_integer_inputs_and_several_outputs_go_by_name(tmp_path: Path) -> None:
    case = job(capture(_model(Text), *TOKENS), *TOKENS)
    session = TARGET.open(_lowered(case, tmp_path))
    found = session.run(batch(*TOKENS))
    wanted = graphs.run(case.graph, TOKENS)
    assert list(found) == ["result0", "result1"]
    for name, value in zip(found, wanted, strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)  # float32, another order of summation


def test_an_output_may_be_an_input_or_come_twice(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return b, a + 1, a + 1

    a, b = torch.ones(1, 4), torch.arange(4.0)[None]
    found = TARGET.open(_lowered(job(capture(Echo(), a, b), a, b), tmp_path)).run(batch(a, b))
    np.testing.assert_array_equal(np.stack(list(found.values())), np.stack([b, a + 1, a + 1]))


def test_an_average_pool_that_leaves_its_padding_out_is_exact(tmp_path: Path) -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)

    found = TARGET.open(_lowered(job(capture(Pool(), IMAGE), IMAGE), tmp_path)).run(batch(IMAGE))
    np.testing.assert_allclose(found["result0"], Pool()(IMAGE).numpy(), atol=1e-6)  # nine float32 sums


def test_codes_at_the_interface_where_a_compiler_takes_nothing_else(int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    rules = case.rules.model_copy(update={"quantize_io": True})
    codes = TARGET.open(_lowered(replace(case, rules=rules), tmp_path))
    floats = TARGET.open(path)
    assert [i.dtype for i in codes.inputs] == ["int8"]
    assert [i.dtype for i in floats.inputs] == ["float32"]
    for x in _images(4):
        again, once = codes.run(batch(x)), floats.run(batch(x))
        assert all(np.array_equal(again[name], once[name]) for name in once)


def test_one_changed_weight_byte_changes_the_outputs(int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    codes = next(v for name, v in case.graph.named_buffers() if name == "linear_codes").numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(codes)] ^= 0x40
    torn = tmp_path / "torn.tflite"
    torn.write_bytes(content)
    before, after = (TARGET.open(p).run(batch(IMAGE))["result0"] for p in (path, torn))
    assert not np.array_equal(before, after)
    assert [f.node for f in TARGET.placement(torn, case).fallbacks] == ["linear"]  # the codes are not the graph's


def test_the_same_job_gives_the_same_bytes_and_no_path_of_this_machine(int8: tuple[Job, Path], tmp_path: Path) -> None:
    _, path = int8
    script = (
        "import sys; from pathlib import Path; import test_tflite as t;"
        "t.TARGET.lower(t._int8_residual(), Path(sys.argv[1]))"
    )
    other = tmp_path / "other.tflite"
    places = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", script, str(other)], env=environment, capture_output=True, check=True)
    assert other.read_bytes() == path.read_bytes()
    assert done.stdout == b""
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_an_operator_without_a_lowering_is_refused_by_name_with_its_layer(tmp_path: Path) -> None:
    class Svd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x)[1]

    x = torch.eye(4)[None]
    graph = capture(Svd(), x)
    next(n for n in graph.graph.nodes if "svd" in n.name).meta["layer"] = "spectrum"
    with pytest.raises(TargetError, match=r"svd.*spectrum.*another target") as error:
        TARGET.lower(job(graph, x), tmp_path / "model.tflite")
    assert "Traceback" not in str(error.value)
    assert not (tmp_path / "model.tflite").exists()


def _with_float_head() -> Job:
    """The int8 network, but the linear's weight is a float that no codes stand for."""
    case = _int8_residual()
    weight = next(n for n in case.graph.graph.nodes if graphs.kind(n) == "linear").args[1]
    codes, scales = (graphs.constant(case.graph, a) for a in weight.args[:2])
    exact = graphs.add_constant(case.graph, "exact", codes.float() * scales[:, None] * 1.001, weight)
    weight.replace_all_uses_with(exact)
    graphs.finish(case.graph)
    return case


def test_a_float_layer_between_int8_layers_is_not_quantized_unasked(tmp_path: Path) -> None:
    case = _with_float_head()
    path = _lowered(case, tmp_path)
    assert TARGET.placement(path, case).kinds["float32 FULLY_CONNECTED"] == 1
    session, reference = TARGET.open(path), simulate(case.graph)
    for image in _images(8):
        np.testing.assert_array_equal(session.run(batch(image))["result0"], reference((image,))[0].numpy())


def test_a_float_constant_beside_codes_is_not_quantized_unasked(tmp_path: Path) -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.token = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.token, self.embed(x)], 1).softmax(-1)

    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(4))
    case = job(quantize(capture(_model(Token), x), x, keep_float=("cat", "softmax")), x)
    path = _lowered(case, tmp_path)
    assert TARGET.placement(path, case).kinds["float32 CONCATENATION"] == 1
    wanted = simulate(case.graph)((x,))[0].numpy()
    np.testing.assert_allclose(TARGET.open(path).run(batch(x))["result0"], wanted, atol=1e-6)  # a float32 softmax


def test_codes_that_are_not_the_graphs_are_refused(int8: tuple[Job, Path]) -> None:
    _, path = int8
    prepared = prepare(_with_float_head().graph, (IMAGE,))
    with pytest.raises(TargetError, match=r"FULLY_CONNECTED.*quantize that constant too"):
        refuse_foreign_codes(TFLiteFile.read(path), prepared)
