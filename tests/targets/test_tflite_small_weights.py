"""Weights of 4 and 2 bits and in groups: packed in the .tflite file, and computed with as the graph says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from hypothesis import given
from hypothesis import strategies as st
from tflite_graphs import batch, capture, job, make_dynamic, quantize, store_codes

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import group_scales, simulate
from targets import Job
from targets._tflite_file import TFLiteFile
from targets._tflite_pack import add_codes, pack, storage, stored_scales
from targets.errors import TargetError
from targets.faults.tflite import FAULTS
from targets.tflite import TARGET


class Convolutions(nn.Module):
    """Kernels of 3 and 1, a stride on an even and one on an odd size, padding, a depthwise layer, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.depthwise, self.c = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 12, 1)
        self.d, self.head = nn.Conv2d(12, 8, 2, 2), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.c(F.relu(self.depthwise(x)))
        return self.head(self.d(x).mean((2, 3)))


IMAGE = torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(5))
ROWS = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(6))


def _seeded(model: type[nn.Module] | nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return model() if isinstance(model, type) else model


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))


def _lowered(case: Job, folder: Path) -> Path:
    path = folder / "model.tflite"
    TARGET.lower(case, path)
    return path


def _difference(case: Job, path: Path, *inputs: Tensor) -> float:
    """The largest difference between file and simulation, as a share of the largest output."""
    wanted = simulate(case.graph, "float32", "fixed_point")(inputs)[0].numpy()
    found = TARGET.open(path).run(batch(*inputs))["result0"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("bits", [4, 2])
def test_static_layers_on_small_weights_equal_the_simulation_bit_for_bit(bits: int, tmp_path: Path) -> None:
    case = job(quantize(capture(_seeded(Convolutions), IMAGE), IMAGE, bits=bits), IMAGE)
    path = _lowered(case, tmp_path)
    assert _difference(case, path, IMAGE) == 0
    placement = TARGET.placement(path, case)
    assert placement.float_ops == 0
    assert placement.kinds[f"int8-w{bits} FULLY_CONNECTED"] == 5  # four convolutions over patches, and the linear
    assert placement.kinds["built-in operators"] == 0
    # XNNPACK has no such depthwise kernel: the codes take a byte each, and that is said.
    assert [f.reason for f in placement.fallbacks] == [
        f"its {bits}-bit weights take 8 bits each in the file: TFLite has no kernel for fewer here"
    ]


def test_the_codes_in_the_file_are_those_of_the_graph_and_half_a_byte_each(tmp_path: Path) -> None:
    case = job(quantize(capture(_mlp(), ROWS), ROWS, bits=4), ROWS)
    file = TFLiteFile.read(_lowered(case, tmp_path))
    stored = [t for t in range(len(file.graph.tensors)) if file.dtype(t) == "INT4"]
    wanted = [v.numpy() for name, v in case.graph.named_buffers() if name.endswith("_codes")]
    for tensor in stored:
        codes = file.constant(tensor)
        assert codes is not None
        assert any(np.array_equal(codes, w) for w in wanted)
        assert len(file.model.buffers[file.graph.tensors[tensor].buffer].data) == codes.size // 2
    assert len(stored) == 2


@pytest.mark.parametrize(("bits", "group"), [(4, None), (2, None), (4, 32), (2, 32)])
def test_dynamic_linears_on_small_weights_equal_the_simulation(bits: int, group: int | None, tmp_path: Path) -> None:
    case = job(make_dynamic(capture(_mlp(), ROWS), bits=bits, group=group), ROWS)
    path = _lowered(case, tmp_path)
    # Exact integer products, scaled in float32 in another order; a step of the second layer's input is 1/255.
    assert _difference(case, path, ROWS) < 1 / 255
    placement = TARGET.placement(path, case)
    kept = 4 if group else bits  # no kernel reads groups of 2-bit codes
    assert placement.kinds[f"int8-dynamic-w{kept} FULLY_CONNECTED"] == 2
    assert [("2-bit weights take 4" in f.reason) for f in placement.fallbacks] == [True] * 2 * (kept != bits)


def test_scales_of_groups_are_the_kernels_own_in_the_simulation(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    case = job(make_dynamic(capture(_seeded(model), ROWS), bits=4, group=32), ROWS)
    path = _lowered(case, tmp_path)
    assert _difference(case, path, ROWS) < 1e-6  # one layer: float32 rounding alone
    exact = simulate(case.graph)((ROWS,))[0].numpy()  # float32 scales, as no kernel has them
    found = TARGET.open(path).run(batch(ROWS))["result0"]
    assert np.abs(found - exact).max() / np.abs(exact).max() > 1e-5


def test_dynamic_convolutions_on_small_weights_run_and_their_slowness_is_said(tmp_path: Path) -> None:
    case = job(make_dynamic(capture(_seeded(Convolutions), IMAGE), bits=4), IMAGE)
    path = _lowered(case, tmp_path)
    assert _difference(case, path, IMAGE) < 0.02  # five layers deep, each may move codes by a step: 1/255
    reasons = [f.reason for f in TARGET.placement(path, case).fallbacks]
    assert sum("built-in kernel" in r for r in reasons) == 4
    assert sum("8 bits" in r for r in reasons) == 1


def test_groups_that_only_the_built_in_kernel_reads_are_refused_because_it_forgets_the_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = job(make_dynamic(capture(_mlp(), ROWS), bits=4, group=16), ROWS)
    with pytest.raises(TargetError, match=r"has groups of 16, .* use groups of 32 or a multiple of it"):
        TARGET.lower(case, tmp_path / "m.tflite")
    monkeypatch.setattr("targets._tflite_prepare.FAST_GROUP", 16)  # what the refusal is for
    path = _lowered(case, tmp_path)
    assert TARGET.placement(path, case).kinds["built-in operators"] == 2
    assert _difference(case, path, ROWS) > 0.1


@pytest.mark.parametrize(("bits", "group"), [(4, None), (2, None), (4, 32)])
def test_small_weights_before_float_arithmetic_keep_the_numbers(bits: int, group: int | None, tmp_path: Path) -> None:
    graph = capture(_mlp(), ROWS)
    for node in [n for n in graph.graph.nodes if graphs.kind(n) == "linear"]:
        store_codes(graph, node, 1, bits, group)
    case = job(graphs.finish(graph), ROWS)
    path = _lowered(case, tmp_path)
    assert _difference(case, path, ROWS) < 1e-5  # float32 sums in another order
    placement = TARGET.placement(path, case)
    assert placement.fallbacks == ()
    assert placement.kinds["float32 BATCH_MATMUL"] == 2  # XNNPACK takes computed weights there


def test_float_convolutions_on_small_weights_keep_the_numbers(tmp_path: Path) -> None:
    graph = capture(_seeded(Convolutions), IMAGE)
    for node in [n for n in graph.graph.nodes if graphs.is_weighted(n)]:
        store_codes(graph, node, 1, 4)
    case = job(graphs.finish(graph), IMAGE)
    assert _difference(case, _lowered(case, tmp_path), IMAGE) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 32), (2, 32)])
