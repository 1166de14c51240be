"""Attention probabilities of one bit: s where they are at least a share of their row's largest, else 0.

Softmax-aware binarization (BiViT, arXiv 2211.07091): 1[A >= share * max A], with one scale s for the whole
tensor. Written out, `quantize(where(A - share * amax(A) >= 0, s, 0))` with the scale s: the codes 1 and 0 of an int8
kernel, to the bit where runtimes agree on A. The share is above 0, so that a masked key, whose A is 0, is never kept.
"""

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from . import qdq
from .coded import set_constant
from .graph import constant, is_constant, kind, operator_name
from .tokens.builder import Builder, aten

LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Kept:
    """One such place: `source` [..., N, M]; `share`, `above` and `below` are constants of one number, float32."""

    source: Node
    share: Node
    top: Node
    least: Node
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
    def inner(self) -> tuple[Node, ...]:
        """What lies between the source and the codes."""
        return self.top, self.least, self.shift, self.test, self.choice

    def set_scale(self, graph: GraphModule, scale: float) -> None:
        """Make the kept ones `scale`."""
        for node in (self.quantize, *self.quantize.users):
            node.args = (node.args[0], scale, *node.args[2:])
        set_constant(graph, self.above, torch.full_like(constant(graph, self.above), scale))

    def set_share(self, graph: GraphModule, share: float) -> None:
        """Keep what is at least this share of its row's largest."""
        set_constant(graph, self.share, torch.full_like(constant(graph, self.share), max(share, LEAST_SHARE)))


def insert(build: Builder, source: Node, dtype: torch.dtype, share: float, scale: float) -> Node:
    """Bits of `source` as values that came back from codes of `dtype` (int8 or uint8): {0, scale}."""
    rank = source.meta["val"].dim()
    names = {"share": max(share, LEAST_SHARE), "kept": scale, "left": 0.0}
    of, above, below = (build.constant(n, torch.full((1,) * rank, v)) for n, v in names.items())
    least = build.call(aten.mul.Tensor, build.call(aten.amax.default, source, [-1], True), of)
    test = build.call(aten.ge.Scalar, build.call(aten.sub.Tensor, source, least), 0.0)
    choice = build.call(aten.where.self, test, above, below)
    codes = (0, -128, 127, torch.int8) if dtype is torch.int8 else (0, 0, 255, torch.uint8)
    return build.call(qdq.DEQUANTIZE, build.call(qdq.QUANTIZE, choice, scale, *codes), scale, *codes)


def find(graph: GraphModule) -> list[Kept]:
    """Every place with such bits, in the order in which they are computed."""
    found = (_kept(node) for node in graph.graph.nodes if node.target is qdq.QUANTIZE)
    return [f for f in found if f is not None]


def _kept(quantize: Node) -> Kept | None:
    choice = quantize.args[0]
    if quantize.args[2] != 0 or not isinstance(choice, Node) or choice.target is not aten.where.self:
        return None
    test, above, below = choice.args
    if not (isinstance(test, Node) and test.target is aten.ge.Scalar and test.args[1] == 0.0):
        return None
    shift = test.args[0]
    if not (isinstance(shift, Node) and operator_name(shift) == "sub"):
        return None
    source, least = shift.args[:2]
    if not (isinstance(source, Node) and isinstance(least, Node) and kind(least) == "mul"):
        return None
    top, share = least.args[:2]
    if not (isinstance(top, Node) and kind(top) == "amax" and top.args[0] is source and is_constant(share)):
        return None
    assert isinstance(share, Node)
    assert isinstance(above, Node)
    assert isinstance(below, Node)
    return Kept(source, share, top, least, shift, test, choice, above, below, quantize)


def wrong(graph: GraphModule) -> str | None:
    """What is wrong with such bits in the graph, or None: values that are not codes 1 and 0, a share out of (0, 1]."""
    for kept in find(graph):
        pair = [constant(graph, n).item() for n in (kept.above, kept.below)]
        step = float(torch.tensor(kept.scale, dtype=torch.float32))
        if pair != [step, 0.0]:
            return f"{kept.quantize.name} is to hold 0 and {step}, and is given {pair}"
        share = float(constant(graph, kept.share))
        if not 0 < share <= 1:
            return f"{kept.quantize.name} keeps what is {share} of its row's largest, which is not in (0, 1]"
    return None
