"""Signs of activations as something to train: their thresholds and their scale (arXiv 2205.13016, 2003.03488)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph import constant
from .plan import Plan
from .ranges import representable
from .signs import Signs


class LearnedSigns:
    """x -> a * sign((x - b) / a): `log` moves a by factors, `move` b in units of the a it starts from.

    `surrogate` gives a sign with a gradient. Scale and threshold are float32, as the runtime stores them.
    """

    def __init__(self, graph: GraphModule, signs: Signs, surrogate: Callable[[Tensor], Tensor]) -> None:
        self.graph, self.signs, self.surrogate = graph, signs, surrogate
        self.start, self.scale = constant(graph, signs.threshold), signs.scale
        self.log = torch.zeros((), requires_grad=True)
        self.move = torch.zeros_like(self.start).requires_grad_()
        self.source: Node = signs.source
        self.inner: tuple[Node, ...] = signs.inner
        self.quantize: Node = signs.quantize

    def threshold(self) -> Tensor:
        """b with what it learned."""
        return self.start + self.move * self.scale

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
