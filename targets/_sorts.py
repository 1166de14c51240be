"""Stable sorts as TopK of everything, for formats whose TopK puts the lower index first among equals (ONNX, TFLite)."""

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import kind
from calibrate.tokens.builder import Builder, aten


def as_topk(graph: GraphModule, ascends: bool) -> None:
    """Rewrite, in place, each sort that is stable; `ascends`: the runtime's TopK can take the smallest first.

    Where it can't, indices that a sort made are negated, as float32, to be sorted upwards: exact below 2^24. Other
    sorts upwards, and those along an axis of no fixed length, are left to the converter.
    """
    for node in [n for n in graph.graph.nodes if n.target is aten.sort.stable and n.kwargs.get("stable")]:
        source, dim = node.args[0], node.kwargs.get("dim", -1)
        assert isinstance(source, Node)
        count = source.meta["val"].shape[dim]
        if not isinstance(count, int):
            continue
        build = Builder(graph, node, str(node.meta.get("layer", node.name)), chooses=False)
        downwards = bool(node.kwargs.get("descending", False))
        if not downwards and not ascends:
            if not (_are_indices(source) and all(user.args[1] == 1 for user in node.users)):
                continue
            source = build.call(aten.neg.default, build.call(aten.to.dtype, source, torch.float32))
            downwards = True
        made = build.call(aten.topk.default, source, count, dim, downwards, True)
        node.replace_all_uses_with(made)
        made.meta |= {name: node.meta[name] for name in ("layer", "custom") if name in node.meta}
        graph.graph.erase_node(node)


def _are_indices(node: Node) -> bool:
    """Whether a node is the order that a sort found, not what it sorted."""
    made = node.args[0] if kind(node) == "getitem" else None
    return isinstance(made, Node) and kind(made) in ("sort", "topk") and node.args[1] == 1
