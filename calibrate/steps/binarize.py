"""Weights of one to two bits: layers that have codes of 8 bits get two to four levels per output channel instead."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import binarize as binarizers
from calibrate import qdq
from calibrate.binarize import Binarized
from calibrate.binarized_codes import Stored, stored
from calibrate.coded import CodedLayer, coded_layers
from calibrate.decoded import decoded
from calibrate.errors import CalibrationError
from calibrate.graph import chooses_tokens, constant, is_weighted, kept_float, kind, layer_name, weight_nodes
from calibrate.hessian import gram, ridge
from calibrate.layer_problem import LayerProblem, own_bias, problem, refusal
from calibrate.lockstep import Visit, walk
from calibrate.plan import Entry, Plan
from calibrate.registry import refuse_unknown
from calibrate.rounding import COMPUTED, codes_out_of_range
from calibrate.steps import Context, first
from calibrate.weights import quantize_weight

NAME = "binarize"
# A row of fewer weights (a depthwise kernel) has as many levels as weights, or nearly.
SHORTEST_ROW = 16
# A float layer of fewer weights saves less than its scales cost.
SMALLEST = 256
TARGETS = ("layer", "float")
SOURCES = ("float", "graph")
# The relative output error, on samples kept aside, above which the ledger warns.
POOR = 0.1
# Positions per layer: four times what rounding looks at, as scales and levels are fitted to them.
ROWS = 32768


class Binarize:
    """Levels chosen layer after layer, in lockstep with the float graph, from what each layer really reads.

    `method` is one of `calibrate/binarize/`, `options` what it is told. `target` "float": the weight is first moved so
    that it makes up for errors in its inputs (ERQ, ICML 2024), "layer": it is not. Then columns in turn, each one's
    error made up for by the others (arXiv 2210.17323), scales and levels in turns under the inputs' second moments, and
    the bias takes the mean that is left.

    `source` "float": all that is the float model's weights and outputs. "graph": those the graph has when the step
    begins, for weights that were trained behind signs of activations already and are no longer the float model's.

    What stays at 8 bits: the first and the last layer (`ends` = false binarizes them too), layers named in `wide`,
    rows of fewer than 16 weights, and, with `gate`, layers whose output error on samples kept aside is above that share
    of the output's power. `largest`: the largest code that may stand for a level, 0 for what the plan allows; 7 where
    a runtime has no tables. Embedding tables are the quantizing step's.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {
        "method": "sign",
        "options": {},
        "target": "float",
        "source": "float",
        "damping": 0.01,
        "ridge": 0.1,
        "samples": 512,
        "ends": True,
        "wide": (),
        "gate": 0.0,
        "largest": 0,
        "rounds": 6,
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = {**self.defaults, **context.parameters}
        ledger = _code_the_rest(graph, context.plan)
        names = [layer.name for layer in coded_layers(graph)]
        _check(wish, names)
        if not names:
            return [Entry(NAME, "model", "left alone", "no layer of it has coded weights")]
        assert context.float_graph is not None
        weighted = [layer_name(n) for n in context.float_graph.graph.nodes if is_weighted(n)]
        reference = context.float_graph if wish["source"] == "float" else decoded(graph)
        work = _Work(graph, reference, context, wish, names, {weighted[0], weighted[-1]}, ledger)
        walk(reference, graph, first(context, int(wish["samples"])), work.visit)
        graph.recompile()
        return work.ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return codes_out_of_range(graph)


def _code_the_rest(graph: GraphModule, plan: Plan) -> list[Entry]:
    """Give layers that the quantizing step left float codes of 8 bits; what they compute with stays float.

    Where a runtime has no fast kernel on codes, codes still save room, and few levels more of it.
    """
    ledger = []
    for node in list(graph.graph.nodes):
        name = layer_name(node)
        floats = is_weighted(node) and kind(node) in ("conv", "linear") and node.target not in qdq.DYNAMIC
        if not floats or chooses_tokens(node):
            continue
        if kept_float(node, plan.keep_float) is not None or node.meta["val"].dtype != torch.float32:
            continue
        if _float_weight(graph, node).numel() >= SMALLEST and name not in plan.formats:
            label = quantize_weight(graph, node, plan).label
            ledger.append(Entry(NAME, name, f"{label} weights", "the quantizing step left it float"))
    return ledger


def _float_weight(graph: GraphModule, node: Node) -> Tensor:
    source, _ = weight_nodes(node)
    assert source is not None
    return constant(graph, source)


def _check(wish: Mapping[str, Any], names: list[str]) -> None:
    found = binarizers.find(wish["method"])
    if wish["target"] not in TARGETS:
        raise CalibrationError(f"{NAME} has no target {wish['target']!r}: use {' or '.join(TARGETS)}")
    if wish["source"] not in SOURCES:
        raise CalibrationError(f"{NAME} has no source {wish['source']!r}: use {' or '.join(SOURCES)}")
    refuse_unknown(f"the binarizer {wish['method']}", found.defaults, wish["options"])
    if not 0 <= float(wish["gate"]) <= 1:
        raise CalibrationError(f"{NAME} takes a gate from 0 (none) to 1, not {wish['gate']}")
    absent = [name for name in wish["wide"] if name not in names]
    if absent:
        raise CalibrationError(f"{NAME}: no layer '{absent[0]}' has coded weights; there are {', '.join(names)}")


