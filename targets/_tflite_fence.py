"""Keeps litert-torch from quantizing what the graph leaves in float.

With static Q/DQ in the graph the converter turns every operator between DQ and Q into an int8 kernel, and quantizes a
float constant of it with a scale of its own; it also moves Q and DQ through operators whose output keeps the input's
scale. A layer that a plan keeps in float would so come out in int8, with numbers nobody asked for. A fence is a FLOOR,
which has no int8 kernel and fuses with nothing, beside such an operator; it is taken out of the file again.

The converter also merges a multiplication in front of a layer or behind it (a LayerNorm's gain, a layer scale) into the
layer's weight. Codes would no longer stand for that weight, so layers with packed weights are fenced in too.
"""

import torch
from torch.fx import GraphModule, Node

from calibrate import graph as graphs
from calibrate import qdq

from ._tflite_file import TFLiteFile
from .errors import TargetError

FENCE = "tightfit.fence"
# The key in a node's `meta` that says: this layer's weight is packed once the file is written.
PACKED = "tightfit_packed"
_ARITHMETIC = ("add", "sub", "mul", "div")
# The converter would quantize these, and LiteRT's int8 kernels for them are several times slower than XNNPACK's float.
_SLOW = ("hardswish", "gelu")
# Operators that keep the scale of their input, yet round.
_SAME_SCALE = ("avg_pool", "upsample")


def insert_fences(graph: GraphModule, static: bool) -> int:
    """Put a fence at each operator that the converter would quantize (`static`) or merge; returns how many."""
    fences = _Fences(graph)
    for node in list(graph.graph.nodes):
        end = after_activation(node)
        if PACKED in node.meta:
            fences.behind(node.args[0])
            if end is node and _meets_constant(node):
                fences.behind(node)
        elif static and has_float_constant(node) and _reaches_codes(end):
            fences.behind(end)
        elif static and (_rounds_unasked(node) or _moves_constant(node) or graphs.kind(node) in _SLOW):
            # The converter would move the DQ in front of such an operator behind it.
            for value in node.all_input_nodes:
                if not _is_fixed(value) and not _is_whole(value):
                    node.replace_input_with(value, fences.of(value))
    return len(fences.made)


class _Fences:
    """One fence for each value, since the converter merges equal operators."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.made: dict[Node, Node] = {}

    def of(self, value: Node) -> Node:
        """The fence behind `value`, or `value` where it is one."""
        if value.meta.get("layer") == FENCE:
            return value
        if value not in self.made:
            place = value.next
            while place.op in ("placeholder", "get_attr"):  # placeholders stay in front together
                place = place.next
            with self.graph.graph.inserting_before(place):
                fence = self.graph.graph.call_function(torch.ops.aten.floor.default, (value,))
            fence.meta["layer"] = FENCE
            self.made[value] = fence
        return self.made[value]

    def behind(self, value: Node) -> None:
        """Let all operators that read `value` read its fence."""
        fence = self.of(value)
        value.replace_all_uses_with(fence, delete_user_cb=lambda user: user is not fence and user.op != "output")


def remove_fences(file: TFLiteFile, count: int) -> None:
    """Take `count` fences out of the file; raises TargetError where the converter made something else of them."""
    around: dict[int, int] = {}
    kept = []
    for op in file.graph.operators:
        if file.operator(op) == "FLOOR" and FENCE in file.name(file.outputs(op)[0]):
            around[file.outputs(op)[0]] = op.inputs[0]
        else:
            kept.append(op)
    if len(around) != count:
        raise TargetError(
            f"litert-torch kept {len(around)} of {count} marks around the layers that stay float, so the file is not "
            "what the plan says; keep the whole model float, or choose another target."
        )
    for op in kept:
        op.inputs = [around.get(i, i) for i in op.inputs]
    file.graph.operators = kept


def after_activation(node: Node) -> Node:
    """The relu or clamp that alone reads `node`, which a kernel fuses; else `node` itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and graphs.kind(users[0]) in ("relu", "clamp") else node


def has_float_constant(node: Node) -> bool:
    """True for an operator on a constant that is not codes: a weight, an operand, a Python number; biases apart."""
    if node.op != "call_function" or graphs.kind(node) in ("qdq", *graphs.MOVEMENT):
        return False
    if graphs.kind(node) in graphs.WEIGHTED:
        return graphs.is_constant(node.args[1])
    if graphs.kind(node) in _ARITHMETIC and any(not isinstance(a, Node) for a in node.args[:2]):
        return True
    return any(graphs.is_constant(a) for a in node.all_input_nodes)


def _meets_constant(node: Node) -> bool:
    """True when a multiplication by a constant reads the value, past moves: an attention scale."""
    for user in node.users:
        if has_float_constant(user) or graphs.kind(user) == "attention":
            return True
        if graphs.kind(user) in ("getitem", *graphs.MOVEMENT) and _meets_constant(user):
            return True
    return False


def _rounds_unasked(node: Node) -> bool:
    return graphs.kind(node) in _SAME_SCALE and any(user.target != qdq.QUANTIZE for user in node.users)


def _moves_constant(node: Node) -> bool:
    """True for a concat and the like of computed values with a float constant, which would have to become codes."""
    inputs = node.all_input_nodes if graphs.kind(node) in ("cat", "stack", "where", "scatter") else []
    fixed = [_is_fixed(i) for i in inputs]
    return any(fixed) and not all(fixed)


def _is_whole(node: Node) -> bool:
    """True for booleans (what a `where` asks) and integers, which nobody quantizes."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _is_fixed(node: Node) -> bool:
    """True for a constant and for what is computed from constants and sizes alone: an expanded class token."""
    if graphs.is_constant(node) or graphs.kind(node) == "shape":
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(_is_fixed(s) for s in sources)


def _reaches_codes(node: Node) -> bool:
    """True when a QUANTIZE reads the node's value, directly or past operators that only move values."""
    for user in node.users:
        if user.target == qdq.QUANTIZE:
            return True
        if graphs.kind(user) in ("getitem", *graphs.MOVEMENT) and _reaches_codes(user):
            return True
    return False
