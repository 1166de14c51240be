"""A file for an Arm board gives its own numbers on x86 without VNNI too, where fast int8 sums saturate."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets import _onnx_exact, find
from targets._onnx_exact import exact_model, saturates

CODES = np.full((4, 64), 120, np.int8)


def net(folder: Path, codes: np.ndarray) -> Path:
    """Two linear layers on codes that share a zero point: x float32 [1, 64] -> y [1, 4] and z [1, 4]."""
    tensors = {
        "scale": np.float32(1 / 255), "zero": np.uint8(0), "weight_scale": np.float32(0.01), "weight_zero": np.int8(0),
        "w": codes.T.copy(), "v": codes.T.copy(),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero", "weight_zero"], ["a"]),
        helper.make_node("MatMulInteger", ["q", "v", "zero", "weight_zero"], ["b"]),
        helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["b"], ["z"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("y", "z")],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()],
    )
    path = folder / "net.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


def test_sums_are_exact_on_every_processor(tmp_path: Path) -> None:
    found = find("onnx").open(net(tmp_path, CODES)).run({"x": np.ones((1, 64), np.float32)})
    assert found["y"].tolist() == found["z"].tolist() == [[255 * 120 * 64.0] * 4]


@pytest.mark.skipif(not saturates(), reason="this processor sums int8 products exactly")
def test_without_it_they_would_saturate(tmp_path: Path) -> None:
    """The negative control: the same file in ONNX Runtime as it comes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(net(tmp_path, CODES)), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 64), np.float32)})[0].max() < 255 * 120 * 64


@pytest.mark.parametrize(("codes", "needed"), [(CODES, True), (CODES // 2, False)])
def test_only_weights_of_eight_bits_need_it(
    tmp_path: Path, codes: np.ndarray, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_exact, "saturates", lambda: True)
    assert (exact_model(net(tmp_path, codes)) is not None) == needed
    monkeypatch.setattr(_onnx_exact, "saturates", lambda: False)
    assert exact_model(net(tmp_path, codes)) is None


def test_a_processor_with_vnni_is_told_by_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_onnx_exact.platform, "machine", lambda: "x86_64")
    for flags, expected in (("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), ("avx2", True)):
        path = tmp_path / flags.replace(" ", "-")
        path.write_text(f"flags: {flags}\n")
        assert saturates(path) == expected
    monkeypatch.setattr(_onnx_exact.platform, "machine", lambda: "aarch64")
    assert not saturates(tmp_path / "none")
