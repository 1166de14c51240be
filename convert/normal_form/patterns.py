"""Activations and norms spelled out operator by operator, as exporters to ONNX write them, become one operator."""

import math

from torch.fx import GraphModule, Node

from calibrate.graph import constant, is_constant, operator_name

from .rewriting import aten, is_number, number, only_user, replace, value

# 1 + erf(x / sqrt 2), written with however many digits the exporter had.
ROOT = math.sqrt(2.0)


def patterns_are_recognised(graph: GraphModule) -> None:
    """GELU (erf form), layer norm, SiLU and hard swish."""
    for node in list(graph.graph.nodes):
        name = operator_name(node)
        if name == "erf":
            _gelu(graph, node)
        elif name == "div":
            _layer_norm(graph, node)
        elif name in ("sigmoid", "hardsigmoid"):
            _gated(node)
    for node in list(graph.graph.nodes):
        if operator_name(node) == "clamp" or operator_name(node) == "hardtanh":
            _hardswish(graph, node)
    graph.graph.eliminate_dead_code()


def _operands(node: Node | None, name: str) -> tuple[object, object] | None:
    """The two operands of an add, mul, div... without scaling factors; None for another operator."""
    if node is None or operator_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def _other(node: Node | None, name: str, one: object) -> object | None:
    """What `node` combines with `one`, whichever side it stands on."""
    pair = _operands(node, name)
    if pair is None:
        return None
    if pair[0] is one:
        return pair[1]
    return pair[0] if pair[1] is one else None


def _gelu(graph: GraphModule, erf: Node) -> None:
    """x * 0.5 * (1 + erf(x / sqrt 2)), in either order of the factors (Hendrycks & Gimpel 2016, section 2)."""
    x = _scaled(graph, erf.args[0])
    plus = only_user(erf)
    if x is None or plus is None or not is_number(graph, _other(plus, "add", erf), 1.0):
        return
    product = only_user(plus)
    factor = _other(product, "mul", plus)
    if product is None or factor is None:
        return
    if factor is x:
        half = only_user(product)
        if half is not None and is_number(graph, _other(half, "mul", product), 0.5):
            _replace(half, aten.gelu.default, (x,), "gelu")
    elif isinstance(factor, Node) and is_number(graph, _other(factor, "mul", x), 0.5):
        _replace(product, aten.gelu.default, (x,), "gelu")
    elif is_number(graph, factor, 0.5):
        last = only_user(product)
        if last is not None and _other(last, "mul", product) is x:
            _replace(last, aten.gelu.default, (x,), "gelu")


def _scaled(graph: GraphModule, item: object) -> Node | None:
    """The x of x / sqrt 2."""
    divided = _operands(item, "div") if isinstance(item, Node) else None
    if divided is not None and is_number(graph, divided[1], ROOT) and isinstance(divided[0], Node):
        return divided[0]
    multiplied = _operands(item, "mul") if isinstance(item, Node) else None
    for x, factor in (multiplied, reversed(multiplied)) if multiplied else ():
        if is_number(graph, factor, 1 / ROOT) and isinstance(x, Node):
            return x
    return None


def _layer_norm(graph: GraphModule, div: Node) -> None:
    """(x - mean) / sqrt(var + eps) * gamma + beta over the last axis (Ba et al. 2016, equation 4)."""
    found = _normalised(graph, div)
    if found is None:
        return
    x, eps = found
    made = value(x)
    if made is None or not isinstance(made.shape[-1], int):
        return
    width = int(made.shape[-1])
    last, gamma = _affine(graph, div, "mul", width)
    last, beta = _affine(graph, last, "add", width)
    _replace(last, aten.layer_norm.default, (x, [width], gamma, beta, eps, False), "layer_norm")


