"""Low-level operators become the high-level ones they came from; only names change, every bit stays."""

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import is_constant, operator_name

from .rewriting import argument, aten, bypass, replace, value

CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
PADDED = {"constant_pad_nd": "constant", **{f"reflection_pad{d}d": "reflect" for d in (1, 2, 3)}} | {
    f"replication_pad{d}d": "replicate" for d in (1, 2, 3)
}
POOLS = {
    "max_pool2d_with_indices": aten.max_pool2d.default,
    "max_pool3d_with_indices": aten.max_pool3d.default,
}


def operators_are_high_level(graph: GraphModule) -> None:
    """Rewrite node by node; see the module's docstring of `convert.normal_form` for the vocabulary."""
    for node in list(graph.graph.nodes):
        rewrite = REWRITES.get(operator_name(node)) if node.op == "call_function" else None
        if rewrite is not None:
            rewrite(node)
        elif node.op == "call_function" and operator_name(node).endswith("_copy"):
            _view_of_copy(node)


def _view_of_copy(node: Node) -> None:
    """expand_copy -> expand and so on: in a functional graph nobody can tell a copy from a view."""
    packet = getattr(aten, operator_name(node).removesuffix("_copy"), None)
    target = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if target is None:
        return
    new = replace(node, target, node.args, dict(node.kwargs))
    rewrite = REWRITES.get(operator_name(new))
    if rewrite is not None:
        rewrite(new)


def _convolution(node: Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    rank = len(stride)
    if transposed:
        replace(node, TRANSPOSED[rank - 1], (x, weight, bias, stride, padding, output_padding, groups, dilation))
    else:
        replace(node, CONVS[rank - 1], (x, weight, bias, stride, padding, dilation, groups))


def _string_padding(node: Node) -> None:
    """conv2d(padding="same") with the numbers it means; more on the right where the sum is odd, as torch does."""
    if node.target._overloadname != "padding":
        return
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    shape = value(weight)
    if shape is None:
        return
    kernel = [int(d) for d in shape.shape[2:]]
    rank = len(kernel)
    stride, dilation = argument(node, 3, "stride", [1] * rank), argument(node, 5, "dilation", [1] * rank)
    groups, padding = argument(node, 6, "groups", 1), argument(node, 4, "padding", "valid")
    dilation = list(dilation) * (rank // len(dilation))
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    sides = [t // 2 for t in total]
    odd = [t % 2 for t in total]
    if any(odd):
        x = _padded_at_the_end(node, odd)
    replace(node, CONVS[rank - 1], (x, weight, bias, stride, sides, dilation, groups))


def _padded_at_the_end(node: Node, more: list[int]) -> Node:
    source = node.args[0]
    before = value(source)
    assert before is not None
    amounts = [n for extra in reversed(more) for n in (0, extra)]
    with node.graph.inserting_before(node):
        pad = node.graph.call_function(aten.pad.default, (source, amounts, "constant", 0.0))
    spatial = [d + m for d, m in zip(before.shape[2:], more, strict=True)]
    pad.meta = {**node.meta, "val": before.new_empty([*before.shape[:2], *spatial])}
    return pad


def _batch_norm(node: Node) -> None:
    name = operator_name(node)
    if name == "batch_norm":
        return
    if name == "_native_batch_norm_legit_no_training":
        x, weight, bias, mean, variance, momentum, eps = node.args
    else:
        x, weight, bias, mean, variance, training, momentum, eps = node.args[:8]
        if training:
            return
    _first_of_tuple(node, aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, eps, False))


def _layer_norm(node: Node) -> None:
    x, shape, weight, bias, eps = node.args
    _first_of_tuple(node, aten.layer_norm.default, (x, shape, weight, bias, eps, False))


def _group_norm(node: Node) -> None:
    x, weight, bias, _batch, _channels, _positions, groups, eps = node.args
    _first_of_tuple(node, aten.group_norm.default, (x, groups, weight, bias, eps, False))


def _pool(node: Node) -> None:
    _first_of_tuple(node, POOLS[operator_name(node)], node.args)


def _first_of_tuple(node: Node, target: torch._ops.OpOverload, args: tuple) -> None:
    """A tuple whose first element alone is read becomes the operator that gives just that."""
    read = [u for u in node.users if u.users]
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in read) or not read:
        return
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, tuple(args))
    new.meta = {**node.meta, "val": read[0].meta["val"]}
    for user in list(node.users):
        if user in read:
            bypass(user, new)
        else:
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _softmax(node: Node) -> None:
    if operator_name(node) == "_safe_softmax" and _may_be_fully_masked(node.args[0]):
        return
    target = aten.log_softmax.int if operator_name(node) == "_log_softmax" else aten.softmax.int
    replace(node, target, (node.args[0], node.args[1]))


