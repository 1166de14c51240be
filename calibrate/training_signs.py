"""Signs of activations as something to train: their thresholds and their scale (arXiv 2205.13016, 2003.03488)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import constant
from .plan import Plan
from .ranges import representable
from .signs import Signs


class LearnedSigns:
    """x -> a * sign((x - b) / a): `log` moves a by factors, `move` b in units of the a it starts from.

    `surrogate` gives a sign with a gradient. Scale and threshold are float32, as the runtime stores them.

    Behind a ReLU much of a channel is exactly zero, all of it where it is dead. A threshold that crosses zero turns all
    that at once, and a step of any size can undo the whole model. So it stays half a code from zero, on the side where
    it began: the same function at first, as no value lies between two codes.
    """

    def __init__(self, graph: GraphModule, signs: Signs, surrogate: Callable[[Tensor], Tensor]) -> None:
        self.graph, self.signs, self.surrogate = graph, signs, surrogate
        self.start, self.scale = constant(graph, signs.threshold), signs.scale
        self.log = torch.zeros((), requires_grad=True)
        self.move = torch.zeros_like(self.start).requires_grad_()
        self.source: Node = signs.source
        self.inner: tuple[Node, ...] = signs.inner
        self.quantize: Node = signs.quantize
        self.margin = _margin(signs.source)

    def threshold(self) -> Tensor:
        """b with what it learned."""
        moved = self.start + self.move * self.scale
        if self.margin is None:
            return moved
        kept = torch.where(self.start > 0, moved.clamp(min=self.margin), moved.clamp(max=-self.margin))
        return moved + (kept - moved).detach()  # with its gradient, so that it may come back

    def value(self, x: Tensor) -> Tensor:
        """-a or +a for each element of `x`."""
        a = self.scale * torch.exp(self.log)
        return a * self.surrogate((x - self.threshold()) / a.detach())

    def store(self, plan: Plan) -> None:
        """Write what was learned into the graph."""
        self.signs.set_scale(self.graph, representable(self.scale * math.exp(float(self.log)), plan))
        self.signs.set_threshold(self.graph, self.threshold())

    def restore(self) -> None:
        """Put back everything as it was."""
        self.signs.set_scale(self.graph, self.scale)
        self.signs.set_threshold(self.graph, self.start)


def _margin(source: Node) -> float | None:
    """Half a code of what signs are taken of, where its codes hold nothing below zero; else None."""
    if source.target is not qdq.DEQUANTIZE:
        return None
    scale, zero, low = source.args[1:4]
    return scale / 2 if isinstance(scale, float) and zero == low else None
