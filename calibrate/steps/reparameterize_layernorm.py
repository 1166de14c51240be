"""Give every channel of a LayerNorm's output the same range, undone in the linears after it (RepQ-ViT)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import layer_of, scale_inputs
from calibrate.channel_groups import Group, find_groups, scale_norm, tensor_of
from calibrate.channels import Channels, plain, readers, trace
from calibrate.errors import CalibrationError
from calibrate.graph import constant, is_weighted, kind, layer_name
from calibrate.layer_trial import Seen, activations, output_error, watch, weight_of
from calibrate.plan import Entry, Plan, QParams
from calibrate.ranges import representable
from calibrate.steps import Context

# A channel's scale is not taken below this share of the mean one: it would only inflate float32 rounding.
NARROWEST = 1e-4


@dataclass(frozen=True)
class Codes:
    """Scale and zero point per channel, float64 [C], and the ones that all channels get."""

    scales: Tensor
    zeros: Tensor
    shared: QParams

    @property
    def factor(self) -> Tensor:
        """r1 = s / s~."""
        return self.scales / self.shared.scale

    @property
    def shift(self) -> Tensor:
        """s * r2, r2 = z - z~."""
        return self.scales * (self.zeros - self.shared.zero_point)


class ReparameterizeLayernorm:
    """gamma' = gamma / r1, beta' = (beta + s r2) / r1; W' = r1 W, b' = b - (s r2) W (arXiv 2212.08254, equations 8, 9).

    s, z: scale and zero point of each channel; s~ = mean s, z~ = round(mean z); r1 = s / s~, r2 = z - z~. The float
    function stays, and the codes of the whole tensor under (s~, z~) are those that each channel would have had under
    its own (s, z). Static plans are told to use (s~, z~). The range of a channel is that between the percentiles
    100 - `percentile` and `percentile`. A LayerNorm whose readers, quantized as planned, would not gain `least_gain`
    (their weights take up the spread) is left alone, and so is one that anything but linears reads.
    """

    exact = True
    defaults = {"percentile": 100.0, "least_gain": 0.02}  # noqa: RUF012

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        settings = {**self.defaults, **context.parameters}
        percentile, plan = float(settings["percentile"]), context.plan
        if not 50 < percentile <= 100:
            raise CalibrationError(f"reparameterize_layernorm: percentile is {percentile:g}; give one in (50, 100]")
        how = activations(plan)
        if how is None or how in ("float", "int16"):
            reason = "the plan keeps no 8-bit activations before linear layers"
            return [Entry("reparameterize_layernorm", "model", "left alone", reason)]
        norms = [n for n in graph.graph.nodes if plain(n)]
        if not norms:
            return [Entry("reparameterize_layernorm", "model", "left alone", "there is no LayerNorm")]
        channels = trace(graph, next(iter(context.few_batches())))
        groups = {g.source: g for g in find_groups(graph, channels, "norm")}
        groups = {n: g for n, g in groups.items() if n in norms and g.folds and _shifts(g)}
        reach = watch(graph, list(groups), context.batches(), rows=percentile < 100)
        seen = watch(graph, {tensor_of(n) for g in groups.values() for n in g.layers}, context.few_batches())
        ledger = []
        for count, norm in enumerate(norms):
            action, reason = "left alone", _why_not(channels, norm)
            if norm in groups:
                codes = channel_codes(reach[norm], plan, percentile)
                before, after = (_error(graph, plan, groups[norm], seen, c) for c in (None, codes))
                reason = f"noise over signal of its readers would go from {before:.3g} to {after:.3g}"
                if after < before * (1 - float(settings["least_gain"])):
                    _apply(graph, context, groups[norm], codes)
                    action = "reparameterized"
                    spread = float(codes.scales.max() / codes.scales.min())
                    noise = f"noise over signal of its readers {before:.3g} before, {after:.3g} after"
                    reason = f"its channels' scales differed {spread:.3g} times; {noise}"
            ledger.append(Entry("reparameterize_layernorm", layer_name(norm), action, reason))
            context.progress("reparameterize", count + 1)
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.op == "get_attr" and "_scaled_" in str(node.target) and not constant(graph, node).isfinite().all():
                return f"the constant {node.target} is not finite"
        return None


def _shifts(group: Group) -> bool:
    """Whether a shift of the source reaches the layers as it is: past movements only."""
    return {r for r, _ in readers(group.source)} == set(group.layers)


def _why_not(channels: Channels, norm: Node) -> str:
    for reader, tensor in readers(norm):
        linear = is_weighted(reader) and kind(reader) == "linear" and reader.args[0] is tensor
        if not linear or reader not in channels.columns:
            return f"{kind(reader)} {layer_name(reader)} reads it, where only linear layers can undo the change"
    return "nothing reads it that can undo the change"


def channel_codes(seen: Seen, plan: Plan, percentile: float = 100.0) -> Codes:
    """Scale and zero point of every channel from its range, zero inside it, and those that all will share."""
    low, high = seen.low.double(), seen.high.double()
    if percentile < 100:
        rows = torch.cat(seen.rows).double()
        low = torch.maximum(low, rows.quantile(1 - percentile / 100, 0))
        high = torch.minimum(high, rows.quantile(percentile / 100, 0))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if plan.symmetric:
        scales, (qmin, qmax) = torch.maximum(-low, high) / 127, (-128, 127)
    else:
        scales, (qmin, qmax) = (high - low) / 255, ((-128, 127) if plan.activation == "int8" else (0, 255))
    scales = scales.clamp(min=max(float(scales.mean()), 1e-30) * NARROWEST)
    zeros = torch.zeros_like(scales) if plan.symmetric else torch.round(qmin - low / scales).clamp(qmin, qmax)
    zero = int(torch.round(zeros.mean()))
    scale = representable(float(scales.mean()), plan)
    dtype = "int8" if plan.symmetric else plan.activation
    return Codes(scales, zeros, QParams(scale, zero, qmin, qmax, dtype, "reparameterized"))


def _error(graph: GraphModule, plan: Plan, group: Group, seen: dict, codes: Codes | None) -> float:
    total = 0.0
    how = activations(plan)
    assert how is not None
    for node, columns in zip(group.layers, group.columns, strict=True):
        rows, weight = seen[tensor_of(node)], weight_of(graph, node)
        if codes is not None:
            factor, shift = codes.factor[columns].float(), (codes.shift / codes.factor)[columns].float()
            rows, weight = rows.mapped(1 / factor, shift), weight * factor
        total += output_error(plan, how, rows, [node], [weight])
    return total / len(group.layers)


def _apply(graph: GraphModule, context: Context, group: Group, codes: Codes) -> None:
    scale_norm(graph, group.source, 1 / codes.factor, codes.shift / codes.factor)
    for node, columns in zip(group.layers, group.columns, strict=True):
        layer = layer_of(graph, node)
        assert layer is not None
        scale_inputs(graph, layer, codes.factor[columns], -codes.shift[columns])
        # What static quantization would otherwise choose for itself; a clipped percentile would cut other values.
        context.chosen[frozenset({tensor_of(node).name})] = codes.shared


STEP = ReparameterizeLayernorm()
