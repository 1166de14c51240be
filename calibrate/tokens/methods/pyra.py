"""Merge as ToMe does, and re-activate what is merged by what was trained for it (PYRA, arXiv 2403.09192).

The pairs are those of ToMe, in the order of their likeness. Before a source token of a pair is merged it is
modulated: with g = LN(source + target) [pairs, C], weights W_a [C] and W_b [pairs],
source ← source + source · 2σ(g W_a) · (2σ(gᵀ W_b) - 1), a factor for each pair times one for each channel. W_b begins
at zero, so that without training this is ToMe to the last bit.

The paper trains these weights along with adapters in all layers, on labels; here they are all that is trained, to
answer as the model with all tokens does (`recover`). The norm has no gain of its own: W_a takes one in.
On a small ViT with about a hundred samples to learn from that brought nothing, and was rolled back.
"""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..attention import Site
from ..builder import Builder, aten
from ..merging import Merged, alternating, grouped, joined, likeliest, merged, removed, similarity, sized
from ..selection import Reduction
from ..trained import trained_constant
from . import Request


class Pyra:
    attention = False
    halves = True
    trains = True
    defaults: ClassVar[dict[str, Any]] = {"proportional": True}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        gone = removed(site, request)
        size = sized(build, site, request)
        likeness, places = likeliest(build, similarity(build, site), *alternating(site.tokens, request.protected))
        goes, becomes = joined(build, likeness, places, gone)
        made = merged(build, grouped(build, goes, becomes, gone), size)
        if not gone:
            return made
        return Modulated(made, site.residual, _modulated(build, site.residual, places, becomes, gone))


def _modulated(build: Builder, tokens: Node, places: Node, becomes: Node, gone: int) -> Node:
    """The tokens [B, N, C] with those modulated that go; `places` [B, N] and `becomes` [B, N, N] say where to."""
    width = int(tokens.meta["val"].shape[-1])
    order = build.constant("pairs_in_order", torch.arange(gone, dtype=torch.float32).view(1, gone, 1))
    hit = build.call(aten.eq.Tensor, build.call(aten.unsqueeze.default, places, 1), order)
    rows = build.call(aten.to.dtype, hit, torch.float32)  # [B, pairs, N]
    source = build.call(aten.matmul.default, rows, tokens)
    target = build.call(aten.matmul.default, build.call(aten.matmul.default, rows, becomes), tokens)
    both = build.call(aten.layer_norm.default, build.call(aten.add.Tensor, source, target), [width])
    per_pair = trained_constant(build, "pyra_a", torch.zeros(width, 1))
    per_channel = trained_constant(build, "pyra_b", torch.zeros(1, gone))
    strength = build.call(aten.sigmoid.default, build.call(aten.matmul.default, both, per_pair))
    direction = build.call(aten.sigmoid.default, build.call(aten.matmul.default, per_channel, both))
    direction = build.call(aten.sub.Tensor, build.call(aten.mul.Tensor, direction, 2.0), 1.0)
    factor = build.call(aten.mul.Tensor, build.call(aten.mul.Tensor, strength, 2.0), direction)
    change = build.call(aten.mul.Tensor, source, factor)
    turned = build.call(aten.transpose.int, rows, 1, 2)
    return build.call(aten.add.Tensor, tokens, build.call(aten.matmul.default, turned, change))


class Modulated(Merged):
    """Merged tokens, of which `modulated` [B, N, C] take the place of `tokens`; all else is merged as it is."""

    def __init__(self, made: Merged, tokens: Node, modulated: Node) -> None:
        super().__init__(made.weights, made.size, made.count)
        self.tokens, self.modulated = tokens, modulated

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        return super().take(build, self.modulated if operand is self.tokens else operand, dim, batch)


METHOD = Pyra()
