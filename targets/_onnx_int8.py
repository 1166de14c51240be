"""The forms of Q/DQ that ONNX Runtime 1.31 fuses into integer kernels, numbers unchanged.

Each function is named for what is true after it.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ._onnx_graph import Array, constant, new_constant, new_node, producer, replace, source, static_shape

INT32_MAX = 2**31 - 1
MULTIPLYING = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
BIAS_TOLERANCE = 4 * float(np.finfo(np.float32).eps)
"""A float32 bias that is a multiple of its step carries the rounding of two products and a division."""


def weight_codes_are_stored_transposed(model: ir.Model) -> None:
    """Transpose(Dequantize(codes (out, in), axis 0)) becomes Dequantize(codes (in, out), axis 1)."""
    for node in list(model.graph):
        dequantize = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "Transpose" else None
        codes = constant(dequantize.inputs[0]) if dequantize is not None else None
        if dequantize is None or codes is None or codes.ndim != 2:
            continue
        stored = new_constant(model.graph, f"{source(dequantize, 0).name}_t", codes.T)
        group = dequantize.attributes.get_int("block_size", 0)
        inputs, attributes = list(dequantize.inputs), {"axis": 1 - dequantize.attributes.get_int("axis", 1)}
        if group:
            scales = constant(inputs[1])
            assert scales is not None
            inputs[1] = new_constant(model.graph, f"{source(dequantize, 1).name}_t", scales.T)
            attributes["block_size"] = group
        replacement = new_node(node, "DequantizeLinear", [stored, *inputs[1:]], **attributes)
        replacement.metadata_props.update(dequantize.metadata_props)
        replace(model.graph, node, replacement)


def biases_are_codes(model: ir.Model) -> None:
    """The float bias of an int8 Conv or Gemm becomes int32 codes with scale = input scale x weight scale.

    Only where the codes give the bias back to within float32 rounding: a bias that is no multiple of the step stays
    float, because rounding it here would be a number the simulation never saw.
    """
    for node in list(model.graph):
        step = _accumulator_step(node) if node.op_type in ("Conv", "Gemm") else None
        if step is None:
            continue
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        bias = constant(node.inputs[2]) if has_bias else np.zeros(step.shape, np.float32)
        codes = None if bias is None else bias_codes(bias, step)
        if codes is None:
            continue
        name = f"{source(node, 1).name}_bias"
        inputs: list[ir.Value | None] = [
            new_constant(model.graph, f"{name}_codes", codes),
            new_constant(model.graph, f"{name}_scale", step),
            new_constant(model.graph, f"{name}_zero", np.zeros(step.shape, np.int32)),
        ]
        dequantize = new_node(node, "DequantizeLinear", inputs, axis=0)
        model.graph.insert_before(node, dequantize)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, dequantize.outputs[0])


def _accumulator_step(node: ir.Node) -> NDArray[np.float32] | None:
    """float32 [out]: what one unit of the integer accumulator is worth; None where the node isn't int8."""
    x, w = producer(node.inputs[0], "DequantizeLinear"), producer(node.inputs[1], "DequantizeLinear")
    if x is None:  # a linear of three axes: its input is reshaped to rows first
        rows = producer(node.inputs[0], "Reshape")
        x = producer(rows.inputs[0], "DequantizeLinear") if rows is not None else None
    if x is None or w is None or constant(w.inputs[0]) is None:
        return None
    x_scale, w_scale = constant(x.inputs[1]), constant(w.inputs[1])
    if x_scale is None or w_scale is None or w_scale.ndim != 1:
        return None
    return np.asarray(x_scale.astype(np.float32) * w_scale.astype(np.float32), np.float32)


def bias_codes(bias: Array, step: NDArray[np.float32]) -> NDArray[np.int32] | None:
    """int32 codes with codes * step == bias to float32 rounding, or None where there are none."""
    wanted = bias.astype(np.float64)
    codes = np.rint(wanted / step)
    if not np.all(np.isfinite(codes)) or np.any(np.abs(codes) > INT32_MAX):
        return None
    if np.any(np.abs(codes * step.astype(np.float64) - wanted) > BIAS_TOLERANCE * np.abs(wanted)):
        return None
    return codes.astype(np.int32)


