"""Run a decision's steps over the float graph, and put layers back in float where `auto` promised a floor."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate import steps
from calibrate.graph import clone, run
from calibrate.plan import Entry
from calibrate.samples import Batch, CalibrationSet, InputSpec
from calibrate.simulation import simulate
from convert.capture import Captured
from convert.drift import Drift
from convert.planning import Decision, keeping_float

Progress = Callable[[str, int], None]
# Samples for what is dear per sample: the race of observers, the search for layers to leave float.
FEW = 64
SEARCH = 16
BATCH = 16


@dataclass(frozen=True)
class Compressed:
    """`stages`: (step, graph after it), the last one is `graph`. `restored`: layers put back to float -> reason."""

    graph: GraphModule
    stages: tuple[tuple[str, GraphModule], ...]
    ledger: tuple[Entry, ...]
    decision: Decision
    restored: dict[str, str]

    @property
    def exact(self) -> GraphModule | None:
        """The graph after the last step that leaves the float function unchanged; None when none does."""
        last = None
        for name, graph in self.stages:
            if not steps.find(name).exact:
                break
            last = graph
        return last


def tensors(batch: Batch, inputs: Iterable[InputSpec]) -> list[Tensor]:
    """A batch as the graph's positional inputs, in their order and dtypes."""
    return [torch.from_numpy(batch[i.name].astype(i.dtype, copy=False)) for i in inputs]


def batch_size(captured: Captured, wanted: int = BATCH) -> int:
    """How many samples one run of the graph takes: `wanted` where the batch may vary, else what was captured."""
    return wanted if all(i.dynamic_batch for i in captured.inputs) else captured.inputs[0].shape[0]


def whole_batches(captured: Captured, data: CalibrationSet, limit: int | None = None) -> Iterable[Batch]:
    """Batches the graph can take: where its batch is fixed, an incomplete last one is left out."""
    size = batch_size(captured)
    fixed = not all(i.dynamic_batch for i in captured.inputs)
    seen = 0
    for batch in data.batches(size):
        count = len(next(iter(batch.values())))
        if (fixed and count < size) or (limit is not None and seen >= limit):
            break
        seen += count
        yield batch


def compress(captured: Captured, decision: Decision, data: CalibrationSet, progress: Progress) -> Compressed:
    """Apply the decision; when it has a floor and the simulation on calibration data is below, restore layers."""
    context = steps.Context(
        plan=decision.plan,
        batches=lambda: (tensors(b, captured.inputs) for b in whole_batches(captured, data)),
        few_batches=lambda: (tensors(b, captured.inputs) for b in whole_batches(captured, data, FEW)),
        progress=progress,
    )
    result = _apply(captured, decision, context)
    if decision.floor_db is None:
        return result
    reference = [run(captured.graph, t) for t in _search_batches(captured, data)]
    reached = _sqnr(captured, result.graph, data, reference)
    if reached >= decision.floor_db:
        return result
    return _restore(captured, decision, context, data, reference, reached)


def _apply(captured: Captured, decision: Decision, context: steps.Context) -> Compressed:
    context.plan = decision.plan
    graph = captured.graph
    stages: list[tuple[str, GraphModule]] = []
    ledger: list[Entry] = []
    for name in decision.plan.steps:
        graph = clone(graph)
        ledger += steps.apply(name, graph, context)
        stages.append((name, graph))
    return Compressed(graph, tuple(stages), tuple(ledger), decision, {})


def _search_batches(captured: Captured, data: CalibrationSet) -> Iterable[list[Tensor]]:
    return (tensors(b, captured.inputs) for b in whole_batches(captured, data, SEARCH))


def _sqnr(captured: Captured, graph: GraphModule, data: CalibrationSet, reference: list[tuple[Tensor, ...]]) -> float:
    drift = Drift(classifies=False)
    call = simulate(graph)
    for inputs, expected in zip(_search_batches(captured, data), reference, strict=True):
        got = call(inputs)
        drift.add(_named(captured, expected), _named(captured, got))
    return -math.inf if math.isnan(drift.sqnr_db) else drift.sqnr_db


def _named(captured: Captured, values: tuple[Tensor, ...]) -> Batch:
    return {name: v.numpy() for name, v in zip(captured.outputs, values, strict=True) if v.is_floating_point()}


def _restore(
    captured: Captured,
    decision: Decision,
    context: steps.Context,
    data: CalibrationSet,
    reference: list[tuple[Tensor, ...]],
    reached: float,
) -> Compressed:
    """Put back the layers that hurt most, judged one by one on calibration samples, until the floor holds."""
    floor = decision.floor_db
    assert floor is not None
    layers = [e.layer for e in _apply(captured, decision, context).ledger if e.action.startswith("int8")]
    scores = []
    for count, layer in enumerate(layers):
        alone = keeping_float(
            decision, {other: "float while one layer is judged" for other in layers if other != layer}
        )
        scores.append((_sqnr(captured, _apply(captured, alone, context).graph, data, reference), layer))
        context.progress("sensitivity", count + 1)
    ranked = [layer for _, layer in sorted(scores)]
    best = None
    stride = max(1, len(ranked) // 12)
    for count in [*range(stride, len(ranked), stride), len(ranked)]:
        reason = f"put back to float by auto: with it the simulation had {reached:.1f} dB, below {floor:.0f} dB"
        chosen = dict.fromkeys(ranked[:count], reason)
        best = _apply(captured, keeping_float(decision, chosen), context)
        best = Compressed(best.graph, best.stages, best.ledger, best.decision, chosen)
        if _sqnr(captured, best.graph, data, reference) >= floor:
            break
    assert best is not None
    return best
