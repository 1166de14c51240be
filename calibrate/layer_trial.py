"""What quantization as planned would do to a linear layer's output: for steps that choose between exact rewrites."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import qdq
from .graph import constant, layer_name, weight_nodes
from .plan import Plan
from .ranges import fake_quantize, qparams
from .weights import fitted_scales, spread, weight_codes

Activations = Literal["static", "int16", "tensor_uint8", "row_int8", "float"]
# Rows kept of each tensor: enough for an output error, few enough that every tensor of a model is watched in one pass.
ROWS_PER_BATCH = 256
MOST_ROWS = 2048
# Of the whole range, what a static range may be clipped to, as the observers would; it must win by the race's margin.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
MARGIN = 0.9


@dataclass
class Seen:
    """What was seen of a tensor whose last axis holds channels.

    `rows`: float32 [n, C] of each batch, evenly spaced and with those that hold the batch's extremes; `lows`, `highs`:
    float32 [C] of each batch, over every row.
    """

    rows: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        flat = value.detach().float().reshape(-1, value.shape[-1])
        self.lows.append(flat.amin(0))
        self.highs.append(flat.amax(0))
        if sum(len(r) for r in self.rows) < MOST_ROWS:
            even = torch.linspace(0, len(flat) - 1, min(ROWS_PER_BATCH, len(flat))).long()
            extremes = torch.tensor([int(flat.amin(1).argmin()), int(flat.amax(1).argmax())])
            self.rows.append(flat[torch.cat([even, extremes]).unique()].clone())

    @property
    def low(self) -> Tensor:
        """The least value of each channel."""
        return torch.stack(self.lows).amin(0)

    @property
    def high(self) -> Tensor:
        """The largest value of each channel."""
        return torch.stack(self.highs).amax(0)

    @property
    def reach(self) -> Tensor:
        """The largest magnitude of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def mapped(self, factor: Tensor, shift: Tensor | None = None) -> "Seen":
        """The same of the tensor x * factor + shift, both [C], factor positive."""

        def change(x: Tensor) -> Tensor:
            return x * factor + shift if shift is not None else x * factor

        return Seen(*([change(x) for x in part] for part in (self.rows, self.lows, self.highs)))

    def turned(self, rotation: Tensor) -> "Seen":
        """The same of the tensor x @ rotation, extremes from the rows alone."""
        result = Seen()
        for rows in self.rows:
            result.add(rows @ rotation)
        return Seen([r @ rotation for r in self.rows], result.lows, result.highs)


def watch(graph: GraphModule, nodes: Iterable[Node], batches: Iterable[list[Tensor]], rows: bool = True) -> dict:
    """`Seen` of each of `nodes` over `batches`; without `rows` only the extremes of each channel."""
    seen: dict[Node, Seen] = {n: Seen() for n in nodes}

    class _Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in seen:
                seen[n].add(value)
                if not rows:
                    seen[n].rows = []
                    seen[n].lows, seen[n].highs = [seen[n].low], [seen[n].high]
            return value

    runner = _Watch(graph, garbage_collect_values=True)
    with torch.no_grad():
        for inputs in batches:
            runner.run(*inputs)
    return seen


def activations(plan: Plan) -> Activations | None:
    """How the plan quantizes what a linear layer reads; None when it quantizes no linear layer at all."""
    found: Activations | None = None
    for name in plan.steps:
        if name == "quantize_static" and "linear" in plan.quantize_inputs:
            return "int16" if plan.activation == "int16" else "static"
        if name == "quantize_dynamic" and "linear" in plan.dynamic_kinds:
            return plan.dynamic_scheme
        if name.startswith("quantize_") and name not in ("quantize_static", "quantize_dynamic"):
            found = "float"
    return found


def quantized(seen: Seen, plan: Plan, how: Activations) -> list[Tensor]:
    """The rows as the layer would see them, batch by batch."""
    if how == "float":
        return seen.rows
    if how == "int16":
        scale = float(seen.reach.max()) / 32767 or 1.0
        return [torch.round(r / scale) * scale for r in seen.rows]
    if how == "static":
        return _static(seen, plan)
    result = []
    for rows, low, high in zip(seen.rows, seen.lows, seen.highs, strict=False):
        if how == "row_int8":
            codes, scale = qdq.dynamic_codes(rows, how, (-1,))
        else:  # the range is that of the whole batch: its extremes join as two more rows, and leave again
            codes, scale = qdq.dynamic_codes(torch.cat([rows, low[None], high[None]]), how, (-1,))
            codes = codes[:-2]
        result.append(codes * scale)
    return result


def _static(seen: Seen, plan: Plan) -> list[Tensor]:
    low, high = min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)
    best, least = seen.rows, float("inf")
    for share in CLIPS:
        q = qparams(low * share, high * share, plan)
        tried = [fake_quantize(r, q) for r in seen.rows]
        error = sum(float((t - r).square().sum()) for t, r in zip(tried, seen.rows, strict=True))
        if error < (least if share == 1.0 else least * MARGIN):
            best, least = tried, error
    return best


def stored(weight: Tensor, plan: Plan, layer: str) -> Tensor:
    """A linear layer's weight [out, in] after a round trip through the codes that the plan stores."""
    form = plan.format_of(layer)
    if form.kind != "int":
        return weight  # a palette or 8-bit floats: what scales do to it is not modelled
    scales = fitted_scales(weight, plan, form)
    return (weight_codes(weight, scales, *plan.code_range(form.bits)).float() * spread(scales, weight.shape)).float()


def row_weights(signal: Tensor) -> Tensor:
    """How much each row's noise counts, given its output's power: as much as LayerNorm or a cosine would let it.

    1 / power, but no more than ten times that of the median row. Without it the few tokens that encoders give huge
    values would decide alone.
    """
    return 1 / signal.clamp(min=max(0.1 * float(signal.median()), 1e-12))


def output_error(plan: Plan, how: Activations, seen: Seen, layers: Iterable[Node], weights: list[Tensor]) -> float:
    """Noise over signal in the outputs of linear `layers` that all read `seen`, averaged over rows, summed over layers.

    The weights are those that go with `seen`, so that the float outputs are the layers' own.
    """
    rows, read = torch.cat(seen.rows), torch.cat(quantized(seen, plan, how))
    total = 0.0
    for node, weight in zip(layers, weights, strict=True):
        wanted = rows @ weight.T
        noise = (read @ stored(weight, plan, layer_name(node)).T - wanted).square().sum(1)
        total += float((noise * row_weights(wanted.square().sum(1))).mean())
    return total


def weight_of(graph: GraphModule, node: Node) -> Tensor:
    """The float weight of a linear layer, [out, in]."""
    source, _ = weight_nodes(node)
    assert source is not None
    return constant(graph, source)
