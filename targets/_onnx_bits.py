"""Weights of few bits: how they are stored, and what runs on them.

Codes of 4 bits are INT4 tensors (opset 21), of 2 bits INT2 (opset 25), each behind one Cast to INT8. ONNX Runtime 1.32
folds the Cast when it loads the file, before it fuses: the file has the bits asked for, the kernels are those of int8.
A lower opset in the profile is raised for them, as no older one has such tensors.

Weights beside float activations are dequantized by operators that ONNX Runtime folds at load, and run at float's speed;
4 bits with groups stay packed in memory too, in com.microsoft.MatMulNBits (1.06 to 1.3 times float's time here; at 8
and 2 bits that operator needs 3 to 29 times, so they don't use it). Tables are looked up as codes.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch.fx import GraphModule

from calibrate import qdq
from calibrate.graph import layer_name

from ._onnx_attention import DOMAIN
from ._onnx_export import LAYER_KEY
from ._onnx_graph import Array, constant, new_constant, new_node, producer, replace, source, static_shape
from .errors import TargetError

Bits = dict[str, int]
PACKED = {4: (ml_dtypes.int4, 21), 2: (ml_dtypes.int2, 25)}
"""{bits: (the type of the tensor, the first opset that has it)}."""
BLOCKS = (16, 32, 64, 128, 256)
"""Group sizes of ONNX Runtime's operators on packed weights."""
LARGEST_BLOCK = 1 << 14
"""More than a row of any table: one block is then one scale per row."""


def stored_bits(graph: GraphModule) -> Bits:
    """{layer, as ONNX nodes are marked with it: bits of its weight codes in the file, 2, 4 or 8; 1 for codes of -1 to
    1, for which there is no type}."""
    found: Bits = {}
    for node in graph.graph.nodes:
        bits = qdq.code_bits(node)
        if bits is not None:
            name = layer_name(node)
            few = 1 if qdq.code_range(node) == (-1, 1) else 8 if bits > 4 else 4 if bits > 2 else 2
            found[name] = max(found.get(name, 0), few)
    return found


def oldest_opset(graph: GraphModule, runtime: str) -> int:
    """The first opset that has all types and attributes which this graph needs."""
    needed = max((PACKED[b][1] for b in stored_bits(graph).values() if b in PACKED), default=0)
    for node in graph.graph.nodes:
        if node.target in (qdq.QUANTIZE_FLOAT8, qdq.DEQUANTIZE_FLOAT8):
            needed = max(needed, 19)
        if node.target is qdq.QUANTIZE and torch.int16 in node.args:
            needed = max(needed, 21)
        if node.target is qdq.DEQUANTIZE_GROUP and runtime == "tensorrt":
            needed = max(needed, 21)
    return needed


def codes_are_stored_in_their_bits(model: ir.Model, bits: Bits, runtime: str) -> None:
    """Weight codes become INT4 or INT2 tensors; a Cast to INT8 stands between them and what reads int8."""
    done: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(model.graph):
        count = bits.get(node.metadata_props.get(LAYER_KEY, ""), 8)
        if count not in PACKED:
            continue
        for index, codes in list(enumerate(node.inputs)):
            array = constant(codes)
            if codes is None or array is None or array.dtype != np.int8 or not is_weight(node, index):
                continue
            direct = runtime == "tensorrt" or node.op_type == "Cast"
            if runtime == "tensorrt" and count == 2:
                raise TargetError("TensorRT has no weights of 2 bits; use 4 bits with groups, or 8")
            if (codes, direct) not in done:
                packed = new_constant(model.graph, f"{codes.name}_int{count}", array.astype(PACKED[count][0]))
                done[codes, direct] = packed if direct else _as_int8(model.graph, node, packed)
            node.replace_input_with(index, done[codes, direct])
            if direct and node.op_type == "DequantizeLinear" and len(node.inputs) > 2:
                node.resize_inputs(2)  # a zero point of zeros, in a type that is no longer the codes'


def is_weight(node: ir.Node, index: int) -> bool:
    """Whether this input of a node may be a weight's codes."""
    if node.op_type in ("MatMulInteger", "ConvInteger"):
        return index == 1
    return index == 0 and node.op_type in ("DequantizeLinear", "Cast", "Gather")


def _as_int8(graph: ir.Graph, node: ir.Node, packed: ir.Value) -> ir.Value:
    cast = new_node(node, "Cast", [packed], to=ir.DataType.INT8)
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT8, packed.shape
    graph.insert_before(node, cast)
    return cast.outputs[0]


