"""Move the spread of activation channels into the weights that read them (SmoothQuant), alpha chosen layer by layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.channel_groups import Group, find_groups, scale_group, tensor_of
from calibrate.channels import trace
from calibrate.errors import CalibrationError
from calibrate.graph import constant, layer_name
from calibrate.layer_trial import Activations, Seen, activations, output_error, watch, weight_of
from calibrate.plan import Entry
from calibrate.smoothing import refined, scales
from calibrate.steps import Context

EXPLICIT = ("never", "norm", "all")


class Smooth:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); X / s is folded into what made X, s into the rows of W.

    (SmoothQuant, arXiv 2211.10438, equation 4; alpha from a grid by the error in the layers' own output, as DiTAS does,
    arXiv 2409.07756; with `refine`, gradient descent goes on from the best of the grid, see `calibrate.smoothing`.)
    LayerNorms fold it into weight and bias, attention's values into the value projection. Where the tensor has other
    readers, as in post-LN encoders, one multiplication by the constant 1/s is put before the layers, as far as
    `explicit` allows: "never", "norm" (after LayerNorms), "all" (after GELU and attention too). What gains less than
    the share `least_gain` of the error is left alone.
    """

    exact = True
    defaults = {  # noqa: RUF012
        "explicit": "norm",
        "alphas": (0.25, 0.35, 0.45, 0.5, 0.55, 0.65, 0.75, 0.85, 0.9),
        "refine": True,
        "least_gain": 0.02,
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        settings = {**self.defaults, **context.parameters}
        if settings["explicit"] not in EXPLICIT:
            raise CalibrationError(f"smooth: explicit is {settings['explicit']!r}; it may be {', '.join(EXPLICIT)}")
        how = activations(context.plan)
        if how is None:
            return [Entry("smooth", "model", "left alone", "the plan quantizes no linear layer")]
        first = next(iter(context.few_batches()))
        groups = find_groups(graph, trace(graph, first), settings["explicit"])
        if not groups:
            reason = "no linear layer reads a LayerNorm or attention's values in a way that can be scaled"
            return [Entry("smooth", "model", "left alone", reason)]
        seen = watch(graph, {tensor_of(n) for g in groups for n in g.layers}, context.few_batches())
        ledger = []
        for count, group in enumerate(groups):
            ledger.append(_smooth(graph, context, how, group, seen, settings))
            context.progress("smooth", count + 1, len(groups))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.op == "get_attr" and "smooth" in str(node.target) and not constant(graph, node).isfinite().all():
                return f"the constant {node.target} is not finite"
        return None


def _smooth(
    graph: GraphModule, context: Context, how: Activations, group: Group, seen: Mapping[Node, Seen], settings: Mapping
) -> Entry:
    weights = [weight_of(graph, n) for n in group.layers]
    reach = torch.zeros(group.width)
    load = torch.zeros(group.width)
    for node, weight, columns in zip(group.layers, weights, group.columns, strict=True):
        reach.scatter_reduce_(0, columns, seen[tensor_of(node)].reach, "amax")
        load.scatter_reduce_(0, columns, weight.abs().amax(0).float(), "amax")

    def error(scale: Tensor | None) -> float:
        total = 0.0
        for node, weight, columns in zip(group.layers, weights, group.columns, strict=True):
            rows = seen[tensor_of(node)]
            if scale is not None:
                rows, weight = rows.mapped(1 / scale[columns]), weight * scale[columns]
            total += output_error(context.plan, how, rows, [node], [weight])
        return total / len(weights)

    before = error(None)
    tried = [(error(s), f"alpha {a:g}", s) for a in settings["alphas"] for s in [scales(reach, load, float(a))]]
    after, found, scale = min(tried, key=lambda t: t[0])
    if settings["refine"]:
        layers = zip(group.layers, weights, group.columns, strict=True)
        bits = [context.plan.format_of(layer_name(n)).bits for n in group.layers]
        read = [(seen[tensor_of(n)], w, c, b) for (n, w, c), b in zip(layers, bits, strict=True)]
        better = refined(scale, read, context.plan, how)
        if error(better) < after:
            after, found, scale = error(better), f"{found} refined", better
    name, readers_ = layer_name(group.source), ", ".join(layer_name(n) for n in group.layers)
    if not after < before * (1 - settings["least_gain"]):
        reason = f"no alpha lowers the output error of {readers_} by more than {settings['least_gain']:.0%}"
        return Entry("smooth", name, "left alone", reason)
    scale_group(graph, group, scale.double())
    action = f"smoothed, {found}, {'folded' if group.folds else 'by a multiplication'}"
    gained = f"output error of {readers_} {_db(before)} dB before, {_db(after)} dB after"
    return Entry("smooth", name, action, gained + (f"; {group.why}" if group.why else ""))


def _db(error: float) -> str:
    return f"{10 * math.log10(max(error, 1e-12)):.1f}"


STEP = Smooth()
