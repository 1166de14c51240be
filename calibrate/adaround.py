"""One layer's weights between two codes each, as AdaRound (arXiv 2004.10568) learns which to take."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from .coded import CodedLayer
from .graph import constant
from .plan import Plan
from .training import LearnedScale, latent_steps, stored_scales

# AdaRound's rectified sigmoid reaches a little beyond 0 and 1, so that both are reached at finite values.
STRETCH, SHIFT = 1.2, -0.1


class Rounding:
    """The trained form of one layer: every weight between the code below and the code above, scales, bias."""

    def __init__(self, graph: GraphModule, layer: CodedLayer, weight: Tensor | None, plan: Plan, scales: bool) -> None:
        self.layer = layer
        latent = latent_steps(graph, layer, weight)
        self.below, self.gap = _around(latent, layer.levels(graph))
        share = ((latent - self.below) / self.gap).clamp(0.001, 0.999)
        self.up = (-torch.log(STRETCH / (share - SHIFT) - 1)).requires_grad_()
        self.scale = LearnedScale(constant(graph, layer.scales), not plan.per_channel, tuple(latent.shape))
        self.learns_scale = scales and not plan.format_of(layer.name).power_of_two
        bias = layer.bias
        self.bias = constant(graph, bias).clone() if bias is not None else None
        self.move = torch.zeros_like(self.bias).requires_grad_() if self.bias is not None else None
        self.unit = 1.0

    def share(self) -> Tensor:
        """How far each weight stands from the code below to the code above, 0 to 1."""
        return torch.clamp(torch.sigmoid(self.up) * STRETCH + SHIFT, 0, 1)

    def weight(self) -> Tensor:
        """The soft weight."""
        scale = self.scale.spread() if self.learns_scale else self.scale.spread().detach()
        return torch.clamp(self.below + self.share() * self.gap, self.layer.low, self.layer.high) * scale

    def moved_bias(self) -> Tensor:
        """The bias with what was learned."""
        assert self.bias is not None
        assert self.move is not None
        return self.bias + self.move * self.unit

    def cost(self, beta: float) -> Tensor:
        """How undecided the roundings are: 0 when each is at an end, at most 1."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).mean()

    def store(self, graph: GraphModule, plan: Plan) -> float:
        """Write codes, scales and bias into the graph; the share of codes that moved."""
        with torch.no_grad():
            codes = torch.clamp(self.below + (self.share() >= 0.5) * self.gap, self.layer.low, self.layer.high)
            moved = float((codes != constant(graph, self.layer.codes)).float().mean())
            self.layer.set_codes(graph, codes)
            if self.learns_scale:
                self.layer.set_scales(graph, stored_scales(self.scale.value(), plan))
            if self.bias is not None:
                self.layer.set_bias(graph, self.moved_bias(), plan.int32_bias)
        return moved


def _around(latent: Tensor, levels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The code below each latent weight, and how far the next is: 1, or what lies between two of the row's levels."""
    if levels is None:
        below = torch.floor(latent)
        return below, torch.ones_like(below)
    shape = (-1, *[1] * (latent.dim() - 1))
    below, above = levels[:, 0].view(shape).expand(latent.shape), levels[:, 1].view(shape).expand(latent.shape)
    for i in range(1, levels.shape[1] - 1):
        beyond = (latent >= levels[:, i].view(shape)) & (levels[:, i + 1] > levels[:, i]).view(shape)
        below = torch.where(beyond, levels[:, i].view(shape), below)
        above = torch.where(beyond, levels[:, i + 1].view(shape), above)
    return below, above - below
