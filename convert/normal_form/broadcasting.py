"""Ways of writing a broadcast that cost a gather or a copy become the broadcast itself.

Text models have most of them: a mask indexed by aranges, `and` with a mask of ones, token type ids that are all zero
expanded to the batch before their embedding is looked up.
"""

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import constant, is_constant, operator_name

from .rewriting import aten, bypass, replace, same_shape, value

BROADCASTING = ("add", "sub", "mul", "div", "where", "eq", "ne", "lt", "le", "gt", "ge", "logical_and")


def broadcasts_are_plain(graph: GraphModule) -> None:
    """Index by aranges -> reshape; `and` with ones -> nothing; lookup of expanded ids -> expanded lookup; then
    drop expands whose reader broadcasts anyway."""
    for node in list(graph.graph.nodes):
        name = operator_name(node)
        if name == "index":
            _index(graph, node)
        elif name in ("__and__", "logical_and", "bitwise_and"):
            _and(graph, node)
        elif name == "embedding":
            _lookup(node)
    for node in list(graph.graph.nodes):
        if operator_name(node) == "expand":
            _expand(node)
    graph.graph.eliminate_dead_code()


def _index(graph: GraphModule, node: Node) -> None:
    """x[arange(a)[:, None, None], arange(b)] with all axes in order is x[:, None, :], a reshape."""
    x, after = value(node.args[0]), value(node)
    indices = node.args[1]
    if x is None or after is None or len(indices) != x.dim():
        return
    axes = [_arange_axis(graph, i, length) for i, length in zip(indices, x.shape, strict=True)]
    known = [a for a in axes if a is not None]
    if len(known) != len(axes) or known != sorted(set(known)):
        return
    sizes = [d if isinstance(d, int) else -1 for d in after.shape]
    if sizes.count(-1) <= 1:
        replace(node, aten.reshape.default, (node.args[0], sizes))


def _arange_axis(graph: GraphModule, index: object, length: object) -> int | None:
    """The axis, counted from the last (-1), along which an index tensor is 0, 1, ..., length - 1; else None."""
    made = value(index)
    if made is None or not isinstance(index, Node):
        return None
    long = [i - made.dim() for i, d in enumerate(made.shape) if not (isinstance(d, int) and d == 1)]
    if len(long) != 1 or str(made.shape[long[0]]) != str(length):
        return None
    if is_constant(index):
        stored = constant(graph, index).reshape(-1)
        return long[0] if torch.equal(stored, torch.arange(stored.numel(), dtype=stored.dtype)) else None
    source: object = index
    while isinstance(source, Node) and operator_name(source) in ("unsqueeze", "reshape"):
        source = source.args[0]
    counts = isinstance(source, Node) and operator_name(source) == "arange" and len(source.args) == 1
    return long[0] if counts else None


def _and(graph: GraphModule, node: Node) -> None:
    left, right = node.args
    after = value(node)
    if after is None or after.dtype != torch.bool:
        return
    for one, other in ((left, right), (right, left)):
        if is_constant(one) and isinstance(other, Node) and bool(constant(graph, one).all()):
            source = value(other)
            if source is not None and same_shape(source, after):
                bypass(node, other)
                return
    if node.target != aten.logical_and.default:
        replace(node, aten.logical_and.default, (left, right))


def _lookup(node: Node) -> None:
    """embedding(table, expand(ids)) -> expand(embedding(table, ids)) for constant table and ids."""
    table, ids = node.args[0], node.args[1]
    if not (
        is_constant(table) and isinstance(ids, Node) and operator_name(ids) == "expand" and is_constant(ids.args[0])
    ):
        return
    before, width, sizes = value(ids.args[0]), value(table), ids.args[1]
    if before is None or width is None or before.dim() != len(sizes):
        return
    with node.graph.inserting_before(node):
        found = node.graph.call_function(aten.embedding.default, (table, ids.args[0]))
    found.meta = {**node.meta, "val": width.new_empty((*before.shape, width.shape[1]))}
    replace(node, aten.expand.default, (found, [*sizes, -1]))


def _expand(node: Node) -> None:
    """op(expand(x), y) -> op(x, y) where y alone already has the shape of the result."""
    source = node.args[0]
    for user in list(node.users):
        after = value(user)
        others = [v for a in user.args if a is not node and (v := value(a)) is not None]
        whole = after is not None and any(same_shape(o, after) for o in others)
        if operator_name(user) in BROADCASTING and whole and user.args.count(node) == 1:
            user.args = tuple(source if a is node else a for a in user.args)
    if not node.users:
        node.graph.erase_node(node)
