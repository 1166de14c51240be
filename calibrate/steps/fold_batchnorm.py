"""Fold batch normalisation into the layer before it, or into all layers after it; the float function is unchanged."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import Layer, layer_of, pads, scale_inputs, scale_outputs
from calibrate.graph import constant, kind, layer_name
from calibrate.plan import Entry
from calibrate.steps import Context

NAME = "fold_batchnorm"


class FoldBatchnorm:
    """y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta, with gamma / sqrt(var + eps) moved into the weight.

    (Jacob et al. 2017, arXiv 1712.05877, section 3.2.) Where no layer comes before, the same map moves into the weights
    of the layers that read it: exact where they do not pad, since a padded zero is a zero after the normalisation.
    """

    exact = True

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        ledger: list[Entry] = []
        while True:  # a norm behind a norm can be folded once the other one is
            before = len(ledger)
            for node in _norms(graph):
                if isinstance(_place(graph, node), str):
                    continue
                ledger.append(Entry(NAME, layer_name(node), _fold(graph, node)))
            if len(ledger) == before:
                break
        for node in _norms(graph):
            reason = _place(graph, node)
            assert isinstance(reason, str)
            ledger.append(Entry(NAME, layer_name(node), "left alone", reason))
        return ledger or [Entry(NAME, "model", "left alone", "it has no batch normalisation")]

    def ensures(self, graph: GraphModule) -> str | None:
        left = [n.name for n in _norms(graph) if not isinstance(_place(graph, n), str)]
        return f"{left[0]} could have been folded" if left else None


def _norms(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if kind(n) == "batch_norm"]


def _place(graph: GraphModule, node: Node) -> Layer | list[Layer] | str:
    """The layer before, or the layers after, that can take the norm; else why none can."""
    if _uses_batch_statistics(node):
        return "it normalises with the statistics of the batch"
    if any(kind(n) == "getitem" and n.args[1] != 0 and n.users for n in node.users):
        return "its saved statistics are read by something else"
    reason = _refusal_before(graph, node)
    if reason is None:
        layer = layer_of(graph, node.args[0])
        assert layer is not None
        return layer
    return _layers_after(graph, node) or reason


def _refusal_before(graph: GraphModule, node: Node) -> str | None:
    source = node.args[0]
    layer = layer_of(graph, source)
    if layer is None or not isinstance(source, Node):
        return "no convolution or linear layer with constant weights before it"
    if len(source.users) != 1:
        return f"{layer_name(source)} is read by something else too"
    rank = _rank(source)
    if (layer.axis == -1 or rank is not None) and layer.axis != 1 - (rank or 0):
        return "the channels it normalises are not the linear layer's outputs"
    return None


def _layers_after(graph: GraphModule, node: Node) -> list[Layer]:
    """The layers that are all that reads the norm, where each of them can take it; else none."""
    rank = _rank(node.args[0])
    readers = [u for result in _results(node) for u in result.users]
    layers = [layer_of(graph, u) for u in readers]
    for layer, reader in zip(layers, readers, strict=True):
        if layer is None or reader.args[0] not in _results(node) or pads(layer) or rank is None:
            return []
        if layer.axis != 1 - rank:
            return []
    return [layer for layer in layers if layer is not None]


def _results(node: Node) -> list[Node]:
    """What holds the normalised tensor: a decomposed batch norm returns a tuple."""
    parts = [n for n in node.users if kind(n) == "getitem"]
    return [p for p in parts if p.args[1] == 0] if parts else [node]


def _uses_batch_statistics(node: Node) -> bool:
    if "_no_training" in str(node.target):
        return False
    mean, var, training = node.args[3:6]
    return bool(training) or mean is None or var is None


def _rank(node: object) -> int | None:
    """How many axes a tensor has; None where capture did not say."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _map(graph: GraphModule, node: Node) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(factor, shift, gamma, beta) float64 [channels]: the norm is x * factor + shift."""
    gamma, beta, mean, var = (constant(graph, a).double() if isinstance(a, Node) else None for a in node.args[1:5])
    eps = next(a for a in reversed(node.args) if isinstance(a, float))
    assert mean is not None
    assert var is not None  # else _place had said so
    gamma = gamma if gamma is not None else torch.ones_like(mean)
    beta = beta if beta is not None else torch.zeros_like(mean)
    factor = gamma / torch.sqrt(var + eps)
    return factor, beta - mean * factor, gamma, beta


def _fold(graph: GraphModule, node: Node) -> str:
    place = _place(graph, node)
    factor, shift, gamma, beta = _map(graph, node)
    source = node.args[0]
    assert isinstance(source, Node)
    assert not isinstance(place, str)
    if isinstance(place, Layer):
        scale_outputs(graph, place, factor, shift)
        # Mean and deviation of what the layer now computes, channel by channel: correct_bias knows inputs from it.
        source.meta["bn"] = (beta.float(), gamma.abs().float())
    else:
        for layer in place:
            scale_inputs(graph, layer, factor, shift)
    for result in [n for n in node.users if kind(n) == "getitem"]:
        result.replace_all_uses_with(source)
        graph.graph.erase_node(result)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)
    return "folded" if isinstance(place, Layer) else "folded into " + ", ".join(layer_name(p.node) for p in place)


STEP = FoldBatchnorm()
