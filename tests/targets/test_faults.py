"""Each fault changes what it says it changes and nothing else; where there is no place for it, it says so."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import targets
from targets import faults
from targets.errors import TargetError
from targets.faults._blocks import Block, Weight, faults_of

CODES = np.random.default_rng(0).integers(-127, 128, (6, 4), dtype=np.int8)
SCALES = np.linspace(0.01, 0.06, 6, dtype=np.float32)
HEAD = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)


def static_int8(path: Path) -> Path:
    """Gemm on dequantized codes with one scale per row, then a small float MatMul."""
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["wide"], axis=0),
        helper.make_node("Gemm", ["x", "wide"], ["h"], transB=1),
        helper.make_node("MatMul", ["h", "head"], ["y"]),
    ]
    return save(nodes, {"codes": CODES, "scales": SCALES, "zeros": np.zeros(6, np.int8), "head": HEAD}, path)


def dynamic_int8(path: Path) -> Path:
    """MatMulInteger whose sums are cast and multiplied with x's scale times the weight's scales."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "codes", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "scales"], ["factors"]),
        helper.make_node("Mul", ["wide", "factors"], ["y"]),
    ]
    return save(nodes, {"codes": np.ascontiguousarray(CODES.T), "scales": SCALES}, path, outputs=6)


def weight_only(path: Path) -> Path:
    """Codes cast to float and multiplied with their scales in front of the layer."""
    nodes = [
        helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scales"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    return save(nodes, {"codes": CODES, "scales": SCALES[:, None]}, path, outputs=6)


def save(nodes: list, constants: dict[str, np.ndarray], path: Path, outputs: int = 3) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), ir_version=10)
    model.opset_import[0].version = 18
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def constants(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def changed_bits(before: bytes, after: bytes) -> int:
    assert len(before) == len(after)
    return sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True))


def test_a_flipped_bit_is_one_bit_of_a_weight(tmp_path: Path) -> None:
    path = static_int8(tmp_path / "m.onnx")
    before, old = path.read_bytes(), constants(path)
    said = faults.find("onnx")["flipped-bit"](path)
    assert changed_bits(before, path.read_bytes()) == 1
    assert [name for name, array in constants(path).items() if not np.array_equal(array, old[name])] == ["head"]
    assert "the weight head" in said


def test_permuted_channels_are_the_largest_weights_rows_moved_by_one(tmp_path: Path) -> None:
    path = dynamic_int8(tmp_path / "m.onnx")
    faults.find("onnx")["permuted-channels"](path)
    np.testing.assert_array_equal(constants(path)["codes"], np.roll(CODES.T, 1, axis=-1))
    np.testing.assert_array_equal(constants(path)["scales"], SCALES)


