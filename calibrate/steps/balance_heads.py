"""Scale each attention head's queries against its keys, and its values against its output columns, to like ranges."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import layer_of, scale_outputs
from calibrate.channel_groups import Group, find_groups, scale_group, tensor_of
from calibrate.channels import Channels, Product, readers, trace
from calibrate.graph import constant, is_weighted, kind, layer_name
from calibrate.layer_trial import Activations, Seen, activations, output_error, watch, weight_of
from calibrate.plan import Entry
from calibrate.steps import Context


@dataclass(frozen=True)
class Operand:
    """One side of a product: the linear layer that makes it, and its channels [heads, channels of a head]."""

    layer: Node
    channels: Tensor


class BalanceHeads:
    """Wq_h / d_h and Wk_h * d_h; Wv_h / c_h and Wo_h * c_h, biases too: attention computes the same.

    d_h = sqrt(max|q_h| / max|k_h|) and c_h = sqrt(max|v_h| / max|Wo_h|), divided by their geometric mean: the
    equalization of arXiv 1906.04721, equation 11, with heads in the place of channels, so that one scale for all heads
    wastes less on the small ones. Where the plan quantizes what the output projection reads, values are scaled only if
    that lowers the projection's error by more than the share `least_gain`.
    """

    exact = True
    defaults = {"least_gain": 0.02}  # noqa: RUF012

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        channels = trace(graph, next(iter(context.few_batches())))
        values = [g for g in find_groups(graph, channels, "never") if kind(g.source) == "linear"]
        attention = [
            n for n in graph.graph.nodes if kind(n) == "attention" or any(p.node is n for p in channels.products)
        ]
        if not attention:
            return [
                Entry("balance_heads", "model", "left alone", "the graph has no attention whose heads can be followed")
            ]
        sides = {n: _operands(channels, n) for n in attention}
        tensors = {s.layer for pair in sides.values() if not isinstance(pair, str) for s in pair}
        tensors |= {tensor_of(n) for g in values for n in g.layers}
        seen = watch(graph, tensors, context.few_batches())
        ledger = [_balance_products(graph, node, pair, seen) for node, pair in sides.items()]
        gain = float({**self.defaults, **context.parameters}["least_gain"])
        return ledger + [_balance_values(graph, context, channels, g, seen, gain) for g in values]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if is_weighted(node) and kind(node) == "linear" and not constant(graph, node.args[1]).isfinite().all():
                return f"the weight of {layer_name(node)} is not finite"
        return None


def _operands(channels: Channels, node: Node) -> tuple[Operand, Operand] | str:
    """The layers that make queries and keys, or why these can't be scaled."""
    products = [p for p in channels.products if p.node is node]
    found = [_operand(channels, labels) for p in products for labels in (p.left, p.right)]
    left, right = found if len(found) == 2 else (None, None)
    if left is None or right is None:
        return "its queries and keys are not the plain outputs of linear layers, each channel against one other"
    if left.layer is right.layer and bool(torch.isin(left.channels, right.channels).any()):
        return "its queries and keys are the same channels"
    for side in (left, right):
        reader = _other_reader(channels, products[0], side)
        if reader is not None:
            return f"{layer_name(reader)} reads its queries or keys too"
    return left, right


def _operand(channels: Channels, labels: Tensor) -> Operand | None:
    found = channels.source(labels)
    if found is None or kind(found[0]) != "linear" or found[1].unique().numel() != found[1].numel():
        return None
    return Operand(*found)


def _other_reader(channels: Channels, product: Product, side: Operand) -> Node | None:
    """Something besides the product that may read the operand's channels; a fused projection's values are others."""
    for reader, tensor in readers(side.layer, channels.sums):
        if reader is product.node:
            continue
        columns = channels.columns.get(reader)
        found = channels.source(columns) if columns is not None and reader.args[0] is tensor else None
        if found is None or found[0] is not side.layer or bool(torch.isin(found[1], side.channels).any()):
            return reader
    return None


