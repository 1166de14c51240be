"""Layers whose weights are stored as codes, whatever form quantized them: for steps that choose better codes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import add_constant, constant, is_constant, kind, layer_name
from .levels import alphabet
from .weights import spread


@dataclass(frozen=True)
class CodedLayer:
    """A conv or linear node of a quantized graph and its stored weight.

    `codes` (int8, the float weight's shape) and `scales` (float32 [out] or [out, groups]) are get_attr nodes; codes lie
    in [low, high]. `dynamic`: the layer quantizes its input at run time.
    """

    node: Node
    codes: Node
    scales: Node
    low: int
    high: int
    dynamic: bool

    @property
    def name(self) -> str:
        """The layer's name, the same as in the float graph."""
        return layer_name(self.node)

    @property
    def bits(self) -> int:
        """Bits per weight in the file."""
        return qdq.bits_of(self.low, self.high)

    @property
    def bias(self) -> Node | None:
        """The bias constant, None where there is none."""
        index = 3 if self.dynamic else 2
        value = self.node.args[index] if len(self.node.args) > index else None
        return value if isinstance(value, Node) and is_constant(value) else None

    @property
    def groups(self) -> int:
        """The convolution's groups; 1 for a linear layer."""
        index = 7 if self.dynamic else 6
        value = self.node.args[index] if kind(self.node) == "conv" and len(self.node.args) > index else 1
        assert isinstance(value, int)
        return value

    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """A convolution's (stride, padding, dilation), one number per spatial axis; padding as a word raises."""
        first = 4 if self.dynamic else 3
        dims = int(self.codes.meta["val"].dim()) - 2
        found = []
        for offset, default in enumerate((1, 0, 1)):
            value = self.node.args[first + offset] if len(self.node.args) > first + offset else default
            if not isinstance(value, int | list | tuple):
                raise ValueError(f"padding given as {value!r}")
            numbers = [int(v) for v in value] if isinstance(value, list | tuple) else [value]
            found.append(numbers * dims if len(numbers) == 1 else numbers)
        return found[0], found[1], found[2]

    def step(self, graph: GraphModule) -> Tensor:
        """The scale of every weight, float64, in the weight's shape."""
        scales = constant(graph, self.scales).double()
        return spread(scales, constant(graph, self.codes).shape)

    def levels(self, graph: GraphModule) -> Tensor | None:
        """The codes that each row may use, float32 [out, 2 or 4] ascending, where the layer was given so few: signs, or
        two magnitudes with both signs. None where every code of the range may be used, ternary ones included."""
        codes = constant(graph, self.codes)
        if self.bits <= 2:
            signs = (self.low, self.high) == (-1, 1) and not bool((codes == 0).any())
            return torch.tensor([-1.0, 1.0]).expand(len(codes), 2) if signs else None
        rows = codes.reshape(len(codes), -1)
        found = alphabet(torch.cat([rows, -rows], 1))
        return found.float() if found is not None else None

    def weight(self, graph: GraphModule) -> Tensor:
        """The weight that the codes stand for, float32."""
        return (constant(graph, self.codes).double() * self.step(graph)).float()

    def set_codes(self, graph: GraphModule, codes: Tensor) -> None:
        """Put other codes in the place of the stored ones (same shape, in [low, high])."""
        set_constant(graph, self.codes, codes.to(torch.int8))

    def set_scales(self, graph: GraphModule, scales: Tensor) -> None:
        """Put other scales in the place of the stored ones (same shape)."""
        set_constant(graph, self.scales, scales.float())

    def set_range(self, low: int, high: int) -> "CodedLayer":
        """Say that codes lie in [low, high]: ±1, -8..7 or 8 bits; the layer as it then is."""
        if self.dynamic:
            bits = 1 if (low, high) == (-1, 1) else qdq.bits_of(low, high)
            after_scheme = next(i for i, a in enumerate(self.node.args) if isinstance(a, str)) + 1
            self.node.args = (*self.node.args[:after_scheme], bits)
        else:
            weight = self.node.args[1]
            assert isinstance(weight, Node)
            first = 4 if weight.target is qdq.DEQUANTIZE_CHANNEL else 3
            weight.args = (*weight.args[:first], low, high, *weight.args[first + 2 :])
        found = coded(self.node)
        assert found is not None
        return found

    def input_scale(self) -> float | None:
        """The scale of the layer's static int8 input; None where the input is float."""
        source = self.node.args[0]
        step = source.args[1] if isinstance(source, Node) and source.target is qdq.DEQUANTIZE else None
        return step if isinstance(step, float) else None

    def set_bias(self, graph: GraphModule, bias: Tensor, int32: bool) -> None:
        """Give the layer this bias [out]; with `int32` rounded to the step of the kernel's int32 bias where static."""
        step = self.input_scale()
        if int32 and step is not None:  # the kernel's step is the float32 product of the two scales
            unit = (torch.tensor(step, dtype=torch.float32) * constant(graph, self.scales)).double()
            bias = torch.round(bias.double() / unit).clamp(-(2.0**30), 2.0**30) * unit
        index = 3 if self.dynamic else 2
        fresh = add_constant(graph, f"{self.name}_corrected_bias", bias.float(), self.node)
        args = list(self.node.args) + [None] * (index + 1 - len(self.node.args))
        args[index] = fresh
        self.node.args = tuple(args)


def set_constant(graph: GraphModule, node: Node, value: Tensor) -> None:
    """Replace the tensor behind a get_attr node by another, leaving graphs that share the old one as they are."""
    *path, last = str(node.target).split(".")
    owner: torch.nn.Module = graph
    for part in path:
        owner = getattr(owner, part)
    fresh = value.detach().contiguous()
    if last in owner._parameters:
        owner._parameters[last] = torch.nn.Parameter(fresh, requires_grad=False)
    else:
        owner._buffers[last] = fresh
    node.meta["val"] = fresh


def coded(node: Node) -> CodedLayer | None:
    """`node` as a layer with a coded weight; None for anything else (float layers, tables, palettes, 8-bit floats)."""
    if node.op != "call_function" or kind(node) not in ("conv", "linear"):
        return None
    dynamic = node.target in qdq.DYNAMIC
    weight = node if dynamic else node.args[1] if len(node.args) > 1 else None
    bounds = qdq.code_range(weight) if isinstance(weight, Node) else None
    if bounds is None or not isinstance(weight, Node):
        return None
    codes, scales = weight.args[1:3] if dynamic else weight.args[:2]
    if not (is_constant(codes) and is_constant(scales)):
        return None
    assert isinstance(codes, Node)
    assert isinstance(scales, Node)
    return CodedLayer(node, codes, scales, *bounds, dynamic)


def coded_layers(graph: GraphModule) -> Iterator[CodedLayer]:
    """Every conv and linear with a coded weight, in the order in which they run."""
    for node in graph.graph.nodes:
        found = coded(node)
        if found is not None:
            yield found
