"""Ridge update: weights move before rounding so that they make up for errors in what the layer reads."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import constant
from calibrate.hessian import descend, gram, ridge
from calibrate.layer_problem import LayerProblem
from calibrate.plan import Entry, Plan
from calibrate.rounding import (
    Rounded,
    code_bounds,
    codes_out_of_range,
    group_of,
    round_layers,
    scale_fitter,
    settle,
)
from calibrate.steps import Context

NAME = "ridge"
SCALES = ("keep", "refit")


class Ridge:
    """ERQ (ICML 2024), section 3.2: dW = (X^T X + lambda I)^-1 X^T (Y - X W), X quantized, Y of the float layer.

    Layer after layer, in closed form; then W + dW is rounded to nearest and the bias takes the mean error that is left.
    `damping`: lambda as a share of X^T X's mean diagonal; large, as in ERQ: small changes survive rounding best.
    `flips`: passes over the codes in which each may move one step from nearest where that costs less. `scales`: "keep"
    them, or "refit" to W + dW. A layer whose output error on samples kept aside does not fall keeps its codes and bias.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, object]] = {"damping": 1.0, "flips": 0, "scales": "refit"}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        options = {**self.defaults, **context.parameters}
        if options["scales"] not in SCALES:
            raise CalibrationError(f"ridge has no scales {options['scales']!r}: use {' or '.join(SCALES)}")

        def choose(made: LayerProblem) -> Entry:
            return settle(graph, made, _proposal(graph, made, context.plan, options), made.y, context.plan, NAME)

        return round_layers(NAME, graph, context, choose, own_biases=True)

    def ensures(self, graph: GraphModule) -> str | None:
        return codes_out_of_range(graph)


def _proposal(graph: GraphModule, made: LayerProblem, plan: Plan, options: Mapping[str, Any]) -> Rounded:
    """Codes and bias of one layer, from the rows that are not kept aside."""
    layer, x, y = made.layer, made.x[:, made.fitted], made.y[:, made.fitted]
    change, _ = ridge(x, y - _product(x, made.weight), options["damping"])
    weight = made.weight + change
    h = gram(x)
    scales = constant(graph, layer.scales)
    if options["scales"] == "refit":
        fit, group = scale_fitter(graph, made, h, plan), group_of(graph, made)
        width = group or h.shape[1]
        parts = [fit(made.restored(weight) if group is None else w, c) for w, c in _parts(weight, width)]
        scales = parts[0] if group is None else torch.stack(parts, 1)
    step = made.step(scales)
    low, high = code_bounds(layer, plan)
    codes = torch.round(weight / step).clamp(low, high)
    if options["flips"]:
        bounds = (codes - 1).clamp(min=low), (codes + 1).clamp(max=high)
        codes, _ = descend(codes, weight, h, step, *bounds, options["flips"])
    return Rounded(codes, step, scales, (y - _product(x, codes * step)).double().mean(1))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.float().transpose(1, 2)


def _parts(weight: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """Groups of `width` neighbouring columns of a weight [1, out, in], or [g, o, k] whole; each with its columns."""
    count = weight.shape[2]
    return [(weight[0, :, i : i + width], torch.arange(i, i + width)) for i in range(0, count, width)]


STEP = Ridge()
