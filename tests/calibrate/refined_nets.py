"""A small network on correlated images, quantized and then refined, for the tests of steps that round weights anew."""

from dataclasses import replace

import torch
from small_graphs import ISLANDS, Made, capture, context
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.coded import CodedLayer, coded_layers
from calibrate.graph import clone, run
from calibrate.plan import Entry, Plan
from calibrate.steps import Context

STATIC = replace(ISLANDS, steps=("quantize_static",))
WEIGHTS = Plan(steps=("quantize_weights",))
DYNAMIC = Plan(steps=("quantize_dynamic",), dynamic_kinds=frozenset({"linear", "conv"}))
Parameters = dict[str, object]


def pictures(count: int = 32, seed: int = 0) -> Tensor:
    """Smooth positive images [count, 4, 8, 8]: neighbours and channels correlate, as activations do."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 3, 3, generator=random)
    smooth = nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    mixed = torch.einsum("nchw,cd->ndhw", smooth, torch.randn(2, 4, generator=torch.Generator().manual_seed(7)))
    return mixed + 0.1 * torch.randn(count, 4, 8, 8, generator=random) + 0.5


def cnn() -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, dilation=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1, groups=2),
        nn.Flatten(),
        nn.Linear(512, 8),
    )
    return capture(model, pictures(4))


def batches(seed: int = 0) -> list[list[Tensor]]:
    return [[part] for part in pictures(seed=seed).split(8)]


def refined(
    plan: Plan, graph: GraphModule, step: str, parameters: Parameters
) -> tuple[GraphModule, GraphModule, list[Entry]]:
    """`graph` after the plan's own step, then after `step`, and the ledger of that."""
    setting = context(replace(plan, parameters={step: parameters}), *batches())
    before = clone(graph)
    steps.apply(plan.steps[0], before, setting)
    after = clone(before)
    return before, after, steps.apply(step, after, setting)


def drift(float_graph: GraphModule, graph: GraphModule, seed: int = 5) -> float:
    """Squared error of the output over its power, on images that no step saw."""
    wanted, got = (run(g, [pictures(seed=seed)])[0] for g in (float_graph, graph))
    return float((got - wanted).square().mean() / wanted.square().mean())


def pairs(a: GraphModule, b: GraphModule) -> list[tuple[CodedLayer, CodedLayer]]:
    return list(zip(coded_layers(a), coded_layers(b), strict=True))


def with_computed_bias() -> tuple[GraphModule, Context]:
    """A weight-only linear layer whose bias is computed from the input, and the context it was quantized in."""

    def call(self: Made, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.fc.weight, self.fc.bias * x.mean())

    torch.manual_seed(0)
    graph = capture(Made(call, fc=nn.Linear(32, 32)), torch.randn(4, 32))
    setting = context(WEIGHTS, [torch.rand(32, 32)])
    steps.apply("quantize_weights", graph, setting)
    return graph, setting