def _balance_products(
    graph: GraphModule, node: Node, sides: tuple[Operand, Operand] | str, seen: dict[Node, Seen]
) -> Entry:
    if isinstance(sides, str):
        return Entry("balance_heads", layer_name(node), "left alone", sides)
    left, right = (seen[s.layer].reach[s.channels].amax(1).double() for s in sides)
    scale = balanced(left, right)
    for side, factor in zip(sides, (1 / scale, scale), strict=True):
        layer = layer_of(graph, side.layer)
        assert layer is not None
        rows = torch.ones(layer.outputs, dtype=torch.float64)
        rows[side.channels] = factor[:, None].expand(side.channels.shape)
        scale_outputs(graph, layer, rows)
    reason = (
        f"heads of the queries reach {_span(left)} before and {_span(left / scale)} after, "
        f"of the keys {_span(right)} and {_span(right * scale)}"
    )
    return Entry("balance_heads", layer_name(node), "queries balanced with keys", reason)


def _balance_values(
    graph: GraphModule, context: Context, channels: Channels, group: Group, seen: dict[Node, Seen], least_gain: float
) -> Entry:
    """Scale the heads of the values that `group`'s output projections read."""
    name = layer_name(group.source)
    heads = _heads(channels, group)
    if heads is None:
        return Entry("balance_heads", name, "left alone", "its values do not come in heads of their own")
    weights = [weight_of(graph, n) for n in group.layers]
    reach, load = torch.zeros(group.width), torch.zeros(group.width)
    for node, weight, columns in zip(group.layers, weights, group.columns, strict=True):
        reach.scatter_reduce_(0, columns, seen[tensor_of(node)].reach, "amax")
        load.scatter_reduce_(0, columns, weight.abs().amax(0).float(), "amax")
    before, per_head = reach[heads].amax(1).double(), balanced(reach[heads].amax(1), load[heads].amax(1))
    scale = torch.ones(group.width, dtype=torch.float64)
    scale[heads] = per_head[:, None].expand(heads.shape)
    how = activations(context.plan)
    if how is not None:
        old, new = (_error(graph, context, how, group, seen, s) for s in (torch.ones_like(scale), scale))
        if not new < old * (1 - least_gain):
            reason = f"scaling would not lower the output error of the projection by more than {least_gain:.0%}"
            return Entry("balance_heads", name, "left alone", reason)
    scale_group(graph, group, scale)
    reason = f"heads of the values reach {_span(before)} before, {_span(before / per_head)} after"
    return Entry("balance_heads", name, "values balanced with the output projection", reason)


def _error(
    graph: GraphModule, context: Context, how: Activations, group: Group, seen: dict[Node, Seen], scale: Tensor
) -> float:
    total = 0.0
    for node, columns in zip(group.layers, group.columns, strict=True):
        factor = scale[columns].float()
        rows = seen[tensor_of(node)].mapped(1 / factor)
        total += output_error(context.plan, how, rows, [node], [weight_of(graph, node) * factor])
    return total


def _heads(channels: Channels, group: Group) -> Tensor | None:
    """The value channels [heads, channels of a head]; None where heads share channels or are not known."""
    base, width = channels.base[group.source], group.width
    for average in channels.averages:
        local = average.channels - base
        if bool(((local >= 0) & (local < width)).all()):
            return local if local.unique().numel() == local.numel() else None
    return None


def balanced(left: Tensor, right: Tensor) -> Tensor:
    """sqrt(left / right), float64, geometric mean 1; 1 where one of them is zero."""
    left, right = left.double(), right.double()
    alive = (left > 0) & (right > 0)
    if not alive.any():
        return torch.ones_like(left)
    logs = (left.clamp(min=1e-30).log() - right.clamp(min=1e-30).log()) / 2
    return torch.where(alive, (logs - logs[alive].mean()).exp(), torch.ones_like(left))


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"


STEP = BalanceHeads()
