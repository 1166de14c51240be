"""Reading and editing an ONNX model in memory: constants, producers, replacement."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer, None for anything computed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def source(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator must have."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} '{node.name}' lacks its input {index}"
    return value


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value`, where it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape where every length is known."""
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(d for d in value.shape if isinstance(d, int))


def new_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """An initializer called `name`, or like it where the name is taken."""
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(np.array(array, order="C"), name=unique))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def new_node(like: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Node:
    """An operator of the same layer as `like`, not yet in the graph."""
    return ir.node(op_type, inputs, attributes=attributes, metadata_props=dict(like.metadata_props))


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`; its output keeps the old one's name, type and readers."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    new.name = old.name
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