def test_rows_of_a_table_are_looked_up_as_codes(bits: int, group: int | None, tmp_path: Path) -> None:
    ids = torch.arange(6)[None] * 7
    graph = capture(_seeded(nn.Sequential(nn.Embedding(400, 64))), ids)
    store_codes(graph, next(n for n in graph.graph.nodes if graphs.kind(n) == "embedding"), 0, bits, group)
    case = job(graphs.finish(graph), ids)
    path = _lowered(case, tmp_path)
    assert _difference(case, path, ids) < 1e-7  # one product each
    assert TARGET.placement(path, case).fallbacks == ()
    # A float16 scale for each group; or for each row a float32 scale and an int64 zero point.
    table = 400 * 64 * bits / 8 + 400 * (2 * 64 / group if group else 12)
    assert path.stat().st_size < table + 4000  # and some structure
    assert not any(file_op == "DEQUANTIZE" for file_op in _operators(path))


def _operators(path: Path) -> list[str]:
    file = TFLiteFile.read(path)
    return [file.operator(op) for op in file.graph.operators]


def test_a_changed_code_of_four_bits_changes_the_outputs(tmp_path: Path) -> None:
    case = job(quantize(capture(_mlp(), ROWS), ROWS, bits=4), ROWS)
    path = _lowered(case, tmp_path)
    file = TFLiteFile.read(path)
    tensor = next(t for t in range(len(file.graph.tensors)) if file.dtype(t) == "INT4")
    data = file.model.buffers[file.graph.tensors[tensor].buffer].data.copy()
    file.model.buffers[file.graph.tensors[tensor].buffer].data = data ^ 0x44
    torn = tmp_path / "torn.tflite"
    torn.write_bytes(file.to_bytes())
    assert _difference(case, torn, ROWS) > 0
    assert len(TARGET.placement(torn, case).fallbacks) == 1


