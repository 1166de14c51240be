"""Stable sorts as TopK of everything, for formats whose TopK puts the lower index first among equals (ONNX, TFLite)."""

import torch
from torch.fx import GraphModule, Node

from calibrate.tokens.builder import Builder, aten


def as_topk(graph: GraphModule, ascends: bool) -> None:
    """Rewrite, in place, each sort that is stable; `ascends`: the runtime's TopK can take the smallest first.

    Where it can't, what is sorted upwards is negated, as float32: exact for indices, below 2^24.
    """
    for node in [n for n in graph.graph.nodes if n.target is aten.sort.stable and n.kwargs.get("stable")]:
        source, dim = node.args[0], node.kwargs.get("dim", -1)
        assert isinstance(source, Node)
        count = int(source.meta["val"].shape[dim])
        build = Builder(graph, node, str(node.meta.get("layer", node.name)), chooses=False)
        downwards = bool(node.kwargs.get("descending", False))
        only_indices = all(user.args[1] == 1 for user in node.users)
        if not downwards and not ascends and only_indices:
            source = build.call(aten.neg.default, build.call(aten.to.dtype, source, torch.float32))
            downwards = True
        if not downwards and not ascends:
            continue  # the converter's own way, or its refusal
        made = build.call(aten.topk.default, source, count, dim, downwards, True)
        node.replace_all_uses_with(made)
        made.meta |= {name: node.meta[name] for name in ("layer", "custom") if name in node.meta}
        graph.graph.erase_node(node)
