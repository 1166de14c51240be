"""Static int8: activations (8 or 16 bits) and weights become codes, with ranges fixed from calibration data."""

from collections import defaultdict
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import add_constant, constant, is_weighted, kind, layer_name, weight_nodes
from calibrate.histogram import Histogram
from calibrate.placement import Sites, place
from calibrate.plan import Entry, Plan, QParams
from calibrate.race import race
from calibrate.ranges import candidates, fill_histograms
from calibrate.steps import Context
from calibrate.weights import fitted_scales, halve_layers, store_codes, weight_codes

# A tensor whose largest value is above this, and above this many times what a quarter of its values stay below, holds a
# sentinel (a mask's -1e9), not data.
SENTINEL = 1e6
# Lesser sentinels (a mask's -1e4) are told by their looks: below this, so many times beyond all data, in a few bins of
# the histogram only (-1e4 added once or twice to small numbers), and this share of all values or more.
MASKED, GAP, FEW_BINS, OFTEN = -1e3, 64, 6, 0.01


class QuantizeStatic:
    """Weights per output channel, symmetric; activations per tensor, each with the range that won its race.

    Affine quantization as in Jacob et al. 2017, arXiv 1712.05877, section 2.
    """

    exact = False

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        plan = context.plan
        ledger = halve_layers(graph, plan, "quantize_static")
        halved = {e.layer for e in ledger}
        sites = place(graph, plan)
        refused = _look(graph, sites, context)
        if refused:  # a tensor no scale can serve: its readers stay float, and the placement is made again without them
            plan = replace(plan, keep_float={**plan.keep_float, **refused})
            sites = place(graph, plan)
            _look(graph, sites, context)
        _choose(graph, sites, context)
        chosen = {g: context.chosen[names] for g, names in _members(sites).items()}
        nodes = {n.name: n for n in graph.graph.nodes}
        for name, group in sites.group_of.items():
            _insert(graph, nodes, name, sites, chosen[group])
        left = {layer: reason for layer, reason in sites.left.items() if layer not in halved}
        ledger += [Entry("quantize_static", layer, "left float", reason) for layer, reason in left.items()]
        for name, layer in sites.layers.items():
            node = nodes[name]
            if is_weighted(node):
                _weights(graph, node, plan)
            ledger.append(Entry("quantize_static", layer, _action(node, plan), _how(node, sites, chosen)))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return qdq.stray_codes(graph)


