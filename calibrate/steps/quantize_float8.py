"""8-bit floats: weights per output channel, activations per tensor with fixed scales, for GPUs with FP8 units."""

import torch
from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import (
    add_constant,
    constant,
    constant_made,
    is_constant,
    is_weighted,
    kept_float,
    kind,
    layer_name,
    weight_nodes,
)
from calibrate.placement import Sites
from calibrate.plan import Entry, Plan
from calibrate.ranges import fill_histograms, representable
from calibrate.steps import Context
from calibrate.steps.quantize_static import unquantizable
from calibrate.weights import halve_layers, weight_scales


class QuantizeFloat8:
    """Inputs and weights of conv and linear layers, scale = absmax / largest float (arXiv 2309.14592, section 3).

    E4M3 unless the format of the plan or of the layer says E5M2. No range is searched: floats have fine steps near zero
    whatever the largest value is, so clipping gains nothing (section 3.1 there).
    """

    exact = False

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        plan = context.plan
        ledger = halve_layers(graph, plan, "quantize_float8")
        made = constant_made(graph.graph.nodes)
        layers = [n for n in graph.graph.nodes if is_weighted(n)]
        reasons = {n: kept_float(n, plan.keep_float) or _fixed_input(n, made) for n in layers}
        _look(graph, [n.args[0] for n in layers if reasons[n] is None], context)
        stored: dict[tuple[Node, str], Node] = {}
        for node in layers:
            source = node.args[0]
            assert isinstance(source, Node)
            reason = reasons[node] or unquantizable(context.histograms[source.name])
            action = "left float"
            if reason is None:
                form = _kind_of(node, plan)
                if (source, form) not in stored:
                    stored[source, form] = _activation(graph, source, form, context)
                scale = _layer(graph, node, stored[source, form], form)
                action, reason = form, f"{kind(node)}, input scale {scale:.6g}"
            ledger.append(Entry("quantize_float8", layer_name(node), action, reason))
        return ledger or [Entry("quantize_float8", "model", "left alone", "it has no layer with weights")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.target is qdq.QUANTIZE_FLOAT8 and any(u.target is not qdq.DEQUANTIZE_FLOAT8 for u in node.users):
                return f"{node.name} is read by something other than a dequantize"
        return None


def _kind_of(node: Node, plan: Plan) -> str:
    wanted = plan.format_of(layer_name(node)).kind
    return wanted if wanted in qdq.FLOAT8 else "float8_e4m3"


def _fixed_input(node: Node, made: set[Node]) -> str | None:
    source = node.args[0]
    return "its input is a constant" if is_constant(source) or source in made else None


def _look(graph: GraphModule, sources: list[object], context: Context) -> None:
    """Find the largest values of these tensors, where not known yet."""
    wanted = [n.name for n in dict.fromkeys(sources) if isinstance(n, Node) and n.name not in context.histograms]
    if wanted:
        sites = Sites(group_of={name: group for group, name in enumerate(wanted)})
        seen = fill_histograms(
            graph, sites, context.batches(), lambda n: context.progress("ranges", n, context.samples)
        )
        context.histograms.update(seen)


def _activation(graph: GraphModule, source: Node, form: str, context: Context) -> Node:
    """Quantize and dequantize after `source`; returns the dequantize node, which nothing reads yet."""
    found = context.histograms[source.name]
    reach = max(abs(found.low), abs(found.high)) / torch.finfo(qdq.FLOAT8[form]).max
    place = [n for n in graph.graph.nodes if n.op == "placeholder"][-1] if source.op == "placeholder" else source
    scale = torch.tensor(representable(reach, context.plan), dtype=torch.float32)
    number = add_constant(graph, f"{layer_name(source)}_float8_scale", scale, place.next)
    with graph.graph.inserting_after(number):
        codes = graph.graph.call_function(qdq.QUANTIZE_FLOAT8, (source, number, form))
    with graph.graph.inserting_after(codes):
        restored = graph.graph.call_function(qdq.DEQUANTIZE_FLOAT8, (codes, number))
    codes.meta["layer"] = restored.meta["layer"] = f"{layer_name(source)}.codes"
    if "val" in source.meta:
        restored.meta["val"] = source.meta["val"]
    return restored


def _layer(graph: GraphModule, node: Node, activation: Node, form: str) -> float:
    """Let the layer read the restored activation and weights of 8-bit floats; returns the activation's scale."""
    weight_node, _ = weight_nodes(node)
    assert weight_node is not None
    weight = constant(graph, weight_node)
    scales = weight_scales(weight, int(torch.finfo(qdq.FLOAT8[form]).max), per_channel=True)
    stem = f"{layer_name(node)}_weight"
    codes = add_constant(graph, f"{stem}_codes", qdq.quantize_float8(weight, scales, form), node)
    steps = add_constant(graph, f"{stem}_scales", scales, node)
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(qdq.DEQUANTIZE_FLOAT8, (codes, steps))
    made.meta["layer"] = f"{layer_name(node)}.weight"
    made.meta["val"] = weight
    node.args = (activation, made, *node.args[2:])
    scale = activation.args[1]
    assert isinstance(scale, Node)
    return float(constant(graph, scale))


STEP = QuantizeFloat8()
