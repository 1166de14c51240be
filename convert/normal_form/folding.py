"""What depends on constants alone is computed once."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.graph import add_constant, constant, is_constant, operator_name

from .rewriting import derived_constant

# Repeating a constant costs memory in every artifact; up to this many numbers it is cheaper than the operator.
SMALL = 65536


def constants_are_folded(graph: GraphModule) -> None:
    """Replace operators of constants by their result, unless it is much larger than what it is made of."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_foldable(node):
            continue
        with torch.no_grad():
            result = node.target(*_values(graph, node.args), **_keywords(graph, node.kwargs))
        sources = [constant(graph, n) for n in node.all_input_nodes]
        if isinstance(result, Tensor) and result.numel() <= max(SMALL, sum(s.numel() for s in sources)):
            _store(graph, node, result)


def _is_foldable(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    made = node.meta.get("val")
    static = isinstance(made, Tensor) and all(isinstance(d, int) for d in made.shape)
    # The interior of a quantized weight is the target's business, not a constant to be multiplied out.
    return static and operator_name(node) != "sym_size" and all(is_constant(n) for n in node.all_input_nodes)


def _values(graph: GraphModule, args: object) -> tuple:
    return torch.fx.node.map_arg(args, lambda n: constant(graph, n))


def _keywords(graph: GraphModule, kwargs: object) -> dict:
    return torch.fx.node.map_arg(kwargs, lambda n: constant(graph, n))


def _store(graph: GraphModule, node: Node, result: Tensor) -> None:
    source = next((n for n in node.all_input_nodes if "fqn" in n.meta), None)
    if source is not None:
        made = derived_constant(graph, source, result, node, "_folded")
    else:
        made = add_constant(graph, f"{node.name}_constant", result, node)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)
