"""What mixed precision chooses from: each layer's loss, bytes and work in every format, and the integer programme.

A layer's score is what the whole model loses when that layer alone changes format (output KL for class scores,
relative squared error else); the choice is an integer linear programme (as in HAWQ-V3, arXiv 2011.10680).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import steps as known
from calibrate.binarize import binarize
from calibrate.binarized_codes import stored
from calibrate.coded import coded
from calibrate.graph import (
    add_constant,
    clone,
    constant,
    constant_made,
    finish,
    is_table,
    is_weighted,
    kind,
    layer_name,
    run,
)
from calibrate.plan import HALF, WeightFormat
from calibrate.steps.binarize import SHORTEST_ROW
from calibrate.weights import fits_half, fitted_scales, spread, weight_codes, weight_index
from convert.automatic import quantized_layers
from convert.compress import Builder
from convert.costs import costs
from convert.drift import classifies
from convert.errors import TightfitError
from convert.planning import Decision, keeping_float, weighted_layers

FLOAT, EIGHT = "float", "8"
# Binarizers that a layer may get, and the bits per weight that its file takes.
LEVELS = {"sign": 1, "planes": 2}
CHOSEN = "chosen by mixed precision: in codes it costs more than its share of the budget brings"
# What a runtime does not take: TensorRT has no weights of 2 bits; what the Edge TPU's compiler makes of float16
# constants is not known.
LACKS = {"tensorrt": "2", "edgetpu": "16"}


@dataclass(frozen=True)
class Table:
    """One row per layer, one column per option: `scores` (loss of the output), `bytes`, and each layer's `macs`.

    Options are bits, "2" to "16", binarizers, and "float"; the smallest comes first. "16" are float16 weights before
    float arithmetic. What a layer can't have takes infinitely many bytes.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]
    scores: np.ndarray
    bytes: np.ndarray
    macs: np.ndarray
    fixed_bytes: int


def options(decision: Decision) -> tuple[str, ...]:
    """Formats that a layer may get, the smallest first.

    Two bits are for weights alone: activations add their own. Where the artifact computes in float16, a float layer is
    one of 16 bits.
    """
    names = ["4", EIGHT, "16"]
    if "binarize" in decision.plan.steps:  # in TFLite two planes take the room of 4 bits, which err less
        names = [*(n for n in LEVELS if n == "sign" or decision.rules.target != "tflite"), *names]
    elif "quantize_weights" in decision.plan.steps:
        names.insert(0, "2")
    if decision.compute != "float16":
        names.append(FLOAT)
    return tuple(n for n in names if n != LACKS.get(decision.rules.runtime))


def form_of(decision: Decision, option: str) -> WeightFormat:
    """The weight format that an option other than "float" stands for."""
    bits = int(option)
    if bits == HALF.bits:
        return HALF
    group = decision.plan.weight.group if bits < 8 else None
    return replace(decision.plan.weight, bits=bits, group=group, kind="int")


def build_table(builder: Builder, decision: Decision) -> Table:
    """Score every layer in every format, the others at 8 bits. Raises TightfitError where no layer can be quantized."""
    plain = _plain(decision)
    base = builder.build(plain)
    quantized = set(quantized_layers(base))
    layers = tuple(n for n in weighted_layers(builder.captured.graph, tables=True) if n in quantized)
    if not layers:
        raise TightfitError("mixed precision has nothing to choose: no layer of this model can be quantized here.")
    before = base.exact or builder.captured.graph
    weights = _weights(before)
    loss = Loss(builder)
    start, columns = loss(base.graph), options(decision)
    ends = weighted_layers(builder.captured.graph)
    wide = {ends[0], ends[-1]} | set(weighted_layers(builder.captured.graph, tables=True)) - set(ends)
    scores, sizes = np.zeros((len(layers), len(columns))), np.zeros((len(layers), len(columns)))
    for row, layer in enumerate(layers):
        weight = weights[layer]
        unquantized = builder.build(keeping_float(plain, {layer: CHOSEN})).graph
        for column, option in enumerate(columns):
            if option in LEVELS:
                sizes[row, column] = _few_bytes(weight, option, decision) if layer not in wide else np.inf
                if np.isfinite(sizes[row, column]):
                    scores[row, column] = loss(_with_levels(base.graph, decision, layer, weight, option)) - start
                continue
            form = None if option == FLOAT else form_of(decision, option)
            sizes[row, column] = stored_bytes(weight, form, _scale_bytes(decision, form))
            if option != EIGHT:
                graph = unquantized if form in (None, HALF) else base.graph
                made = graph if form is None else _with_format(graph, decision, layer, weight, form)
                scores[row, column] = loss(made) - start
        builder.progress("sensitivity", row + 1, len(layers))
    macs = {c.name: c.macs or 0 for c in costs(builder.captured.graph, builder.captured.inputs)}
    work = np.array([float(macs.get(n, 0)) for n in layers])
    return Table(layers, columns, scores, sizes, work, _others(before, weights.values(), decision))


