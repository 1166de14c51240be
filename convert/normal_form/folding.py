"""What depends on constants alone is computed once."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.graph import add_constant, constant, is_constant, operator_name

from .rewriting import derived_constant, value

# Repeating a constant costs memory in every artifact; up to this many numbers it is cheaper than the operator.
SMALL = 65536
ARITHMETIC = ("add", "sub", "mul", "div")


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


def scalars_are_literal(graph: GraphModule) -> None:
    """x op constant of no axes -> x op number: the same bits, and nobody takes the constant for a weight."""
    for node in list(graph.graph.nodes):
        if operator_name(node) not in ARITHMETIC or len(node.args) != 2 or node.kwargs:
            continue
        x, scalar = node.args
        made = value(x)
        if made is None or is_constant(x) or not isinstance(scalar, Node) or not is_constant(scalar):
            continue
        stored = constant(graph, scalar)
        if stored.dim() == 0 and stored.dtype == made.dtype and made.dtype in (torch.float32, torch.int64):
            node.args = (x, stored.item())


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
