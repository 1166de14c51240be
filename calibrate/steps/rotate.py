"""Rotate the residual stream of pre-LN transformers so that outlier channels spread over all; LayerNorms stay."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import Layer, argument, constant_operand, layer_of, per_channel, scale_inputs, scale_outputs
from calibrate.channel_groups import tensor_of
from calibrate.graph import add_constant, clone, constant, finish, kind, layer_name
from calibrate.layer_trial import Activations, activations, output_error, watch, weight_of
from calibrate.plan import Entry
from calibrate.residual import NotCoveredError, Stream, channel_axes, cover, widths
from calibrate.rotation import rotation
from calibrate.steps import Context


class Rotate:
    """What is written to the residual stream is multiplied by an orthogonal R, what reads it by Rᵀ.

    LayerNorms first lose their affine to the linears after them; then LN(x R) = LN(x) R where R keeps the vector of
    ones, and no operator changes (QuaRot, arXiv 2404.00456, with a rotation that LayerNorm survives in place of the
    RMSNorm it needs). The whole stream must be known: one operator that is not makes the step leave it alone. It is
    also left where the layers that read it, quantized as planned, would not gain the share `least_gain`.
    """

    exact = True
    defaults = {"least_gain": 0.02}  # noqa: RUF012

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        how = activations(context.plan)
        if how is None:
            return [Entry("rotate", "model", "left alone", "the plan quantizes no linear layer")]
        starts = widths(graph)
        if not starts:
            return [Entry("rotate", "model", "left alone", "there is no LayerNorm, so no residual stream to rotate")]
        ledger = [
            Entry("rotate", layer_name(linear), "layer scale folded", f"by {layer_name(mul)}")
            for mul, linear in _fold_layer_scales(graph)
        ]
        finish(graph)
        gain = float({**self.defaults, **context.parameters}["least_gain"])
        return ledger + [_stream(graph, context, how, width, gain) for width in starts]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.op == "get_attr" and "rotated" in str(node.target) and not constant(graph, node).isfinite().all():
                return f"the constant {node.target} is not finite"
        return None


def _stream(graph: GraphModule, context: Context, how: Activations, width: int, least_gain: float) -> Entry:
    """Rotate the stream of this width if it is covered and its readers gain."""
    name = f"residual stream of {width} channels"
    first = next(iter(context.few_batches()))
    trial = clone(graph)
    try:
        stream = cover(graph, widths(graph)[width], channel_axes(graph, first, width))
        twin = cover(trial, widths(trial)[width], channel_axes(trial, first, width))
    except NotCoveredError as why:
        return Entry("rotate", name, "left alone", str(why))
    turn = rotation(width, context.seed)
    rotate_stream(trial, twin, turn)
    before, after = _error(graph, context, how, stream), _error(trial, context, how, twin)
    if not after < before * (1 - least_gain):
        reason = f"the layers that read it would not gain: noise over signal {before:.3g} before, {after:.3g} after"
        return Entry("rotate", name, "left alone", reason)
    rotate_stream(graph, stream, turn)
    ends = f"{len(stream.writers) + len(stream.constants) + len(stream.tables)} writers, {len(stream.readers)} readers"
    return Entry("rotate", name, "rotated", f"{ends}; noise over signal there {before:.3g} before, {after:.3g} after")


def _error(graph: GraphModule, context: Context, how: Activations, stream: Stream) -> float:
    """The mean noise over signal of all layers that read the stream."""
    seen = watch(graph, {tensor_of(n) for n in stream.readers}, context.few_batches())
    errors = [output_error(context.plan, how, seen[tensor_of(n)], [n], [weight_of(graph, n)]) for n in stream.readers]
    return sum(errors) / max(len(errors), 1)


def rotate_stream(graph: GraphModule, stream: Stream, turn: Tensor) -> None:
    """Give every writer, constant, table and reader of `stream` its rotated weights; `turn` float64 [C, C]."""
    for reader, norm in stream.readers.items():
        if norm is not None:
            weight, bias = (_affine(graph, norm, i, n) for i, n in ((2, "weight"), (3, "bias")))
            scale_inputs(graph, _layer(graph, reader), torch.ones_like(turn[0]) if weight is None else weight, bias)
    for norm in stream.norms:
        _bare(graph, norm, stream.width)
    for node in stream.writers:
        layer = _layer(graph, node)
        weight = constant(graph, layer.weight).double()
        bias = constant(graph, layer.bias).double() @ turn if layer.bias is not None else None
        _give(graph, node, torch.tensordot(turn.T, weight, 1), bias)
    for node in stream.readers:
        layer = _layer(graph, node)
        bias = constant(graph, layer.bias).double() if layer.bias is not None else None
        _give(graph, node, constant(graph, layer.weight).double() @ turn, bias)
    for node in stream.constants:
        fresh = _rotated(graph, node, turn, node)
        node.replace_all_uses_with(fresh)
    for node in stream.tables:
        table = node.args[0]
        assert isinstance(table, Node)
        node.args = (_rotated(graph, table, turn, node), *node.args[1:])


def _layer(graph: GraphModule, node: Node) -> Layer:
    layer = layer_of(graph, node)
    assert layer is not None
    return layer


def _affine(graph: GraphModule, norm: Node, position: int, name: str) -> Tensor | None:
    value = argument(norm, position, name, None)
    return constant(graph, value).double() if isinstance(value, Node) else None


def _bare(graph: GraphModule, norm: Node, width: int) -> None:
    """Leave the LayerNorm weight 1 and bias 0."""
    ones = add_constant(graph, f"{layer_name(norm)}_rotated_ones", torch.ones(width), norm)
    zeros = add_constant(graph, f"{layer_name(norm)}_rotated_zeros", torch.zeros(width), norm)
    norm.kwargs = {k: v for k, v in norm.kwargs.items() if k not in ("weight", "bias")}
    norm.args = (*norm.args[:2], ones, zeros, *norm.args[4:])


def _give(graph: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    name, dtype = layer_name(node), constant(graph, _layer(graph, node).weight).dtype
    parts = [add_constant(graph, f"{name}_rotated_weight", weight.to(dtype), node), None]
    if bias is not None:
        parts[1] = add_constant(graph, f"{name}_rotated_bias", bias.to(dtype), node)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    node.args = (node.args[0], *parts, *node.args[3:])


def _rotated(graph: GraphModule, node: Node, turn: Tensor, before: Node) -> Node:
    value = constant(graph, node)
    return add_constant(graph, f"{node.target}_rotated", (value.double() @ turn).to(value.dtype), before)


def _fold_layer_scales(graph: GraphModule) -> list[tuple[Node, Node]]:
    """Fold every multiplication by a constant per channel into the linear that alone it reads: (mul, linear)."""
    folded = []
    for node in list(graph.graph.nodes):
        for index in (0, 1) if kind(node) == "mul" and len(node.args) > 1 else ():
            layer, factor = layer_of(graph, node.args[index]), constant_operand(graph, node.args[1 - index])
            if layer is None or factor is None or kind(layer.node) != "linear" or len(layer.node.users) != 1:
                continue
            line = per_channel(factor, -1, layer.outputs, max(factor.dim(), 2))
            if line is not None:
                scale_outputs(graph, layer, line)
                node.replace_all_uses_with(layer.node)
                graph.graph.erase_node(node)
                folded.append((node, layer.node))
                break
    return folded


STEP = Rotate()