@pytest.mark.parametrize("make", [dynamic_int8, weight_only])
def test_the_scale_of_codes_is_found_where_each_form_keeps_it(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx")
    old = constants(path)
    said = faults.find("onnx")["scaled-weight"](path)
    np.testing.assert_array_equal(constants(path)["scales"], old["scales"] * np.float32(1.5))
    np.testing.assert_array_equal(constants(path)["codes"], old["codes"])
    assert "scale of the weight codes" in said


def test_a_nan_goes_into_the_last_layer(tmp_path: Path) -> None:
    path = static_int8(tmp_path / "m.onnx")
    faults.find("onnx")["not-a-number"](path)
    assert int(np.isnan(constants(path)["head"]).sum()) == 1


def test_files_are_cut_and_removed(tmp_path: Path) -> None:
    path = static_int8(tmp_path / "m.onnx")
    size = path.stat().st_size
    faults.find("onnx")["truncated-file"](path)
    assert path.stat().st_size == size // 2
    faults.find("onnx")["missing-file"](path)
    assert not path.exists()


@pytest.mark.parametrize("fault", ["flipped-bit", "permuted-channels", "scaled-weight", "not-a-number"])
def test_a_model_without_weights_has_no_place_for_faults_in_weights(fault: str, tmp_path: Path) -> None:
    path = save([helper.make_node("Neg", ["x"], ["y"])], {}, tmp_path / "m.onnx", outputs=4)
    before = path.read_bytes()
    with pytest.raises(TargetError, match="no layer"):
        faults.find("onnx")[fault](path)
    assert path.read_bytes() == before


def test_channels_that_are_all_the_same_cannot_be_permuted(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(nodes, {"w": np.ones((4, 3), np.float32)}, tmp_path / "m.onnx")
    with pytest.raises(TargetError, match="all the same"):
        faults.find("onnx")["permuted-channels"](path)


def test_what_is_no_model_is_a_target_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(TargetError, match="no ONNX model"):
        faults.find("onnx")["scaled-weight"](path)


def test_a_block_reads_and_writes_its_own_bytes_only(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(32)))
    block = Block(path, 8, "float16", (2, 3))
    block.write(block.read() * 0 + np.nan)
    assert path.read_bytes()[:8] == bytes(range(8))
    assert path.read_bytes()[20:] == bytes(range(20, 32))
    assert np.isnan(block.read()).all()
    with pytest.raises(TargetError, match="ends within"):
        Block(path, 24, "float32", (3,)).read()


@given(bits=st.integers(1, 7), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_packed_numbers_are_read_and_written_bit_by_bit(bits: int, rows: int, seed: int) -> None:
    from targets._coreml_weights import pack

    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        path.write_bytes(b"\xaa" * 40)
        block = Block(path, 8, "uint8", codes.shape, bits)
        block.write(codes)
        content = path.read_bytes()
        np.testing.assert_array_equal(block.read(), codes)
    assert content[8 : 8 + block.bytes] == pack(codes, bits).tobytes()
    assert content[:8] + content[8 + block.bytes :] == b"\xaa" * (40 - block.bytes)


def test_a_nan_goes_to_a_number_of_the_table_that_a_weight_stands_for(tmp_path: Path) -> None:
    """One table of four numbers for each row and each half of it; of the row in the middle only number 3 is used."""
    indices = np.zeros((3, 4), np.uint8)
    indices[1] = 3
    (tmp_path / "codes").write_bytes(b"\0" * 3)
    (tmp_path / "tables").write_bytes(np.arange(24, dtype=np.float16).tobytes())
    codes = Block(tmp_path / "codes", 0, "uint8", (3, 4), 2)
    codes.write(indices)
    table = Block(tmp_path / "tables", 0, "float16", (3, 2, 4, 1))
    found = faults_of(lambda path: [Weight("w", codes, 0, table=table)], lambda path: path)
    assert found["not-a-number"](tmp_path) == "wrote a NaN into the table of the weight w"
    assert np.argwhere(np.isnan(table.read())).tolist() == [[1, 1, 3, 0]]


def test_every_target_has_the_same_faults_and_an_unknown_one_is_named() -> None:
    pytest.importorskip("coremltools")
    named = {name: list(faults.find(name)) for name in targets.names()}
    assert len(set(map(tuple, named.values()))) == 1
    with pytest.raises(TargetError, match="there are for c, coreml, onnx, tflite"):
        faults.find("wasm")


class Small(nn.Module):
    """A convolution, a depthwise one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.deep(self.wide(x))).mean((2, 3)))


def lowered(target: str, folder: Path) -> tuple[Path, list[Weight]]:
    """`Small` lowered in float32, and the weights the faults find in it."""
    from dataclasses import replace

    from tflite_graphs import capture, job

    from device_profiles import load

    x = torch.randn(1, 3, 8, 8)
    device = "iphone-a17-pro" if target == "coreml" else "raspberry-pi-4b"
    made = replace(job(capture(Small(), x), x), rules=load(device).rules(target))
    path = folder / f"small{targets.find(target).suffix}"
    targets.find(target).lower(made, path)
    finder = __import__(f"targets.faults.{target}", fromlist=["weights"]).weights
    return path, finder(path)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "package"), [("tflite", "litert_torch"), ("coreml", "coremltools")])
def test_weights_are_found_in_the_files_bytes(target: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    path, weights = lowered(target, tmp_path)
    state = Small().state_dict()
    wanted = [state["wide.weight"], state["deep.weight"], state["head.weight"]]
    if target == "tflite":  # the format's own layouts: OHWI, and 1HWC for depthwise
        wanted = [wanted[0].permute(0, 2, 3, 1), wanted[1].permute(1, 2, 3, 0), wanted[2]]
    assert [w.axis for w in weights] == ([0, 3, 0] if target == "tflite" else [0, 0, 0])
    for weight, tensor in zip(weights, wanted, strict=True):
        np.testing.assert_array_equal(weight.values.read(), tensor.numpy())
    before = weights[0].values.file.read_bytes()
    faults.find(target)["flipped-bit"](path)
    assert changed_bits(before, weights[0].values.file.read_bytes()) == 1


@pytest.mark.slow
def test_a_weight_file_without_the_blobs_it_should_hold_is_a_target_error(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    path, weights = lowered("coreml", tmp_path)
    file = weights[0].values.file
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(TargetError, match="no weight at byte"):
        faults.find("coreml")["scaled-weight"](path)
    shutil.rmtree(path / "Data")
    with pytest.raises(TargetError):
        faults.find("coreml")["scaled-weight"](path)


# Packed codes with scales, indices with tables in weight.bin (16 numbers) and within the program (fewer than 10), and
# codes as tables of one per group; iOS 16 keeps indices as bytes, iOS 18 with their shape.
PACKED = [
    ("int", 4, None, "iOS17"),
    ("int", 4, 32, "iOS17"),
    ("int", 2, 32, "iOS17"),
    ("palette", 4, None, "iOS17"),
    ("palette", 2, None, "iOS17"),
    ("palette", 1, None, "iOS18"),
    ("palette", 3, None, "iOS18"),
    ("palette", 6, None, "iOS18"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits", "group", "system"), PACKED)
def test_faults_reach_core_ml_weights_of_fewer_than_8_bits(
    kind: str, bits: int, group: int | None, system: str, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    from test_coreml import run
    from test_coreml_formats import IDS, lowered, stored

    from calibrate.plan import WeightFormat
    from targets.faults.coreml import weights

    path = lowered(stored(WeightFormat(bits, group, kind), system=system), tmp_path)  # type: ignore[arg-type]
    conv, linear = weights(path)
    assert [w.values.shape for w in (conv, linear)] == [(64, 64, 3), (128, 64)]
    assert {w.values.bits for w in (conv, linear)} == {bits}
    before, expected, indices = read(path), run(path, {"ids": IDS})["y"], conv.values.read()
    for fault, inject in faults.find("coreml").items():
        copy = shutil.copytree(path, tmp_path / fault / path.name)
        said = inject(copy)
        if fault in ("truncated-file", "missing-file"):
            with pytest.raises(TargetError):
                run(copy, {"ids": IDS})
            continue
        got = run(copy, {"ids": IDS})["y"]
        assert not np.array_equal(got, expected), said
        if fault == "flipped-bit":
            assert changed_bits(before, read(copy)) == 1
        elif fault == "permuted-channels":
            np.testing.assert_array_equal(weights(copy)[0].values.read(), np.roll(indices, 1, 0))
        elif fault == "not-a-number":
            assert np.isnan(got).any()
        else:
            assert "table" in said or "scale" in said


def read(package: Path) -> bytes:
    """All files of a package, one after the other."""
    return b"".join(file.read_bytes() for file in sorted(package.rglob("*")) if file.is_file())
