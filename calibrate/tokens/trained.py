"""Constants of a token method that can be trained: marked in the graph, and known by a name in every graph of a cut.

The name is made of the layer that is cut and of what the constant is, so that what was trained in one form of the graph
is put into another, or into the one that shows where tokens came from.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from ..coded import set_constant
from .builder import Builder

# A mark in `meta` of a constant that can be trained: its name.
TRAINED = "trained_for_tokens"


def trained_constant(build: Builder, name: str, start: Tensor) -> Node:
    """A constant that begins at `start` and can be trained."""
    node = build.constant(name, start)
    node.meta[TRAINED] = f"{build.layer}.{name}"
    return node


def marked(graph: GraphModule) -> dict[str, Node]:
    """Every constant of the graph that can be trained, by name, in the graph's order."""
    return {str(n.meta[TRAINED]): n for n in graph.graph.nodes if n.op == "get_attr" and TRAINED in n.meta}


def write(graph: GraphModule, values: Mapping[str, Tensor]) -> None:
    """Put trained values, by name, into the graph, which has a constant for each."""
    found = marked(graph)
    for name, value in values.items():
        set_constant(graph, found[name], value)
