"""A whole quantized graph as something to train: latent weights, scales, biases and layer-norm constants."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import kept, qdq, signs
from .coded import CodedLayer, coded_layers, set_constant
from .graph import constant, is_constant, kind
from .levels import to_levels
from .plan import Plan
from .ranges import representable
from .surrogates import SURROGATES, Surrogate
from .training import LearnedScale, OneBit, Saved, carrier, stored_scales, straight_round
from .training_signs import LearnedKept, LearnedSigns

# Learning rates relative to that of the weights, which is in codes: the same for all formats of few bits, and more of
# them where codes are finer than those of four bits.
SCALE_RATE, STEP_RATE, SHIFT_RATE = 0.25, 0.25, 0.25
FOUR_BITS = 8


class Weight:
    """A layer's latent weight in units of its scales; the gradient passes its rounding where it is not clipped.

    It starts in the middle of each code. From where the float weight lies, those near an edge would cross it in the
    first steps, whatever their gradient (Adam's steps have one size), and undo what GPTQ or learned rounding chose.
    Signs may have another gradient (`surrogate`), and start where that is steep.
    """

    def __init__(self, graph: GraphModule, layer: CodedLayer, plan: Plan, surrogate: Surrogate) -> None:
        self.layer = layer
        self.levels = layer.levels(graph)
        start = constant(graph, layer.codes).float()
        signs = self.levels is not None and self.levels.shape[1] == 2
        self.sign = surrogate.weight if signs else None
        self.size = self.levels[:, 1].view(-1, *[1] * (start.dim() - 1)) if signs and self.levels is not None else None
        self.latent = (start * surrogate.start if self.sign is not None else start.clone()).requires_grad_()
        self.scale = LearnedScale(constant(graph, layer.scales), not plan.per_channel, tuple(self.latent.shape))
        self.learns_scale = not plan.format_of(layer.name).power_of_two

    def codes(self) -> Tensor:
        """The codes, float32; differentiable."""
        if self.sign is not None and self.size is not None:
            return self.size * self.sign(self.latent / self.size)
        if self.levels is not None:
            reach = self.levels.amax(1).view(-1, *[1] * (self.latent.dim() - 1))
            inside = torch.minimum(torch.maximum(self.latent, -reach), reach)
            return inside + (to_levels(inside, self.levels) - inside).detach()
        return straight_round(torch.clamp(self.latent, self.layer.low, self.layer.high))

    @property
    def gap(self) -> float:
        """The distance between neighbouring codes, on average, in units of a code of four bits."""
        if self.levels is None:
            return max(1.0, (self.layer.high + 1) / FOUR_BITS)
        return float((self.levels[:, -1] - self.levels[:, 0]).mean()) / (self.levels.shape[1] - 1)

    def value(self) -> Tensor:
        """The weight that the codes stand for."""
        scale = self.scale.spread()
        return self.codes() * (scale if self.learns_scale else scale.detach())


class Shift:
    """A constant that learns by additions, in units of its own size."""

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.move = torch.zeros_like(start).requires_grad_()
        self.unit = float(start.square().mean().sqrt()) or 1.0

    def value(self) -> Tensor:
        """The constant with what it learned."""
        return self.start + self.move * self.unit


class Student:
    """What is trained of `graph`, and how it is written back.

    Static activation scales that are alike in all their parameters are one parameter, so that tensors which share a
    scale go on sharing it; what the plan fixes stays. Signs, of weights and activations, learn by the gradient that
    `surrogate` names.
    """

    def __init__(self, graph: GraphModule, plan: Plan, surrogate: str = "straight") -> None:
        self.graph, self.plan = graph, plan
        gradient = SURROGATES[surrogate]
        self.weights = [Weight(graph, x, plan, gradient) for x in coded_layers(graph)]
        self.signs = [LearnedSigns(graph, s, gradient.activation) for s in signs.find(graph)] if self.weights else []
        self.kept = [LearnedKept(graph, k, gradient.activation) for k in kept.find(graph)] if self.weights else []
        self.biases: dict[Node, tuple[Node, Shift]] = {}
        for layer in coded_layers(graph):
            if layer.bias is not None:
                self.biases[layer.node] = layer.bias, Shift(constant(graph, layer.bias))
        self.norms = {n: Shift(constant(graph, n)) for n in _norm_constants(graph)}
        taken = {s.quantize for s in self.bits}
        self.quantizers = _tied_quantizers(graph, plan, taken) if self.weights else {}
        self.factors = {key: torch.zeros((), requires_grad=True) for key in self.quantizers}
        self._saved = [Saved.of(graph, w.layer) for w in self.weights]

    @property
    def given(self) -> dict[Node, Callable[[], Tensor]]:
        """What stands in for stored weights and constants (Runner.given)."""
        return {
            **{carrier(w.layer): w.value for w in self.weights},
            **{bias: shift.value for bias, shift in self.biases.values()},
            **{node: shift.value for node, shift in self.norms.items()},
        }

    @property
    def steps(self) -> dict[Node, Callable[[], Tensor]]:
        """The trained scales of static activations (Runner.steps)."""
        found: dict[Node, Callable[[], Tensor]] = {}
        for key, nodes in self.quantizers.items():
            for node in nodes:
                found[node] = partial(self._step, key)
        return found

    @property
    def bits(self) -> list[OneBit]:
        """What is one bit, with what is trained of it (Runner.bits)."""
        return list(self._learned)

    @property
    def _learned(self) -> list[LearnedSigns | LearnedKept]:
        return [*self.signs, *self.kept]

    def _step(self, key: "Key") -> Tensor:
        return key[0] * torch.exp(self.factors[key])

    def parameters(self) -> list[Tensor]:
        """Every tensor that is trained."""
        return [p for g in self.groups(1.0) for p in g["params"]]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Adam's parameter groups; `rate` is in codes of up to four bits a step."""
        shifts = [s for _, s in self.biases.values()] + list(self.norms.values())
        groups: list[dict[str, Any]] = [{"params": [w.latent], "lr": rate * w.gap} for w in self.weights]
        groups.append({"params": [w.scale.log for w in self.weights if w.learns_scale], "lr": rate * SCALE_RATE})
        factors = [*self.factors.values(), *(s.log for s in self._learned if s.log.requires_grad)]
        groups.append({"params": factors, "lr": rate * STEP_RATE})
        moves = [*(s.move for s in shifts), *(s.move for s in self._learned)]
        groups.append({"params": moves, "lr": rate * SHIFT_RATE})
        return [g for g in groups if g["params"]] if self.weights else []

    def snapshot(self) -> list[Tensor]:
        """A copy of every trained tensor."""
        return [p.detach().clone() for p in self.parameters()]

    def load(self, numbers: list[Tensor]) -> None:
        """Put a snapshot back."""
        with torch.no_grad():
            for parameter, number in zip(self.parameters(), numbers, strict=True):
                parameter.copy_(number)

    def summary(self) -> str:
        """What is trained, in words."""
        parts = [f"{len(self.weights)} weights with their scales", f"{len(self.biases)} biases"]
        if self.quantizers:
            parts.append(f"{len(self.quantizers)} activation scales")
        if self.signs:
            parts.append(f"{len(self.signs)} signs of activations")
        if self.kept:
            parts.append(f"{len(self.kept)} attentions' bits")
        if self.norms:
            parts.append(f"{len(self.norms)} layer-norm constants")
        return ", ".join(parts)

    def store(self) -> None:
        """Write what was learned into the graph, in numbers that the runtime can store."""
        with torch.no_grad():
            for key, nodes in self.quantizers.items():
                learned = key[0] * math.exp(float(self.factors[key]))
                _set_scale(nodes, representable(learned, self.plan))
            for sign in self._learned:
                sign.store(self.plan)
            for weight in self.weights:
                weight.layer.set_codes(self.graph, weight.codes())
                if weight.learns_scale:
                    weight.layer.set_scales(self.graph, stored_scales(weight.scale.value(), self.plan))
            for weight in self.weights:
                if weight.layer.node in self.biases:
                    shift = self.biases[weight.layer.node][1]
                    weight.layer.set_bias(self.graph, shift.value(), self.plan.int32_bias)
            for node, shift in self.norms.items():
                set_constant(self.graph, node, shift.value())

    def restore(self) -> None:
        """Put back everything as it was."""
        for key, nodes in self.quantizers.items():
            _set_scale(nodes, key[0])
        for sign in self._learned:
            sign.restore()
        for saved in self._saved:
            saved.restore(self.graph)
        for node, shift in self.norms.items():
            set_constant(self.graph, node, shift.start)


def _norm_constants(graph: GraphModule) -> list[Node]:
    """Gamma and beta of every layer norm, each once."""
    found: dict[Node, None] = {}
    for node in graph.graph.nodes:
        if kind(node) == "layer_norm":
            constants = [a for a in node.args[2:4] if isinstance(a, Node) and is_constant(a)]
            found.update(dict.fromkeys(constants))
    return list(found)


Key = tuple[float, int, int, int, torch.dtype]


def _tied_quantizers(graph: GraphModule, plan: Plan, taken: set[Node]) -> dict[Key, list[Node]]:
    """Static quantizers by their parameters; those whose parameters the plan fixes, and those `taken`, are left out."""
    fixed = {scale for scale, _ in plan.fixed_output.values()}
    groups: dict[Key, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        open_ = node.target is qdq.QUANTIZE and node not in taken
        if open_ and isinstance(node.args[1], float) and node.args[1] not in fixed:
            groups[tuple(node.args[1:6])].append(node)
    return dict(groups)


def _set_scale(nodes: list[Node], scale: float) -> None:
    for node in nodes:
        for each in (node, *(u for u in node.users if u.target is qdq.DEQUANTIZE)):
            each.args = (each.args[0], scale, *each.args[2:])
