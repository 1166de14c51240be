"""Matrix products with a constant weight become aten.linear."""

from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.graph import constant, is_constant, operator_name

from .rewriting import argument, aten, derived_constant, number, only_user, replace, same_shape, value


def linears_are_recognised(graph: GraphModule) -> None:
    """addmm, mm, matmul and bmm by a constant matrix; then a bias added after; then reshapes around it."""
    for node in list(graph.graph.nodes):
        if operator_name(node) == "addmm":
            _from_addmm(graph, node)
        elif operator_name(node) in ("mm", "matmul", "bmm"):
            _from_product(graph, node, node.args[0], node.args[1], None)
    for node in list(graph.graph.nodes):
        if operator_name(node) == "add":
            _with_bias(graph, node)
    for node in list(graph.graph.nodes):
        if operator_name(node) == "linear":
            _without_reshapes(node)


def _from_addmm(graph: GraphModule, node: Node) -> None:
    bias, x, weight = node.args
    if number(graph, node.kwargs.get("beta", 1)) != 1 or number(graph, node.kwargs.get("alpha", 1)) != 1:
        return
    columns = value(weight)
    if isinstance(bias, Node) and is_constant(bias) and columns is not None and _is_row(bias, columns.shape[-1]):
        _from_product(graph, node, x, weight, _flat(graph, bias, node))


def _is_row(bias: Node, width: object) -> bool:
    shape = value(bias)
    return shape is not None and shape.numel() == width and shape.shape[-1] == width


def _flat(graph: GraphModule, bias: Node, before: Node) -> Node:
    stored = constant(graph, bias)
    return bias if stored.dim() == 1 else derived_constant(graph, bias, stored.reshape(-1), before)


def _from_product(graph: GraphModule, node: Node, x: object, weight: object, bias: Node | None) -> None:
    source, swapped = _matrix(weight)
    left, stored = value(x), value(source)
    if source is None or stored is None or left is None or not left.is_floating_point() or is_constant(x):
        return
    if not swapped:
        source = derived_constant(graph, source, constant(graph, source).t(), node, "_t")
    replace(node, aten.linear.default, (x, source, bias))


def _matrix(item: object) -> tuple[Node | None, bool]:
    """The 2-D constant behind an operand, and whether it comes transposed. A matrix repeated along a batch is one."""
    swapped = False
    while isinstance(item, Node):
        shape = value(item)
        if is_constant(item):
            return (item, swapped) if shape is not None and shape.dim() == 2 else (None, False)
        name = operator_name(item)
        if name in ("t", "transpose", "permute") and shape is not None and shape.dim() == 2:
            swapped ^= name == "t" or not _keeps_order(item)
        elif not (name in ("expand", "view", "reshape") and _only_repeats(item)):
            return None, False
        item = item.args[0]
    return None, False


def _keeps_order(node: Node) -> bool:
    axes = node.args[1:] if operator_name(node) == "transpose" else node.args[1]
    positive = [int(a) % 2 for a in axes]
    return positive == [0, 1] if operator_name(node) == "permute" else positive[0] == positive[1]


def _only_repeats(node: Node) -> bool:
    before, after = value(node.args[0]), value(node)
    if before is None or after is None:
        return False
    if operator_name(node) == "expand":
        return [str(d) for d in before.shape[-2:]] == [str(d) for d in after.shape[-2:]] and before.dim() == 2
    return same_shape(before, after)


def _with_bias(graph: GraphModule, node: Node) -> None:
    """add(linear(x, W), b) -> linear(x, W, b); exporters to ONNX write a layer's bias that way."""
    if len(node.args) != 2 or node.kwargs:
        return
    for layer, bias in (node.args, reversed(node.args)):
        if not (isinstance(layer, Node) and operator_name(layer) == "linear" and only_user(layer) is node):
            continue
        made = value(layer)
        if made is None or not isinstance(bias, Node) or not is_constant(bias):
            continue
        if argument(layer, 2, "bias") is None and _is_row(bias, made.shape[-1]):
            row = _flat(graph, bias, node)
            new = replace(node, aten.linear.default, (layer.args[0], layer.args[1], row))
            new.meta.update({k: layer.meta[k] for k in ("nn_module_stack", "custom") if k in layer.meta})
            graph.graph.erase_node(layer)
            return


def _without_reshapes(node: Node) -> None:
    """reshape([-1, in]), linear, reshape([..., out]) is one linear over all but the last axis."""
    before, after = node.args[0], only_user(node)
    if not (isinstance(before, Node) and operator_name(before) == operator_name(after or node) == "reshape"):
        return
    assert after is not None
    inner = before.args[0]
    x, y = value(inner), value(after)
    flat = value(before)
    if x is None or y is None or flat is None or flat.dim() != 2 or after.args[0] is not node:
        return
    if _leading(x) == _leading(y) and str(x.shape[-1]) == str(flat.shape[-1]) and str(y.shape[-1]) == _out(node):
        new = replace(after, aten.linear.default, (inner, *node.args[1:]))
        new.meta.update({k: node.meta[k] for k in ("nn_module_stack", "custom") if k in node.meta})
        node.graph.erase_node(node)


def _leading(tensor: Tensor) -> list[str]:
    return [str(d) for d in tensor.shape[:-1]]


def _out(node: Node) -> str:
    made = value(node)
    return "" if made is None else str(made.shape[-1])