@dataclass
class _Work:
    """One pass over the layers; collects the ledger."""

    graph: GraphModule
    reference: GraphModule
    context: Context
    wish: Mapping[str, Any]
    names: list[str]
    ends: set[str]
    ledger: list[Entry]
    done: int = 0

    def visit(self, found: Visit) -> None:
        """Binarize one layer, or say why it keeps its 8 bits."""
        layer = found.layer
        reason = self._wide(layer)
        if reason is None:
            reason = refusal(self.graph, self.reference, found)
        if reason is None and not own_bias(layer):
            reason = COMPUTED
        if reason is None:
            seed = self.context.seed + self.done
            entry = self._binarize(problem(self.graph, self.reference, found, seed, ROWS))
        else:
            entry = Entry(NAME, layer.name, f"left at {layer.bits} bits", reason)
        self.ledger.append(entry)
        self.done += 1
        self.context.progress(NAME, self.done, len(self.names))

    def _method(self, layer: CodedLayer) -> str:
        """The binarizer for a layer."""
        return (self.context.plan.levels or {}).get(layer.name) or str(self.wish["method"])

    def _wide(self, layer: CodedLayer) -> str | None:
        """Why the layer keeps the bits it has, before anything is computed."""
        mixed = self.context.plan.levels
        if mixed is not None and layer.name not in mixed:
            return "the mixed plan gives it these"
        if self.wish["ends"] and layer.name in self.ends:
            return "the first and the last layer are small, and errors there cost most"
        if layer.name in self.wish["wide"]:
            return "the recipe names it in `wide`"
        codes = constant(self.graph, layer.codes)
        if codes[0].numel() < SHORTEST_ROW:
            return f"rows of {codes[0].numel()} weights save less than their scales cost"
        if constant(self.graph, layer.scales).dim() == 2:
            return "its scales belong to groups of inputs, not to output channels"
        return None

    def _binarize(self, made: LayerProblem) -> Entry:
        wish, layer = self.wish, made.layer
        x, y, weight = made.x[:, made.fitted], made.y, made.weight
        if wish["target"] == "float":
            rest = y[:, made.fitted] - x @ weight.float().transpose(1, 2)
            weight = weight + ridge(x, rest, float(wish["ridge"]))[0]
        else:
            y = made.x @ weight.float().transpose(1, 2)
            y = y if made.offset is None else y + made.offset[:, None].float()
        h = gram(x - x.mean(1, keepdim=True))
        method = self._method(layer)
        found = binarizers.binarize(
            method, weight, h, wish["options"], int(wish["rounds"]), damping=float(wish["damping"])
        )
        if found.grid.columns is not None:
            raise CalibrationError(
                f"the binarizer {method} gives columns scales of their own, which no file stores: put the step "
                f"even_columns before the quantizing step instead, and use {_without(method)}"
            )
        form = stored(weight, h, found, self._largest(), self.context.plan.half_scales)
        bias = (y[:, made.fitted] - x @ form.values.float().transpose(1, 2)).double().mean(1)
        power = float((y[:, made.held] - y[:, made.held].mean(1, keepdim=True)).double().square().mean()) or 1.0
        error = made.error(form.values, y, bias) / power
        if wish["gate"] and error > float(wish["gate"]):
            reason = f"{error:.1%} of its output's power would be lost, above the gate of {float(wish['gate']):.0%}"
            return Entry(NAME, layer.name, f"left at {layer.bits} bits", reason)
        return self._store(made, found, form, bias, error)

    def _largest(self) -> int:
        """The largest code that may stand for a level."""
        return int(self.wish["largest"]) or self.context.plan.weight_max

    def _store(self, made: LayerProblem, found: Binarized, form: Stored, bias: Tensor, error: float) -> Entry:
        graph, plan, layer = self.graph, self.context.plan, made.layer
        old = constant(graph, layer.bias).double() if layer.bias is not None else torch.zeros(made.shape[0]).double()
        total = old + bias.flatten()
        if not _holds(layer, plan, form.scales, total):
            return Entry(NAME, layer.name, f"left at {layer.bits} bits", "its bias is beyond int32 at these scales")
        fresh = layer.set_range(form.low, form.high)
        fresh.set_codes(graph, made.restored(form.codes))
        fresh.set_scales(graph, form.scales)
        fresh.set_bias(graph, total, plan.int32_bias)
        told = f"{error:.1%} of its output's power lost on samples kept aside"
        poor = ": more than most networks bear, so train it (reconstruct, finetune)" if error > POOR else ""
        return Entry(NAME, layer.name, f"{form.count} levels by {self._method(layer)}", told + poor)


def _holds(layer: CodedLayer, plan: Plan, scales: Tensor, bias: Tensor) -> bool:
    """Whether the kernel's int32 bias can hold `bias` at these scales."""
    step = layer.input_scale()
    return not plan.int32_bias or step is None or bool((bias.abs() <= scales.double() * step * 2**30).all())


def _without(method: str) -> str:
    return "the method sign" if method == "onebit" else "columns = false"


STEP = Binarize()
