"""Bring activations into the forms that kernels fuse, and constant scales and shifts into the layers beside them."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import (
    Layer,
    constant_operand,
    layer_of,
    pads,
    per_channel,
    scale_inputs,
    scale_outputs,
    value_of,
)
from calibrate.clamps import INFINITE, clamp_bounds
from calibrate.graph import finish, kind, layer_name, operator_name
from calibrate.plan import Entry
from calibrate.steps import Context

aten = torch.ops.aten
NAME = "fuse_activations"
# An activation may pass these on its way to the layer whose kernel does it: elementwise and monotone, it commutes.
PASSED = ("reshape", "transpose", "max_pool")


class FuseActivations:
    """What normal form leaves: clamps of any spelling become relu, relu6 or one clamp; two in a row become one; a
    decomposed hardsigmoid (and x times it, or times a sigmoid) becomes one operator; an activation behind a reshape or
    max pool moves to the layer before; x * a + b with constants a, b moves into the layer after or before it.
    """

    exact = True

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        ledger: list[Entry] = []
        changed = True
        while changed:  # one rewrite may make room for another: a folded bias brings a relu to its convolution
            changed = False
            for node in list(graph.graph.nodes):
                action = _rewrite(graph, node)
                if action is not None:
                    ledger.append(Entry(NAME, *action))
                    changed = True
        ledger += _left(graph)
        return ledger or [Entry(NAME, "model", "left alone", "every activation has a form that kernels fuse already")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            bounds = clamp_bounds(node)
            if bounds is not None and node.target != _clamp(node.args[0], *bounds)[0]:
                return f"{node.name} has a form of its own"
            if bounds is not None and clamp_bounds(node.args[0]) is not None and len(node.args[0].users) == 1:
                return f"{node.name} clamps what is clamped already"
        return None


def _clamp(x: object, low: float, high: float) -> tuple[object, tuple[object, ...]]:
    """The operator and arguments that kernels know these bounds by."""
    if low == 0 and high == INFINITE:
        return aten.relu.default, (x,)
    if low > -INFINITE and high < INFINITE:
        return aten.hardtanh.default, (x, low, high)
    return aten.clamp.default, (x, low if low > -INFINITE else None, high if high < INFINITE else None)


def _rewrite(graph: GraphModule, node: Node) -> tuple[str, str] | None:
    """Improve one node; (layer, what was done), or None when there was nothing to do."""
    if node.op != "call_function" or not node.users:
        return None
    bounds = clamp_bounds(node)
    if bounds is not None:
        return _one_clamp(graph, node, bounds) or _earlier(graph, node)
    what = operator_name(node)
    if what in ("div", "mul"):
        found = _hardsigmoid(graph, node) or _gated(graph, node)
        if found is not None:
            return found
    if what in ("add", "sub", "mul", "div", "neg"):
        return _into_layer(graph, node)
    return None


def _put(graph: GraphModule, node: Node, target: object, args: tuple[object, ...]) -> None:
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(target, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def _one_clamp(graph: GraphModule, node: Node, bounds: tuple[float, float]) -> tuple[str, str] | None:
    source = node.args[0]
    inner = clamp_bounds(source)
    name = layer_name(node)
    if inner is not None and isinstance(source, Node) and len(source.users) == 1:
        low, high = (min(max(b, bounds[0]), bounds[1]) for b in inner)
        _put(graph, node, *_clamp(source.args[0], low, high))
        graph.graph.erase_node(source)
        return name, "merged with the clamp before it"
    if bounds == (-INFINITE, INFINITE) and isinstance(source, Node):
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
        return name, "taken out: it clamps nothing"
    target, args = _clamp(source, *bounds)
    if node.target == target:
        return None
    _put(graph, node, target, args)
    return name, f"became {getattr(target, '__name__', target)}".removesuffix(".default")


def _earlier(graph: GraphModule, node: Node) -> tuple[str, str] | None:
    """conv, max pool, relu -> conv, relu, max pool: the same values, and the kernel does the relu for nothing."""
    source = node.args[0]
    first = source
    while isinstance(first, Node) and kind(first) in PASSED and len(first.users) == 1:
        before = first.args[0]
        if not isinstance(before, Node) or len(before.users) != 1:
            return None
        first = before
    if first is source or not isinstance(first, Node) or kind(first) not in ("conv", "linear", "conv_transpose", "add"):
        return None
    with graph.graph.inserting_after(first):
        made = graph.graph.call_function(node.target, (first, *node.args[1:]), dict(node.kwargs))
    made.meta = {**node.meta, "val": first.meta.get("val")}
    first.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)
    return layer_name(made), f"moved to {layer_name(first)}, before {layer_name(source)}"


def _factor(graph: GraphModule, node: Node) -> tuple[Node, float] | None:
    """(x, a) of x * a or x / (1 / a) with a plain number a."""
    if len(node.args) != 2 or node.kwargs:
        return None
    x, other = node.args
    if operator_name(node) == "mul" and not isinstance(x, Node):
        x, other = other, x
    number = constant_operand(graph, other)
    if not isinstance(x, Node) or number is None or number.numel() != 1 or not float(number):
        return None
    return x, float(number) if operator_name(node) == "mul" else 1 / float(number)


def _hardsigmoid(graph: GraphModule, node: Node) -> tuple[str, str] | None:
    """clamp(x + 3, 0, 6) / 6 (Howard et al. 2019, arXiv 1905.02244, section 5.2)."""
    found = _factor(graph, node)
    if found is None or abs(found[1] * 6 - 1) > 1e-6 or clamp_bounds(found[0]) != (0.0, 6.0):
        return None
    shifted = found[0].args[0]
    if not isinstance(shifted, Node) or operator_name(shifted) != "add" or shifted.kwargs or len(found[0].users) != 1:
        return None
    for x, other in (shifted.args, shifted.args[::-1]):
        three = constant_operand(graph, other)
        if isinstance(x, Node) and three is not None and three.numel() == 1 and float(three) == 3:
            _put(graph, node, aten.hardsigmoid.default, (x,))
            graph.graph.eliminate_dead_code()
            return layer_name(node), "became hardsigmoid"
    return None


def _gated(graph: GraphModule, node: Node) -> tuple[str, str] | None:
    """x * sigmoid(x) and x * hardsigmoid(x), the latter found just now."""
    if operator_name(node) != "mul" or len(node.args) != 2:
        return None
    for x, gate in (node.args, node.args[::-1]):
        name = operator_name(gate) if isinstance(gate, Node) else ""
        if name in ("sigmoid", "hardsigmoid") and isinstance(gate, Node) and gate.args[0] is x and len(gate.users) == 1:
            target = aten.silu.default if name == "sigmoid" else aten.hardswish.default
            _put(graph, node, target, (x,))
            graph.graph.erase_node(gate)
            return layer_name(node), "became silu" if name == "sigmoid" else "became hardswish"
    return None


def _map(graph: GraphModule, node: Node) -> tuple[Node, Tensor | None, Tensor | None] | None:
    """(x, a, b) where `node` is x * a + b with constants a and b (None: 1 and 0); None for anything else."""
    name = operator_name(node)
    if node.kwargs or len(node.args) != (1 if name == "neg" else 2):
        return None
    left = node.args[0]
    if name == "neg":
        return (left, torch.tensor(-1.0, dtype=torch.float64), None) if isinstance(left, Node) else None
    right = node.args[1]
    known, swapped = constant_operand(graph, right), False
    if known is None:
        known, swapped, left = constant_operand(graph, left), True, right
    if known is None or not isinstance(left, Node) or constant_operand(graph, left) is not None:
        return None
    known = known.double()
    if not bool(known.isfinite().all()) or (name == "div" and (swapped or bool((known == 0).any()))):
        return None
    minus = torch.tensor(-1.0, dtype=torch.float64)
    if name in ("mul", "div"):
        return left, known if name == "mul" else 1 / known, None
    if name == "sub":
        return (left, minus, known) if swapped else (left, None, -known)
    return left, None, known


def _vectors(
    layer: Layer, x: Node, node: Node, found: tuple[Node, Tensor | None, Tensor | None], count: int
) -> tuple[Tensor, Tensor | None] | None:
    """(factor, shift) per channel, float64 [count]; None where the constants vary along another axis."""
    made, after = value_of(x), value_of(node)
    if made is None or after is None or made.dtype != after.dtype or not made.is_floating_point():
        return None
    if made.dim() != after.dim() or str(made.shape[layer.axis]) != str(count):
        return None
    ones = torch.ones((), dtype=torch.float64)
    factor = per_channel(found[1] if found[1] is not None else ones, layer.axis, count, made.dim())
    shift = per_channel(found[2], layer.axis, count, made.dim()) if found[2] is not None else None
    if factor is None or (shift is None and found[2] is not None):
        return None
    return factor, shift


def _into_layer(graph: GraphModule, node: Node) -> tuple[str, str] | None:
    """Fold x * a + b into the layer that makes x, or into all layers that read the result."""
    found = _map(graph, node)
    if found is None:
        return None
    before = layer_of(graph, found[0])
    if before is not None and len(found[0].users) == 1:
        vectors = _vectors(before, found[0], node, found, before.outputs)
        if vectors is not None:
            scale_outputs(graph, before, *vectors)
            node.replace_all_uses_with(found[0])
            graph.graph.erase_node(node)
            return layer_name(node), f"folded into {layer_name(before.node)}"
    readers = [layer_of(graph, u) for u in node.users]
    if any(r is None or r.node.args[0] is not node or (found[2] is not None and pads(r)) for r in readers):
        return None
    layers = [r for r in readers if r is not None]
    plans = [_vectors(r, found[0], node, found, r.inputs) for r in layers]
    if any(p is None for p in plans):
        return None
    for layer, vectors in zip(layers, plans, strict=True):
        assert vectors is not None
        scale_inputs(graph, layer, *vectors)
    node.replace_all_uses_with(found[0])
    graph.graph.erase_node(node)
    return layer_name(node), "folded into " + ", ".join(layer_name(r.node) for r in layers)


def _left(graph: GraphModule) -> list[Entry]:
    """Constant scales and shifts beside a layer that had to stay, and why."""
    ledger = []
    for node in finish(graph).graph.nodes:
        found = _map(graph, node) if operator_name(node) in ("add", "sub", "mul", "div", "neg") else None
        if found is None:
            continue
        reason = None
        if layer_of(graph, found[0]) is not None:
            shared = len(found[0].users) > 1
            reason = f"{layer_name(found[0])} is read by something else too" if shared else "it varies within a channel"
        for user in node.users:
            layer = layer_of(graph, user)
            if reason is None and layer is not None and layer.node.args[0] is node:
                padded = found[2] is not None and pads(layer)
                reason = f"{layer_name(user)} pads with zeros, which a shift of its input would have to reach"
                reason = reason if padded else "not every reader is a layer that it could be folded into"
        if reason is not None:
            ledger.append(Entry(NAME, layer_name(node), "left alone", reason))
    return ledger


STEP = FuseActivations()