def means_are_pools(model: ir.Model) -> None:
    """ReduceMean over H and W of dequantized codes becomes GlobalAveragePool, which has an integer kernel."""
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or producer(node.inputs[0], "DequantizeLinear") is None:
            continue
        x, shape = source(node, 0), static_shape(node.inputs[0])
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if shape is None or len(shape) != 4 or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        pool = new_node(node, "GlobalAveragePool", [x])
        if node.attributes.get_int("keepdims", 1):
            replace(model.graph, node, pool)
            continue
        pool.outputs[0].shape = ir.Shape([*shape[:2], 1, 1])
        pool.outputs[0].type = None if x.dtype is None else ir.TensorType(x.dtype)
        model.graph.insert_before(node, pool)
        flat = new_constant(model.graph, f"{node.name}_shape", np.array(shape[:2], np.int64))
        replace(model.graph, node, new_node(node, "Reshape", [pool.outputs[0], flat]))


def pads_run_on_codes(model: ir.Model) -> None:
    """Dequantize, Pad(constant), Quantize with the same parameters becomes Pad of the codes with the constant's code.

    The same numbers, since Quantize works element by element. ONNX Runtime moves codes through Slice, Reshape,
    Transpose and MaxPool by itself, but not through Pad.
    """
    for node in list(model.graph):
        pad = producer(node.inputs[0], "Pad") if node.op_type == "QuantizeLinear" else None
        before = producer(pad.inputs[0], "DequantizeLinear") if pad is not None else None
        if pad is None or before is None or pad.attributes.get_string("mode", "constant") != "constant":
            continue
        if len(pad.outputs[0].uses()) != 1 or not _same_parameters(before, node):
            continue
        has_fill = len(pad.inputs) > 2 and pad.inputs[2] is not None
        fill = constant(pad.inputs[2]) if has_fill else np.zeros((), np.float32)
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        if scale is None or zero is None or fill is None:
            continue
        limits = np.iinfo(zero.dtype)
        code = np.clip(np.rint(fill / scale) + zero.astype(np.float32), limits.min, limits.max).astype(zero.dtype)
        value = new_constant(model.graph, f"{pad.name}_code", code)
        inputs = [before.inputs[0], pad.inputs[1], value, *pad.inputs[3:]]
        replace(model.graph, node, new_node(pad, "Pad", inputs, mode="constant"))


def _same_parameters(a: ir.Node, b: ir.Node) -> bool:
    pairs = [(constant(x), constant(y)) for x, y in zip(a.inputs[1:3], b.inputs[1:3], strict=True)]
    return all(x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def float_layers_stay_float(model: ir.Model) -> None:
    """A layer with float weights reads codes through a Dequantize of its own, whose one scale is written once per index
    of an axis.

    The same numbers. ONNX Runtime (WeightBiasQuantization, seen in 1.32) takes a float layer between Dequantize and
    Quantize for one that somebody forgot to quantize, and rounds its weights to int8 with one scale for all of them; it
    leaves alone what reads more scales than one. A product of two activations has no weights: where the other one is
    codes too, behind a transposition, it fuses to an integer product that wants one zero point.
    """
    for node in list(model.graph):
        before = producer(node.inputs[0], "DequantizeLinear") if node.op_type in MULTIPLYING else None
        shape = static_shape(node.inputs[0]) if before is not None else None
        if before is None or shape is None or producer(node.inputs[1], "DequantizeLinear") is not None:
            continue
        if _computed(node.inputs[1]):
            continue
        scale, zero = constant(before.inputs[1]), constant(before.inputs[2]) if len(before.inputs) > 2 else None
        axis = next((a for a in (1, 2, 3, 0) if a < len(shape) and shape[a] > 1), None)
        if scale is None or scale.size != 1 or axis is None:
            continue
        inputs: list[ir.Value | None] = [before.inputs[0]]
        for name, value in (("scales", scale), ("zeros", zero)):
            if value is not None:
                spread = np.full(shape[axis], value.reshape(()), value.dtype)
                inputs.append(new_constant(model.graph, f"{source(node, 0).name}_{name}", spread))
        own = new_node(before, "DequantizeLinear", inputs, axis=axis)
        own.outputs[0].shape, own.outputs[0].type = ir.Shape(shape), source(node, 0).type
        model.graph.insert_before(node, own)
        node.replace_input_with(0, own.outputs[0])
        if not before.outputs[0].uses():
            model.graph.remove(before, safe=True)


def _computed(value: ir.Value | None) -> bool:
    """Whether the value depends on what the model is given."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value is None or value in seen or value.is_initializer():
            continue
        seen.add(value)
        maker = value.producer()
        if maker is None:
            return True
        stack += maker.inputs
    return False
