"""Run a decision's steps over the float graph: what one plan makes of one model."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.graph import clone, run
from calibrate.histogram import Histogram
from calibrate.plan import Entry, Plan, QParams
from calibrate.samples import Batch, CalibrationSet, InputSpec
from calibrate.simulation import Adder, simulate
from convert.capture import Captured
from convert.drift import Drift
from convert.planning import Decision

Effort = Literal["fast", "normal", "max"]
Outputs = tuple[Tensor, ...]
# Samples for what is dear per sample: the race of observers, layers that are changed one after the other.
FEW = 64
# Models that read little per sample see more of them: so many values, if the calibration set has as many samples, but
# never those that judge where trials are judged.
FEW_VALUES, MOST_FEW = 2**15, 256
# Samples that judge whether a change helped, at most: of the last half of the calibration set, where the few above are
# the first. With 64 a ResNet-20's score still moves by 0.4 dB with the choice of samples, more than many steps bring.
JUDGED = 128
BATCH = 16
# How much longer than by default a step may work that has a time limit or counts its rounds.
PATIENCE = {"fast": 0.25, "normal": 1.0, "max": 4.0}
COUNTED = ("iterations", "time_limit_s")


@dataclass(frozen=True)
class Compressed:
    """`stages`: (step, graph after it), the last one is `graph`. `restored`: layers put back to float -> reason.

    `notes`: sentences for the report on what was tried and chosen. `tokens`: the float graph with fewer tokens that the
    steps began with, where a recipe removes any.
    """

    graph: GraphModule
    stages: tuple[tuple[str, GraphModule], ...]
    ledger: tuple[Entry, ...]
    decision: Decision
    restored: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokens: GraphModule | None = None

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


@dataclass
class _Prefix:
    """The graph after some exact steps, and what was learned of its tensors."""

    graph: GraphModule
    stages: tuple[tuple[str, GraphModule], ...] = ()
    ledger: tuple[Entry, ...] = ()
    histograms: dict[str, Histogram] = field(default_factory=dict)
    chosen: dict[frozenset[str], QParams] = field(default_factory=dict)


class Builder:
    """Applies plans to one model with one calibration set; exact steps and ranges that plans share are found once."""

    def __init__(
        self,
        captured: Captured,
        data: CalibrationSet,
        progress: steps.Progress = steps.silent,
        effort: Effort = "normal",
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        self.captured, self.data, self.progress, self.effort, self.seed = captured, data, progress, effort, seed
        self._prefixes: dict[Any, _Prefix] = {}
        self._judge = Judge(captured, data, batch)
        self._few = FEW

    def build(self, decision: Decision) -> Compressed:
        """Apply the decision's steps, each to a graph of its own."""
        plan = replace(decision.plan, parameters=_patient(decision.plan, self.effort))
        self._few = self._how_few(judged=decision.automatic or decision.search is not None)
        count = next((i for i, s in enumerate(plan.steps) if not steps.find(s).exact), len(plan.steps))
        start = self._prefix(plan, plan.steps[:count])
        context = self._context(plan, start)
        graph, stages, ledger = start.graph, list(start.stages), list(start.ledger)
        for name in plan.steps[count:]:
            graph = clone(graph)
            ledger += steps.apply(name, graph, context)
            stages.append((name, graph))
        return Compressed(graph, tuple(stages), tuple(ledger), decision)

    def forget_trials(self, kept: tuple[str, ...]) -> None:
        """Drop the graphs of exact steps that were tried and did not become the beginning of `kept`: each may hold the
        model's weights once more."""
        self._prefixes = {k: p for k, p in self._prefixes.items() if kept[: len(k[0])] == k[0]}

    def look(self, step: str, plan: Plan) -> list[Entry]:
        """What a step that changes nothing says of the graph before `plan` quantizes it."""
        self._few = self._how_few(judged=True)
        count = next((i for i, s in enumerate(plan.steps) if not steps.find(s).exact), len(plan.steps))
        start = self._prefix(plan, plan.steps[:count])
        return steps.apply(step, clone(start.graph), self._context(plan, start))

    def _prefix(self, plan: Plan, names: tuple[str, ...]) -> _Prefix:
        # What an exact step does may depend on which formats it prepares for, not on which layers stay float.
        told = {name: plan.parameters[name] for name in names if name in plan.parameters}
        kept = replace(plan, steps=(), keep_float={}, formats={}, parameters=told)
        key = (names, repr(kept), self._few)
        if key not in self._prefixes:
            if not names:
                self._prefixes[key] = _Prefix(self.captured.graph)
            else:
                before = self._prefix(plan, names[:-1])
                graph = clone(before.graph)
                found = _Prefix(graph)
                entries = steps.apply(names[-1], graph, self._context(plan, found))
                found.stages = (*before.stages, (names[-1], graph))
                found.ledger = (*before.ledger, *entries)
                self._prefixes[key] = found
        return self._prefixes[key]

    def _context(self, plan: Plan, prefix: _Prefix) -> steps.Context:
        def batches(limit: int | None = None) -> Iterable[list[Tensor]]:
            return (tensors(b, self.captured.inputs) for b in whole_batches(self.captured, self.data, limit))

        few = self._few
        return steps.Context(
            plan=plan,
            batches=batches,
            few_batches=lambda: batches(few),
            progress=self.progress,
            samples=len(self.data),
            labels=torch.from_numpy(self.data.labels) if self.data.labels is not None else None,
            seed=self.seed,
            histograms=prefix.histograms,
            chosen=prefix.chosen,
        )

    def _how_few(self, judged: bool) -> int:
        """How many samples a step gets that looks at few; with `judged` none of those that judge, beyond FEW."""
        values = sum(math.prod(i.sample_shape) for i in self.captured.inputs)
        wanted = max(FEW, min(MOST_FEW, FEW_VALUES // max(values, 1)))
        return max(FEW, min(wanted, len(self.data) - self._judge.samples)) if judged else wanted

    def score(self, made: Compressed) -> float:
        """How close the simulation is to float on the last samples of the calibration set, in dB: see `Judge.score`."""
        return self._judge.score(made.graph, made.decision.adder)

    @property
    def judge(self) -> "Judge":
        """What scores plans."""
        return self._judge


def _patient(plan: Plan, effort: Effort) -> dict[str, Mapping[str, Any]]:
    """The steps' parameters with rounds and time limits scaled by the effort, where the recipe did not set them."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in plan.steps:
        defaults = {k: v for k, v in steps.defaults(name).items() if k in COUNTED and v}
        scaled = {k: type(v)(max(1, v * PATIENCE[effort])) for k, v in defaults.items()}
        given = {**scaled, **plan.parameters.get(name, {})}
        if given:
            found[name] = given
    return found


def depends_on_company(graph: GraphModule) -> bool:
    """Whether a sample's numbers depend on the others in its batch: where one range at run time serves all of them."""
    return any(n.target in qdq.DYNAMIC and "tensor_uint8" in n.args for n in graph.graph.nodes)


class Judge:
    """How far a graph's simulation is from float on the last `JUDGED` samples of a calibration set.

    Where the set has at least twice as many, none of them serves a step that looks at few samples. `batch`: the
    artifact's.
    """

    def __init__(self, captured: Captured, data: CalibrationSet, batch: int = 1) -> None:
        self.captured, self.batch = captured, batch
        count = min(JUDGED, max(len(data) // 2, min(FEW, len(data))))
        fixed = batch_size(captured, 1)
        count = max(fixed, count // fixed * fixed)
        part = data.select(np.arange(len(data) - count, len(data)))
        self._inputs = [tensors(b, captured.inputs) for b in whole_batches(captured, part)]
        self._expected = [run(captured.graph, t) for t in self._inputs]

    @property
    def samples(self) -> int:
        """How many samples judge."""
        return sum(len(t[0]) for t in self._inputs)

    @property
    def inputs(self) -> list[list[Tensor]]:
        """The samples, batch by batch, as the graph's positional inputs."""
        return self._inputs

    @property
    def expected(self) -> list[tuple[Tensor, ...]]:
        """What the float graph makes of them."""
        return self._expected

    def score(self, graph: GraphModule, adder: Adder = "float") -> float:
        """The lesser of the SQNR over everything and that of the mean relative error of a sample, dB; -inf: undefined.

        The first alone is blind to what happens to samples of small outputs; the second is what a mean cosine sees:
        20 dB is a cosine of 0.995.
        """
        call = simulate(graph, adder=adder)
        made = []
        for inputs in self._inputs:
            made.append(self._in_company(call, inputs) if depends_on_company(graph) else call(inputs))
        return self.closeness(made)

    def closeness(self, made: Iterable[Outputs]) -> float:
        """The same for outputs of these samples, batch by batch."""
        drift, each = Drift(classifies=False), _Each()
        for expected, got in zip(self._expected, made, strict=True):
            drift.add(self.named(expected), self.named(got))
            each.add(expected, got)
        return -math.inf if math.isnan(drift.sqnr_db) else min(drift.sqnr_db, each.db)

    def _in_company(self, call: Callable[[Iterable[Tensor]], tuple[Tensor, ...]], inputs: list[Tensor]) -> Outputs:
        """What `call` makes of the samples in batches of the artifact's size."""
        size = batch_size(self.captured, self.batch)
        parts = [call([t[i : i + size] for t in inputs]) for i in range(0, len(inputs[0]), size)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def named(self, values: Outputs) -> Batch:
        """Outputs by name, those that are float numbers."""
        return {n: v.numpy() for n, v in zip(self.captured.outputs, values, strict=True) if v.is_floating_point()}


@dataclass
class _Each:
    """The mean over samples of squared error over squared output."""

    total: float = 0.0
    count: int = 0

    def add(self, expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
        """Take in one batch; axis 0 counts samples."""
        for want, have in zip(expected, got, strict=True):
            if not want.is_floating_point() or want.dim() < 2:
                continue
            power = want.double().flatten(1).square().sum(1)
            error = (have - want).double().flatten(1).square().sum(1)
            alive = power > 0
            self.total += float((error[alive] / power[alive]).sum())
            self.count += int(alive.sum())

    @property
    def db(self) -> float:
        """The mean as a ratio of signal to noise in dB; inf where there is no error."""
        return -10 * math.log10(self.total / self.count) if self.count and self.total > 0 else math.inf
