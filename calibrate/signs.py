"""Signs in a graph: in front of a layer on codes stand -s and +s, which are the codes -1 and +1 of the scale s.

Written out, `quantize(where(x - t >= 0, +s, -s))` with the scale s. Every runtime computes that to the bit: x are the
values of int8 codes, the comparison has no zero (a dead ReLU output is +1 or -1, as the threshold says), and the layer
behind is the int8 kernel it was, or counts bits where a target has such kernels. Thresholds t may differ by channel,
the scale may not: with one per channel no integer kernel could add the products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .coded import CodedLayer, coded, set_constant
from .graph import constant, is_constant, kind, layer_name, operator_name
from .tokens.builder import Builder, aten

# Zero point, lowest, highest and type of codes: signs lie around zero, wherever their source does.
INT8 = (0, -128, 127, torch.int8)
UINT8 = (128, 0, 255, torch.uint8)
# A mark in `meta` of a quantize node whose scale is not to be trained: what reads the signs counts on it.
HELD = "held_scale"


@dataclass(frozen=True)
class Signs:
    """One place with signs: `shift` is source - threshold, `above` and `below` the constants +s and -s, float32.

    `threshold` is a constant float32 of the rank of `source` with one number per channel; converters that lay images
    out anew want `above` and `below` [1, ...] in that rank too.
    """

    source: Node
    threshold: Node
    shift: Node
    test: Node
    choice: Node
    above: Node
    below: Node
    quantize: Node

    @property
    def scale(self) -> float:
        """The scale s."""
        value = self.quantize.args[1]
        assert isinstance(value, float)
        return value

    @property
    def inner(self) -> tuple[Node, Node, Node]:
        """What lies between the source and the codes."""
        return self.shift, self.test, self.choice

    @property
    def layers(self) -> list[CodedLayer]:
        """The layers that read the signs."""
        found = [coded(r) for d in self.quantize.users for r in d.users]
        return [f for f in found if f is not None]

    def set_scale(self, graph: GraphModule, scale: float) -> None:
        """Make the signs -scale and +scale."""
        for node in (self.quantize, *self.quantize.users):
            node.args = (node.args[0], scale, *node.args[2:])
        for node, value in ((self.above, scale), (self.below, -scale)):
            set_constant(graph, node, torch.full_like(constant(graph, node), value))

    def set_threshold(self, graph: GraphModule, threshold: Tensor) -> None:
        """Put other thresholds, one for each channel, in the place of these."""
        set_constant(graph, self.threshold, threshold.float().view(constant(graph, self.threshold).shape))


def insert(graph: GraphModule, source: Node, layers: Sequence[CodedLayer], channels: tuple[int, ...]) -> Signs:
    """Let `layers`, which read `source`, read its signs: thresholds of shape `channels`, 0 at first, and scale 1.

    The codes have the type and the range of the source's own, as a runtime's kernels want them.
    """
    codes = INT8 if source.args[5] is torch.int8 else UINT8
    build = Builder(graph, layers[0].node, f"{layer_name(source)}.signs", chooses=False)
    found, back = write(build, source, torch.zeros(channels), codes)
    for layer in layers:
        layer.node.replace_input_with(source, back)
    return found


def write(
    build: Builder, source: Node, threshold: Tensor, codes: tuple[object, ...], scale: float = 1.0
) -> tuple[Signs, Node]:
    """Signs of `source` around `threshold` (it may have fewer axes), and the values that come back from their codes.

    `codes` are (zero point, lowest, highest, dtype).
    """
    rank = source.meta["val"].dim()
    ones = (1,) * rank
    bound = build.constant("threshold", threshold.float().view(*ones[threshold.dim() :], *threshold.shape))
    above, below = (build.constant(n, torch.full(ones, v)) for n, v in (("above", scale), ("below", -scale)))
    shift = build.call(aten.sub.Tensor, source, bound)
    test = build.call(aten.ge.Scalar, shift, 0.0)
    choice = build.call(aten.where.self, test, above, below)
    quantize = build.call(qdq.QUANTIZE, choice, scale, *codes)
    back = build.call(qdq.DEQUANTIZE, quantize, scale, *codes)
    return Signs(source, bound, shift, test, choice, above, below, quantize), back


def find(graph: GraphModule) -> list[Signs]:
    """Every place with signs, in the order in which they are computed."""
    found = (_signs(node) for node in graph.graph.nodes if node.target is qdq.QUANTIZE)
    return [f for f in found if f is not None]


def _signs(quantize: Node) -> Signs | None:
    choice = quantize.args[0]
    if quantize.args[2] not in (0, 128) or not isinstance(choice, Node) or choice.target is not aten.where.self:
        return None
    test, above, below = choice.args
    if not (isinstance(test, Node) and test.target is aten.ge.Scalar and test.args[1] == 0.0):
        return None
    shift = test.args[0]
    if not (isinstance(shift, Node) and operator_name(shift) == "sub"):
        return None
    source, threshold = shift.args[:2]
    if not (isinstance(source, Node) and is_constant(threshold) and is_constant(above) and is_constant(below)):
        return None
    assert isinstance(threshold, Node)
    assert isinstance(above, Node)
    assert isinstance(below, Node)
    return Signs(source, threshold, shift, test, choice, above, below, quantize)


def channel_axis(layer: CodedLayer) -> int:
    """The axis of a layer's input that its weight's second axis belongs to, counted from the end."""
    dims = int(layer.codes.meta["val"].dim())
    return -1 if kind(layer.node) == "linear" else -(dims - 1)


def channels_of(source: Node, layer: CodedLayer) -> tuple[int, ...]:
    """The shape of thresholds that differ by channel: [C, 1, 1] for images, [C] for rows."""
    axis = channel_axis(layer)
    return (int(source.meta["val"].shape[axis]), *[1] * (-axis - 1))


def wrong(graph: GraphModule) -> str | None:
    """What is wrong with the signs of the graph, or None: constants that are not the scale, numbers that are none."""
    for signs in find(graph):
        pair = [constant(graph, n).item() for n in (signs.above, signs.below)]
        step = float(torch.tensor(signs.scale, dtype=torch.float32))
        if pair != [step, -step]:
            return f"{signs.quantize.name} is to hold signs of scale {step}, and is given {pair}"
        if not bool(torch.isfinite(constant(graph, signs.threshold)).all()):
            return f"a threshold of {signs.quantize.name} is not finite"
    return None