def tables_are_looked_up_as_codes(model: ir.Model, bits: Bits) -> None:
    """Gather(Dequantize(table), ids) becomes Dequantize(Gather(codes, ids)): only the rows asked for become floats.

    4 bits: com.microsoft.GatherBlockQuantized, packed in memory too. Otherwise the rows' codes times their scales.
    """
    for node in list(model.graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        cast = producer(node.inputs[0], "Cast")
        table = producer(node.inputs[0] if cast is None else cast.inputs[0], "DequantizeLinear")
        codes = None if table is None else constant(table.inputs[0])
        scales = None if table is None else constant(table.inputs[1])
        if table is None or codes is None or codes.dtype != np.int8 or codes.ndim != 2 or scales is None:
            continue
        if scales.ndim == 1 and table.attributes.get_int("axis", 1) != 0:
            continue
        scales = scales.reshape(len(codes), -1)
        few = bits.get(table.metadata_props.get(LAYER_KEY, ""), 8) == 4
        block = _block(codes.shape[1], scales.shape[1])
        made = _packed_rows if few and block is not None else _rows
        rows = made(model.graph, node, table, codes, scales)
        if cast is not None:
            rows = new_node(node, "Cast", [_before(model.graph, node, rows)], to=cast.attributes.get_int("to", 1))
        replace(model.graph, node, rows)
        for unread in (cast, table):
            if unread is not None and not unread.outputs[0].uses():
                model.graph.remove(unread, safe=True)


def _block(width: int, groups: int) -> int | None:
    """The block size with which ONNX Runtime's operators see one scale per group, None where they can't."""
    if groups == 1:
        block = max(16, 1 << (width - 1).bit_length())
        return block if block <= LARGEST_BLOCK else None
    group = width // groups
    return group if group in BLOCKS else None


def _before(graph: ir.Graph, node: ir.Node, made: ir.Node) -> ir.Value:
    graph.insert_before(node, made)
    return made.outputs[0]


def _packed_rows(graph: ir.Graph, node: ir.Node, table: ir.Node, codes: Array, scales: Array) -> ir.Node:
    stored = source(table, 0)
    packed = new_constant(graph, f"{stored.name}_int4", codes.astype(ml_dtypes.int4))
    steps = new_constant(graph, f"{stored.name}_scale", scales.astype(np.float32))
    block = _block(codes.shape[1], scales.shape[1])
    return ir.node(
        "GatherBlockQuantized",
        [packed, node.inputs[1], steps],
        attributes={"block_size": block, "gather_axis": 0, "quantize_axis": 1},
        domain=DOMAIN,
        metadata_props=dict(node.metadata_props),
    )


def _rows(graph: ir.Graph, node: ir.Node, table: ir.Node, codes: Array, scales: Array) -> ir.Node:
    stored, ids, groups = source(table, 0), source(node, 1), scales.shape[1]
    gathered = _before(graph, node, new_node(table, "Gather", [stored, ids], axis=0))
    rows = new_node(node, "Cast", [gathered], to=ir.DataType.FLOAT)
    value = _before(graph, node, rows)
    if groups > 1:
        shape = [*(static_shape(ids) or ()), groups, codes.shape[1] // groups]
        scales = scales[:, :, None]
        value = _reshaped(graph, node, value, shape)
    steps = new_constant(graph, f"{stored.name}_scale", scales.astype(np.float32))
    factor = _before(graph, node, new_node(node, "Gather", [steps, ids], axis=0))
    product = new_node(node, "Mul", [value, factor])
    if groups == 1:
        return product
    whole = [*(static_shape(ids) or ()), codes.shape[1]]
    shape_value = new_constant(graph, f"{stored.name}_row", np.array(whole, np.int64))
    return new_node(node, "Reshape", [_before(graph, node, product), shape_value])


def _reshaped(graph: ir.Graph, node: ir.Node, value: ir.Value, shape: list[int]) -> ir.Value:
    to = new_constant(graph, f"{value.name}_shape", np.array(shape, np.int64))
    return _before(graph, node, new_node(node, "Reshape", [value, to]))


def lone_weight_codes_are_multiplied(model: ir.Model, bits: Bits, packed_in_memory: bool = True) -> None:
    """Dequantize(weight codes) beside a float activation becomes Cast(codes) * scales: codes on disk, folded at load.

    ONNX Runtime fuses a lone Dequantize and MatMul to MatMulNBits at accuracy level 4, which quantizes the activation
    too (errors of 1 % where the graph has none), and elsewhere dequantizes anew in every run. Groups of 4 bits become
    MatMulNBits at accuracy level 1, which computes in float32.
    """
    for node in list(model.graph):
        codes = constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != np.int8 or any(_is_fused(u.node, node) for u in node.outputs[0].uses()):
            continue
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or (zero is not None and np.any(zero != 0)):
            continue
        few = bits.get(node.metadata_props.get(LAYER_KEY, ""), 8) == 4
        readers = [u.node for u in node.outputs[0].uses()]
        if packed_in_memory and few and scale.ndim == 2 and _all_matmuls(readers, node, codes, scale):
            for reader in readers:
                _on_packed_blocks(model.graph, reader, source(node, 0), codes, scale)
            model.graph.remove(node, safe=True)
        else:
            _multiplied(model.graph, node, codes, scale)


def _multiplied(graph: ir.Graph, node: ir.Node, codes: Array, scale: Array) -> None:
    cast = new_node(node, "Cast", [source(node, 0)], to=ir.DataType.from_numpy(scale.dtype))
    value, shape = _before(graph, node, cast), [1] * codes.ndim
    axis = node.attributes.get_int("axis", 1)
    if scale.ndim == 2:  # groups: [.., groups, group, ..] times [.., groups, 1, ..]
        groups = [*codes.shape[:axis], scale.shape[axis], -1, *codes.shape[axis + 1 :]]
        value, scale = _reshaped(graph, node, value, groups), np.expand_dims(scale, axis + 1)
    elif scale.ndim:
        shape[axis] = -1
        scale = scale.reshape(shape)
    scales = new_constant(graph, f"{source(node, 0).name}_scale", scale)
    product = new_node(node, "Mul", [value, scales])
    if scale.ndim <= codes.ndim:
        replace(graph, node, product)
        return
    whole = new_constant(graph, f"{source(node, 0).name}_shape", np.array(codes.shape, np.int64))
    replace(graph, node, new_node(node, "Reshape", [_before(graph, node, product), whole]))


def _all_matmuls(readers: list[ir.Node], node: ir.Node, codes: Array, scale: Array) -> bool:
    """True where all readers are MatMul(x float32, weight) with codes (in, out) in groups along the inputs."""
    axis = node.attributes.get_int("axis", 1)
    fits = codes.ndim == 2 and axis == 0 and codes.shape[0] // scale.shape[0] in BLOCKS
    output = node.outputs[0]
    return fits and all(r.op_type == "MatMul" and r.inputs[1] is output and r.inputs[0] is not output for r in readers)


def _on_packed_blocks(graph: ir.Graph, node: ir.Node, stored: ir.Value, codes: Array, scale: Array) -> None:
    """MatMul on weights (in, out) becomes MatMulNBits: (out, groups, group / 2) bytes, two codes + 8 in each."""
    inputs, outputs = codes.shape
    unsigned = (codes.T.astype(np.int16) + 8).astype(np.uint8).reshape(outputs, scale.shape[0], -1)
    data = unsigned[..., ::2] | (unsigned[..., 1::2] << 4)
    attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": inputs // scale.shape[0], "accuracy_level": 1}
    made = ir.node(
        "MatMulNBits",
        [
            node.inputs[0],
            new_constant(graph, f"{stored.name}_int4", data),
            new_constant(graph, f"{stored.name}_scale", np.ascontiguousarray(scale.T.astype(np.float32))),
        ],
        attributes=attributes,
        domain=DOMAIN,
        metadata_props=dict(node.metadata_props),
    )
    replace(graph, node, made)


def _is_fused(reader: ir.Node, weight: ir.Node) -> bool:
    """True where the reader's activation carries codes of 8 bits as its weight does, one scale per channel."""
    rows = producer(reader.inputs[0], "Reshape") if reader.op_type == "Gemm" else None
    x = producer(reader.inputs[0] if rows is None else rows.inputs[0], "DequantizeLinear")
    if x is None or x is weight or "block_size" in weight.attributes:
        return False
    zero = constant(x.inputs[2]) if len(x.inputs) > 2 else None
    return zero is not None and zero.dtype in (np.int8, np.uint8)
