"""What the rewrites share: reading a node's value, and putting one node in the place of another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.graph import add_constant, constant, is_constant

aten = torch.ops.aten


def replace(node: Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Node:
    """Put target(*args) in the place of `node`; it has the same value, so it takes over all that is known of it."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, tuple(args), kwargs or {})
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def bypass(node: Node, source: Node) -> None:
    """Let everybody who read `node` read `source`."""
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def value(node: object) -> Tensor | None:
    """The (fake) tensor a node makes; None for shapes, tuples and plain numbers."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether the shapes are equal; symbols are compared by name, so that no guard arises."""
    return a.dim() == b.dim() and all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(graph: GraphModule, item: object) -> float | None:
    """The number behind a literal or a constant of one element; None for anything else."""
    if isinstance(item, int | float) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, Node) and is_constant(item):
        stored = constant(graph, item)
        return float(stored) if stored.numel() == 1 else None
    return None


def is_number(graph: GraphModule, item: object, wanted: float) -> bool:
    """Whether `item` is the constant `wanted`, to float32 rounding."""
    found = number(graph, item)
    return found is not None and abs(found - wanted) <= 1e-6 * abs(wanted)


def derived_constant(graph: GraphModule, source: Node, tensor: Tensor, before: Node, suffix: str = "") -> Node:
    """A new constant made from the constant `source`; it keeps the name people know the weight by."""
    made = add_constant(graph, str(source.target).removesuffix(suffix) + suffix, tensor, before)
    made.meta["fqn"] = source.meta.get("fqn", str(source.target))
    return made


def only_user(node: Node) -> Node | None:
    """The one reader of `node`, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
