"""Activations of one bit: layers on int8 codes read signs instead, -s or +s around a threshold per channel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import binarize_activations as methods
from calibrate import qdq, signs
from calibrate.binarize_activations import Fitted
from calibrate.coded import CodedLayer, coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import constant, finish
from calibrate.layer_problem import own_bias
from calibrate.lockstep import Run, refresh
from calibrate.plan import Entry, Plan
from calibrate.ranges import representable
from calibrate.registry import refuse_unknown
from calibrate.signs import Signs
from calibrate.steps import Context, first

NAME = "binarize_activations"
# As for weights: a sum of fewer signs than this has hardly more values than one sign.
SHORTEST_ROW = 16
WARNING = "few networks bear signs without training: put finetune behind it"


class BinarizeActivations:
    """Signs in front of convolutions and linear layers with static int8 inputs, fitted layer after layer.

    `method` is one of `calibrate/binarize_activations/`, `options` what it is told. Each place is fitted to what it
    reads when the layers before it read signs already. Layers that read the same tensor read the same signs; others
    (a residual add) still read its int8 codes. What signs leave out on average goes into the layers' biases: exactly
    inside a picture, where a convolution pads with zeros too much.

    What keeps int8 inputs: the first and the last layer (`ends` = false gives them signs too), layers named in `wide`,
    rows of fewer than 16 weights (depthwise kernels), and layers with a bias that is computed.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {
        "method": "elastic",
        "options": {},
        "samples": 256,
        "ends": True,
        "wide": (),
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = context.parameters
        layers = list(coded_layers(graph))
        _check(wish, [layer.name for layer in layers])
        ledger = []
        groups: dict[tuple[Node, int], list[CodedLayer]] = {}
        ends = {layers[0].name, layers[-1].name} if layers and wish["ends"] else set()
        for layer in layers:
            reason = _refusal(graph, layer, wish, ends)
            if reason is None:
                source = layer.node.args[0]
                assert isinstance(source, Node)
                groups.setdefault((_codes(source), signs.channel_axis(layer)), []).append(layer)
            else:
                ledger.append(Entry(NAME, layer.name, "inputs left as they are", reason))
        places = [_insert(graph, members) for members in groups.values()]
        if not places:
            return [*ledger, Entry(NAME, "model", "left alone", "no layer of it has static int8 inputs to binarize")]
        finish(graph)
        return ledger + _fit(graph, places, context)

    def ensures(self, graph: GraphModule) -> str | None:
        return signs.wrong(graph) or qdq.stray_codes(graph)


def _check(wish: Mapping[str, Any], names: list[str]) -> None:
    known = methods.find(wish["method"]).defaults
    refuse_unknown(f"{NAME}: the method {wish['method']}", known, wish["options"])
    absent = [name for name in wish["wide"] if name not in names]
    if absent:
        raise CalibrationError(f"{NAME}: no layer '{absent[0]}' has coded weights; there are {', '.join(names)}")
    if int(wish["samples"]) < 1:
        raise CalibrationError(f"{NAME} needs samples to fit thresholds to: set samples to 1 or more")


def _refusal(graph: GraphModule, layer: CodedLayer, wish: Mapping[str, Any], ends: set[str]) -> str | None:
    """Why the layer's input stays as it is, or None."""
    source = layer.node.args[0]
    if layer.dynamic or not isinstance(source, Node) or source.target is not qdq.DEQUANTIZE:
        return "its input is no static int8: use a recipe with quantize_static"
    if source.args[5] is not torch.int8 and source.args[5] is not torch.uint8:
        return "its input has more than 8 bits"
    if layer.name in ends:
        return "the first and the last layer are small, and errors there cost most"
    if layer.name in wish["wide"]:
        return "the recipe names it in `wide`"
    row = constant(graph, layer.codes)[0].numel()
    if row < SHORTEST_ROW:
        return f"sums of {row} signs say too little"
    return None if own_bias(layer) else "its bias is computed, and could not take what signs leave out"


def _codes(dequantize: Node) -> Node:
    found = dequantize.args[0]
    assert isinstance(found, Node)
    return found


def _insert(graph: GraphModule, layers: list[CodedLayer]) -> Signs:
    """Signs for all these layers, of the first one's input: the others read the same codes."""
    source = layers[0].node.args[0]
    assert isinstance(source, Node)
    for layer in layers[1:]:
        other = layer.node.args[0]
        assert isinstance(other, Node)
        layer.node.replace_input_with(other, source)
    return signs.insert(graph, source, layers, signs.channels_of(source, layers[0]))


def _fit(graph: GraphModule, places: list[Signs], context: Context) -> list[Entry]:
    """Run the samples through the graph; where they reach a place, fit it, and go on with its signs."""
    wish = context.parameters
    method = methods.find(wish["method"])
    options = {**method.defaults, **wish["options"]}
    waiting = {p.shift: p for p in places}
    readers = {layer.node for p in places for layer in p.layers}
    ledger: list[Entry] = []
    with torch.no_grad():
        runs = [Run(graph, batch) for batch in first(context, int(wish["samples"]))]
        for node in list(graph.graph.nodes):
            place = waiting.get(node)
            if place is not None:
                samples = [run.env[place.source] for run in runs]
                fitted = method.fit(samples, signs.channels_of(place.source, place.layers[0]), options)
                again = _store(graph, place, fitted, context.plan)
                for run in runs:
                    for changed in again:
                        run.step(changed)
                ledger.append(_entry(place, fitted, samples, str(wish["method"])))
                context.progress(NAME, len(ledger), len(places))
            if node.op == "output":
                break
            for run in runs:
                if node in readers:  # their biases are new
                    refresh(run, node)
                run.step(node)
                run.forget(node)
    return ledger


def _store(graph: GraphModule, place: Signs, fitted: Fitted, plan: Plan) -> list[Node]:
    """Write what was fitted into the graph; the constants that changed and are computed already."""
    place.set_threshold(graph, fitted.threshold)
    place.set_scale(graph, representable(fitted.scale, plan))
    for layer in place.layers:
        weight = layer.weight(graph).double()
        columns = weight.reshape(*weight.shape[:2], -1).sum(2)  # [out, in / groups]
        share = fitted.offset.view(layer.groups, 1, -1)
        moved = (columns.view(layer.groups, -1, columns.shape[1]) * share).sum(2).flatten()
        old = constant(graph, layer.bias).double() if layer.bias is not None else torch.zeros(len(moved)).double()
        layer.set_bias(graph, old + moved, plan.int32_bias)
    return [place.threshold, place.above, place.below]


def _entry(place: Signs, fitted: Fitted, samples: list[Tensor], method: str) -> Entry:
    """What signs lose of their input, in the ledger."""
    error = power = 0.0
    shape = fitted.threshold.shape
    offset = fitted.offset.float().view(shape)
    for x in samples:
        made = offset + torch.where(x - fitted.threshold >= 0, fitted.scale, -fitted.scale)
        error += float((x - made).square().sum(dtype=torch.float64))
        power += float(x.square().sum(dtype=torch.float64))
    names = ", ".join(layer.name for layer in place.layers)
    lost = f"{error / (power or 1.0):.1%} of the power of its input lost; {WARNING}"
    return Entry(NAME, names, f"inputs are signs by {method}", lost)


STEP = BinarizeActivations()
