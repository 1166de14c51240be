"""A quantized graph with its weights as float constants again: what later steps aim at where training changed them."""

import torch
from torch.fx import GraphModule, Node

from . import qdq
from .coded import CodedLayer, coded_layers
from .graph import add_constant, clone, finish

FLOAT = {qdq.DYNAMIC_LINEAR: torch.ops.aten.linear.default, qdq.DYNAMIC_CONV2D: torch.ops.aten.conv2d.default}


def decoded(graph: GraphModule) -> GraphModule:
    """A graph of its own in which every coded layer holds, in float32, the weight that its codes stand for.

    Layers keep their names, and whatever rounds activations stays where it has nodes of its own: static codes, signs.
    Layers that rounded their input at run time read it as it is.
    """
    made = clone(graph)
    for layer in list(coded_layers(made)):
        weight = add_constant(made, f"{layer.name}_decoded", layer.weight(made), layer.node)
        if layer.dynamic:
            _read_floats(made, layer, weight)
        else:
            layer.node.args = (layer.node.args[0], weight, *layer.node.args[2:])
    return finish(made)


def _read_floats(graph: GraphModule, layer: CodedLayer, weight: Node) -> None:
    node = layer.node
    geometry = node.args[4:8] if node.target is qdq.DYNAMIC_CONV2D else ()
    with graph.graph.inserting_before(node):
        args = (node.args[0], weight, node.args[3], *geometry)
        plain = graph.graph.call_function(FLOAT[node.target], args)
    plain.meta = {"layer": layer.name, **node.meta}
    node.replace_all_uses_with(plain)
    graph.graph.erase_node(node)