@pytest.mark.parametrize("group", [None, 32])
def test_faults_find_packed_weights_and_change_the_outputs(group: int | None, tmp_path: Path) -> None:
    case = job(make_dynamic(capture(_mlp(), ROWS), bits=4, group=group), ROWS)
    path = _lowered(case, tmp_path)
    before = TARGET.open(path).run(batch(ROWS))["result0"]
    for name in ("flipped-bit", "permuted-channels", "scaled-weight"):
        torn = tmp_path / f"{name}.tflite"
        torn.write_bytes(path.read_bytes())
        FAULTS[name](torn)
        assert not np.array_equal(TARGET.open(torn).run(batch(ROWS))["result0"], before), name


def test_what_tflite_cannot_read_is_refused_by_layer(tmp_path: Path) -> None:
    graph = capture(_mlp(), ROWS)
    linear = next(n for n in graph.graph.nodes if graphs.kind(n) == "linear")
    linear.meta["layer"] = "first"
    table = graphs.add_constant(graph, "table", torch.linspace(-1, 1, 16), linear)
    indices = graphs.add_constant(graph, "indices", torch.zeros(96, 64, dtype=torch.uint8), linear)
    with graph.graph.inserting_before(linear):
        linear.args = (linear.args[0], graph.graph.call_function(qdq.LOOKUP, (indices, table)), *linear.args[2:])
    with pytest.raises(TargetError, match=r"first.*palette.*8, 4 or 2"):
        TARGET.lower(job(graphs.finish(graph), ROWS), tmp_path / "model.tflite")


def test_eight_bit_floats_are_refused_by_layer(tmp_path: Path) -> None:
    graph = capture(_mlp(), ROWS)
    linear = next(n for n in graph.graph.nodes if graphs.kind(n) == "linear")
    linear.meta["layer"] = "first"
    codes = graphs.add_constant(graph, "codes", torch.zeros(96, 64).to(torch.float8_e4m3fn), linear)
    scales = graphs.add_constant(graph, "scales", torch.ones(96), linear)
    with graph.graph.inserting_before(linear):
        made = graph.graph.call_function(qdq.DEQUANTIZE_FLOAT8, (codes, scales))
    linear.args = (linear.args[0], made, *linear.args[2:])
    with pytest.raises(TargetError, match=r"first.*8-bit floats"):
        TARGET.lower(job(graphs.finish(graph), ROWS), tmp_path / "model.tflite")


def test_groups_of_eight_bit_codes_are_refused(tmp_path: Path) -> None:
    case = job(make_dynamic(capture(_mlp(), ROWS), group=32), ROWS)
    with pytest.raises(TargetError, match="groups of 4-bit codes"):
        TARGET.lower(case, tmp_path / "model.tflite")


@given(st.integers(1, 40), st.sampled_from(["INT8", "INT4", "INT2"]), st.integers(0, 2**32 - 1))
def test_packed_codes_come_back(count: int, dtype: str, seed: int) -> None:
    reach = {"INT8": 128, "INT4": 8, "INT2": 2}[dtype]
    codes = np.random.default_rng(seed).integers(-reach, reach, (1, count)).astype(np.int8)
    file = TFLiteFile(_EMPTY)
    tensor = add_codes(file, "weight", codes, np.ones(1, np.float32), dtype)
    again = file.constant(tensor)
    assert again is not None
    np.testing.assert_array_equal(again, codes)
    assert pack(codes, dtype).size == -(-count * {"INT8": 8, "INT4": 4, "INT2": 2}[dtype] // 8)


@given(st.floats(1e-4, 10), st.sampled_from([16, 32, 64]))
def test_the_file_and_the_simulation_round_scales_of_groups_alike(scale: float, group: int) -> None:
    scales = np.full((1, 2), scale, np.float32)
    wanted = group_scales(torch.from_numpy(scales), group).numpy()
    np.testing.assert_array_equal(stored_scales(scales, group).astype(np.float32), wanted)


def test_codes_get_the_smallest_type_that_a_kernel_reads() -> None:
    assert [storage(b, 64) for b in (1, 2, 3, 4, 5, 8)] == ["INT2", "INT2", "INT4", "INT4", "INT8", "INT8"]
    assert (storage(2, 6), storage(4, 27), storage(2, 64, grouped=True)) == ("INT4", "INT8", "INT4")


def _empty() -> bytes:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [graph]
    graph.tensors, graph.operators, graph.inputs, graph.outputs = [], [], [], []
    builder = flatbuffers.Builder(64)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


_EMPTY = _empty()
