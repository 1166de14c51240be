"""From a quantized graph to a `Program`: which node is computed by which kernel, on what."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import integer_kernels, whole_steps

from . import Job
from ._c_program import Program, Store, Tensor
from .errors import TargetError

CTYPES = {torch.float32: "float", torch.int8: "int8_t", torch.int64: "int64_t", torch.int32: "int32_t"}
# What changes no number and only moves values, so that it works on codes too.
MOVES = frozenset(
    ("reshape", "transpose", "slice", "select", "split", "expand", "cat", "pad", "max_pool", "upsample", "stack")
)
# Names of operators that hand their input on.
SAME = frozenset(("clone", "contiguous", "alias", "detach", "detach_", "dropout", "lift_fresh_copy", "identity"))
Handler = Callable[["Lowering", Node], Tensor | list[Tensor]]
Parameters = tuple[Any, ...]  # of a quantize or dequantize node: scale, zero point, least and largest code, dtype


class Lowering:
    """One graph on its way to a program; `run` does it all. Handlers of `_c_codes` and `_c_floats` add the calls."""

    def __init__(self, job: Job, handlers: dict[str, Handler], integer: "Callable[[Lowering, Node], bool]") -> None:
        self.job, self.graph = job, job.graph
        self.program = Program(job.name)
        self.handlers, self.integer = handlers, integer
        found = integer_kernels(job.graph)
        self.kernels = found.kernels
        # A bias of its own precision is added in float: the layer's output is float, and is quantized behind it.
        loose = {n for n in found.kernels if not _has_whole_bias(self.graph, n, found.kernels[n].unit)}
        self.outputs = {n: o for n, o in found.outputs.items() if n not in loose}
        self.written = {q: n for q, n in found.written.items() if n not in loose}
        self.writer = {n: q for q, n in self.written.items()}
        self.fused = {n for q, source in self.written.items() for n in _between(q, source)}
        self.facts = _Facts(job.graph)
        self.facts.observe(job)
        self.values: dict[Node, Tensor | list[Tensor]] = {}
        self.signs: set[Node] = set()  # quantize nodes whose codes are -1 and +1 only
        self._laid: dict[tuple[int, bool], Tensor] = {}
        self._floats: dict[Node, Tensor] = {}
        self._moved: dict[Node, Tensor | list[Tensor]] = {}

    def run(self) -> Program:
        """The program, with its memory planned. Raises TargetError for what no kernel computes."""
        for position, node in enumerate(n for n in self.graph.graph.nodes if n.op == "placeholder"):
            self._input(node, position)
        for node in self.graph.graph.nodes:
            computes = node.op == "call_function" and node not in self.facts.fixed and node not in self.facts.numbers
            if computes and not graphs.operator_name(node).startswith("_assert"):
                self._lower(node)
        output = next(n for n in self.graph.graph.nodes if n.op == "output")
        results = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
        for name, node in zip(self.job.outputs, results, strict=True):
            self.program.outputs.append((name, self.plain(node)))
        self.program.plan_memory()
        return self.program

    def _input(self, node: Node, position: int) -> None:
        spec = self.job.inputs[position]
        ctype = CTYPES.get(getattr(torch, spec.dtype, None))
        if ctype is None or ctype == "int8_t":
            raise TargetError(
                f"the input '{spec.name}' is {spec.dtype}: the target 'c' takes float32, int64 and int32. Cast it in "
                "the model, or choose another target."
            )
        store = Store(0, 0, 0, argument=position)
        self.values[node] = tensor = Tensor(tuple(spec.shape), ctype, store)
        self.program.inputs.append((spec.name, tensor, spec.dtype))

    def _lower(self, node: Node) -> None:
        if node in self.fused or node.target in (qdq.DEQUANTIZE, *qdq.EXPANDING) or self._waits(node):
            return
        if self._tests_signs(node):
            return
        if node.target is qdq.QUANTIZE:
            if node not in self.written:
                self.values[node] = self._quantized(node)
            return
        if self.integer(self, node):
            return
        name = graphs.operator_name(node)
        kind = "same" if name in SAME else graphs.kind(node)
        if kind not in self.handlers:
            raise TargetError(
                f"the target 'c' has no kernel for {name or node.target} (layer '{graphs.layer_name(node)}'). Write it "
                "with operators that it has (docs/c.md lists them), or choose --target onnx or tflite."
            )
        self.values[node] = self.handlers[kind](self, node)

    # What handlers ask for.

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of what `node` gives, batch included."""
        return self.facts.shapes[node]

    def number(self, value: Any) -> Any:
        """An argument with sizes that the graph computes in the place of their nodes."""
        if isinstance(value, list | tuple):
            return [self.number(v) for v in value]
        return self.facts.numbers.get(value, value) if isinstance(value, Node) else value

    def argument(self, node: Node, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument of `node`, sizes resolved."""
        value = node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
        return self.number(value)

    def parameters(self, node: Any) -> Parameters | None:
        """Scale, zero point, least and largest code and dtype of a dequantize node of activations; None for others."""
        if isinstance(node, Node) and node.target is qdq.DEQUANTIZE and node.args[0] not in self.facts.fixed:
            source = node.args[0]
            return tuple(node.args[1:]) if isinstance(source, Node) and source.op == "call_function" else None
        return None

    def codes(self, node: Node) -> Tensor:
        """The codes that a dequantize node reads."""
        source = node.args[0]
        assert isinstance(source, Node)
        found = self.values[source]
        assert isinstance(found, Tensor)
        return found

    def tensor(self, node: Node) -> Tensor:
        """What `node` gives, in whatever layout it has; codes are dequantized for float readers, constants written."""
        if node in self.values:
            found = self.values[node]
        elif node in self._floats:
            found = self._floats[node]
        elif self.parameters(node) is not None:
            found = self._floats[node] = self._dequantized(node)
        elif node in self.facts.constants:
            found = self._floats[node] = self.folded(node)
        elif graphs.kind(node) in MOVES or graphs.kind(node) == "getitem":
            self.values[node] = found = self.handlers[graphs.kind(node)](self, node)
        else:
            raise TargetError(f"the target 'c' cannot read '{node.name}' as a number of its own")
        if not isinstance(found, Tensor):
            raise TargetError(f"the target 'c' cannot use the several tensors of '{node.name}' as one")
        return found

    def folded(self, node: Node) -> Tensor:
        """A constant, or what is computed from constants alone, as an array of the source."""
        value = self.facts.constants[node]
        if value.dtype in (torch.bool, torch.float64):
            value = value.float()
        ctype = CTYPES.get(value.dtype)
        if ctype is None:
            raise TargetError(f"the constant '{node.name}' is {value.dtype}, which the target 'c' does not read")
        array = value.detach().cpu().numpy()
        return Tensor(tuple(value.shape), ctype, self.program.constant("value", ctype, array))

    def plain(self, node: Node) -> Tensor:
        """What `node` gives, lying as its shape says."""
        return self.laid(self.tensor(node), False)

    def laid(self, tensor: Tensor, images: bool) -> Tensor:
        """The same values lying as N H W C (`images`) or as the shape says; copied only where that differs."""
        if tensor.images == images:
            return tensor
        _, c, h, w = tensor.shape
        if c == 1 or h * w == 1:
            return Tensor(tensor.shape, tensor.ctype, tensor.home, images)
        key = (id(tensor), images)
        if key not in self._laid:
            made = self.program.tensor(tensor.shape, tensor.ctype, images)
            self.copy(tensor, made, "layout")
            self._laid[key] = made
        return self._laid[key]

    def copy(
        self,
        source: Tensor,
        made: Tensor,
        layer: str,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        to: tuple[int, ...] | None = None,
        to_offset: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Copy along the axes of `shape` (else `made`'s): from `strides` and `offset` of the source to `to` of made."""
        axes, first, second = merged(shape or made.shape, strides or source.strides, to or made.strides)
        if len(axes) > 6:
            raise TargetError(f"'{layer}' moves values along {len(axes)} axes; the target 'c' does up to 6")
        walk = self.walk(axes, first, second, offset, to_offset)
        size = {"int8_t": 1, "float": 4, "int32_t": 4, "int64_t": 8, "uint8_t": 1}[made.ctype]
        self.program.call("tf_copy", size, walk, source, made, layer=layer)

    def walk(self, axes: list[int], a: list[int], b: list[int], offset_a: int = 0, offset_b: int = 0) -> Any:
        """The structure of a walk over `axes` with the operands' steps."""
        return self.program.struct(
            "tf_walk", rank=len(axes), shape=axes, a=a, b=b, offset_a=offset_a, offset_b=offset_b
        )

    # Codes.

    def movable(self, node: Any) -> Parameters | None:
        """The parameters of the codes that `node`'s values stand for, where it only moves values; None elsewhere."""
        own = self.parameters(node)
        if own is not None or not isinstance(node, Node) or node.op != "call_function":
            return own
        if graphs.kind(node) == "getitem":
            return self.movable(node.args[0])
        if graphs.kind(node) not in MOVES or node in self.facts.fixed:
            return None
        sources = [a for a in node.all_input_nodes if a not in self.facts.numbers]
        found = {self.movable(a) for a in sources}
        return next(iter(found)) if len(found) == 1 else None

    def _waits(self, node: Node) -> bool:
        """Whether `node` is left to those who read its codes: all of them are quantized as they were."""
        if self.movable(node) is None or graphs.kind(node) not in (*MOVES, "getitem"):
            return False
        return all(
            (u.target is qdq.QUANTIZE and tuple(u.args[1:]) == self.movable(node)) or self._waits(u) for u in node.users
        )

    def _tests_signs(self, node: Node) -> bool:
        """Whether `node` is part of a choice of signs that the quantize nodes behind it stand for."""
        from ._c_codes import sign_of

        if graphs.kind(node) == "compare":
            return all(self._tests_signs(u) for u in node.users)
        return sign_of(self, node) is not None and all(u.target is qdq.QUANTIZE for u in node.users)

    def moved(self, node: Node) -> Tensor | list[Tensor]:
        """The codes behind a node that `movable` knows: itself moved, on codes."""
        if self.parameters(node) is not None:
            return self.codes(node)
        if node not in self._moved:
            hidden = {a: self.values.get(a) for a in node.all_input_nodes}
            for source in node.all_input_nodes:
                if source not in self.facts.numbers:
                    self.values[source] = self.moved(source)
            self._moved[node] = self.handlers[graphs.kind(node)](self, node)
            for source, before in hidden.items():
                self.values.pop(source, None)
                if before is not None:
                    self.values[source] = before
        return self._moved[node]

    def zero_of(self, node: Node, tensor: Tensor) -> int | float:
        """What zero is among the values of a moving node that works on `tensor`."""
        known = self.movable(node)
        return int(known[1]) if tensor.ctype == "int8_t" and known is not None else 0.0

    def _quantized(self, node: Node) -> Tensor:
        source = node.args[0]
        assert isinstance(source, Node)
        parameters = tuple(node.args[1:])
        check_dtype(parameters, graphs.layer_name(source))
        if self.movable(source) == parameters:
            found = self.moved(source)
            assert isinstance(found, Tensor)
            if _origins(source) <= self.signs and not _pads(source):
                self.signs.add(node)
            return found
        scale, zero, low, high, _ = parameters
        from ._c_codes import sign_codes

        signs = sign_codes(self, node)
        if signs is not None:
            self.signs.add(node)
            return signs
        x = self.tensor(source)
        made = self.program.tensor(x.shape, "int8_t", x.images)
        inverse = np.float32(1.0 / scale)
        arguments = (x.count, inverse, zero, low, high, x, made)
        self.program.call("tf_quantize", *arguments, layer=graphs.layer_name(source))
        return made

    def _dequantized(self, node: Node) -> Tensor:
        codes = self.codes(node)
        scale, zero = node.args[1:3]
        made = self.program.tensor(codes.shape, "float", codes.images)
        self.program.call(
            "tf_dequantize", codes.count, np.float32(scale), zero, codes, made, layer=graphs.layer_name(node)
        )
        return made


def check_dtype(parameters: Parameters, layer: str) -> None:
    """Refuse codes that are not int8, with the way out."""
    dtype = parameters[-1]
    if dtype is not torch.int8:
        raise TargetError(
            f"'{layer}' has {str(dtype).removeprefix('torch.')} codes: the kernels of the target 'c' take int8 alone. "
            "Use --recipe int8, or another target for 16-bit activations."
        )


def merged(
    shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]
) -> tuple[list[int], list[int], list[int]]:
    """The same walk with axes of one left out and neighbours joined where both operands step through them as one."""
    axes: list[tuple[int, int, int]] = []
    for size, a, b in zip(shape, first, second, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == a * size and axes[-1][2] == b * size:
            axes[-1] = (axes[-1][0] * size, a, b)
        else:
            axes.append((size, a, b))
    axes = axes or [(1, 1, 1)]
    return [x[0] for x in axes], [x[1] for x in axes], [x[2] for x in axes]


def rows_of(shape: tuple[int, ...]) -> int:
    """How many rows a tensor has: all axes but the last."""
    return math.prod(shape[:-1])


def _has_whole_bias(graph: GraphModule, node: Node, unit: torch.Tensor) -> bool:
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, Node):
        return True
    if bias.op != "get_attr":
        raise TargetError(f"the bias of '{graphs.layer_name(node)}' is computed, which the target 'c' does not take")
    return whole_steps(graphs.constant(graph, bias), unit) is not None


