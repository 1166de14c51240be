"""What an artifact keeps in memory, measured in a process of its own with the real runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from convert.resident import resident_bytes

MIB = 2**20


def matmul(path: Path, width: int, *, packed: bool = False) -> Path:
    """A product with a matrix of width x width: float32, or int8 codes that the runtime casts on loading."""
    codes = np.random.default_rng(0).integers(-7, 8, (width, width)).astype(np.int8)
    nodes, kept = [], [onnx.numpy_helper.from_array(codes.astype(np.float32), "w")]
    if packed:
        kept = [onnx.numpy_helper.from_array(codes, "codes")]
        nodes = [helper.make_node("Cast", ["codes"], ["w"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, width]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], kept)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_memory_follows_the_weights_and_the_runtime_itself_is_not_counted(tmp_path: Path) -> None:
    large, small = matmul(tmp_path / "large.onnx", 2048), matmul(tmp_path / "small.onnx", 16)
    found = resident_bytes("onnx", [large, small])
    assert isinstance(found, list), found
    # Runtimes keep a matrix once or, packed for their kernels, twice.
    assert 15 * MIB < found[0] < 40 * MIB
    assert found[1] < 4 * MIB


def test_weights_that_the_runtime_unpacks_count_as_what_they_become(tmp_path: Path) -> None:
    path = matmul(tmp_path / "packed.onnx", 2048, packed=True)
    found = resident_bytes("onnx", [path])
    assert isinstance(found, list), found
    assert found[0] > 3 * path.stat().st_size


@pytest.mark.parametrize("target", ["coreml", "c"])
def test_what_no_runtime_of_devices_runs_here_is_not_measured(target: str, tmp_path: Path) -> None:
    assert resident_bytes(target, [tmp_path]) == "no runtime of devices runs it inside a process here"


def test_a_file_that_does_not_load_has_a_reason_and_no_number(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    why = resident_bytes("onnx", [tmp_path / "broken.onnx"])
    assert isinstance(why, str)
    assert "the process that measures it failed: " in why
