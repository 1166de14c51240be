"""What is established about an ONNX model before it is written; each function is named for what is true after it."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir

from ._onnx_export import LAYER_KEY

Array = NDArray[np.generic]
WORK = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"))
INT32_MAX = 2**31 - 1
BIAS_TOLERANCE = 4 * float(np.finfo(np.float32).eps)
"""A float32 bias that is a multiple of its step carries the rounding of two products and a division."""


def constants_are_folded(model: ir.Model) -> None:
    """Fold what is constant, drop what is unused or does nothing. Half-precision weights keep their Cast."""

    def should_fold(node: ir.Node) -> bool | None:
        stored_half = node.op_type == "Cast" and node.inputs[0] is not None
        if stored_half and node.inputs[0].dtype == ir.DataType.FLOAT16 and constant(node.inputs[0]) is not None:
            return False
        return None

    optimize_ir(model, should_fold=should_fold, input_size_limit=1 << 40, output_size_limit=1 << 40)


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer, None for anything computed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


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


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value`, where it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def weight_codes_are_stored_transposed(model: ir.Model) -> None:
    """Transpose(Dequantize(codes (out, in), axis 0)) becomes Dequantize(codes (in, out), axis 1)."""
    for node in list(model.graph):
        source = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "Transpose" else None
        codes = constant(source.inputs[0]) if source is not None else None
        if source is None or codes is None or codes.ndim != 2:
            continue
        stored = new_constant(model.graph, f"{source.inputs[0].name}_t", codes.T)
        made = ir.node(
            "DequantizeLinear", [stored, *source.inputs[1:]], attributes={"axis": 1}, metadata_props=node.metadata_props
        )
        replace(model.graph, node, made)


def biases_are_codes(model: ir.Model) -> None:
    """The float bias of an int8 Conv or Gemm becomes int32 codes with scale = input scale x weight scale.

    Only where the codes give the bias back to within float32 rounding: a bias that is no multiple of the step stays
    float, because rounding it here would be a number the simulation never saw.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm"):
            continue
        step = _accumulator_step(node)
        if step is None:
            continue
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(step.shape, np.float32)
        codes = None if bias is None else bias_codes(bias, step)
        if codes is None:
            continue
        name = f"{node.inputs[1].producer().inputs[0].name}_bias"
        scale = new_constant(model.graph, f"{name}_scale", step)
        zero = new_constant(model.graph, f"{name}_zero", np.zeros(step.shape, np.int32))
        dequantize = ir.node(
            "DequantizeLinear",
            [new_constant(model.graph, f"{name}_codes", codes), scale, zero],
            attributes={"axis": 0},
            metadata_props=node.metadata_props,
        )
        model.graph.insert_before(node, dequantize)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, dequantize.outputs[0])


def _accumulator_step(node: ir.Node) -> NDArray[np.float32] | None:
    """float32 [out]: what one unit of the integer accumulator is worth; None where the node isn't int8."""
    x, w = producer(node.inputs[0], "DequantizeLinear"), producer(node.inputs[1], "DequantizeLinear")
    if x is None:  # a linear of three axes: its input is reshaped to rows first
        reshape = producer(node.inputs[0], "Reshape")
        x = producer(reshape.inputs[0], "DequantizeLinear") if reshape is not None else None
    if x is None or w is None:
        return None
    x_scale, w_scale, codes = constant(x.inputs[1]), constant(w.inputs[1]), constant(w.inputs[0])
    if x_scale is None or w_scale is None or codes is None or w_scale.ndim != 1:
        return None
    return (x_scale.astype(np.float32) * w_scale.astype(np.float32)).astype(np.float32)


def bias_codes(bias: Array, step: NDArray[np.float32]) -> NDArray[np.int32] | None:
    """int32 codes with codes * step == bias to float32 rounding, or None where there are none."""
    wanted = bias.astype(np.float64)
    codes = np.rint(wanted / step)
    if np.any(np.abs(codes) > INT32_MAX) or not np.all(np.isfinite(codes)):
        return None
    if np.any(np.abs(codes * step.astype(np.float64) - wanted) > BIAS_TOLERANCE * np.abs(wanted)):
        return None
    return codes.astype(np.int32)


def means_are_pools(model: ir.Model) -> None:
    """ReduceMean over H and W of dequantized codes becomes GlobalAveragePool, which has an integer kernel."""
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or producer(node.inputs[0], "DequantizeLinear") is None:
            continue
        x, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if x.shape is None or len(x.shape) != 4 or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        pool = ir.node("GlobalAveragePool", [x], metadata_props=node.metadata_props)
        pool.outputs[0].shape = ir.Shape([x.shape[0], x.shape[1], 1, 1])
        pool.outputs[0].dtype = x.dtype
        if node.attributes.get_int("keepdims", 1):
            replace(model.graph, node, pool)
            continue
        shape = new_constant(model.graph, f"{node.name}_shape", np.array([int(d) for d in x.shape[:2]], np.int64))
        model.graph.insert_before(node, pool)
        reshape = ir.node("Reshape", [pool.outputs[0], shape], metadata_props=node.metadata_props)
        replace(model.graph, node, reshape)


def pads_run_on_codes(model: ir.Model) -> None:
    """Dequantize, Pad(constant), Quantize with the same parameters becomes Pad of the codes with the constant's code.

    The same numbers: Quantize works element by element. ONNX Runtime moves codes through Slice, Reshape, Transpose and
    MaxPool by itself, but not through Pad.
    """
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        pad = producer(node.inputs[0], "Pad")
        source = producer(pad.inputs[0], "DequantizeLinear") if pad is not None else None
        if pad is None or source is None or pad.attributes.get_string("mode", "constant") != "constant":
            continue
        if len(pad.outputs[0].uses()) != 1 or not _same_parameters(source, node):
            continue
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        fill = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.float32(0)
        if scale is None or zero is None or fill is None:
            continue
        limits = np.iinfo(zero.dtype)
        code = np.clip(np.rint(fill / scale) + zero.astype(np.float32), limits.min, limits.max).astype(zero.dtype)
        value = new_constant(model.graph, f"{pad.name}_code", code)
        rest = pad.inputs[3:]
        made = ir.node(
            "Pad",
            [source.inputs[0], pad.inputs[1], value, *rest],
            attributes={"mode": "constant"},
            metadata_props=pad.metadata_props,
        )
        replace(model.graph, node, made)


def _same_parameters(a: ir.Node, b: ir.Node) -> bool:
    pairs = [(constant(x), constant(y)) for x, y in zip(a.inputs[1:3], b.inputs[1:3], strict=True)]
    return all(x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def nodes_bear_layer_names(model: ir.Model) -> None:
    """Name the nodes `<layer>` or `<layer>/<operator>`, `#2` and on where a name recurs; the operator that does a layer's work gets the bare name."""
    taken: dict[str, int] = {}
    for node in model.graph:
        layer = node.metadata_props.get(LAYER_KEY, node.op_type)
        base = layer if node.op_type in WORK else f"{layer}/{node.op_type}"
        taken[base] = taken.get(base, 0) + 1
        node.name = base if taken[base] == 1 else f"{base}#{taken[base]}"


def nothing_machine_specific_is_kept(model: ir.Model) -> None:
    """Drop metadata, doc strings and value types: the same job gives the same bytes on every machine."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "tightfit", None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "main_graph"
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if value not in outputs:
                value.shape, value.type = None, None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`; its output keeps the old one's name, type and readers."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    new.name = old.name
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