def _between(quantize: Node, source: Node) -> list[Node]:
    """The activations between a kernel and the quantize node that its codes are."""
    found, node = [], quantize.args[0]
    while isinstance(node, Node) and node is not source:
        found.append(node)
        node = node.args[0]
    return found


def _origins(node: Node) -> set[Node]:
    """The quantize nodes whose codes a moving node hands on."""
    if node.target is qdq.DEQUANTIZE:
        return {node.args[0]} if isinstance(node.args[0], Node) else set()
    return {o for a in node.all_input_nodes for o in _origins(a)}


def _pads(node: Node) -> bool:
    return node.target is not qdq.DEQUANTIZE and (
        graphs.kind(node) == "pad" or any(_pads(a) for a in node.all_input_nodes)
    )


class _Facts(Interpreter):
    """Runs the graph once on zeros: shapes, sizes, and the values of what is computed from constants alone."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.fixed = graphs.constant_made(graph.graph.nodes)
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.constants: dict[Node, torch.Tensor] = {}
        self.numbers: dict[Node, Any] = {}

    def observe(self, job: Job) -> None:
        """Fill in the facts for the job's static shapes."""
        with torch.no_grad():
            self.run(*(torch.zeros(*spec.shape, dtype=getattr(torch, spec.dtype)) for spec in job.inputs))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(value.shape)
            if n.op == "get_attr" or (n in self.fixed and n.target not in qdq.EXPANDING):
                self.constants[n] = value.detach()
        elif isinstance(value, int | float | bool) and n.op == "call_function":
            self.numbers[n] = value
        return value
