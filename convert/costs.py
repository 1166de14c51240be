"""What each operator of a float graph costs: output shapes at batch 1, multiply-accumulates, trained numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from calibrate.graph import constant, kind, layer_name, operator_name
from calibrate.samples import InputSpec

Shape = tuple[int, ...]
HIDDEN = ("getitem", "shape")


@dataclass(frozen=True)
class Cost:
    """One operator. `shape`: its output's (the first one's) at batch 1. `parameters`: trained numbers that no operator
    before it reads. `macs`: multiply-accumulates for one sample; None where they are not counted."""

    name: str
    kind: str
    operator: str
    shape: Shape
    parameters: int
    macs: int | None


def costs(graph: GraphModule, inputs: Sequence[InputSpec]) -> list[Cost]:
    """The operators of a float graph in the order they run; nothing is computed, shapes alone flow through it."""
    shapes = shapes_of(graph, inputs)
    found: list[Cost] = []
    counted: set[str] = set()
    for node in graph.graph.nodes:
        what = kind(node)
        if node.op != "call_function" or what in HIDDEN:
            continue
        parameters = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr" and _is_parameter(graph, source) and str(source.target) not in counted:
                counted.add(str(source.target))
                parameters += constant(graph, source).numel()
        shape = shapes.get(node, ())
        found.append(Cost(layer_name(node), what, operator_name(node), shape, parameters, macs(node, shapes)))
    return found


def shapes_of(graph: GraphModule, inputs: Sequence[InputSpec]) -> dict[Node, Shape]:
    """The shape of every node that gives a tensor, at batch 1 where the batch is free."""
    shapes = _Shapes(graph)
    shapes.trace(inputs)
    return shapes.of


class _Shapes(Interpreter):
    """Runs the graph on tensors without data; `of` is the shape of every node that gives a tensor."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.of: dict[Node, Shape] = {}

    def trace(self, inputs: Sequence[InputSpec]) -> None:
        """`inputs` at batch 1; a fixed batch as it is."""
        with self.mode, torch.no_grad():
            tensors = [torch.empty(_batch_of_one(i), dtype=getattr(torch, i.dtype)) for i in inputs]
            self.run(*tensors)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self.mode.from_tensor(value)
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor):
            self.of[n] = tuple(int(d) for d in first.shape)
        return value


def _batch_of_one(spec: InputSpec) -> Shape:
    return (1, *spec.sample_shape) if spec.dynamic_batch else spec.shape


def _is_parameter(graph: GraphModule, node: Node) -> bool:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return bool(node.meta.get("parameter", isinstance(value, torch.nn.Parameter)))


def macs(node: Node, shapes: dict[Node, Shape]) -> int | None:
    """Multiply-accumulates of one operator; 0 for those that have no product of two tensors along an axis."""
    what = kind(node)
    if what == "lstm":
        return None  # a loop inside one operator
    if what == "einsum":
        return _einsum_macs(node, shapes)
    operands = [shapes.get(a, ()) for a in node.args[:3] if isinstance(a, Node)]
    out = math.prod(shapes.get(node, ()))
    if what == "conv":
        return out * math.prod(operands[1][1:])
    if what == "conv_transpose":
        return math.prod(operands[0]) * math.prod(operands[1][1:])
    if operator_name(node) in ("addmm", "baddbmm"):
        return out * operands[1][-1]
    if what in ("linear", "matmul"):
        return out * operands[0][-1]
    if what == "attention":  # query key^T, then its product with the values
        query, key, value = operands
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _einsum_macs(node: Node, shapes: dict[Node, Shape]) -> int | None:
    """One multiply-accumulate for every combination of indices of a product of two tensors."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms = equation.partition("->")[0].split(",")
    if len(terms) != 2 or "." in equation or not isinstance(operands, list | tuple):
        return None
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        assert isinstance(operand, Node)
        sizes.update(zip(term, shapes[operand], strict=True))
    return math.prod(sizes.values())
