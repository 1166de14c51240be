"""Operators that check or do nothing are taken out."""

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import constant, is_constant, operator_name

from .rewriting import argument, aten, bypass, replace, same_shape, value

ASSERTIONS = frozenset(
    (
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_print",
    )
)
COPIES = frozenset(("detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "_reshape_alias"))
DROPOUTS = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"))
CASTS = frozenset(("to", "_to_copy", "type_as", "_to_dtype"))
LAST = 2**62


def nothing_is_asserted(graph: GraphModule) -> None:
    """Drop assertions and what only they read; torch.export wrote them to guard shapes, and shapes are known here."""
    for node in reversed(list(graph.graph.nodes)):
        if operator_name(node) in ASSERTIONS:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def nothing_is_a_no_op(graph: GraphModule) -> None:
    """Drop copies, dropout (the model is in evaluation mode) and casts, slices, reshapes that change nothing."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        name = operator_name(node)
        if name in DROPOUTS:
            _drop_dropout(node, name)
        elif name in CASTS:
            _cast(node)
        elif name in COPIES or _changes_nothing(node, name):
            source = node.args[0]
            assert isinstance(source, Node)
            bypass(node, source)
    graph.graph.eliminate_dead_code()


def reshapes_are_single(graph: GraphModule) -> None:
    """reshape(reshape(x, a), b) -> reshape(x, b)."""
    for node in list(graph.graph.nodes):
        inner = node.args[0] if operator_name(node) == "reshape" else None
        if isinstance(inner, Node) and operator_name(inner) == "reshape":
            node.args = (inner.args[0], *node.args[1:])
    graph.graph.eliminate_dead_code()


def masks_hide_something(graph: GraphModule) -> None:
    """Attention whose mask is a constant that hides nothing, expanded over the batch or not, has none.

    Hugging Face's encoders make such masks; with them runtimes leave their fast kernels.
    """
    for node in list(graph.graph.nodes):
        if operator_name(node) != "scaled_dot_product_attention":
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        source = mask
        while isinstance(source, Node) and operator_name(source) in ("expand", "unsqueeze", "reshape"):
            source = source.args[0]
        if not isinstance(source, Node) or not is_constant(source):
            continue
        stored = constant(graph, source)
        if bool(stored.all()) if stored.dtype == torch.bool else not bool(stored.any()):
            if len(node.args) > 3:
                node.update_arg(3, None)
            else:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
    graph.graph.eliminate_dead_code()


def _drop_dropout(node: Node, name: str) -> None:
    trains = argument(node, 2, "train", False)
    source = node.args[0]
    if trains or not isinstance(source, Node):
        return
    if name != "native_dropout":
        bypass(node, source)
        return
    for user in list(node.users):
        if user.args[1] == 0:
            bypass(user, source)


def _cast(node: Node) -> None:
    source = node.args[0]
    before, after = value(source), value(node)
    if before is None or after is None or not isinstance(source, Node):
        return
    if before.dtype == after.dtype:
        bypass(node, source)
    elif node.target != aten.to.dtype or len(node.args) > 2:
        replace(node, aten.to.dtype, (source, after.dtype))


def _changes_nothing(node: Node, name: str) -> bool:
    before, after = value(node.args[0]) if node.args else None, value(node)
    if before is None or after is None or not same_shape(before, after) or before.dtype != after.dtype:
        return False
    if name == "slice":
        start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        return start in (None, 0) and step == 1 and (end is None or _covers(end, before, argument(node, 1, "dim", 0)))
    if name == "permute":
        return list(node.args[1]) == list(range(before.dim()))
    return name in ("view", "reshape", "expand", "_unsafe_view", "flatten", "expand_copy", "view_copy", "squeeze")


def _covers(end: object, tensor: torch.Tensor, axis: int) -> bool:
    length = tensor.shape[axis]
    return isinstance(end, int) and (end >= LAST or (isinstance(length, int) and end >= length))
