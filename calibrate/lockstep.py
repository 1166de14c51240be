"""Run float graph and quantized graph side by side, layer by layer, and let a step change each layer on the way.

What a layer sees is then computed by the changed layers before it ("true sequential" in GPTQ, the empirical bias
correction of arXiv 1906.04721, section 4.2), at the cost of one run of each graph. Memory: the tensors alive at one
layer, for the samples given; it does not depend on how many samples the calibration set has.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import padding
from .coded import CodedLayer, coded
from .graph import is_weighted, layer_name


@dataclass
class Visit:
    """One layer of the quantized graph, with the batches that reach it.

    `inputs`: what the layer reads in the quantized graph (after Q/DQ where static); `wanted`: what the float graph
    reads there; `targets`: what the float layer computed. `compute()` runs the layer as it now stands on `inputs`.
    `partner` is the layer's node in the float graph. `visible`: of each batch, the tokens that are no padding, bool
    [n, tokens]; None where nothing says so.
    """

    layer: CodedLayer
    inputs: list[Tensor]
    wanted: list[Tensor]
    targets: list[Tensor]
    compute: Callable[[], list[Tensor]]
    partner: Node
    visible: list[Tensor | None] = field(default_factory=list)


class Run(Interpreter):
    """One batch on its way through a graph, node by node; `env` holds the values still wanted."""

    def __init__(self, graph: GraphModule, inputs: list[Tensor]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.args_iter = iter(inputs)
        self.env: dict[Node, Any] = {}
        self.last_use: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        for node in reversed(list(graph.graph.nodes)):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self.last_use.setdefault(node, []).append(source)

    def step(self, node: Node) -> Any:
        """Compute `node` and keep its value."""
        self.env[node] = self.run_node(node)
        return self.env[node]

    def forget(self, node: Node) -> None:
        """Drop what `node` was the last to read."""
        for source in self.last_use.get(node, ()):
            self.env.pop(source, None)


def walk(
    float_graph: GraphModule,
    graph: GraphModule,
    batches: Iterable[list[Tensor]],
    visit: Callable[[Visit], None],
) -> None:
    """Call `visit` for each layer with coded weights, in order; a layer it changes feeds the later ones.

    `graph` must stem from `float_graph`: layers are matched by name, and in order where a name repeats. `visit` may
    replace constants of its layer (`CodedLayer.set_codes`, `set_scales`, `set_bias`), nothing else.
    """
    with torch.no_grad():
        listed = list(batches)
        floats = [Run(float_graph, b) for b in listed]
        quantized = [Run(graph, b) for b in listed]
        seen = [padding.visible(float_graph, b) for b in listed]
        del listed
        matched = partners(float_graph, graph)
        pending = iter(list(float_graph.graph.nodes))
        for node in list(graph.graph.nodes):
            if node.op == "output":
                break
            partner = matched.get(node)
            found = coded(node) if partner is not None else None
            if found is None or partner is None:
                for run in quantized:
                    run.step(node)
                    run.forget(node)
                continue
            held = _advance(floats, pending, partner)
            source = node.args[0]
            assert isinstance(source, Node)
            inputs = [run.env[source] for run in quantized]

            def compute(node: Node = node) -> list[Tensor]:
                return [_again(run, node) for run in quantized]

            visit(Visit(found, inputs, [h[0] for h in held], [h[1] for h in held], compute, partner, seen))
            for run in quantized:
                refresh(run, node)
                run.step(node)
                run.forget(node)


def _advance(floats: list[Run], pending: Any, partner: Node) -> list[tuple[Tensor, Tensor]]:
    """Run the float graphs up to `partner`; (its input, its output) per batch."""
    held: list[tuple[Tensor, Tensor]] = []
    for node in pending:
        source = node.args[0] if node is partner else None
        for run in floats:
            kept = run.env[source] if isinstance(source, Node) else None
            value = run.step(node)
            run.forget(node)
            if node is partner:
                assert kept is not None
                held.append((kept, value))
        if node is partner:
            break
    return held


def refresh(run: Run, node: Node) -> None:
    """Compute the constants that `node` reads again: a visit may have replaced them, or added some."""
    wanted, stack = [], list(node.all_input_nodes[1:])
    while stack:
        source = stack.pop()
        if source.op == "get_attr" or all(_constant(a) for a in source.all_input_nodes):
            wanted.append(source)
            stack += source.all_input_nodes
    for source in reversed(wanted):
        run.step(source)


def _constant(node: Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(node.all_input_nodes) and all(_constant(a) for a in node.all_input_nodes)
    )


def _again(run: Run, node: Node) -> Tensor:
    refresh(run, node)
    return run.run_node(node)


def partners(float_graph: GraphModule, graph: GraphModule) -> dict[Node, Node]:
    """Layer of the quantized graph -> the same layer of the float graph, in the order both run in."""
    waiting: dict[str, list[Node]] = {}
    position = {n: i for i, n in enumerate(float_graph.graph.nodes)}
    for node in float_graph.graph.nodes:
        if is_weighted(node):
            waiting.setdefault(layer_name(node), []).append(node)
    found: dict[Node, Node] = {}
    reached = -1
    for node in graph.graph.nodes:
        queue = waiting.get(layer_name(node)) if coded(node) is not None else None
        if queue and position[queue[0]] > reached:
            found[node] = queue.pop(0)
            reached = position[found[node]]
    return found
