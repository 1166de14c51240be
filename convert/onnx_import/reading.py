"""An .onnx file, read and checked: nodes as plain data, initializers as tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convert.errors import TightfitError

from .registry import OnnxNode

if TYPE_CHECKING:
    import onnx

# TensorProto.DataType -> torch (onnx.proto, enum DataType)
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
OLDEST = 9
AGAIN = "Export it again, or run onnx.checker.check_model on it to see more."


@dataclass(frozen=True)
class Declared:
    """A graph input: None in `shape` is an axis of any length."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """An ONNX graph without its protobuf: constants by name, nodes in topological order."""

    inputs: tuple[Declared, ...]
    outputs: tuple[str, ...]
    nodes: tuple[OnnxNode, ...]
    constants: dict[str, Tensor]


def read(path: Path) -> Graph:
    """Read `path` with the external data beside it. Raises TightfitError for what is missing, damaged or too old."""
    import onnx
    from onnx import inliner

    if not path.is_file():
        raise TightfitError(f"there is no file {path}; check the path of the model.")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(path)
    except FileNotFoundError as error:
        raise TightfitError(f"{path} keeps its weights in another file, which is not beside it: {error}.") from error
    except Exception as error:  # protobuf, onnx and its C++ checker raise unrelated types
        raise TightfitError(f"{path} is damaged or no ONNX model: {_first_line(error)} {AGAIN}") from error
    if model.functions:
        model = inliner.inline_local_functions(model)
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    if opsets.get("ai.onnx", OLDEST) < OLDEST:
        raise TightfitError(
            f"{path} is of opset {opsets['ai.onnx']}; {OLDEST} is the oldest that capture reads. Export it with a "
            "newer opset, or convert it with onnx.version_converter."
        )
    return graph_of(model.graph, opsets, path)


def graph_of(graph: "onnx.GraphProto", opsets: dict[str, int], path: Path) -> Graph:
    """A GraphProto as plain data."""
    from onnx import numpy_helper

    constants = {}
    for initializer in graph.initializer:
        constants[initializer.name] = _tensor(numpy_helper.to_array(initializer))
    half = next((n for n, t in constants.items() if t.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise TightfitError(
            f"'{half}' in {path} is {str(constants[half].dtype).removeprefix('torch.')}; capture starts from float32 "
            "and lowers precision itself. Export the float32 model instead."
        )
    inputs = tuple(_declared(i, path) for i in graph.input if i.name not in constants)
    nodes = tuple(_node(n, i, opsets, path) for i, n in enumerate(graph.node))
    return Graph(inputs, tuple(o.name for o in graph.output), nodes, constants)


def _declared(info: "onnx.ValueInfoProto", path: Path) -> Declared:
    tensor = info.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None or dtype in (torch.float16, torch.bfloat16):
        raise TightfitError(
            f"the input '{info.name}' of {path} has the type {tensor.elem_type} of ONNX's DataType, which capture does "
            "not take; it takes float32, float64, integers and bool."
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
    return Declared(info.name, shape, str(dtype).removeprefix("torch."))


def _node(node: "onnx.NodeProto", index: int, opsets: dict[str, int], path: Path) -> OnnxNode:
    domain = node.domain or "ai.onnx"
    attributes = {a.name: _attribute(a, opsets, path) for a in node.attribute}
    if node.op_type == "ConstantOfShape" and "value" in attributes:
        fill = attributes.pop("value")  # read now: while torch.export traces, reading a tensor would be traced too
        attributes |= {"fill": fill.reshape(-1)[0].item(), "dtype": fill.dtype}
    name = node.name or f"{node.op_type}_{index}"
    opset = opsets.get(domain, 1)
    return OnnxNode(node.op_type, domain, name, tuple(node.input), tuple(node.output), opset, attributes)


def _attribute(attribute: "onnx.AttributeProto", opsets: dict[str, int], path: Path) -> Any:
    from onnx import AttributeProto, helper, numpy_helper

    value = helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return _tensor(numpy_helper.to_array(value))
    if attribute.type == AttributeProto.GRAPH:
        return graph_of(value, opsets, path)
    if attribute.type == AttributeProto.STRING:
        return value.decode()
    if attribute.type == AttributeProto.STRINGS:
        return [v.decode() for v in value]
    return list(value) if isinstance(value, Iterable) else value


def _tensor(array: "np.ndarray[Any, Any]") -> Tensor:
    if array.dtype.kind in "SUO":
        raise TightfitError("the model holds strings, which no target of ours computes with.")
    return torch.from_numpy(np.array(array, order="C"))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:300].rstrip('.') if lines else type(error).__name__}."
