"""Weights as codes: symmetric, one scale per output channel or per group of neighbouring inputs."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import add_constant, constant, constant_made, is_table, is_weighted, kind, layer_name, weight_nodes
from .plan import Entry, Plan, WeightFormat
from .ranges import SMALLEST_FLOAT

# Below 8 bits the largest weight no longer decides the scale: these shares of it are tried, and the least squared error
# wins (Banner et al. 2018, arXiv 1810.05723).
SHRINKS = tuple(1 - step / 40 for step in range(24))
HALF_MAX = 65504.0
BEYOND_HALF = "values beyond float16's 65504"
TO_FLOAT = torch.ops.aten.to.dtype


def weight_scales(
    weight: Tensor,
    weight_max: int,
    per_channel: bool,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    half_scales: bool = False,
) -> Tensor:
    """Scales float32 [out] for a weight [out, ...]: absmax / weight_max, per channel or all alike.

    A channel of zeros gets the largest channel's scale. Where the bias becomes int32 codes of step
    input_scale * scale, a scale too small to hold it is widened (|code| < 2^30), as int32 would overflow in silence.
    """
    reach = weight.detach().abs().flatten(1).amax(1).double()
    if not per_channel:
        reach = reach.amax().expand_as(reach).clone()
    return _stored(reach / weight_max, bias, input_scale, half_scales)


def _stored(scales: Tensor, bias: Tensor | None, input_scale: float | None, half_scales: bool) -> Tensor:
    """Scales as the runtime stores them: never zero, wide enough for the bias, float16 numbers where asked for."""
    largest = float(scales.max()) or 1.0
    scales = torch.where(scales > 0, scales, torch.full_like(scales, largest)).clamp(min=SMALLEST_FLOAT)
    if bias is not None and input_scale is not None:
        scales = torch.maximum(scales, bias.detach().abs().double() / (input_scale * 2**30))
    if half_scales:  # rounded up: rounding down would clip the largest weight
        halves = scales.half()
        up = torch.nextafter(halves, torch.full_like(halves, torch.inf))
        return torch.where(halves.double() < scales, up, halves).float()
    return scales.float()


def group_size(weight: Tensor, form: WeightFormat) -> int | None:
    """The group that this weight can be stored with: the format's, for a matrix whose rows it divides."""
    fits = form.group is not None and weight.dim() == 2 and weight.shape[1] % form.group == 0
    return form.group if fits and form.group != weight.shape[1] else None


