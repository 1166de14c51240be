"""The units in which a quantized network is reconstructed, and a walk over them beside the float graph.

A block is what lies between two points where one tensor alone carries on what the layers before computed: a residual
block, an attention or MLP block of a transformer, a layer of a plain chain (the "block" of BRECQ, arXiv 2102.05426,
section 3.2). Values that depend on the graph's inputs alone, such as a mask, may cross as well: they are computed anew.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .coded import CodedLayer, coded
from .graph import kind
from .lockstep import Run, partners, refresh

# A block of more layers than this (a network without a narrow point) is taken layer by layer: too much to fit at once.
MOST_LAYERS = 12
# Values of these kinds are no single float tensor worth comparing.
NO_CUT = ("split", "getitem", "shape", "compare", "lstm", "topk", "sort", "qdq", "weight", "input", "output", "other")


@dataclass(frozen=True)
class Unit:
    """Nodes of the quantized graph that are optimised together, and where the float graph computes the same.

    `entry` is what the unit reads (None: the graph's inputs alone), `exit` what it computes; `side` are the nodes it
    needs besides, in order: constants, and what depends on the graph's inputs alone.
    """

    nodes: tuple[Node, ...]
    side: tuple[Node, ...]
    entry: Node | None
    exit: Node
    layers: tuple[CodedLayer, ...]
    float_entry: Node | None
    float_exit: Node


@dataclass(frozen=True)
class UnitData:
    """What reaches a unit in the quantized and in the float graph, batch by batch, and what the float unit makes."""

    unit: Unit
    inputs: list[Tensor] | None
    wanted: list[Tensor] | None
    targets: list[Tensor]


def layer_units(float_graph: GraphModule, graph: GraphModule) -> list[Unit]:
    """One unit per layer with coded weights, with the relu or clamp that alone reads it."""
    matched = partners(float_graph, graph)
    units = []
    for node in graph.graph.nodes:
        partner = matched.get(node)
        if partner is not None:
            unit = _layer_unit(graph, node, partner)
            if unit is not None:
                units.append(unit)
    return units


def block_units(float_graph: GraphModule, graph: GraphModule) -> list[Unit]:
    """The graph's blocks that hold coded layers, in order; layers that lie in no block are units of their own."""
    matched = partners(float_graph, graph)
    twins = _twins(float_graph, graph, matched)
    order = list(graph.graph.nodes)
    units: list[Unit] = []
    start, entry = 0, None
    best: tuple[int, Node] | None = None  # the last cut since the last layer
    cuts = _cuts(order, matched, twins)
    held = 0
    for index, node in enumerate(order):
        if node in matched:
            if best is not None and held:
                units += _block(graph, order[start : best[0] + 1], entry, best[1], twins, matched)
                start, entry, held = best[0] + 1, best[1], 0
            best, held = None, held + 1
        if index in cuts:
            best = (index, cuts[index])
    if best is not None and held:
        units += _block(graph, order[start : best[0] + 1], entry, best[1], twins, matched)
    else:
        units += _layers(graph, order[start:], matched)
    return units


def _layers(graph: GraphModule, nodes: Sequence[Node], matched: dict[Node, Node]) -> list[Unit]:
    found = [_layer_unit(graph, n, matched[n]) for n in nodes if n in matched]
    return [u for u in found if u is not None]


def _block(
    graph: GraphModule,
    nodes: Sequence[Node],
    entry: Node | None,
    exit: Node,
    twins: dict[Node, Node],
    matched: dict[Node, Node],
) -> list[Unit]:
    layers = [coded(n) for n in nodes if n in matched]
    if len(layers) > MOST_LAYERS:
        return _layers(graph, nodes, matched)
    inside = [n for n in nodes if n.op not in ("placeholder", "output")]
    side = _side(graph, inside, entry)
    assert side is not None
    twin = twins[entry] if entry is not None else None
    return [Unit(tuple(inside), side, entry, exit, tuple(x for x in layers if x), twin, twins[exit])]


def _layer_unit(graph: GraphModule, node: Node, partner: Node) -> Unit | None:
    layer = coded(node)
    entry, float_entry = node.args[0], partner.args[0]
    if layer is None or not isinstance(entry, Node) or not isinstance(float_entry, Node):
        return None
    nodes, last, float_last = [node], node, partner
    after, float_after = _activation(node), _activation(partner)
    if after is not None and float_after is not None and after.target is float_after.target:
        nodes, last, float_last = [node, after], after, float_after
    side = _side(graph, nodes, entry)
    return Unit(tuple(nodes), side, entry, last, (layer,), float_entry, float_last) if side is not None else None


def _activation(node: Node) -> Node | None:
    """The relu or clamp that is the only reader of `node`."""
    readers = list(node.users)
    plain = len(readers) == 1 and kind(readers[0]) in ("relu", "clamp") and readers[0].all_input_nodes == [node]
    return readers[0] if plain else None


def _side(graph: GraphModule, nodes: Sequence[Node], entry: Node | None) -> tuple[Node, ...] | None:
    """What `nodes` need besides `entry`, in order; None where a weighted layer before computes some of it."""
    inside, wanted = set(nodes), set[Node]()
    stack = [s for n in nodes for s in n.all_input_nodes]
    while stack:
        source = stack.pop()
        if source is entry or source in inside or source in wanted or source.op == "placeholder":
            continue
        if coded(source) is not None:
            return None
        wanted.add(source)
        stack += source.all_input_nodes
    return tuple(n for n in graph.graph.nodes if n in wanted)


def _twins(float_graph: GraphModule, graph: GraphModule, matched: dict[Node, Node]) -> dict[Node, Node]:
    """Node of the quantized graph -> the node of the float graph that computes the same."""
    names = {n.name: n for n in float_graph.graph.nodes if n.op == "call_function"}
    found = {
        n: names[n.name]
        for n in graph.graph.nodes
        if n.op == "call_function" and n.name in names and names[n.name].target is n.target
    }
    return {**found, **matched}


def _cuts(order: list[Node], matched: dict[Node, Node], twins: dict[Node, Node]) -> dict[int, Node]:
    """Position -> the one value that is alive after it of all that the matched layers had a part in."""
    last = {source: i for i, n in enumerate(order) for source in n.all_input_nodes}
    downstream: set[Node] = set()
    alive: list[Node] = []
    cuts: dict[int, Node] = {}
    for index, node in enumerate(order):
        if node in matched or any(s in downstream for s in node.all_input_nodes):
            downstream.add(node)
            alive.append(node)
        alive = [n for n in alive if last.get(n, -1) > index]
        if len(alive) == 1 and alive[0] in twins and kind(alive[0]) not in NO_CUT and node is alive[0]:
            cuts[index] = node
    return cuts


def walk_units(
    float_graph: GraphModule,
    graph: GraphModule,
    batches: Iterable[list[Tensor]],
    units: Sequence[Unit],
    visit: Callable[[UnitData], None],
) -> None:
    """Call `visit` for each unit in order; what it changes of the unit's layers feeds the later ones.

    `units` must stand in the order of the graph. Memory: the tensors alive at one unit, for all samples given.
    """
    with torch.no_grad():
        listed = list(batches)
        floats, quantized = [Run(float_graph, b) for b in listed], [Run(graph, b) for b in listed]
        wanted = [n for u in units for n in (u.float_entry, u.float_exit) if n is not None]
        kept: dict[Node, list[Tensor]] = {}
        pending, ahead = iter(list(float_graph.graph.nodes)), list(graph.graph.nodes)
        for unit in units:
            while ahead[0] is not unit.nodes[0]:
                _step(quantized, ahead.pop(0))
            while unit.float_exit not in kept:
                node = next(pending)
                values = [run.step(node) for run in floats]
                if node in wanted:
                    kept[node] = values
                for run in floats:
                    run.forget(node)
            inputs = [run.env[unit.entry] for run in quantized] if unit.entry is not None else None
            reference = kept.get(unit.float_entry) if unit.float_entry is not None else None
            if reference is not None and inputs is not None and reference[0].shape != inputs[0].shape:
                reference = None
            with torch.enable_grad():
                visit(UnitData(unit, inputs, reference, kept[unit.float_exit]))
            for used in (unit.float_entry, unit.float_exit):
                if used is not None:
                    wanted.remove(used)
                    if used not in wanted:
                        kept.pop(used, None)


def _step(runs: Sequence[Run], node: Node) -> None:
    for run in runs:
        if coded(node) is not None:
            refresh(run, node)
        run.step(node)
        run.forget(node)


def quantizers(nodes: Iterable[Node]) -> list[Node]:
    """The static activation quantizers among `nodes`."""
    return [n for n in nodes if n.target is qdq.QUANTIZE]
