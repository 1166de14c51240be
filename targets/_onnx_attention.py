"""Attention as ONNX Runtime's own kernel, com.microsoft.MultiHeadAttention, and the moves around it removed.

In ONNX Runtime 1.32 on x86-64, one thread, the kernel takes 0.55 to 0.65 of the time of MatMul, Softmax, MatMul with
their transposes (197 tokens, 3 heads of 64: 0.80 ms against 1.44; 64 tokens, 12 heads of 32, masked: 0.29 to 0.45).
Its softmax over a row whose keys are all masked is no number where torch gives zeros, so masks become large finite
numbers and such rows are multiplied by 0.
"""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention
from onnxscript.onnx_opset import opset18 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import Op, Opset

from ._onnx_graph import constant, new_constant, new_node, producer, replace, source, static_shape

MASKED = -1e30
"""Added to the score of a masked key: any real score vanishes beside it, and exp of the difference is 0."""
HEADS = [0, 2, 1, 3]
"""The transpose between (batch, tokens, heads, size) and (batch, heads, tokens, size)."""
DOMAIN = "com.microsoft"


def _schema(inputs: tuple[str, ...], attributes: dict[str, str]) -> onnx.defs.OpSchema:
    form = onnx.defs.OpSchema
    optional = form.FormalParameterOption.Optional
    return form(
        "MultiHeadAttention",
        DOMAIN,
        1,
        inputs=[
            form.FormalParameter(n, "T", param_option=form.FormalParameterOption.Single if n == "query" else optional)
            for n in inputs
        ],
        outputs=[form.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[form.Attribute(n, getattr(form.AttrType, t), required=False) for n, t in attributes.items()],
    )


_INPUTS = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
_kernel = Op(
    Opset(DOMAIN, 1),
    "MultiHeadAttention",
    _schema(_INPUTS, {"num_heads": "INT", "scale": "FLOAT", "unidirectional": "INT"}),
)


def attention(
    query: TensorType,
    key: TensorType,
    value: TensorType,
    attn_mask: TensorType | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> TensorType:
    """Scaled dot-product attention, float32 (batch, heads, tokens, size), on the kernel where it has the case.

    Not on: operands that carry codes (an integer matmul fuses there), shared key heads, causal masks that are not
    square, other ranks.
    """
    operands = (query, key, value)
    shapes = [static_shape(x) for x in operands]
    if not _fits(operands, shapes, attn_mask, is_causal):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    (batch, heads, tokens, size), keys, values = (s for s in shapes if s is not None)
    rows = [
        op.Reshape(op.Transpose(x, perm=HEADS), _ints([s[0], s[2], s[1] * s[3]]))
        for x, s in zip(operands, shapes, strict=True)
        if s is not None
    ]
    bias = live = None
    if attn_mask is not None:
        bias, live = _bias(attn_mask, tokens, keys[2])
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float(size**-0.5 if scale is None else scale)}
    if is_causal:
        attributes["unidirectional"] = 1
    y = _kernel(*rows, *(() if bias is None else (None, None, bias)), **attributes)
    y.shape, y.dtype = ir.Shape([batch, tokens, heads * values[3]]), ir.DataType.FLOAT  # no schema infers them
    rows_of_mask = 1 if attn_mask is None else int(attn_mask.shape[-2])
    shared = attn_mask is not None and (len(attn_mask.shape) < 3 or attn_mask.shape[-3] == 1)
    if live is not None and shared:  # beside the rows, where the transposes around them still cancel
        y = op.Mul(y, op.Reshape(live, _ints([-1, rows_of_mask, 1])))
    y = op.Transpose(op.Reshape(y, _ints([batch, tokens, heads, values[3]])), perm=HEADS)
    return y if live is None or shared else op.Mul(y, live)


def _ints(numbers: list[int]) -> TensorType:
    return op.Constant(value=ir.tensor(numbers, dtype=ir.DataType.INT64))


def _float(number: float) -> TensorType:
    return op.Constant(value=ir.tensor(number, dtype=ir.DataType.FLOAT))


def _fits(operands: tuple[Any, ...], shapes: list[tuple[int, ...] | None], mask: Any | None, is_causal: bool) -> bool:
    if any(s is None or len(s) != 4 for s in shapes):
        return False
    q, k, v = (s for s in shapes if s is not None)
    if any(x.dtype != ir.DataType.FLOAT or producer(x, "DequantizeLinear") is not None for x in operands):
        return False
    if k[:2] != q[:2] or v[:2] != q[:2] or k[2] != v[2] or k[3] != q[3] or (is_causal and q[2] != k[2]):
        return False
    if mask is None:
        return True
    shape = static_shape(mask)
    known = mask.dtype in (ir.DataType.BOOL, ir.DataType.FLOAT)
    return known and shape is not None and 2 <= len(shape) <= 4


def _bias(mask: Any, tokens: int, keys: int) -> tuple[TensorType, TensorType]:
    """(what is added to the scores, (1|batch, 1|heads, tokens, keys); 1 where a row sees any key, else 0)."""
    shape = [1] * (4 - len(mask.shape)) + [int(d) for d in mask.shape]
    if len(shape) != len(mask.shape):
        mask = op.Reshape(mask, _ints(shape))
    last = _ints([-1])
    if mask.dtype == ir.DataType.BOOL:
        live = op.ReduceMax(op.Cast(mask, to=ir.DataType.FLOAT), last)
        bias = op.Where(mask, _float(0.0), _float(MASKED))
    else:
        seen = op.Greater(op.ReduceMax(mask, last), _float(-np.inf))
        live, bias = op.Cast(seen, to=ir.DataType.FLOAT), op.Max(mask, _float(MASKED))
    if shape[2:] != [tokens, keys]:
        bias = op.Expand(bias, _ints([*shape[:2], tokens, keys]))
    return bias, live


def moves_that_undo_each_other_are_gone(model: ir.Model) -> None:
    """Drop pairs of transposes, chains of reshapes and masks that mask nothing; take q, k, v out of a packed linear as
    plain slices."""
    for rewrite in (_unpacked, _undone_transpose, _short_reshape):
        for node in list(model.graph):
            rewrite(model.graph, node)
    for node in model.graph:
        bias = constant(node.inputs[5]) if node.op_type == "MultiHeadAttention" and len(node.inputs) > 5 else None
        if bias is not None and not np.any(bias):
            node.resize_inputs(3)  # a mask that masks nothing
    multiplied_by_one = [n for n in model.graph if n.op_type == "Mul" and _is_ones(n.inputs[1])]
    for node in multiplied_by_one:
        x = source(node, 0)
        if static_shape(x) is not None and static_shape(x) == static_shape(node.outputs[0]):
            _skip(model.graph, node, x)


def _is_ones(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.dtype == np.float32 and bool(np.all(array == 1))


def _skip(graph: ir.Graph, node: ir.Node, x: ir.Value) -> None:
    """Let every reader of `node` read `x` instead; a graph output keeps its name, so there the node stays."""
    output = node.outputs[0]
    if output.is_graph_output():
        return
    output.replace_all_uses_with(x)
    graph.remove(node, safe=True)


def _perm(node: ir.Node | None) -> list[int]:
    attribute = None if node is None else node.attributes.get("perm")
    return [] if attribute is None else [int(a) for a in attribute.as_ints()]


def _undone_transpose(graph: ir.Graph, node: ir.Node) -> None:
    before = producer(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
    outer, inner = _perm(node), _perm(before)
    if before is not None and inner and [inner[a] for a in outer] == list(range(len(inner))):
        _skip(graph, node, source(before, 0))


def _short_reshape(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type != "Reshape" or static_shape(node.outputs[0]) is None:
        return
    before = producer(node.inputs[0], "Reshape")
    if before is not None:
        shape = new_constant(graph, f"{node.name}_to", np.array(static_shape(node.outputs[0]), np.int64))
        node.replace_input_with(0, source(before, 0))
        node.replace_input_with(1, shape)
    if static_shape(node.inputs[0]) == static_shape(node.outputs[0]):
        _skip(graph, node, source(node, 0))


def _unpacked(graph: ir.Graph, node: ir.Node) -> None:
    """(batch, tokens, 3 x width) seen as (3, batch, heads, tokens, size), one third of it brought back to
    (batch, tokens, width): a slice of the last axis, because nothing moved."""
    swapped = producer(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    squeezed = producer(swapped.inputs[0], "Squeeze") if swapped is not None and _perm(swapped) == HEADS else None
    part = producer(squeezed.inputs[0], "Slice") if squeezed is not None else None
    moved = producer(part.inputs[0], "Transpose") if part is not None else None
    parted = producer(moved.inputs[0], "Reshape") if moved is not None and _perm(moved) == [2, 0, 3, 1, 4] else None
    if squeezed is None or part is None or parted is None or len(part.inputs) < 4:
        return
    packed, shape = source(parted, 0), static_shape(parted.outputs[0])
    starts, ends, axes = (constant(v) for v in part.inputs[1:4])
    dropped = constant(squeezed.inputs[1]) if len(squeezed.inputs) > 1 else None
    if shape is None or any(a is None or a.tolist() != [0] for a in (axes, dropped)) or starts is None or ends is None:
        return
    batch, tokens, _, heads, size = shape
    width, first = heads * size, int(starts[0])
    if static_shape(packed) != (batch, tokens, shape[2] * width) or int(ends[0]) != first + 1:
        return
    if static_shape(node.outputs[0]) != (batch, tokens, width):
        return
    bounds = [
        new_constant(graph, f"{node.name}_{k}", np.array([v], np.int64))
        for k, v in (("start", first * width), ("end", (first + 1) * width), ("axis", 2))
    ]
    replace(graph, node, new_node(node, "Slice", [packed, *bounds]))