def fitted_scales(
    weight: Tensor,
    plan: Plan,
    form: WeightFormat,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Scales float32 for a weight [out, ...]: [out], or [out, in / group] where the format has groups.

    8 bits: the largest weight is the largest code. Fewer bits: of `SHRINKS`, what leaves the least squared error,
    channel by channel (group by group); `importance`, like the weight, says how much each weight's error counts. With
    `power_of_two` the nearest power of two above.
    """
    low, high = plan.code_range(form.bits)
    group = group_size(weight, form)
    if form.bits == 8 and group is None and not form.power_of_two:
        return weight_scales(weight, plan.weight_max, plan.per_channel, bias, input_scale, plan.half_scales)
    rows = weight.detach().double().reshape(len(weight), -1)
    rows = rows.reshape(-1, group) if group else rows
    scales = best_scales(rows, low, high, importance.double().reshape(rows.shape) if importance is not None else None)
    if not plan.per_channel and group is None:
        scales = scales.amax().expand_as(scales).clone()
    if form.power_of_two:
        scales = torch.where(scales > 0, torch.exp2(torch.ceil(torch.log2(scales.clamp(min=SMALLEST_FLOAT)))), scales)
    scales = scales.view(len(weight), -1) if group else scales
    return _stored(scales, bias, input_scale, plan.half_scales)


def best_scales(rows: Tensor, low: int, high: int, importance: Tensor | None = None) -> Tensor:
    """For each row of `rows` (float64 [n, k]) the scale with the least squared rounding error: float64 [n].

    `importance` (float64 [n, k]) weighs the squares.
    """
    counts = torch.ones_like(rows) if importance is None else importance
    reach = torch.maximum(rows.amax(1).clamp(min=0) / max(high, 1), -rows.amin(1).clamp(max=0) / -low)
    if high >= 63:
        return reach
    best, least = reach.clone(), torch.full_like(reach, torch.inf)
    # A lone extreme may sit on the side with one code less: symmetric reach over the smaller side is tried first.
    wide = rows.abs().amax(1) / max(high, 1)
    for share in SHRINKS:
        for full in (wide, reach):
            scale = (full * share).clamp(min=SMALLEST_FLOAT)[:, None]
            error = (torch.round(rows / scale).clamp(low, high) * scale - rows).square().mul(counts).sum(1)
            better = error < least
            best, least = torch.where(better, scale[:, 0], best), torch.where(better, error, least)
    return torch.where(rows.abs().amax(1) > 0, best, torch.zeros_like(best))


def spread(scales: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Scales [out] or [out, groups] repeated so that they multiply a weight of `shape` element by element."""
    if scales.dim() == 2:
        return scales.repeat_interleave(shape[1] // scales.shape[1], 1)
    return scales.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def weight_codes(weight: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """int8 codes of `weight` [out, ...] under `scales` [out] or [out, groups]: half to even, clipped to [low, high]."""
    codes = torch.round(weight.detach().double() / spread(scales.double(), weight.shape))
    return codes.clamp(low, high).to(torch.int8)


def store_codes(graph: GraphModule, node: Node, codes: Tensor, scales: Tensor, low: int, high: int) -> Node:
    """Add codes and scales, [out] or [out, groups], as constants before `node`; return what dequantizes them."""
    stem = f"{layer_name(node)}_weight"
    stored = add_constant(graph, f"{stem}_codes", codes, node)
    steps = add_constant(graph, f"{stem}_scales", scales, node)
    if scales.dim() == 2:
        group = codes.shape[1] // scales.shape[1]
        target: Any = qdq.DEQUANTIZE_GROUP
        args: tuple[Any, ...] = (stored, steps, None, low, high, torch.int8, group, torch.float32)
    else:
        zeros = add_constant(graph, f"{stem}_zeros", torch.zeros(len(scales), dtype=torch.int64), node)
        target, args = qdq.DEQUANTIZE_CHANNEL, (stored, steps, zeros, 0, low, high, torch.int8)
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(target, args)
    made.meta["layer"] = f"{layer_name(node)}.weight"
    return made


def weight_index(node: Node) -> int:
    """Which argument holds the weight: an embedding's table is the first, a layer's weight the second."""
    return 0 if kind(node) == "embedding" else 1


def quantize_weight(graph: GraphModule, node: Node, plan: Plan) -> WeightFormat:
    """Replace the constant weight of a conv, linear or embedding by its stored form; return the format it got."""
    index = weight_index(node)
    source = node.args[0] if index == 0 else weight_nodes(node)[0]
    assert isinstance(source, Node)
    weight = constant(graph, source)
    form = plan.format_of(layer_name(node))
    scales = fitted_scales(weight, plan, form)
    low, high = plan.code_range(form.bits)
    made = store_codes(graph, node, weight_codes(weight, scales, low, high), scales, low, high)
    node.args = (*node.args[:index], made, *node.args[index + 1 :])
    return form


def fits_half(weight: Tensor) -> bool:
    """Whether float16 holds every value of `weight` to rounding: none lies beyond its largest, 65504."""
    return not bool((weight.abs() > HALF_MAX).any())


def store_half(graph: GraphModule, source: Node) -> Node:
    """Add the float32 constant behind the get_attr node `source` as float16, and return the cast back to float32."""
    half = add_constant(graph, f"{source.target}_half", constant(graph, source).half(), source.next)
    with graph.graph.inserting_after(half):
        cast = graph.graph.call_function(TO_FLOAT, (half, torch.float32))
    cast.meta["val"] = constant(graph, half).float()
    return cast


def halve_layers(graph: GraphModule, plan: Plan, step: str) -> list[Entry]:
    """Store the weights of the layers and tables whose own format is "float16", and say so: the first thing that a
    quantizing step does. What is halved has no constant weight any more, so the step finds nothing there to quantize;
    what float16 cannot hold is marked to stay float.
    """
    wanted = {name for name, form in plan.formats.items() if form.kind == "float16"} - set(plan.keep_float)
    if not wanted:
        return []
    fixed = constant_made(graph.graph.nodes)
    stored: dict[Node, Node] = {}
    ledger: dict[str, Entry] = {}
    for node in list(graph.graph.nodes):
        name, index = layer_name(node), weight_index(node)
        if name not in wanted or not (is_weighted(node) or is_table(node, fixed)):
            continue
        source = node.args[index]
        assert isinstance(source, Node)
        if not fits_half(constant(graph, source)):
            node.meta["keep_float"] = BEYOND_HALF
            continue
        if source not in stored:
            stored[source] = store_half(graph, source)
            stored[source].meta["layer"] = f"{name}.weight"
        node.args = (*node.args[:index], stored[source], *node.args[index + 1 :])
        ledger[name] = Entry(step, name, "float16 weights", f"{kind(node)}, computed in float")
    return list(ledger.values())
