"""The torch module that runs an ONNX graph node by node; what depends on constants alone is computed once."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.errors import TightfitError

from . import host
from .reading import Graph
from .registry import OnnxNode, Operator, operators
from .values import Constant, Number, Numbers, Value, as_numbers, constant, materialised

RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
STATISTICS = {"BatchNormalization": (3, 4)}


class OnnxModule(torch.nn.Module):
    """A positional function of the graph's inputs that returns the tuple of its outputs.

    `names`: attribute -> ONNX's name of that constant. Raises TightfitError for operators that are not supported.
    """

    def __init__(self, graph: Graph, path: Path) -> None:
        super().__init__()
        self._path = path
        self._table = operators()
        self._inputs = tuple(i.name for i in graph.inputs)
        self._outputs = graph.outputs
        self._known: dict[str, Constant] = {n: constant(n, t) for n, t in graph.constants.items()}
        self.names: dict[str, str] = {}
        self._attributes: dict[str, str] = {}
        with torch.no_grad():
            self._nodes = self._folded(list(graph.nodes))
        refuse_unknown([n for n in self._nodes if not self._is_known(n)], self._table, path)
        self._register()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        values: dict[str, Value] = {**self._known, **dict(zip(self._inputs, tensors, strict=True)), "": None}
        for node in self._nodes:
            with torch.fx.traceback.annotate({"layer": node.name}):
                results = self._run(node, [values[name] for name in node.inputs], self._stored)
            for name, result in zip(node.outputs, results, strict=False):
                values[name] = result
        return tuple(self._as_tensor(values[name], self._stored) for name in self._outputs)

    # --- building

    def _is_known(self, node: OnnxNode) -> bool:
        return node.op in self._table and node.domain == "ai.onnx"

    def _folded(self, waiting: list[OnnxNode]) -> tuple[OnnxNode, ...]:
        """The nodes that depend on an input; all others become constants. Branches whose side is known disappear."""
        left: list[OnnxNode] = []
        waiting.reverse()
        while waiting:
            node = waiting.pop()
            foldable = all(not name or name in self._known for name in node.inputs)
            if node.op == "If" and node.inputs[0] in self._known:
                waiting += reversed(self._branch(node))
            elif foldable and node.op not in RANDOM and self._is_known(node):
                inputs: list[Value] = [self._known[n] if n else None for n in node.inputs]
                for name, result in zip(node.outputs, self._run(node, inputs, lambda c: c.tensor), strict=False):
                    self._known[name] = constant(name, self._as_tensor(result, lambda c: c.tensor))
            else:
                left.append(node)
        return tuple(left)

    def _branch(self, node: OnnxNode) -> list[OnnxNode]:
        taken: Graph = node.get("then_branch" if bool(self._known[node.inputs[0]].tensor) else "else_branch")
        self._known.update({n: constant(n, t) for n, t in taken.constants.items()})
        ends = [
            OnnxNode("Identity", "ai.onnx", f"{node.name}_{outer}", (inner,), (outer,), node.opset)
            for inner, outer in zip(taken.outputs, node.outputs, strict=True)
        ]
        return [*taken.nodes, *ends]

    def _register(self) -> None:
        """Constants that run-time nodes read become parameters (trained floats) or buffers, under their ONNX names."""
        readers = [(name, node, i) for node in self._nodes for i, name in enumerate(node.inputs) if name in self._known]
        statistics = {name for name, node, i in readers if i in STATISTICS.get(node.op, ())}
        for name in dict.fromkeys([*(r[0] for r in readers), *(o for o in self._outputs if o in self._known)]):
            tensor = self._known[name].tensor
            attribute = self._free(name)
            if tensor.dtype == torch.float32 and tensor.numel() > 1 and name not in statistics:
                self.register_parameter(attribute, torch.nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(attribute, tensor)
            self._attributes[name] = attribute
            self.names[attribute] = name

    def _free(self, name: str) -> str:
        stem = "c_" + re.sub(r"\W", "_", name).strip("_")
        attribute, count = stem, 0
        while hasattr(self, attribute):
            count += 1
            attribute = f"{stem}_{count}"
        return attribute

    # --- running

    def _stored(self, constant: Constant) -> Tensor:
        stored: Tensor = getattr(self, self._attributes[constant.name])
        return stored

    def _run(self, node: OnnxNode, inputs: Sequence[Value], stored: Callable[[Constant], Tensor]) -> tuple[Any, ...]:
        if node.op in ("Shape", "Size") and isinstance(inputs[0], Tensor | Numbers):
            return (_measured(node, inputs[0]),)
        if any(isinstance(i, Numbers) for i in inputs):
            numbers = [as_numbers(i) for i in inputs]
            if all(n is not None or i is None for n, i in zip(numbers, inputs, strict=True)):
                computed = host.compute(node, numbers)
                if computed is not None:
                    return (computed,)
        operator = self._table[node.op]
        arguments = [self._argument(node, operator, i, v, stored) for i, v in enumerate(inputs)]
        try:
            result = operator.function(node, *arguments)
        except (TypeError, KeyError, AttributeError) as error:  # a form of the operator that its function doesn't take
            raise node.refuse(f"has a form ({type(error).__name__}: {error})") from error
        return result if isinstance(result, tuple) else (result,)

    def _argument(
        self, node: OnnxNode, operator: Operator, position: int, value: Value, stored: Callable[[Constant], Tensor]
    ) -> Any:
        if value is None:
            return None
        if position in operator.hint:
            return as_numbers(value) or self._as_tensor(value, stored)
        if position not in operator.host:
            return self._as_tensor(value, stored)
        if isinstance(value, Constant) and value.numbers is not None:
            return list(value.numbers)
        if isinstance(value, Numbers):
            return list(value.values)
        raise node.refuse(
            f"takes its input {position} ('{node.inputs[position]}') from values that only a run can know"
        )

    def _as_tensor(self, value: Value, stored: Callable[[Constant], Tensor]) -> Tensor:
        if isinstance(value, Constant):
            return stored(value)
        if isinstance(value, Numbers):
            return materialised(value)
        assert isinstance(value, Tensor)
        return value


def _measured(node: OnnxNode, value: Tensor | Numbers) -> Numbers:
    """Shape or Size as numbers, so that nothing computed from them becomes a tensor."""
    if isinstance(value, Numbers):
        shape: tuple[Number, ...] = () if value.scalar else (len(value.values),)
    else:
        shape = tuple(value.shape)
    if node.op == "Size":
        return Numbers((math.prod(shape),), True)
    return Numbers(shape[node.get("start", 0) : node.get("end", None)])


def refuse_unknown(nodes: Sequence[OnnxNode], table: dict[str, Operator], path: Path) -> None:
    """Raise TightfitError naming every operator that is not supported, with the nearest that is."""
    if not nodes:
        return
    first = {(n.domain, n.op): n for n in reversed(nodes)}
    told = []
    for domain, op in sorted(first):
        near = difflib.get_close_matches(op, table, 1)
        hint = f", nearest supported: {near[0]}" if near else ""
        where = "" if domain == "ai.onnx" else f" of the domain '{domain}'"
        told.append(f"{op}{where} (node '{first[domain, op].name}'{hint})")
    count = f"{len(told)} operator{'s' * (len(told) > 1)}"
    raise TightfitError(
        f"{path} uses {count} that capture does not know: {'; '.join(told[:6])}{' and others' * (len(told) > 6)}. "
        f"Export the model without, or capture it from PyTorch (MODULE:FUNCTION). {len(table)} operators are supported."
    )
