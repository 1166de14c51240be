"""Palettes: weights as indices of 1 to 8 bits into a table of values fitted by k-means, float arithmetic."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibrate import qdq
from calibrate.errors import CalibrationError
from calibrate.graph import add_constant, constant, constant_made, is_table, is_weighted, kept_float, kind, layer_name
from calibrate.palettes import nearest, palette
from calibrate.plan import Entry, Plan
from calibrate.steps import Context
from calibrate.weights import BEYOND_HALF, fits_half, halve_layers, weight_index

BITS = (1, 2, 3, 4, 6, 8)
# A weight below this many values saves less than the table and the operator that reads it cost.
SMALLEST = 256


class Palettize:
    """Convolutions, linear layers and embedding tables, one table per tensor (deep compression, arXiv 1510.00149).

    Parameter `importance`: "none" fits the table to the weights; "inputs" weighs each by the mean square of the input
    it meets, which is the diagonal of the layer's Hessian (as in SqueezeLLM, arXiv 2306.07629).
    """

    exact = False
    defaults: ClassVar = {"importance": "inputs"}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = context.parameters["importance"]
        if wish not in ("none", "inputs"):
            raise CalibrationError(f'palettize: importance is "none" or "inputs", not {wish!r}')
        ledger = halve_layers(graph, context.plan, "palettize")
        fixed = constant_made(graph.graph.nodes)
        layers = [n for n in graph.graph.nodes if is_weighted(n) or is_table(n, fixed)]
        reasons = {n: _why_not(graph, n, context.plan) for n in layers}
        met = _squares(graph, [n for n in layers if not reasons[n]], context) if wish == "inputs" else {}
        for count, node in enumerate(layers):
            reason, action = reasons[node], "left float"
            if reason is None:
                action, reason = _store(graph, node, context.plan, met.get(node.name)), kind(node)
                context.progress("palettes", count + 1, len(layers))
            ledger.append(Entry("palettize", layer_name(node), action, reason))
        return ledger or [Entry("palettize", "model", "left alone", "it has no layer with weights")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.target is qdq.LOOKUP:
                indices, table = (constant(graph, a) for a in node.args)
                if int(indices.max()) >= len(table) or len(table) not in {2**bits for bits in BITS}:
                    return f"{node.name} has indices up to {int(indices.max())} and a table of {len(table)}"
        return None


def _weight(graph: GraphModule, node: Node) -> Tensor:
    source = node.args[weight_index(node)]
    assert isinstance(source, Node)
    return constant(graph, source)


def _why_not(graph: GraphModule, node: Node, plan: Plan) -> str | None:
    """Why a layer keeps float weights; None when it gets a palette. Raises CalibrationError for bits there are not."""
    name = layer_name(node)
    kept = kept_float(node, plan.keep_float)
    if kept is not None:
        return kept
    form = plan.format_of(name)
    if name in plan.formats and form.kind != "palette":
        return f"the plan wants {form.label} there, which is no palette"
    if form.bits not in BITS:
        raise CalibrationError(f"'{name}': a palette has {', '.join(map(str, BITS))} bits, not {form.bits}")
    weight = _weight(graph, node)
    if weight.numel() < SMALLEST:
        return f"only {weight.numel()} weights"
    if weight.numel() * (16 - form.bits) / 8 <= 2 * 2**form.bits:
        return f"only {weight.numel()} weights: a table of {2**form.bits} would save nothing"
    if plan.half_scales and not fits_half(weight):
        return BEYOND_HALF
    return None


def _store(graph: GraphModule, node: Node, plan: Plan, squares: Tensor | None) -> str:
    """Put a lookup in the place of the layer's weight; return what the ledger says."""
    weight, index = _weight(graph, node), weight_index(node)
    bits = plan.format_of(layer_name(node)).bits
    importance = None if squares is None else _spread(squares, node, weight)
    table = palette(weight, 2**bits, importance, half=plan.half_scales)
    stem = f"{layer_name(node)}_weight"
    sources = (
        add_constant(graph, f"{stem}_indices", nearest(weight, table), node),
        add_constant(graph, f"{stem}_table", table, node),
    )
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(qdq.LOOKUP, sources)
    made.meta["layer"] = f"{layer_name(node)}.weight"
    made.meta["val"] = weight
    node.args = (*node.args[:index], made, *node.args[index + 1 :])
    return f"{bits}-bit palette weights"


def _spread(squares: Tensor, node: Node, weight: Tensor) -> Tensor:
    """Mean squares per input channel [in] as the importance of each weight [out, in / groups, ...]."""
    if kind(node) == "linear":
        return squares.expand(weight.shape)
    groups = len(squares) // weight.shape[1]
    rows = squares.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return rows.view(len(weight), weight.shape[1], *[1] * (weight.dim() - 2)).expand(weight.shape)


def _squares(graph: GraphModule, layers: Iterable[Node], context: Context) -> dict[str, Tensor]:
    """Mean square of each input channel of these layers over a few batches: float64 [in] by the node's name."""
    wanted = {n: n.args[0] for n in layers if kind(n) != "embedding"}
    if not wanted:
        return {}
    watch = _Watch(graph, wanted)
    with torch.no_grad():
        for batch in context.few_batches():
            watch.run(*batch)
            context.progress("inputs of layers", watch.seen)
    return {node.name: total / max(watch.counts[node], 1) for node, total in watch.totals.items()}


class _Watch(Interpreter):
    def __init__(self, graph: GraphModule, wanted: dict[Node, Any]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._wanted = wanted
        self.totals: dict[Node, Tensor] = {}
        self.counts: dict[Node, int] = {}
        self.seen = 0

    def run_node(self, n: Node) -> Any:
        if n.op == "placeholder" and n.name == next(iter(self.module.graph.nodes)).name:
            value = super().run_node(n)
            self.seen += len(value)
            return value
        source = self._wanted.get(n)
        if source is not None:
            x = self.env[source].double()
            channels = x.movedim(1, -1) if kind(n) == "conv" and x.dim() > 2 else x
            flat = channels.reshape(-1, channels.shape[-1])
            self.totals[n] = self.totals.get(n, 0) + flat.square().sum(0)
            self.counts[n] = self.counts.get(n, 0) + len(flat)
        return super().run_node(n)


STEP = Palettize()
