"""Run every stage of one conversion on the held-out samples, side by side and batch by batch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibrate import qdq
from calibrate.graph import chooses_tokens, kind, layer_name, run
from calibrate.samples import Batch, CalibrationSet
from calibrate.simulation import ROUNDS, Adder, Simulation, simulate
from convert.capture import Captured
from convert.compress import Compressed, batch_size, depends_on_company, tensors
from convert.drift import Drift, OutputDrift, classifies, top1
from targets import Session

Runner = Callable[[Batch], Batch]
LAYER_SAMPLES = 32
# What the waterfall calls the float graph with fewer tokens.
STEP = "prune_tokens"
# How far a value in front of a quantizer may lie from the simulation's for no other reason than the order in which
# float numbers were added: the roundings of a long float32 sum that nearly cancels, two roundings of float16.
JITTER, HALF_JITTER = 2.0**-14, 2.0**-10


@dataclass
class Judged:
    """What the held-out samples showed. `stages` in order, the artifact last; `match` is artifact against simulation.

    `unsteady` is the simulation against itself with jitter, where codes are made from float arithmetic or tokens chosen
    by it, or against itself in single precision, where it computes in half.
    """

    stages: dict[str, Drift]
    match: Drift
    unsteady: Drift
    classifies: bool
    output_range: float = 0.0
    layers: list[tuple[str, OutputDrift]] = field(default_factory=list)
    samples: int = 0
    correct_float: int = 0
    correct_artifact: int = 0
    # by class: samples, those on which float and artifact agree, those float has right, those the artifact has right
    per_class: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    labelled: bool = False
    classes: int = 0


def graph_runner(
    captured: Captured,
    graph: GraphModule,
    compute: str,
    artifact_batch: int,
    adder: Adder = "float",
    jitter: float = 0.0,
) -> Runner:
    """`graph` as the artifact should compute it: integer kernels exact, the rest in `compute`.

    A graph that takes ranges at run time runs in slices of the artifact's batch: its numbers depend on the company.
    """
    call = simulate(graph, compute, adder, jitter)

    def once(batch: Batch) -> Batch:
        return _named(captured, call(tensors(batch, captured.inputs)))

    return _sliced(once, artifact_batch) if depends_on_company(graph) else once


def _sliced(run_slice: Runner, size: int) -> Runner:
    def once(batch: Batch) -> Batch:
        count = len(next(iter(batch.values())))
        parts = [run_slice({k: v[i : i + size] for k, v in batch.items()}) for i in range(0, count, size)]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    return once


def float_runner(captured: Captured) -> Runner:
    """The float reference."""
    return lambda batch: _named(captured, run(captured.graph, tensors(batch, captured.inputs)))


def session_runner(session: Session, batch_of_artifact: int) -> Runner:
    """The artifact, run in slices of its own batch."""
    return _sliced(session.run, batch_of_artifact)


def _named(captured: Captured, values: tuple[Tensor, ...]) -> Batch:
    return {name: v.detach().numpy() for name, v in zip(captured.outputs, values, strict=True)}


def evaluation_batches(
    captured: Captured, data: CalibrationSet, artifact_batch: int
) -> Iterator[tuple[Batch, NDArray | None]]:
    """Batches that both the graph and the artifact can take whole, with their labels; a remainder is left out."""
    size = math.lcm(batch_size(captured, 1), artifact_batch)
    size *= max(1, 32 // size)
    unit = math.lcm(batch_size(captured, 1), artifact_batch)
    seen = 0
    for batch in data.batches(size):
        count = len(next(iter(batch.values()))) // unit * unit
        if not count:
            break
        labels = None if data.labels is None else data.labels[seen : seen + count]
        seen += count
        yield {k: v[:count] for k, v in batch.items()}, labels


def judge(
    captured: Captured,
    compressed: Compressed,
    session: Session,
    data: CalibrationSet,
    artifact_batch: int,
    progress: Callable[[int], None] = lambda n: None,
    keep: Callable[[str, Batch], None] = lambda what, batch: None,
) -> Judged:
    """Compare captured, each step, the simulation and the artifact with the float reference over `data`.

    `keep(what, batch)` is offered the inputs ("input"), the float outputs ("float") and the artifact's ("artifact").
    """
    compute = compressed.decision.compute
    adder = compressed.decision.adder
    reference = float_runner(captured)
    runners: dict[str, Runner] = {}
    if compressed.tokens is not None:
        runners[STEP] = graph_runner(captured, compressed.tokens, "float32", artifact_batch)
    for name, graph in compressed.stages[:-1]:
        runners[name] = graph_runner(captured, graph, "float32", artifact_batch)
    last_step, last_graph = compressed.stages[-1]
    runners[last_step] = graph_runner(captured, last_graph, "float32", artifact_batch, adder)
    simulated = last_step
    if compute == "float16":
        simulated = "float16 arithmetic"
        runners[simulated] = graph_runner(captured, last_graph, "float16", artifact_batch)
    jitter = None
    moves = _quantizes_activations(last_graph) and Simulation(last_graph, compute).rounds_freely
    if moves or compressed.tokens is not None or compares(last_graph):
        amount = HALF_JITTER if compute == "float16" else JITTER
        jitter = graph_runner(captured, last_graph, compute, artifact_batch, adder, amount)
    runners["artifact"] = session_runner(session, artifact_batch)
    judged: Judged | None = None
    for batch, labels in evaluation_batches(captured, data, artifact_batch):
        expected = reference(batch)
        if judged is None:
            scores = classifies(expected, data.labels)
            stages = {name: Drift(scores) for name in runners}
            judged = Judged(stages, Drift(False), Drift(False), scores, labelled=scores and labels is not None)
            judged.classes = next(iter(expected.values())).shape[1] if scores else 0
        outputs = {name: runner(batch) for name, runner in runners.items()}
        for name, value in outputs.items():
            judged.stages[name].add(expected, value)
        judged.match.add(outputs[simulated], outputs["artifact"])
        if jitter is not None:
            judged.unsteady.add(outputs[simulated], jitter(batch))
        elif simulated != last_step:
            judged.unsteady.add(outputs[last_step], outputs[simulated])
        _count(judged, expected, outputs["artifact"], labels)
        keep("input", batch)
        keep("float", expected)
        keep("artifact", outputs["artifact"])
        progress(judged.samples)
    assert judged is not None, "the evaluation set is empty"
    judged.layers = layer_drift(captured, compressed, data)
    return judged


def _count(judged: Judged, expected: Batch, got: Batch, labels: NDArray | None) -> None:
    first = next(iter(expected))
    judged.samples += len(expected[first])
    spread = [float(np.ptp(v)) for v in expected.values() if np.issubdtype(v.dtype, np.floating) and v.size]
    judged.output_range = max([judged.output_range, *spread])
    if labels is None or not judged.classifies:
        return
    wanted, found = top1(expected[first]), top1(got[first])
    judged.correct_float += int((wanted == labels).sum())
    judged.correct_artifact += int((found == labels).sum())
    for label in np.unique(labels):
        here = labels == label
        now = (here.sum(), (wanted == found)[here].sum(), (wanted == label)[here].sum(), (found == label)[here].sum())
        seen, same, right, kept = judged.per_class.get(int(label), (0, 0, 0, 0))
        judged.per_class[int(label)] = (seen + int(now[0]), same + int(now[1]), right + int(now[2]), kept + int(now[3]))


def _quantizes_activations(graph: GraphModule) -> bool:
    return any(n.target in ROUNDS for n in graph.graph.nodes)


def compares(graph: GraphModule) -> bool:
    """Whether a rounding decides something whole: which of two tokens stays, or a bit of an embedding."""
    return any(chooses_tokens(n) for n in graph.graph.nodes)


def output_step(graph: GraphModule) -> float | None:
    """The largest scale of an output that leaves the graph as dequantized codes; None when all outputs are float."""
    result = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    scales = [
        float(n.args[1])
        for n in (result if isinstance(result, tuple | list) else [result])
        if isinstance(n, Node) and n.target is qdq.DEQUANTIZE
    ]
    return max(scales) if scales else None


class _Layers(Interpreter):
    """Keeps the output of every layer worth naming, for one batch."""

    def __init__(self, graph: GraphModule, wanted: set[str]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.wanted, self.seen = wanted, dict[str, np.ndarray]()

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        name = layer_name(n)
        if n.op == "call_function" and name in self.wanted and isinstance(value, Tensor) and kind(n) != "qdq":
            self.seen[name] = value.detach().numpy()
        return value


def layer_drift(captured: Captured, compressed: Compressed, data: CalibrationSet) -> list[tuple[str, OutputDrift]]:
    """Each layer's output in the final graph against the float graph's, worst first, over a few held-out samples."""
    before = compressed.exact or compressed.tokens or captured.graph
    wanted = {layer_name(n) for n in before.graph.nodes if kind(n) in ("conv", "linear", "matmul", "attention", "add")}
    found: dict[str, OutputDrift] = {}
    samples = 0
    for batch, _ in evaluation_batches(captured, data, 1):
        inputs = tensors(batch, captured.inputs)
        runs = []
        for graph in (before, compressed.graph):
            watcher = _Layers(graph, wanted)
            with torch.no_grad():
                watcher.run(*inputs)
            runs.append(watcher.seen)
        for name in runs[0].keys() & runs[1].keys():
            if runs[0][name].shape == runs[1][name].shape:
                found.setdefault(name, OutputDrift()).add(runs[0][name], runs[1][name])
        samples += len(next(iter(batch.values())))
        if samples >= LAYER_SAMPLES:
            break
    return sorted(found.items(), key=lambda item: (item[1].sqnr_db, item[0]))
