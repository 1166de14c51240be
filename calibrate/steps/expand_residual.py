"""Expand weights by what their codes miss: a second coded layer of the residual, added to the first one's output."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibrate import qdq
from calibrate.coded import CodedLayer, coded, coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import add_constant, constant, kind, layer_name, weight_nodes
from calibrate.lockstep import partners
from calibrate.placement import tail
from calibrate.plan import Entry, Plan, QParams
from calibrate.ranges import qparams
from calibrate.steps import Context
from calibrate.weights import store_codes, weight_codes, weight_scales

aten = torch.ops.aten
NAME = "expand_residual"
TYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


class ExpandResidual:
    """y = x Q(W) + x Q(W - Q(W)): REx (Yvinec et al. 2022, arXiv 2203.14645, sections 3.1 and 3.2).

    The residual has a scale of its own, so each order divides the largest weight error by 2^(bits - 1) - 1 or more. No
    data is needed, but for a static layer whose kernel writes codes: the ranges of the products. `layers` are names, or
    "worst": the share `worst` of layers whose weights have the largest relative error. Of each, only the `share` of
    output neurons with the largest residual is expanded (the paper's group sparsity); the other rows hold zeros: on
    every runtime it is one more layer of the same kind, which costs as much as the first one. `orders` adds more.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {"layers": "worst", "worst": 0.25, "share": 0.5, "orders": 1}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wanted = {**self.defaults, **context.parameters}
        _check(wanted)
        found = _candidates(graph, context)
        if not found:
            return [Entry(NAME, "model", "left alone", "no layer has codes for weights beside its float weights")]
        ledger = []
        expanded: list[tuple[CodedLayer, list[Node]]] = []
        chosen = _chosen(graph, found, wanted)
        for layer, weight in found:
            reason = _refusal(layer, context.plan)
            if layer.name not in chosen:
                continue
            if reason is not None:
                ledger.append(Entry(NAME, layer.name, "left alone", reason))
                continue
            before = _error(weight, layer.weight(graph))
            extra, after, rows = _expand(graph, layer, weight, wanted, context.plan)
            expanded.append((layer, extra))
            told = f"weight error {before:.3g} of their power, now {after:.3g}; {rows} of {len(weight)} neurons"
            ledger.append(Entry(NAME, layer.name, f"expanded by {len(extra)} coded residual(s)", told))
        _add_up(graph, expanded, context)
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return qdq.stray_codes(graph)


def _check(wanted: dict[str, Any]) -> None:
    layers = wanted["layers"]
    if layers != "worst" and not isinstance(layers, list | tuple):
        raise CalibrationError(f'{NAME} needs layers = "worst" or a list of layer names, not {layers!r}')
    for name in ("worst", "share"):
        if not 0 < float(wanted[name]) <= 1:
            raise CalibrationError(f"{NAME} needs {name} above 0 and at most 1, not {wanted[name]}")
    if not 1 <= int(wanted["orders"]) <= 4:
        raise CalibrationError(f"{NAME} adds 1 to 4 orders, not {wanted['orders']}")


def _candidates(graph: GraphModule, context: Context) -> list[tuple[CodedLayer, Tensor]]:
    """Layers with coded weights, each with the weight it had in float."""
    assert context.float_graph is not None  # a refining step has it
    matched = partners(context.float_graph, graph)
    found = []
    for layer in coded_layers(graph):
        source = weight_nodes(matched[layer.node])[0] if layer.node in matched else None
        weight = constant(context.float_graph, source) if source is not None else None
        if weight is not None and weight.shape == constant(graph, layer.codes).shape:
            found.append((layer, weight))
    return found


def _chosen(graph: GraphModule, found: list[tuple[CodedLayer, Tensor]], wanted: dict[str, Any]) -> set[str]:
    names = [layer.name for layer, _ in found]
    if wanted["layers"] != "worst":
        unknown = [n for n in wanted["layers"] if n not in names]
        if unknown:
            raise CalibrationError(f"{NAME}: no layer '{unknown[0]}' has coded weights; there are {', '.join(names)}")
        return set(wanted["layers"])
    errors = {layer.name: _error(weight, layer.weight(graph)) for layer, weight in found}
    count = math.ceil(float(wanted["worst"]) * len(errors))
    return set(sorted(errors, key=lambda name: -errors[name])[:count])


def _error(weight: Tensor, stored: Tensor) -> float:
    """Squared error relative to the weight's own square."""
    power = float(weight.double().square().sum()) or 1.0
    return float((weight.double() - stored.double()).square().sum()) / power


def _writes_codes(node: Node, plan: Plan) -> bool:
    """Whether the layer's kernel writes codes, past a relu that it fuses."""
    last = tail(node)
    return (
        kind(node) in plan.quantize_outputs and bool(last.users) and all(u.target is qdq.QUANTIZE for u in last.users)
    )


def _refusal(layer: CodedLayer, plan: Plan) -> str | None:
    if layer.high < 1:
        return "codes of one bit have no residual of the same form"
    if _writes_codes(layer.node, plan) and not ("add" in plan.quantize_inputs and plan.residual_add == "both"):
        return "its kernel writes codes, and the runtime has no int8 add to bring the two products together"
    return None


def _expand(
    graph: GraphModule, layer: CodedLayer, weight: Tensor, wanted: dict[str, Any], plan: Plan
) -> tuple[list[Node], float, int]:
    """Add the residual's layers after `layer`; (them, the weight error that is left, how many rows they serve)."""
    rest = weight.double() - layer.weight(graph).double()
    norms = rest.flatten(1).norm(dim=1)
    rows = math.ceil(float(wanted["share"]) * len(norms))
    mask = torch.zeros_like(norms)
    mask[norms.topk(rows).indices] = 1
    served = rest * mask.view(-1, *[1] * (rest.dim() - 1))
    made: list[Node] = []
    last, total = layer.node, layer.weight(graph).double()
    for order in range(int(wanted["orders"])):
        scales = _scales(graph, layer, served, plan)
        codes = weight_codes(served, scales, layer.low, layer.high)
        last = _layer(graph, layer, last, f"{layer.name}.residual{order + 1 if order else ''}", codes, scales)
        made.append(last)
        fresh = coded(last)
        assert fresh is not None
        stored = fresh.weight(graph).double()
        served, total = served - stored, total + stored
    return made, _error(weight, total), rows


def _scales(graph: GraphModule, layer: CodedLayer, rest: Tensor, plan: Plan) -> Tensor:
    """The largest residual is the largest code: float32 in the shape of the layer's own scales."""
    own = constant(graph, layer.scales)
    rows = rest.reshape(own.numel(), -1) if own.dim() == 2 else rest
    return weight_scales(rows, layer.high, True, half_scales=plan.half_scales).view(own.shape)


def _layer(graph: GraphModule, layer: CodedLayer, after: Node, name: str, codes: Tensor, scales: Tensor) -> Node:
    """The same layer with other codes and no bias, placed after `after`."""
    node = layer.node
    with graph.graph.inserting_after(after):
        extra = graph.graph.call_function(node.target, node.args, dict(node.kwargs))
    extra.meta = {"layer": name, "val": node.meta.get("val")}
    if layer.dynamic:
        parts = [add_constant(graph, f"{name}_{k}", v, extra) for k, v in (("codes", codes), ("scales", scales))]
        extra.args = (node.args[0], *parts, None, *node.args[4:])
    else:
        stored = store_codes(graph, extra, codes, scales, layer.low, layer.high)
        extra.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
        extra.args = (node.args[0], stored, None, *node.args[3:])
    return extra


def _add_up(graph: GraphModule, expanded: list[tuple[CodedLayer, list[Node]]], context: Context) -> None:
    """Add the products; where the kernel writes codes, through codes of their own, so that the add runs on them too."""
    through = [n for layer, extra in expanded if _writes_codes(layer.node, context.plan) for n in (layer.node, *extra)]
    ranges = _ranges(graph, through, context)
    for layer, extra in expanded:
        readers = list(layer.node.users)
        parts = [_coded(graph, n, ranges[n]) if n in ranges else n for n in (layer.node, *extra)]
        total, place = parts[0], max(parts, key=list(graph.graph.nodes).index)
        for part in parts[1:]:
            with graph.graph.inserting_after(place):
                total = graph.graph.call_function(aten.add.Tensor, (total, part))
            total.meta = {"layer": f"{layer.name}.sum", "val": layer.node.meta.get("val")}
            place = total
            if part is not parts[-1] and layer.node in ranges:
                both = [ranges[layer.node], ranges[extra[0]]]
                total = place = _coded(graph, total, _sum(both, context.plan))
        for reader in readers:
            reader.replace_input_with(layer.node, total)


def _ranges(graph: GraphModule, nodes: list[Node], context: Context) -> dict[Node, QParams]:
    """Scale and zero point of these tensors, from the least and largest value on a few batches."""
    seen: dict[Node, tuple[float, float]] = {}
    wanted = set(nodes)

    class _Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                low, high = seen.get(n, (0.0, 0.0))
                seen[n] = (min(low, float(value.min())), max(high, float(value.max())))
            return value

    if nodes:
        graph.graph.lint()
        with torch.no_grad():
            for inputs in context.few_batches():
                _Watch(graph, garbage_collect_values=False).run(*inputs)
        if not seen:
            raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return {n: qparams(low, high, context.plan, "minmax") for n, (low, high) in seen.items()}


def _sum(parts: list[QParams], plan: Plan) -> QParams:
    """The range that a sum of two tensors may have."""
    low = sum((q.qmin - q.zero_point) * q.scale for q in parts)
    return qparams(low, sum((q.qmax - q.zero_point) * q.scale for q in parts), plan, "sum")


def _coded(graph: GraphModule, node: Node, q: QParams) -> Node:
    """A Q/DQ pair after `node`; returns the dequantized tensor, which nobody reads yet."""
    args = (q.scale, q.zero_point, q.qmin, q.qmax, TYPES[q.dtype])
    with graph.graph.inserting_after(node):
        codes = graph.graph.call_function(qdq.QUANTIZE, (node, *args))
    with graph.graph.inserting_after(codes):
        values = graph.graph.call_function(qdq.DEQUANTIZE, (codes, *args))
    codes.meta["layer"] = values.meta["layer"] = f"{layer_name(node)}.codes"
    values.meta["val"] = node.meta.get("val")
    return values


STEP = ExpandResidual()
