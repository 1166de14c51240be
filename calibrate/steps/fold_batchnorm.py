"""Fold batch normalisation into the convolution or linear layer before it; the float function is unchanged."""

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import add_constant, constant, is_constant, is_weighted, kind, layer_name, weight_nodes
from calibrate.plan import Entry
from calibrate.steps import Context


class FoldBatchnorm:
    """y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta, with gamma / sqrt(var + eps) moved into the weight.

    (Jacob et al. 2017, arXiv 1712.05877, section 3.2.)
    """

    exact = True

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        ledger = []
        for node in list(graph.graph.nodes):
            if kind(node) != "batch_norm":
                continue
            reason = _refusal(node)
            action = "folded" if reason is None else "left alone"
            if reason is None:
                _fold(graph, node)
            ledger.append(Entry("fold_batchnorm", layer_name(node), action, reason or ""))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        left = [n.name for n in graph.graph.nodes if kind(n) == "batch_norm" and _refusal(n) is None]
        return f"{left[0]} could have been folded" if left else None


def _refusal(node: Node) -> str | None:
    source = node.args[0]
    if _uses_batch_statistics(node):
        return "it normalises with the statistics of the batch"
    if not isinstance(source, Node) or not is_weighted(source):
        return "no convolution or linear layer with constant weights before it"
    if len(source.users) != 1:
        return f"{layer_name(source)} is read by something else too"
    bias = source.args[2] if len(source.args) > 2 else None
    if bias is not None and not is_constant(bias):
        return f"the bias of {layer_name(source)} is computed"
    if any(kind(n) == "getitem" and n.args[1] != 0 and n.users for n in node.users):
        return "its saved statistics are read by something else"
    if kind(source) == "linear" and _rank(source) != 2:
        return "the channels it normalises are not the linear layer's outputs"
    return None


def _uses_batch_statistics(node: Node) -> bool:
    if "_no_training" in str(node.target):
        return False
    mean, var, training = node.args[3:6]
    return bool(training) or mean is None or var is None


def _rank(node: Node) -> int | None:
    """How many axes the layer's output has; None where capture did not say."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else None


def _fold(graph: GraphModule, node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    gamma, beta, mean, var = (constant(graph, a).double() if isinstance(a, Node) else None for a in node.args[1:5])
    eps = next(a for a in reversed(node.args) if isinstance(a, float))
    assert mean is not None
    assert var is not None  # else _refusal had said so
    factor = 1 / torch.sqrt(var + eps)
    if gamma is not None:
        factor = factor * gamma
    weight_node, bias_node = weight_nodes(source)
    assert weight_node is not None
    weight = constant(graph, weight_node)
    bias = constant(graph, bias_node).double() if bias_node is not None else torch.zeros_like(mean)
    folded = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
    shift = (bias - mean) * factor + (beta if beta is not None else 0)
    name = layer_name(source)
    new_weight = add_constant(graph, f"{name}_folded_weight", folded.to(weight.dtype), source)
    new_bias = add_constant(graph, f"{name}_folded_bias", shift.to(weight.dtype), source)
    source.args = (source.args[0], new_weight, new_bias, *source.args[3:])
    # Mean and deviation of what the layer now computes, channel by channel: correct_bias knows inputs from it.
    ones = torch.ones_like(mean)
    source.meta["bn"] = (
        (beta if beta is not None else torch.zeros_like(mean)).float(),
        (gamma.abs() if gamma is not None else ones).float(),
    )
    for result in [n for n in node.users if kind(n) == "getitem"]:  # a decomposed batch norm returns a tuple
        result.replace_all_uses_with(source)
        graph.graph.erase_node(result)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


STEP = FoldBatchnorm()
