"""Weight codes of few levels: packed to 1, 1.6 or 2 bits each, and looked up once, when ONNX Runtime loads the file.

ONNX has no type of one bit, and none of three or four levels chosen per row. So the file holds bytes, and a table that
all layers share says what each byte stands for: eight signs, five ternary digits (3^5 = 243), four indices. Gather
turns bytes into codes; for levels of each row's own GatherElements takes them from a table [out, 4] of int8 codes.

All of it is constant, so ONNX Runtime computes it when it loads the file, as it unpacks INT4 and INT2 codes: what stays
in memory is an int8 code per weight, as for any int8 layer, where codes are what the layer's kernel reads
(MatMulInteger, QLinearConv, QGemm). Beside float activations it is a float per weight, as for all weight-only formats
here but groups of 4 bits. Only the file is smaller; unpacking in every run would cost more than the product itself.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from calibrate.levels import alphabet

from . import _onnx_patterns as patterns
from ._onnx_bits import PACKED, Bits, is_weight
from ._onnx_export import LAYER_KEY
from ._onnx_graph import Array, constant, new_constant, new_node

# What the nodes that look a weight up cost in the file, in bytes, at most.
NODES = 640
DIGITS = 5
SIGNS, TERNARY, LEVELS = "signs", "ternary", "levels"
EACH = {SIGNS: 8, TERNARY: DIGITS, LEVELS: 4}
"""How many codes a byte holds."""


def form_of(codes: Array) -> str | None:
    """How a weight [out, ...] or [in, out] of int8 codes can be looked up; None where its codes are too many."""
    low, high = int(codes.min()), int(codes.max())
    if low >= -1 and high <= 1:
        return TERNARY if bool((codes == 0).any()) else SIGNS
    return LEVELS if _channel(codes) is not None else None


def _channel(codes: Array) -> tuple[int, Array] | None:
    """(axis, levels [channels, 4]) where each channel along that axis uses four codes at most."""
    for axis in (0, codes.ndim - 1):
        rows = np.ascontiguousarray(np.moveaxis(codes, axis, 0)).reshape(codes.shape[axis], -1)
        found = alphabet(torch.from_numpy(rows))
        if found is not None:
            wide = found.numpy()
            return axis, np.concatenate([wide, wide], 1) if wide.shape[1] == 2 else wide
    return None


def few_levels_are_looked_up(model: ir.Model, bits: Bits) -> None:
    """Weight codes of few levels become bytes and the nodes that look them up, where that makes the file smaller."""
    tables: dict[str, ir.Value] = {}
    done: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        for index, codes in list(enumerate(node.inputs)):
            array = constant(codes)
            if codes is None or array is None or array.dtype != np.int8 or not is_weight(node, index):
                continue
            if node.op_type == "Gather" or array.ndim < 2:
                continue
            if codes not in done:
                form = form_of(array)
                now = bits.get(node.metadata_props.get(LAYER_KEY, ""), 8)
                packed = now / 8 if now in PACKED else 1.0  # the bytes of a code as it would be stored
                if form is None or array.size * (packed - 1 / EACH[form]) < NODES:
                    continue
                done[codes] = _looked_up(model.graph, node, codes, array, form, tables)
            node.replace_input_with(index, done[codes])


def _looked_up(
    graph: ir.Graph, node: ir.Node, codes: ir.Value, array: Array, form: str, tables: dict[str, ir.Value]
) -> ir.Value:
    shape, name = list(array.shape), str(codes.name)
    kernels = patterns.patterns_of(array)
    if kernels is not None:

        def before(op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
            return _before(graph, node, op, inputs, **attributes)

        value = patterns.looked_up(graph, name, array, kernels, before)
    elif form == LEVELS:
        found = _channel(array)
        assert found is not None
        axis, levels = found
        rows = np.moveaxis(array, axis, 0).reshape(len(levels), -1)
        indices = (rows[:, :, None] == levels[:, None, :]).argmax(2)
        if axis == 0:
            shape = list(indices.shape)
        else:  # [in, out]: indices and levels stand as the weight does
            indices, levels = indices.T, levels.T
            assert array.ndim == 2
        digits = _digits(graph, node, name, indices.reshape(-1), form, shape, tables)
        wide = _before(graph, node, "Cast", [digits], to=ir.DataType.INT32)
        table = new_constant(graph, f"{name}_levels", np.ascontiguousarray(levels.astype(np.int8)))
        value = _before(graph, node, "GatherElements", [table, wide], axis=1 if axis == 0 else 0)
        if shape != list(array.shape):
            value = _reshaped(graph, node, value, list(array.shape), tables)
    else:
        plain = (array > 0) if form == SIGNS else array.astype(np.int64) + 1
        value = _digits(graph, node, name, plain.reshape(-1).astype(np.int64), form, shape, tables)
    value.dtype, value.shape = ir.DataType.INT8, ir.Shape(array.shape)
    return value


def _digits(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    indices: Array,
    form: str,
    shape: list[int],
    tables: dict[str, ir.Value],
) -> ir.Value:
    """int8 `shape`: what the table of `form` says of `indices` (flat), which the file holds as bytes."""
    each = EACH[form]
    if form not in tables:
        tables[form] = new_constant(graph, f"bytes_as_{form}", table_of(form))
    packed = pack(indices, form)
    stored = new_constant(graph, f"{name}_{form}", packed)
    places = _before(graph, node, "Cast", [stored], to=ir.DataType.INT32)
    value = _before(graph, node, "Gather", [tables[form], places], axis=0)
    if len(packed) * each != indices.size:
        value = _reshaped(graph, node, value, [-1], tables)
        bounds = (0, indices.size)
        ends = [_numbers(graph, [v], tables) for v in bounds]
        value = _before(graph, node, "Slice", [value, *ends])
    return _reshaped(graph, node, value, shape, tables)


def table_of(form: str) -> Array:
    """int8 [values of a byte, codes]: what each byte stands for, the first code in its lowest digit."""
    each = EACH[form]
    base = {SIGNS: 2, TERNARY: 3, LEVELS: 4}[form]
    numbers = np.arange(base**each)[:, None] // base ** np.arange(each)[None, :] % base
    return {SIGNS: 2 * numbers - 1, TERNARY: numbers - 1, LEVELS: numbers}[form].astype(np.int8)


def pack(indices: Array, form: str) -> Array:
    """Digits (flat, whole numbers from 0) as uint8 bytes, the first in the lowest digit; zeros fill the last byte."""
    each = EACH[form]
    base = {SIGNS: 2, TERNARY: 3, LEVELS: 4}[form]
    full = np.concatenate([indices, np.zeros(-len(indices) % each, np.int64)]).reshape(-1, each)
    return np.asarray((full * base ** np.arange(each)).sum(1), dtype=np.uint8)


def _reshaped(
    graph: ir.Graph, node: ir.Node, value: ir.Value, shape: list[int], tables: dict[str, ir.Value]
) -> ir.Value:
    return _before(graph, node, "Reshape", [value, _numbers(graph, shape, tables)])


def _numbers(graph: ir.Graph, numbers: list[int], tables: dict[str, ir.Value]) -> ir.Value:
    """A constant of these whole numbers; layers alike in shape share it."""
    name = "_".join(["n", *map(str, numbers)])
    if name not in tables:
        tables[name] = new_constant(graph, name, np.array(numbers, np.int64))
    return tables[name]


def _before(graph: ir.Graph, node: ir.Node, op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
    made = new_node(node, op, list(inputs), **attributes)
    own = inputs[1] if op.startswith("Gather") else inputs[0]  # not what layers share
    made.outputs[0].name = f"{own.name}.{op[0].lower()}"  # names that onnx_ir gives may be taken
    graph.insert_before(node, made)
    return made.outputs[0]
