"""Bias correction: each layer's bias takes back the mean error that quantization brought to its output."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.coded import CodedLayer, coded, coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import constant, kind, operator_name, weight_nodes
from calibrate.lockstep import Visit, partners, walk
from calibrate.plan import Entry
from calibrate.steps import Context

NAME = "correct_bias"
# A correction carries the samples' own chance into the bias. It pays on average where the squares of the true mean
# errors exceed those of the standard errors, and what is measured is the sum of both: hence twice.
CLEAR = 2.0


class CorrectBias:
    """Data-Free Quantization, arXiv 1906.04721, section 4.2 and appendix B-D.

    `method` "empirical": layer after layer, b -= mean(quantized output - float output) per output channel, over samples
    and positions; every layer is corrected with the ones before it corrected already. "analytic": no samples; the mean
    error is (Ŵ - W) E[x], with E[x] known where the input is a batch norm that was folded, past relu or a clamp.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, object]] = {"method": "empirical"}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        assert context.float_graph is not None
        method = context.parameters.get("method", "empirical")
        if method not in ("empirical", "analytic"):
            raise CalibrationError(f'correct_bias has no method \'{method}\': set method to "empirical" or "analytic"')
        correct = _empirical if method == "empirical" else _analytic
        ledger = correct(graph, context.float_graph, context)
        return ledger or [Entry(NAME, "model", "left alone", "no layer of it has coded weights")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            layer = coded(node)
            if layer is not None and layer.bias is not None and not torch.isfinite(constant(graph, layer.bias)).all():
                return f"the bias of {layer.name} is not finite"
        return None


def _empirical(graph: GraphModule, float_graph: GraphModule, context: Context) -> list[Entry]:
    ledger: list[Entry] = []
    count = len(list(coded_layers(graph)))

    def visit(found: Visit) -> None:
        ledger.append(_measured(graph, found, context.plan.int32_bias))
        context.progress(NAME, len(ledger), count)

    walk(float_graph, graph, context.few_batches(), visit)
    return ledger


def _measured(graph: GraphModule, found: Visit, int32: bool) -> Entry:
    """Correct one layer by what its samples say."""
    layer, outputs = found.layer, found.compute()
    reason = refusal(layer)
    if reason is None and any(a.shape != b.shape for a, b in zip(outputs, found.targets, strict=True)):
        reason = "its output has another shape than the float layer's"
    if reason is not None:
        return Entry(NAME, layer.name, "left alone", reason)
    errors = mean_errors(layer, outputs, found.targets)
    if len(errors) < 2:
        return Entry(NAME, layer.name, "left alone", "one sample cannot tell an error from chance")
    mean = errors.mean(0)
    chance = errors.std(0) / math.sqrt(len(errors))
    if float(mean.square().sum()) <= CLEAR * float(chance.square().sum()):
        return Entry(NAME, layer.name, "left alone", f"no mean error clear of chance over {len(errors)} samples")
    add_to_bias(graph, layer, -mean, int32)
    left = mean_errors(layer, found.compute(), found.targets).mean(0)
    return Entry(NAME, layer.name, f"corrected, mean error {_rms(mean):.3g} to {_rms(left):.3g}")


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def mean_errors(layer: CodedLayer, outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """outputs - targets, its mean over positions: float64 [samples, channels].

    The tensors are [n, channels, ...] for a convolution, else [n, ..., channels].
    """
    axis = 1 if kind(layer.node) == "conv" else -1
    errors = ((o - t).movedim(axis, -1).double() for o, t in zip(outputs, targets, strict=True))
    return torch.cat([e.reshape(len(e), -1, e.shape[-1]).mean(1) for e in errors])


def refusal(layer: CodedLayer) -> str | None:
    """Why this layer can be given no other bias, or None."""
    index = 3 if layer.dynamic else 2
    given = layer.node.args[index] if len(layer.node.args) > index else layer.node.kwargs.get("bias")
    return "its bias is computed, not constant" if given is not None and layer.bias is None else None


def add_to_bias(graph: GraphModule, layer: CodedLayer, change: Tensor, int32: bool) -> None:
    """Add `change` [out] to the layer's bias, or make it one; rounded as `CodedLayer.set_bias` says."""
    old = constant(graph, layer.bias).double() if layer.bias is not None else torch.zeros_like(change.double())
    layer.set_bias(graph, old + change, int32)


def _analytic(graph: GraphModule, float_graph: GraphModule, context: Context) -> list[Entry]:
    ledger = []
    for node, partner in partners(float_graph, graph).items():
        layer = coded(node)
        assert layer is not None
        reason = refusal(layer)
        mean = expected_input(partner) if reason is None else None
        if reason is None and mean is None:
            reason = "the mean of its input is unknown without samples: no folded batch norm just before it"
        if reason is not None or mean is None:
            ledger.append(Entry(NAME, layer.name, "left alone", reason or ""))
            continue
        weight_node, _ = weight_nodes(partner)
        assert weight_node is not None
        error = layer.weight(graph).double() - constant(float_graph, weight_node).double()
        error = error.reshape(*error.shape[:2], -1).sum(2)
        per_group = mean.double().view(layer.groups, 1, -1)
        shift = (error.view(layer.groups, -1, error.shape[1]) * per_group).sum(2).flatten()
        add_to_bias(graph, layer, -shift, context.plan.int32_bias)
        ledger.append(Entry(NAME, layer.name, f"corrected from batch norm, expected error {_rms(shift):.3g}"))
    return ledger


def expected_input(layer: Node) -> Tensor | None:
    """E[x] per input channel, float64 [in], of a float layer behind a folded batch norm (past relu, clamp), or None.

    The batch norm's output is taken as normal with mean beta and deviation |gamma| (arXiv 1906.04721, appendix C).
    """
    source, low, high = layer.args[0], -math.inf, math.inf
    while isinstance(source, Node) and kind(source) in ("relu", "clamp"):
        bounds = limits(source)
        if bounds is None:
            return None
        low, high = min(max(low, bounds[0]), high), max(min(high, bounds[1]), low)
        source = source.args[0]
    if not isinstance(source, Node) or "bn" not in source.meta:
        return None
    if kind(source) != kind(layer):  # flattened on the way, or another axis holds the channels
        return None
    beta, gamma = source.meta["bn"]
    return clipped_mean(beta.double(), gamma.double(), low, high)


def limits(node: Node) -> tuple[float, float] | None:
    """The bounds of a relu or clamp; None where they are tensors."""
    if kind(node) == "relu":
        return 0.0, math.inf
    name = operator_name(node)
    if name.startswith("relu6"):
        return 0.0, 6.0
    first, second = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", node.kwargs.get("min", first))
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", node.kwargs.get("max", second))
    if name.startswith("clamp_max"):
        low, high = None, low if len(node.args) > 1 else high
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def clipped_mean(mean: Tensor, deviation: Tensor, low: float, high: float) -> Tensor:
    """The mean of a normal variable clipped to [low, high]; bounds may be infinite, deviations zero. float64, [n]."""
    sigma = deviation.clamp(min=1e-12)
    a, b = (low - mean) / sigma, (high - mean) / sigma
    inside = sigma * (_density(a) - _density(b)) + mean * (_below(b) - _below(a))
    outside = torch.zeros_like(mean)
    if math.isfinite(low):
        outside = outside + low * _below(a)
    if math.isfinite(high):
        outside = outside + high * (1 - _below(b))
    return inside + outside


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _below(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


STEP = CorrectBias()
