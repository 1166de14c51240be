"""Runs a quantized graph with the arithmetic of integer kernels, so that artifacts can be held to it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import qdq
from .graph import constant, kind

# Below this, every partial sum of a dot product of codes is an integer that float32 holds exactly.
EXACT = 2.0**24
HALF_MAX = 65504.0


@dataclass(frozen=True)
class _Kernel:
    """The constants of one integer conv or linear: codes as float numbers, the step of its accumulator per channel."""

    codes: Tensor
    input_scale: float
    unit: Tensor
    dtype: torch.dtype


class Simulation(Interpreter):
    """The torch simulation every artifact must match.

    A conv or linear on codes with constant weight codes is computed as kernels do: an exact integer accumulator, the
    bias in it, one multiplication by the float32 product of the scales. In float32 where the largest possible sum
    stays below 2^24, else in float64. A matmul of two dequantized tensors runs in float64, which is exact too.
    Everything else runs as the graph is written; with `compute` "float16" every float32 value is rounded to float16
    (saturated at ±65504) after the node that makes it, as hardware does that stores halves and adds in single.
    """

    def __init__(self, graph: GraphModule, compute: str = "float32") -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._half = compute == "float16"
        self._kernels: dict[Node, _Kernel] = {}
        self._wide: set[Node] = set()
        for node in graph.graph.nodes:
            kernel = _kernel(graph, node)
            if kernel is not None:
                self._kernels[node] = kernel
            elif kind(node) in ("conv", "linear", "matmul") and _on_codes(node):
                self._wide.add(node)

    def run_node(self, n: Node) -> Any:
        value = self._run(n)
        if self._half and n.op != "output" and isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.clamp(-HALF_MAX, HALF_MAX).half().float()
        return value

    def _run(self, n: Node) -> Any:
        if n in self._kernels:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return _run_kernel(n, self._kernels[n], list(args), kwargs)
        if n in self._wide:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            return n.target(*wide, **kwargs).float()
        return super().run_node(n)


def _on_codes(node: Node) -> bool:
    operands = [a for a in node.args[:2] if isinstance(a, Node)]
    return len(operands) == 2 and all(a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in operands)


def _kernel(graph: GraphModule, node: Node) -> _Kernel | None:
    if kind(node) not in ("conv", "linear") or not _on_codes(node):
        return None
    x, weight = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    codes_node, scales_node = weight.args[:2]
    if not isinstance(codes_node, Node) or codes_node.op != "get_attr" or not isinstance(x.args[1], float):
        return None
    codes = constant(graph, codes_node)
    scales = constant(graph, scales_node)
    reach = int(x.args[4]) - int(x.args[3])
    largest = float(codes.float().abs().flatten(1).sum(1).max()) * reach
    dtype = torch.float32 if largest < EXACT else torch.float64
    unit = torch.tensor(x.args[1], dtype=torch.float32) * scales
    return _Kernel(codes.to(dtype), x.args[1], unit, dtype)


def _run_kernel(node: Node, kernel: _Kernel, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    bias = args[2] if len(args) > 2 else None
    codes = torch.round(args[0].to(kernel.dtype) / kernel.input_scale)
    rest = args[3:]
    total = node.target(codes, kernel.codes, None, *rest, **kwargs)
    channels = (1, -1, *[1] * (total.dim() - 2)) if kind(node) == "conv" else (-1,)
    unit = kernel.unit.view(channels)
    if bias is None:
        return (total * unit.to(kernel.dtype)).float()
    steps = bias.double() / kernel.unit.double()
    whole = torch.round(steps)
    if bool(((steps - whole).abs() < 1e-3).all()):  # the step rounded this bias: it lives in the accumulator
        total = (
            total.double() + whole.view(channels)
            if float(whole.abs().max()) > EXACT
            else total + whole.to(kernel.dtype).view(channels)
        )
        return (total.to(torch.float32) * unit).float()
    return (total.to(torch.float32) * unit + bias.view(channels)).float()


def simulate(graph: GraphModule, compute: str = "float32") -> Callable[[Iterable[Tensor]], tuple[Tensor, ...]]:
    """A callable that runs `graph` as integer kernels would; see `Simulation`."""
    interpreter = Simulation(graph, compute)

    def call(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = interpreter.run(*inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    return call
