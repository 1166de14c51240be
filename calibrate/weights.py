"""Weights as codes: symmetric, one scale per output channel."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import add_constant, constant, layer_name, weight_nodes
from .plan import Plan
from .ranges import SMALLEST_FLOAT


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
    largest = float(reach.max()) or 1.0
    reach = torch.where(reach > 0, reach, torch.full_like(reach, largest))
    scales = (reach / weight_max).clamp(min=SMALLEST_FLOAT)
    if bias is not None and input_scale is not None:
        scales = torch.maximum(scales, bias.detach().abs().double() / (input_scale * 2**30))
    if half_scales:  # rounded up: rounding down would clip the largest weight
        halves = scales.half()
        up = torch.nextafter(halves, torch.full_like(halves, torch.inf))
        return torch.where(halves.double() < scales, up, halves).float()
    return scales.float()


def weight_codes(weight: Tensor, scales: Tensor, weight_max: int) -> Tensor:
    """int8 codes of `weight` [out, ...] under `scales` [out]: round half to even, clip to ±weight_max."""
    shape = (-1, *[1] * (weight.dim() - 1))
    codes = torch.round(weight.detach().double() / scales.double().view(shape))
    return codes.clamp(-weight_max, weight_max).to(torch.int8)


def store_codes(graph: GraphModule, node: Node, codes: Tensor, scales: Tensor, weight_max: int) -> Node:
    """Add codes, scales and zero points as constants before `node`; return the dequantized weight's node."""
    stem = f"{layer_name(node)}_weight"
    parts = (
        add_constant(graph, f"{stem}_codes", codes, node),
        add_constant(graph, f"{stem}_scales", scales, node),
        add_constant(graph, f"{stem}_zeros", torch.zeros(len(scales), dtype=torch.int64), node),
    )
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(qdq.DEQUANTIZE_CHANNEL, (*parts, 0, -weight_max, weight_max, torch.int8))
    made.meta["layer"] = f"{layer_name(node)}.weight"
    return made


def quantize_weight(graph: GraphModule, node: Node, plan: Plan) -> None:
    """Replace the constant weight of a conv, linear or embedding by codes and a dequantize node."""
    index = 0 if "embedding" in str(node.target) else 1
    source = node.args[0] if index == 0 else weight_nodes(node)[0]
    assert isinstance(source, Node)
    weight = constant(graph, source)
    scales = weight_scales(weight, plan.weight_max, plan.per_channel, half_scales=plan.half_scales)
    codes = weight_codes(weight, scales, plan.weight_max)
    made = store_codes(graph, node, codes, scales, plan.weight_max)
    node.args = (*node.args[:index], made, *node.args[index + 1 :])