def _may_be_fully_masked(source: object, depth: int = 6) -> bool:
    """_safe_softmax gives zeros for a row of -inf, softmax gives NaN; only a mask makes such rows."""
    if not isinstance(source, Node) or source.op != "call_function":
        return False
    if operator_name(source) in ("add", "where", "masked_fill", "sub") or depth == 0:
        return True
    return operator_name(source) in ("mul", "div", "reshape", "view", "expand") and _may_be_fully_masked(
        source.args[0], depth - 1
    )


def _reshape(node: Node) -> None:
    if operator_name(node) in ("view", "_unsafe_view", "view_as", "_unsafe_reshape") and len(node.args) == 2:
        if isinstance(node.args[1], list | tuple):
            replace(node, aten.reshape.default, node.args)
        return
    after = value(node)
    if after is None:
        return
    sizes = [int(d) if isinstance(d, int) else -1 for d in after.shape]
    if sizes.count(-1) <= 1 and 0 not in sizes:
        replace(node, aten.reshape.default, (node.args[0], sizes))


def _pad(node: Node) -> None:
    mode = PADDED[operator_name(node)]
    fill = argument(node, 2, "value", 0.0) if mode == "constant" else None
    replace(node, aten.pad.default, (node.args[0], node.args[1], mode, fill))


def _transpose(node: Node) -> None:
    before = value(node.args[0])
    if before is not None and before.dim() == 2:
        replace(node, aten.transpose.int, (node.args[0], 0, 1))
    elif operator_name(node) == "t" and isinstance(node.args[0], Node):
        bypass(node, node.args[0])


def _relu6(node: Node) -> None:
    replace(node, aten.hardtanh.default, (node.args[0], 0.0, 6.0))


def _adaptive_pool(node: Node) -> None:
    replace(node, aten.adaptive_avg_pool2d.default, node.args)


def _adaptive_max_pool(node: Node) -> None:
    """adaptive_max_pool2d whose windows are all alike -> max_pool2d, which runtimes have; indices must be unread."""
    before, size = value(node.args[0]), node.args[1]
    if before is None:
        return
    rows, columns = int(before.shape[-2]), int(before.shape[-1])
    if not rows % size[0] and not columns % size[1]:
        window = [rows // size[0], columns // size[1]]
        _first_of_tuple(node, aten.max_pool2d.default, (node.args[0], window, window))


def _multiply_by_constant(node: Node) -> None:
    """mul(constant, x) -> mul(x, constant), so that patterns have one form to look for."""
    one, other = node.args[:2]
    if is_constant(one) and isinstance(other, Node) and not is_constant(other):
        node.args = (other, one)


REWRITES: dict[str, Callable[[Node], None]] = {
    "convolution": _convolution,
    "conv1d": _string_padding,
    "conv2d": _string_padding,
    "conv3d": _string_padding,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("view", "_unsafe_view", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(PADDED, _pad),
    "t": _transpose,
    "numpy_T": _transpose,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "relu6": _relu6,
    "mul": _multiply_by_constant,
}
