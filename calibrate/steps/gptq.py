"""GPTQ: weights rounded column by column, each column's error made up for by those still open."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import constant
from calibrate.hessian import DAMPING, descend, gptq, gram, importance_order, ridge
from calibrate.layer_problem import LayerProblem, own_bias
from calibrate.plan import Entry, Plan
from calibrate.rounding import (
    COMPUTED,
    Rounded,
    code_bounds,
    codes_out_of_range,
    group_of,
    round_layers,
    scale_fitter,
    settle,
)
from calibrate.steps import Context

NAME = "gptq"
CHOICES = {"scales": ("keep", "refit"), "target": ("layer", "float")}


class Gptq:
    """Frantar et al., arXiv 2210.17323: weights that keep the layer's output on what it really reads.

    Layer after layer, with inputs from the layers already rounded. `target` "layer": the float weight's output on the
    quantized input; "float": the float layer's output on the float input, so that weights also make up for what came
    before (ridge regression first, ERQ, ICML 2024). `scales`: "keep" them, or "refit" per channel, or per group when
    its turn comes, errors weighted by the diagonal of the inputs' second moments. `damping`: share of the mean diagonal
    added to it. `act_order`: important columns first. `passes`: coordinate descent over the codes afterwards
    (QuantEase, arXiv 2309.01885). A layer whose output error on samples kept aside does not fall keeps its codes.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, object]] = {
        "target": "layer",
        "scales": "refit",
        "damping": DAMPING,
        "act_order": True,
        "passes": 1,
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        options = {**self.defaults, **context.parameters}
        for name, values in CHOICES.items():
            if options[name] not in values:
                raise CalibrationError(f"gptq has no {name} {options[name]!r}: use {' or '.join(values)}")
        return round_layers(NAME, graph, context, lambda made: _round(graph, made, context.plan, options))

    def ensures(self, graph: GraphModule) -> str | None:
        return codes_out_of_range(graph)


def _round(graph: GraphModule, made: LayerProblem, plan: Plan, options: Mapping[str, Any]) -> Entry:
    """Choose the codes of one layer; keep them where they are better on the samples kept aside."""
    x, weight = made.x[:, made.fitted], made.weight
    goal = made.x @ made.weight.float().transpose(1, 2)
    bias = made.offset  # what a step before did to the bias was for other weights
    if bias is not None:
        goal = goal + bias[:, None].float()
    if options["target"] == "float":
        if not own_bias(made.layer):
            return Entry(NAME, made.layer.name, "left alone", COMPUTED)
        goal = made.y
        now = x @ weight.float().transpose(1, 2)
        change, bias = ridge(x, goal[:, made.fitted] - now, options["damping"])
        weight = weight + change
    proposal = replace(_codes(graph, made, weight, gram(x), plan, options), bias=bias)
    return settle(graph, made, proposal, goal, plan, NAME)


def _codes(
    graph: GraphModule, made: LayerProblem, weight: Tensor, h: Tensor, plan: Plan, options: Mapping[str, Any]
) -> Rounded:
    """Codes for `weight` [g, o, k] under the second moments `h` [g, k, k]."""
    layer, group = made.layer, group_of(graph, made)
    low, high = code_bounds(layer, plan)
    scales = constant(graph, layer.scales)
    fit = scale_fitter(graph, made, h, plan) if options["scales"] == "refit" else None
    if fit is not None and group is None:
        scales = fit(made.restored(weight), torch.arange(h.shape[1]))
    codes, step = gptq(
        weight,
        h,
        made.step(scales),
        low,
        high,
        order=importance_order(h, group) if options["act_order"] else None,
        damping=options["damping"],
        group=group,
        refit=fit if group is not None else None,
    )
    if group is not None:
        scales = step[0, :, ::group].float()
    bounds = torch.full_like(codes, low), torch.full_like(codes, high)
    codes, _ = descend(codes, weight, h, step, *bounds, options["passes"])
    return Rounded(codes, step, scales)


STEP = Gptq()
