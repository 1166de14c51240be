"""Float operators in the form that ONNX Runtime runs fastest, numbers unchanged; each function is named for it."""

import onnx_ir as ir
from onnxscript.function_libs.torch_lib.ops.nn import aten_gelu
from onnxscript.onnx_opset import opset18 as op
from onnxscript.onnx_types import TensorType

from ._onnx_graph import constant, new_node, producer, replace, source, static_shape


def gelu(x: TensorType, approximate: str = "none") -> TensorType:
    """0.5 * (x * (1 + erf(x / sqrt 2))), in the order that ONNX Runtime fuses to its Gelu kernel: on x86-64 0.62 of the
    time of the exporter's order, which it leaves in five operators. Halving is exact, so the numbers are the same."""
    if approximate != "none" or x.dtype != ir.DataType.FLOAT:
        return aten_gelu(x, approximate)
    erf = op.Erf(op.Div(x, _scalar(1.4142135623730951)))
    return op.Mul(op.Mul(x, op.Add(erf, _scalar(1.0))), _scalar(0.5))


def _scalar(number: float) -> TensorType:
    return op.Constant(value=ir.tensor(number, dtype=ir.DataType.FLOAT))


def sums_stay_beside_their_norms(model: ir.Model) -> None:
    """Add before LayerNormalization becomes Sum of two, the same number by another name.

    ONNX Runtime 1.32 fuses Add and LayerNormalization to SkipLayerNormalization, whose CPU kernel takes 3 to 5 times as
    long as the two (64 x 384 values: 178 us against 36 on x86-64); it does not recognise Sum.
    """
    for node in list(model.graph):
        add = producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is None or len(add.outputs[0].uses()) != 1:
            continue
        shapes = {static_shape(x) for x in add.inputs}
        computed = all(constant(x) is None and producer(x, "DequantizeLinear") is None for x in add.inputs)
        if computed and len(shapes) == 1 and None not in shapes:
            replace(model.graph, add, new_node(add, "Sum", [source(add, 0), source(add, 1)]))


def rows_are_gathered_whole(model: ir.Model) -> None:
    """GatherElements of [B, N, C] by indices [B, K, 1] that are spread over C becomes GatherND: K copies of a row each,
    where the other looks up every number by itself and wants its indices written out."""
    for node in list(model.graph):
        spread = producer(node.inputs[1], "Expand") if node.op_type == "GatherElements" else None
        if spread is None:
            continue
        data, index = source(node, 0), source(spread, 0)
        shapes = [static_shape(x) for x in (data, index, node.outputs[0])]
        if any(shape is None or len(shape) != 3 for shape in shapes):
            continue
        (batch, _, width), (rows, count, single), made = (shape or () for shape in shapes)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if axis % 3 == 1 and single == 1 and rows == batch and made == (batch, count, width):
            replace(model.graph, node, new_node(node, "GatherND", [data, index], batch_dims=1))