def _members(sites: Sites) -> dict[int, frozenset[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for name, group in sites.group_of.items():
        groups[group].add(name)
    return {g: frozenset(names) for g, names in groups.items()}


def _look(graph: GraphModule, sites: Sites, context: Context) -> dict[str, str]:
    """Fill the histograms not known yet; return layer -> reason for readers of tensors that no scale can serve."""
    missing = {n for n in sites.group_of if n not in context.histograms}
    if missing:
        wanted = Sites(group_of={n: sites.group_of[n] for n in missing})
        found = fill_histograms(
            graph, wanted, context.batches(), lambda n: context.progress("ranges", n, context.samples)
        )
        context.histograms.update(found)
    refused: dict[str, str] = {}
    for node in graph.graph.nodes:
        reason = unquantizable(context.histograms[node.name]) if node.name in sites.group_of else None
        if reason is not None:
            touched = [node, *(u for u in node.users if u.name in sites.layers), *_writers(node, sites)]
            refused.update({layer_name(t): reason for t in touched})
    return refused


def _writers(node: Node, sites: Sites) -> list[Node]:
    """The layer whose kernel would write this tensor, when a fused activation stands between."""
    source = node.args[0] if node.args else None
    return [source] if isinstance(source, Node) and source.name in sites.layers else []


def _choose(graph: GraphModule, sites: Sites, context: Context) -> None:
    """Fill `context.chosen` for every group of this placement that has no range yet."""
    members = _members(sites)
    open_groups = {g: names for g, names in members.items() if names not in context.chosen}
    proposals: dict[int, list[QParams]] = {}
    for group, names in open_groups.items():
        merged = Histogram()
        for name in sorted(names):
            merged.merge(context.histograms[name])
        proposals[group] = candidates(merged, context.plan)
        if group in sites.fixed:
            proposals[group] = [_fixed(sites.fixed[group], context.plan)]
    if proposals:
        part = Sites(
            group_of={n: g for n, g in sites.group_of.items() if g in proposals},
            readers=sites.readers,
            layers=sites.layers,
        )
        won = race(
            graph, part, proposals, context.histograms, context.few_batches(), lambda n: context.progress("race", n)
        )
        context.chosen.update({open_groups[g]: q for g, q in won.items()})


def _fixed(params: tuple[float, int], plan: Plan) -> QParams:
    scale, zero = params
    if plan.activation == "int16":  # softmax and sigmoid fill [0, 1], tanh [-1, 1]: 1 is code 32768
        return QParams(2.0**-15, 0, -32768, 32767, "int16", "fixed")
    if plan.activation == "uint8":
        return QParams(scale, zero + 128, 0, 255, "uint8", "fixed")
    return QParams(scale, zero, -128, 127, "int8", "fixed")


def unquantizable(histogram: Histogram) -> str | None:
    """Why no scale can serve this tensor, or None: it is not finite, or holds sentinels far beyond its data."""
    if not histogram.finite:
        return "a tensor there holds infinities or values beyond 1e30 (a mask?)"
    reach = max(abs(histogram.low), abs(histogram.high))
    typical = histogram.magnitude(0.25)
    if reach > SENTINEL * max(typical, 1.0):
        return f"a tensor there reaches {reach:.2g} where a quarter of its values are below {typical:.2g} (a mask?)"
    if _masked(histogram):
        return f"a tensor there often holds {histogram.low:.2g} and nothing between that and its data (a mask?)"
    return None


def _masked(histogram: Histogram) -> bool:
    """Whether the tensor has the looks of additive masking with a number such as -1e4."""
    low = histogram.low
    if low > MASKED or histogram.high > -low / GAP:
        return False
    counts = histogram.counts[histogram.centers < low / GAP]
    return int((counts > 0).sum()) <= FEW_BINS and float(counts.sum()) >= OFTEN * float(histogram.counts.sum())


def _insert(graph: GraphModule, nodes: dict[str, Node], name: str, sites: Sites, q: QParams) -> None:
    """Put Q/DQ after the tensor `name` for the readers that want codes."""
    node, readers = nodes[name], sites.readers[name]
    users = [u for u in node.users if readers is None or u.name in readers]
    args = (q.scale, q.zero_point, q.qmin, q.qmax, getattr(torch, q.dtype))
    with graph.graph.inserting_after(_last_placeholder(graph) if node.op == "placeholder" else node):
        quantized = graph.graph.call_function(qdq.QUANTIZE, (node, *args))
    with graph.graph.inserting_after(quantized):
        restored = graph.graph.call_function(qdq.DEQUANTIZE, (quantized, *args))
    quantized.meta["layer"] = restored.meta["layer"] = f"{layer_name(node)}.codes"
    if "val" in node.meta:
        restored.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, restored)


def _last_placeholder(graph: GraphModule) -> Node:
    return [n for n in graph.graph.nodes if n.op == "placeholder"][-1]


def _weights(graph: GraphModule, node: Node, plan: Plan) -> None:
    """Turn the layer's weight into codes, and its bias into a multiple of the int32 step where the kernel wants it."""
    weight_node, bias_node = weight_nodes(node)
    assert weight_node is not None
    weight = constant(graph, weight_node)
    bias = constant(graph, bias_node) if bias_node is not None else None
    source = node.args[0]
    step = source.args[1] if isinstance(source, Node) and source.target is qdq.DEQUANTIZE else None
    input_scale = float(step) if isinstance(step, float) else None
    whole = plan.int32_bias and bias is not None and input_scale is not None
    form = replace(plan.format_of(layer_name(node)), group=None)  # integer kernels have one scale per output channel
    scales = fitted_scales(weight, plan, form, bias if whole else None, input_scale if whole else None)
    low, high = plan.code_range(form.bits)
    made = store_codes(graph, node, weight_codes(weight, scales, low, high), scales, low, high)
    node.args = (node.args[0], made, *node.args[2:])
    if whole and bias is not None and input_scale is not None:
        # The kernel's step is the float32 product of the two scales.
        unit = (torch.tensor(input_scale, dtype=torch.float32) * scales).double()
        rounded = (torch.round(bias.double() / unit) * unit).float()
        fresh = add_constant(graph, f"{layer_name(node)}_rounded_bias", rounded, node)
        node.args = (node.args[0], node.args[1], fresh, *node.args[3:])


def _action(node: Node, plan: Plan) -> str:
    """What became of a layer: "int8", or the weight's format and the activations' where they are not both int8."""
    weight = plan.format_of(layer_name(node)).label if _has_codes(node) else "int8"
    activation = plan.activation.removeprefix("u")
    return weight if activation == "int8" else f"{weight} weights, {activation} activations"


def _has_codes(node: Node) -> bool:
    """Whether the layer has a weight of codes."""
    return any(a.target is qdq.DEQUANTIZE_CHANNEL for a in node.all_input_nodes)


def _how(node: Node, sites: Sites, chosen: dict[int, QParams]) -> str:
    source = node.args[0]
    if isinstance(source, Node) and source.target is qdq.DEQUANTIZE:
        original = source.args[0].args[0]
        q = chosen[sites.group_of[original.name]]
        return f"{kind(node)}, input range by {q.observer}, scale {q.scale:.6g}, zero_point {q.zero_point}"
    return kind(node)


STEP = QuantizeStatic()
