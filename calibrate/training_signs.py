"""Signs of activations as something to train: their thresholds and their scale (arXiv 2205.13016, 2003.03488); bits of
attention probabilities likewise: the share that is kept, and its scale (arXiv 2211.07091)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import constant
from .kept import LEAST_SHARE, Kept
from .plan import Plan
from .ranges import representable
from .signs import HELD, Signs


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
        self.log = torch.zeros((), requires_grad=HELD not in signs.quantize.meta)
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


class LearnedKept:
    """A -> a where A >= c * max A, else 0: `log` moves a by factors, `move` the share c likewise.

    `surrogate` gives a sign with a gradient; here it stands for twice the bit less 1, in units of the threshold, so
    that probabilities from 0 to twice the threshold pass a gradient on to the softmax, and the threshold to its row's
    largest.
    """

    def __init__(self, graph: GraphModule, kept: Kept, surrogate: Callable[[Tensor], Tensor]) -> None:
        self.graph, self.kept, self.surrogate = graph, kept, surrogate
        self.start, self.scale = float(constant(graph, kept.share)), kept.scale
        self.log = torch.zeros((), requires_grad=True)
        self.move = torch.zeros((), requires_grad=True)
        self.source: Node = kept.source
        self.inner: tuple[Node, ...] = kept.inner
        self.quantize: Node = kept.quantize

    def share(self) -> Tensor:
        """c with what it learned, in (0, 1]; float32."""
        return torch.clamp(self.start * torch.exp(self.move), LEAST_SHARE, 1.0)

    def value(self, x: Tensor) -> Tensor:
        """0 or a for each element of `x`."""
        least = self.share() * x.amax(-1, keepdim=True)
        bits = (1 + self.surrogate((x - least) / least.detach())) / 2
        return self.scale * torch.exp(self.log) * bits

    def store(self, plan: Plan) -> None:
        """Write what was learned into the graph."""
        self.kept.set_scale(self.graph, representable(self.scale * math.exp(float(self.log)), plan))
        self.kept.set_share(self.graph, float(self.share()))

    def restore(self) -> None:
        """Put back everything as it was."""
        self.kept.set_scale(self.graph, self.scale)
        self.kept.set_share(self.graph, self.start)