def _others(graph: GraphModule, weights: Iterable[Tensor], decision: Decision) -> int:
    """Bytes of the constants beside weights: biases, norms, positions."""
    everything = sum(v.numel() * v.element_size() for v in [*graph.parameters(), *graph.buffers()])
    rest = max(everything - 4 * sum(w.numel() for w in weights), 0)
    return rest // 2 if decision.compute == "float16" else rest


def _weights(graph: GraphModule) -> dict[str, Tensor]:
    """The float weight of every layer and table, by the layer's name."""
    fixed = constant_made(graph.graph.nodes)
    found = {}
    for node in graph.graph.nodes:
        if is_weighted(node) or is_table(node, fixed):
            source = node.args[weight_index(node)]
            assert isinstance(source, Node)
            found[layer_name(node)] = constant(graph, source)
    return found


def _plain(decision: Decision) -> Decision:
    """The decision at 8 bits throughout, without the steps that refine codes: what single layers are judged against."""
    steps = tuple(s for s in decision.plan.steps if not known.refines(s))
    plan = replace(decision.plan, steps=steps, weight=replace(decision.plan.weight, bits=8, group=None), formats={})
    return replace(decision, plan=plan)


def _scale_bytes(decision: Decision, form: WeightFormat | None) -> int:
    """What a file keeps for each scale: TFLite a float32 and an int64 zero point, for the groups of kernels a float16
    number; the others the number alone."""
    if decision.rules.target == "tflite":
        return 2 if form and form.group and "quantize_dynamic" in decision.plan.steps else 12
    return 2 if decision.plan.half_scales else 4


def stored_bytes(weight: Tensor, form: WeightFormat | None, scale: int = 4) -> float:
    """What a weight [out, ...] takes in a file: codes, and `scale` bytes per scale; two bytes each in float16 where
    that holds them; float32 without a format."""
    if form is None or (form == HALF and not fits_half(weight)):
        return 4.0 * weight.numel()
    if form == HALF:
        return 2.0 * weight.numel()
    groups = weight.numel() / form.group if form.group and weight.dim() == 2 else len(weight)
    return weight.numel() * form.bits / 8 + float(scale) * groups


def _with_format(graph: GraphModule, decision: Decision, layer: str, weight: Tensor, form: WeightFormat) -> GraphModule:
    """A copy of a graph with one layer's weight rounded to another format: of codes where the layer is quantized."""
    if form == HALF:
        return _with_weight(graph, layer, weight.half().float() if fits_half(weight) else weight)
    scales = fitted_scales(weight, decision.plan, form)
    return _with_codes(graph, layer, weight_codes(weight, scales, *decision.plan.code_range(form.bits)), scales)


def _few_bytes(weight: Tensor, option: str, decision: Decision) -> float:
    """What a weight of few levels takes; infinite where rows are too short for them."""
    if weight[0].numel() < SHORTEST_ROW:
        return np.inf
    bits = 2 if decision.rules.target == "tflite" else LEVELS[option]
    return weight.numel() * bits / 8 + float(_scale_bytes(decision, None)) * len(weight)