def _normalised(graph: GraphModule, div: Node) -> tuple[Node, float] | None:
    """(x, eps) when `div` is (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)."""
    pair = _operands(div, "div")
    if pair is None:
        return None
    centred, root = pair
    if not isinstance(centred, Node) or not isinstance(root, Node):
        return None
    difference = _operands(centred, "sub")
    if difference is None or operator_name(root) != "sqrt" or not _is_mean_of(difference[1], difference[0]):
        return None
    inside = _operands(root.args[0], "add")
    for variance, small in (inside, reversed(inside)) if inside else ():
        eps = number(graph, small)
        square = variance.args[0] if isinstance(variance, Node) and variance.args else None
        if eps is not None and _is_square(graph, square, centred, difference) and _is_mean_of(variance, square):
            return difference[0], eps
    return None


def _is_mean_of(mean: object, source: object) -> bool:
    """mean.dim(source, [last axis], keepdim=True)."""
    if not isinstance(mean, Node) or operator_name(mean) != "mean" or mean.args[0] is not source or len(mean.args) < 3:
        return False
    made = value(source)
    axes = mean.args[1]
    return made is not None and mean.args[2] is True and [a % made.dim() for a in axes] == [made.dim() - 1]


def _is_square(graph: GraphModule, node: object, centred: object, difference: tuple[object, object]) -> bool:
    """centred ** 2 or centred * centred; some exporters compute the difference twice."""
    if not isinstance(node, Node):
        return False
    power, product = _operands(node, "pow"), _operands(node, "mul")
    base = None
    if power is not None and is_number(graph, power[1], 2.0):
        base = power[0]
    elif product is not None and product[0] is product[1]:
        base = product[0]
    again = _operands(base, "sub") if isinstance(base, Node) else None
    return base is centred or again == difference


def _affine(graph: GraphModule, node: Node, name: str, width: int) -> tuple[Node, Node | None]:
    """The next node and its constant row [width] when `node` is only read by such a mul or add."""
    user = only_user(node)
    row = _other(user, name, node)
    if (
        user is None
        or not isinstance(row, Node)
        or not is_constant(row)
        or tuple(constant(graph, row).shape) != (width,)
    ):
        return node, None
    return user, row


def _gated(gate: Node) -> None:
    """x * sigmoid(x) is SiLU, x * hardsigmoid(x) is hard swish."""
    user = only_user(gate)
    if _other(user, "mul", gate) is gate.args[0] and user is not None:
        target = aten.silu.default if operator_name(gate) == "sigmoid" else aten.hardswish.default
        _replace(user, target, (gate.args[0],), operator_name(gate).replace("hardsigmoid", "hardswish"))


def _hardswish(graph: GraphModule, clamp: Node) -> None:
    """x * clamp(x + 3, 0, 6) / 6 (Howard et al. 2019, section 5.2)."""
    limits = clamp.args[1:3]
    shifted = clamp.args[0]
    pair = _operands(shifted, "add") if isinstance(shifted, Node) else None
    if pair is None or len(limits) != 2 or number(graph, limits[0]) != 0 or number(graph, limits[1]) != 6:
        return
    x = pair[0] if is_number(graph, pair[1], 3.0) else None
    user = only_user(clamp)
    if not isinstance(x, Node) or user is None:
        return
    last = only_user(user)
    product_first = _other(user, "mul", clamp) is x and last is not None and _is_sixth(graph, last, user)
    sixth_first = _is_sixth(graph, user, clamp) and _other(last, "mul", user) is x
    if last is not None and (product_first or sixth_first):
        _replace(last, aten.hardswish.default, (x,), "hardswish")


def _is_sixth(graph: GraphModule, node: Node, source: Node) -> bool:
    pair = _operands(node, "div")
    if pair is not None:
        return pair[0] is source and is_number(graph, pair[1], 6.0)
    return is_number(graph, _other(node, "mul", source), 1 / 6)


def _replace(node: Node, target: object, args: tuple[object, ...], spelled: str) -> None:
    new = replace(node, target, args)
    new.meta["spelled"] = spelled
