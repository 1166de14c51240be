"""What a graph has to compute and to move, operator by operator, in which number format: the roofline's input."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import MOVEMENT, constant, is_constant, kind, layer_name
from calibrate.samples import InputSpec
from convert.costs import HIDDEN, Shape, macs, shapes_of

FORMATS = ("float32", "float16", "int8")
NARROW = {"float32": 4, "float16": 2, "int8": 1}
_FUSED = ("relu", "clamp")
_BEFORE = ("conv", "conv_transpose", "linear", "add", "batch_norm")
# Moved by changing a shape alone, without a copy.
_FREE = ("reshape", "constant", "cast")
_DEQUANTIZES = (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE_GROUP)


@dataclass(frozen=True)
class Work:
    """`count` alike operators. `format`: one of FORMATS, or the name of one that has no figures.

    `depthwise`: a convolution of one input channel per output; `square`: a plain 3x3 one at stride 1, which Winograd's
    algorithm computes with fewer products. Of each operator: `macs` multiply-accumulates, `weight_bytes` as stored, and
    how many numbers of `format` go in and out. `conversion`: a step between formats.
    """

    format: str
    depthwise: bool
    square: bool
    macs: int
    weight_bytes: float
    numbers: int
    conversion: bool = False
    count: int = 1

    @property
    def bytes(self) -> float:
        """What one of these operators reads and writes."""
        size = 5 if self.conversion else NARROW.get(self.format, 4)  # a conversion: float32 here, int8 there
        return self.weight_bytes + self.numbers * size


def work(
    graph: GraphModule, inputs: Sequence[InputSpec], float_format: str = "float32", stayed_float: Collection[str] = ()
) -> list[Work]:
    """The operators of a graph, float or quantized, in order. `float_format` is what computes all that has no codes;
    layers named in `stayed_float` count as float whatever the graph says. Raises ValueError for a loop inside one
    operator, whose work is not known."""
    shapes = shapes_of(graph, inputs)
    found: list[Work] = []
    for node in graph.graph.nodes:
        found += _conversions(graph, node, shapes, stayed_float)
        what = kind(node)
        if node.op != "call_function" or what in ("qdq", *HIDDEN, *_FREE) or _is_fused(node):
            continue
        products = macs(node, shapes)
        if products is None:
            raise ValueError(f"the work of '{layer_name(node)}' ({what}) is not counted")
        format_ = _format(node, float_format, stayed_float)
        numbers = sum(_size(shapes, n) for n in (*_activations(node), node))
        depthwise = what in ("conv", "conv_transpose") and _is_depthwise(node, shapes)
        square = what == "conv" and not depthwise and _is_square(node, shapes)
        found.append(Work(format_, depthwise, square, products, _weight_bytes(graph, node, format_), numbers))
    return found


def _size(shapes: dict[Node, Shape], node: Node) -> int:
    return math.prod(shapes.get(node, (0,)))


def _activations(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if not _is_stored(n)]


def _is_stored(node: Node) -> bool:
    """A constant, or the dequantized codes of one."""
    return is_constant(node) or (
        node.op == "call_function" and kind(node) in ("qdq", "cast") and all(map(_is_stored, node.all_input_nodes))
    )


def _is_fused(node: Node) -> bool:
    """What runtimes compute in the kernel before it: a clamp, a batch norm behind a convolution."""
    source = next(iter(node.all_input_nodes), None)
    if source is None or len(source.users) > 1:
        return False
    if kind(node) == "batch_norm":
        return kind(source) in ("conv", "conv_transpose", "linear")
    return kind(node) in _FUSED and kind(source) in _BEFORE


def _is_depthwise(node: Node, shapes: dict[Node, Shape]) -> bool:
    weight = node.args[1]
    assert isinstance(weight, Node)
    return shapes[weight][1] == 1 and shapes[node][1] > 1 and shapes[_activations(node)[0]][1] > 1


def _is_square(node: Node, shapes: dict[Node, Shape]) -> bool:
    weight = node.args[1]
    assert isinstance(weight, Node)
    return shapes[weight][2:] == (3, 3) and shapes[node][2:] == shapes[_activations(node)[0]][2:]


def _format(node: Node, float_format: str, stayed_float: Collection[str]) -> str:
    """What an operator computes in; movement and float operators count as `float_format`."""
    if layer_name(node) in stayed_float:
        return float_format
    if node.target in qdq.DYNAMIC:
        return "int8"
    activations = _activations(node)
    narrow = {_code_type(n) for n in activations}
    if not activations or None in narrow:
        return float_format
    if kind(node) in ("conv", "linear") and not any(n.target in _DEQUANTIZES for n in node.all_input_nodes[1:]):
        return float_format  # float weights on dequantized activations
    written = {_code_type_written(n) for n in _through_fused(node).users}
    if kind(node) not in ("conv", "linear", "matmul", *MOVEMENT) and None in written:
        return float_format
    return next((name for name in ("int16", "float8") if name in narrow), "int8")


def _code_type(node: Node) -> str | None:
    """ "int8" (of either sign), "int16" or "float8" where a node dequantizes such codes; else None."""
    if node.target == qdq.DEQUANTIZE_FLOAT8:
        return "float8"
    if node.target not in _DEQUANTIZES:
        return None
    return "int16" if torch.int16 in node.args else "int8"


def _code_type_written(node: Node) -> str | None:
    return "codes" if kind(node) == "qdq" or kind(node) == "output" else None


def _through_fused(node: Node) -> Node:
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and kind(user) in _FUSED else node


def _weight_bytes(graph: GraphModule, node: Node, format_: str) -> float:
    """The bytes of constants an operator reads: codes at their bits, floats in the format that computes."""
    total = 0.0
    for source in node.all_input_nodes:
        if not _is_stored(source):
            continue
        stored = source
        while not is_constant(stored):
            stored = stored.all_input_nodes[0]  # codes, before their scales
        value = constant(graph, stored)
        if value.is_floating_point():
            total += value.numel() * NARROW.get(format_, 4)
        else:
            bits = qdq.code_bits(source) or (qdq.code_bits(node) if source is node.args[1] else None)
            total += value.numel() * (bits / 8 if bits else value.element_size())
    return total


def _conversions(
    graph: GraphModule, node: Node, shapes: dict[Node, Shape], stayed_float: Collection[str]
) -> Iterator[Work]:
    """Steps between float and codes that no integer kernel takes in: at inputs, outputs, and around float layers."""
    if node.target == qdq.QUANTIZE and not _is_stored(node.args[0]):
        source = node.args[0]
        assert isinstance(source, Node)
        while kind(source) in (*_FUSED, *MOVEMENT) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op == "placeholder" or (_format(source, "float", stayed_float) == "float" and kind(source) != "qdq"):
            yield Work("float32", False, False, 0, 0.0, _size(shapes, node), conversion=True)
    elif node.target == qdq.DEQUANTIZE and not _is_stored(node):
        readers = [u for u in node.users if kind(u) not in ("qdq", *_FREE)]
        if any(u.op == "output" or _format(u, "float", stayed_float) == "float" for u in readers):
            yield Work("float32", False, False, 0, 0.0, _size(shapes, node), conversion=True)
    elif node.target in qdq.DYNAMIC:
        yield Work("float32", False, False, 0, 0.0, _size(shapes, node.args[0]), conversion=True)