def _with_levels(graph: GraphModule, decision: Decision, layer: str, weight: Tensor, option: str) -> GraphModule:
    """A copy of a graph with one layer's weight at the levels of a binarizer, by its own errors alone."""
    rows = weight.double().reshape(1, len(weight), -1)
    h = torch.eye(rows.shape[2], dtype=torch.float64)[None]
    form = stored(rows, h, binarize(option, rows), decision.plan.weight_max, decision.plan.half_scales)
    return _with_codes(graph, layer, form.codes.reshape(weight.shape).to(torch.int8), form.scales)


def _with_codes(graph: GraphModule, layer: str, codes: Tensor, scales: Tensor) -> GraphModule:
    """A copy of a graph with one layer's weight as other codes, [out, ...], and scales."""
    rounded = (codes.double() * spread(scales.double(), codes.shape)).float()
    return _with_weight(graph, layer, rounded, codes, scales)


def _with_weight(
    graph: GraphModule, layer: str, rounded: Tensor, codes: Tensor | None = None, scales: Tensor | None = None
) -> GraphModule:
    """A copy of a graph with another weight in one layer: its codes where it quantizes its input at run time."""
    copy = clone(graph)
    for node in list(copy.graph.nodes):
        if layer_name(node) != layer or kind(node) not in ("conv", "linear", "embedding"):
            continue
        found = coded(node)
        if found is not None and found.dynamic and codes is not None and scales is not None:
            found.set_codes(copy, codes)
            found.set_scales(copy, scales)
        else:
            index = weight_index(node)
            fresh = add_constant(copy, f"{layer}_judged", rounded, node)
            node.args = (*node.args[:index], fresh, *node.args[index + 1 :])
    return finish(copy)


class Loss:
    """What a graph loses against float on the judging samples: mean KL of class scores, or relative squared error."""

    def __init__(self, builder: Builder) -> None:
        self.judge = builder.judge
        first = self.judge.expected[0]
        named = {str(i): v.numpy() for i, v in enumerate(first)}
        self.by_kl = classifies(named, None)

    def __call__(self, graph: GraphModule) -> float:
        total, count = 0.0, 0
        for inputs, expected in zip(self.judge.inputs, self.judge.expected, strict=True):
            got = run(graph, inputs)
            if self.by_kl:
                total += float(_kl(expected[0], got[0]).sum())
                count += len(expected[0])
                continue
            for want, have in zip(expected, got, strict=True):
                if want.is_floating_point():
                    total += float(
                        (have - want).double().square().sum() / want.double().square().sum().clamp(min=1e-30)
                    )
                    count += 1
        return total / max(count, 1)


def _kl(wanted: Tensor, got: Tensor) -> Tensor:
    p, q = torch.log_softmax(wanted.double(), 1), torch.log_softmax(got.double(), 1)
    return (p.exp() * (p - q)).sum(1)


def solve(
    table: Table, limits: Iterable[tuple[np.ndarray, float]], banned: Iterable[np.ndarray] = ()
) -> np.ndarray | None:
    """For each layer the column with the least total score within every limit; None where there is none.

    `limits`: (cost of each layer in each option, what their sum may be). `banned`: choices that must differ in at least
    one layer (no-good cuts).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows, columns = table.scores.shape
    allowed = np.isfinite(table.bytes)
    sizes = np.where(allowed, table.bytes, 0.0)
    constraints = [LinearConstraint(np.kron(np.eye(rows), np.ones(columns)), 1, 1)]
    for costs_, limit in limits:
        constraints.append(LinearConstraint(np.where(allowed, costs_, 0.0).reshape(1, -1), -np.inf, limit))
    for choice in banned:
        cut = np.zeros((rows, columns))
        cut[np.arange(rows), choice] = 1
        constraints.append(LinearConstraint(cut.reshape(1, -1), -np.inf, rows - 1))
    # Among equals the smaller wins.
    objective = table.scores.reshape(-1) + 1e-9 * sizes.reshape(-1) / max(float(sizes.max()), 1e-30)
    bounds = Bounds(0, allowed.reshape(-1).astype(float))
    found = milp(objective, constraints=constraints, integrality=np.ones(rows * columns), bounds=bounds)
    return None if found.x is None else np.round(found.x).reshape(rows, columns).argmax(1)
