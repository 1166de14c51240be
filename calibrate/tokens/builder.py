"""Write ATen operators into a captured graph with the shapes that capture would have given them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..graph import CHOOSES_TOKENS, add_constant

aten = torch.ops.aten


class Builder:
    """Puts operators before the node `before`, named after `layer`; each gets its fake tensor at once.

    They are marked as what chooses tokens, which keeps them float when the graph is quantized; not with `chooses` off.
    `sorts`: the runtime has a sort that is stable, so ranks need not be counted (see `selection.rank`).
    """

    def __init__(self, graph: GraphModule, before: Node, layer: str, chooses: bool = True, sorts: bool = False) -> None:
        self.graph, self.before, self.layer, self.chooses, self.sorts = graph, before, layer, chooses, sorts
        self.mode = fake_mode(graph)

    def call(self, target: Any, *args: Any, **keywords: Any) -> Node:
        """target(*args, **keywords); `args` hold nodes, numbers and lists of both."""
        with self.graph.graph.inserting_before(self.before):
            node = self.graph.graph.call_function(target, args, keywords)
        node.meta["layer"] = f"{self.layer}.{node.name}"
        if self.chooses:
            node.meta[CHOOSES_TOKENS] = self.layer
        node.meta["val"] = evaluated(node, self.mode)
        return node

    def constant(self, name: str, value: Tensor) -> Node:
        return add_constant(self.graph, name, value, self.before)

    def item(self, source: Node, index: int) -> Node:
        """One part of an operator that makes several."""
        import operator

        return self.call(operator.getitem, source, index)


def fake_mode(graph: GraphModule) -> FakeTensorMode:
    """The mode that the graph was captured in: its symbols are the dynamic batch."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("a captured graph knows its shapes")


def evaluated(node: Node, mode: FakeTensorMode) -> Any:
    """What the node makes, as fake tensors."""

    def value(argument: Node) -> Any:
        known = argument.meta["val"]
        if isinstance(known, Tensor) and not isinstance(known, FakeTensor):
            return mode.from_tensor(known, static_shapes=True)
        return known

    with mode, torch.no_grad():
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))


def refreshed(graph: GraphModule, nodes: Iterable[Node]) -> None:
    """Work out the shapes of `nodes` anew, in their order."""
    mode = fake_mode(graph)
    for node in nodes:
        if node.op == "call_function":
            node.meta["val"] = evaluated(node, mode)
