"""Every operator alone, in several forms, against ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from operator_cases import Case, F, X, cases, f, i

from convert.errors import TightfitError
from convert.onnx_import import OnnxModule, read
from convert.onnx_import.registry import operators


def of_opset(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10)


def written(case: Case, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The case as an .onnx file, and what to feed it."""
    feeds = {f"x{n}": array for n, array in enumerate(case.inputs)}
    constants = {f"c{n}": a for n, a in enumerate(case.fixed) if a is not None}
    names = [*feeds, *(f"c{n}" if a is not None else "" for n, a in enumerate(case.fixed))]
    outputs = [f"y{n}" for n in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the_node", **case.attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    model = of_opset(graph, case.opset)
    model = onnx.shape_inference.infer_shapes(model)
    for output in model.graph.output:  # onnx infers nothing for operators that are functions of others
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, case.inputs[0].shape))
    path = folder / "op.onnx"
    onnx.save(model, path)
    return path, feeds


def runtime(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_same(got: torch.Tensor | np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    array = np.asarray(got)
    assert array.shape == wanted.shape
    assert array.dtype == wanted.dtype
    span = float(np.abs(wanted.astype(np.float64)).max(initial=0.0))
    np.testing.assert_allclose(array, wanted, rtol=0, atol=tolerance * max(span, 1e-6))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_an_operator_computes_what_onnx_runtime_computes(case: Case, tmp_path: Path) -> None:
    path, feeds = written(case, tmp_path)
    got = OnnxModule(read(path), path)(*(torch.from_numpy(a) for a in feeds.values()))
    for one, wanted in zip(got, runtime(path, feeds), strict=True):
        assert_same(one, wanted, 1e-5)  # float32 sums in another order


def test_every_operator_there_is_has_a_case() -> None:
    covered = {c.op for c in cases()}
    elsewhere = {"Constant", "ConstantOfShape", "Range", "Scatter", "Swish"}  # below, in whole models, or too new
    assert set(operators()) - covered - elsewhere == set()


def test_the_comparison_itself_fails_on_a_wrong_number() -> None:
    with pytest.raises(AssertionError):
        assert_same(np.array([1.0, 2.0001], F), np.array([1.0, 2.0], F), 1e-5)


def test_constants_are_computed_before_anything_runs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["n"], value=numpy_helper.from_array(i([3]))),
        helper.make_node("ConstantOfShape", ["n"], ["full"], value=numpy_helper.from_array(np.array([2.0], F))),
        helper.make_node("Constant", [], ["a"], value_int=0),
        helper.make_node("Constant", [], ["b"], value_int=3),
        helper.make_node("Constant", [], ["c"], value_int=1),
        helper.make_node("Range", ["a", "b", "c"], ["range"]),
        helper.make_node("Cast", ["range"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["full", "floats"], ["slope"]),
        helper.make_node("Mul", ["x", "slope"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ),
        path,
    )
    module = OnnxModule(read(path), path)
    assert [list(b.shape) for b in [*module.parameters(), *module.buffers()]] == [[3]]
    assert_same(module(torch.ones(2, 3))[0], np.tile(np.array([0.0, 2.0, 4.0], F), (2, 1)), 0.0)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_whose_side_is_known_is_taken(taken: bool, tmp_path: Path) -> None:
    def side(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, [2])
        return helper.make_graph([helper.make_node(op, ["x"], [f"{op}_out"])], op, [], [out])

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=side("Exp"), else_branch=side("Neg"))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.array(taken), "c")])
    path = tmp_path / "m.onnx"
    onnx.save(of_opset(graph, 17), path)
    value = f(2)
    assert_same(OnnxModule(read(path), path)(torch.from_numpy(value))[0], np.exp(value) if taken else -value, 1e-6)


def test_unknown_operators_are_all_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="first"),
        helper.make_node("NonZero", ["d"], ["y"], name="second"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 3])
    y = helper.make_empty_tensor_value_info("y")
    path = tmp_path / "m.onnx"
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    with pytest.raises(TightfitError, match=r"2 operators.*Det \(node 'first'.*NonZero \(node 'second'"):
        OnnxModule(read(path), path)


def test_a_form_that_is_not_supported_names_the_node(tmp_path: Path) -> None:
    case = Case("AveragePool", [X], attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}, opset=19)
    path, feeds = written(case, tmp_path)
    with pytest.raises(TightfitError, match=r"'the_node' \(AveragePool\) has a dilation"):
        OnnxModule(read(path), path)(*(torch.from_numpy(a) for a in feeds.values()))
