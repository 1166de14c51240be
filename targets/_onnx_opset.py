"""Moves a model from the exporter's opset to the one a device's runtime reads."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import version_converter

from ._onnx_export import EXPORT_OPSET
from ._onnx_graph import constant, new_constant, new_node, replace, source, static_shape
from .errors import TargetError

OLDEST = 13
"""DequantizeLinear with an axis, so int8 weights per channel, begin here."""
IR_VERSIONS = {24: 12, 25: 13}
"""The file format's version that came with an opset, where it is newer than what the exporter writes."""


def at_opset(model: ir.Model, opset: int | None, needed: int = 0) -> None:
    """Rewrite the model in place for `opset`, or for `needed` where that is newer; `check` looks at the result.

    `needed` is the first opset with the types that the model stores (INT4 21, INT2 25): no older one can say them.
    """
    if opset is None:
        raise TargetError("the profile's rules for onnx name no opset; add `opset = 18` (or what its runtime reads)")
    if opset < OLDEST:
        raise TargetError(f"opset {opset} has no int8 weights per channel; the oldest opset written is {OLDEST}")
    opset = max(opset, needed)
    if opset > EXPORT_OPSET:
        version_converter.convert_version(model, opset, fallback=False)
    elif opset < EXPORT_OPSET:
        for node in list(model.graph):
            for newer_than, rewrite in REWRITES.get(node.op_type, ()):
                if opset < newer_than:
                    rewrite(model.graph, node)
    model.opset_imports[""] = opset
    model.ir_version = max(model.ir_version or 0, IR_VERSIONS.get(opset, 0))


def check(model: ir.Model) -> None:
    """Raise TargetError where the model's opset lacks an operator, or one with the inputs and attributes it has."""
    opset = model.opset_imports[""]
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset)
        except onnx.defs.SchemaError as error:
            raise TargetError(
                f"opset {opset} has no {node.op_type}, which '{node.name}' needs; choose a newer opset"
            ) from error
        unknown = [a for a in node.attributes if a not in schema.attributes]
        if unknown or not schema.min_input <= len(node.inputs) <= schema.max_input:
            raise TargetError(
                f"{node.op_type} of opset {opset} has no {unknown[0] if unknown else f'{len(node.inputs)} inputs'}, "
                f"which '{node.name}' needs; choose a newer opset"
            )


def _axes_to_attribute(graph: ir.Graph, node: ir.Node) -> None:
    """Reduce*(x, axes) of opset 18 becomes Reduce*(x; axes)."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if len(node.inputs) > 1 and axes is None:
        raise TargetError(f"the axes of {node.op_type} '{node.name}' are computed; they need opset {EXPORT_OPSET}")
    node.attributes.pop("noop_with_empty_axes", None)
    if axes is not None:
        node.attributes.add(ir.AttrInt64s("axes", [int(a) for a in axes]))
        node.resize_inputs(1)


def _split_by_sizes(graph: ir.Graph, node: ir.Node) -> None:
    """Split(x; num_outputs) of opset 18 becomes Split(x, sizes)."""
    count = node.attributes.get_int("num_outputs", 0)
    if not count:
        return
    x, axis = source(node, 0), node.attributes.get_int("axis", 0)
    length = _length(x, axis, node)
    each = -(-length // count)
    sizes = [min(each, length - i * each) for i in range(count)]
    node.attributes.pop("num_outputs")
    node.resize_inputs(2)
    node.replace_input_with(1, new_constant(graph, f"{node.name}_sizes", np.array(sizes, np.int64)))


def _length(x: ir.Value, axis: int, node: ir.Node) -> int:
    shape = static_shape(x)
    if shape is None:
        raise TargetError(f"the length that '{node.name}' works on is unknown; it needs opset {EXPORT_OPSET}")
    return shape[axis]


def _normalization_by_parts(graph: ir.Graph, node: ir.Node) -> None:
    """LayerNormalization of opset 17 becomes means, a square root and a division, by its definition."""
    x, weight = source(node, 0), source(node, 1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    axis = node.attributes.get_int("axis", -1)
    if x.shape is None:
        raise TargetError(f"the axes that '{node.name}' normalizes are unknown; it needs opset 17")
    axes = list(range(axis if axis < 0 else axis - len(x.shape), 0))
    made: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        made.append(new_node(node, op_type, list(inputs), **attributes))
        made[-1].outputs[0].type = None if x.dtype is None else ir.TensorType(x.dtype)
        return made[-1].outputs[0]

    epsilon = np.array(node.attributes.get_float("epsilon", 1e-5), np.float32)
    centred = add("Sub", x, add("ReduceMean", x, axes=axes, keepdims=1))
    variance = add("ReduceMean", add("Mul", centred, centred), axes=axes, keepdims=1)
    deviation = add("Sqrt", add("Add", variance, new_constant(graph, f"{node.name}_epsilon", epsilon)))
    y = add("Mul", add("Div", centred, deviation), weight)
    if bias is not None:
        add("Add", y, bias)
    for new in made[:-1]:
        graph.insert_before(node, new)
    replace(graph, node, made[-1])


def _zeros_copy(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape loses `allowzero` (opset 14), which says nothing where the shape holds no zero."""
    shape = constant(node.inputs[1])
    if node.attributes.get_int("allowzero", 0) and (shape is None or np.any(shape == 0)):
        raise TargetError(f"'{node.name}' reshapes to a computed or empty shape; it needs opset 14")
    node.attributes.pop("allowzero", None)


REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
REWRITES: dict[str, tuple[tuple[int, Callable[[ir.Graph, ir.Node], None]], ...]] = {
    **dict.fromkeys((*REDUCTIONS, "ReduceLogSum", "ReduceLogSumExp"), ((18, _axes_to_attribute),)),
    "Reshape": ((14, _zeros_copy),),
    "Split": ((18, _split_by_sizes),),
    "LayerNormalization": ((17, _normalization_by_parts),),
}
"""{operator: (the opset that brought the form which the exporter writes, how to do without), ...}."""
