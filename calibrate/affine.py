"""A scale and a shift per channel, moved into the weight and bias of the layer beside them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph import add_constant, constant, is_constant, kind, layer_name, operator_name, weight_nodes

FOLDABLE = ("conv", "linear", "conv_transpose")


@dataclass(frozen=True)
class Layer:
    """A conv, transposed conv or linear with constant weight: what folding into it needs to know.

    The weight is [out, in / groups, ...], or [in, out / groups, ...] where `transposed`. `axis` is the channel axis of
    input and output, counted from the last one: -1 for linear, -3 for conv2d.
    """

    node: Node
    weight: Node
    bias: Node | None
    transposed: bool
    groups: int

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return torch.Size(self.weight.meta["val"].shape)

    @property
    def axis(self) -> int:
        """The channel axis from the right, negative."""
        return 1 - len(self.shape)

    @property
    def outputs(self) -> int:
        """How many channels come out."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """How many channels go in."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def layer_of(graph: GraphModule, node: object) -> Layer | None:
    """`node` as a layer that can be folded into; None for anything else, and where weight or bias are computed."""
    if not isinstance(node, Node) or node.op != "call_function" or kind(node) not in FOLDABLE:
        return None
    name = operator_name(node)
    if name not in ("linear", "convolution") and not name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose")):
        return None  # addmm has its bias first; the dynamic layers hold codes
    weight, bias = weight_nodes(node)
    if weight is None or not constant(graph, weight).is_floating_point():
        return None
    if argument(node, 2, "bias", None) is not None and bias is None:
        return None
    weight.meta.setdefault("val", constant(graph, weight))
    general = name == "convolution"
    transposed = bool(node.args[6]) if general else kind(node) == "conv_transpose"
    groups = 1 if name == "linear" else int(argument(node, 8 if general else 6, "groups", 1))
    return Layer(node, weight, bias, transposed, groups)


def pads(layer: Layer) -> bool:
    """Whether the layer puts zeros around its input, so that a shift of the input would not reach everywhere."""
    if kind(layer.node) == "linear":
        return False
    if layer.transposed:
        return True  # the border of the output is reached by fewer taps, as if zeros lay around
    padding = argument(layer.node, 4, "padding", 0)
    if isinstance(padding, str):
        return padding != "valid" and any(k > 1 for k in layer.shape[2:])
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def scale_outputs(graph: GraphModule, layer: Layer, factor: Tensor, shift: Tensor | None = None) -> Layer:
    """Make the layer compute y * factor + shift; both float64 [out]. Returns the layer as it is then."""
    weight, bias = _parameters(graph, layer)
    factor = factor.double()
    if layer.transposed:
        parts = weight.unflatten(0, (layer.groups, -1))
        shape = (layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (parts * factor.reshape(layer.groups, -1).view(shape)).flatten(0, 1)
    else:
        weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        bias = bias * factor
    if shift is not None:
        bias = shift.double() + (bias if bias is not None else 0)
    if "bn" in layer.node.meta:  # what is known of its outputs' mean and deviation moves with them
        mean, deviation = layer.node.meta["bn"]
        mean = mean * factor + (shift if shift is not None else 0)
        layer.node.meta["bn"] = (mean.float(), (deviation * factor.abs()).float())
    return _store(graph, layer, weight, bias)


def scale_inputs(graph: GraphModule, layer: Layer, factor: Tensor, shift: Tensor | None = None) -> Layer:
    """Make the layer, given x, compute what it did for x * factor + shift; both float64 [in]. Where the layer pads
    (`pads`) a shift is not exact. Returns the layer as it is then."""
    weight, bias = _parameters(graph, layer)
    if shift is not None and bool(shift.any()):
        parts = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        # Each output sees the inputs of its own group.
        seen = shift.double().reshape(layer.groups, 1, -1)
        more = (parts.unflatten(0, (layer.groups, -1)) * seen).sum(2).flatten()
        bias = more + (bias if bias is not None else 0)
    return _store(graph, layer, weight * input_factor(layer, factor), bias)


def input_factor(layer: Layer, factor: Tensor) -> Tensor:
    """A factor per input channel, float64 [in], in a shape that multiplies the layer's weight."""
    rest = [1] * (len(layer.shape) - 2)
    if layer.transposed:
        return factor.double().view(-1, 1, *rest)
    rows = layer.shape[0] // layer.groups
    return factor.double().reshape(layer.groups, -1).repeat_interleave(rows, 0).view(layer.shape[0], -1, *rest)


def input_reach(graph: GraphModule, layer: Layer) -> Tensor:
    """The largest weight that reads each input channel: float64 [in]."""
    weight = constant(graph, layer.weight).double().abs()
    if layer.transposed:
        return weight.flatten(1).amax(1)
    parts = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
    return parts.unflatten(0, (layer.groups, -1)).amax(1).flatten()


def output_reach(graph: GraphModule, layer: Layer) -> Tensor:
    """The largest weight that makes each output channel: float64 [out]."""
    weight = constant(graph, layer.weight).double().abs()
    if layer.transposed:
        return weight.flatten(2).amax(2).unflatten(0, (layer.groups, -1)).amax(1).flatten()
    return weight.flatten(1).amax(1)


def per_channel(value: Tensor, axis: int, count: int, rank: int) -> Tensor | None:
    """A constant that broadcasts along one channel axis only, as float64 [count]; None for any other.

    `axis` is negative; `rank` that of the tensor it combines with, which it must not extend.
    """
    if value.dim() > rank or not (value.is_floating_point() or value.numel() == 1):
        return None
    if value.numel() == 1:
        return value.double().reshape(1).expand(count).clone()
    wide = [i - value.dim() for i, d in enumerate(value.shape) if d != 1]
    return value.double().reshape(count) if wide == [axis] and value.shape[axis] == count else None


def _parameters(graph: GraphModule, layer: Layer) -> tuple[Tensor, Tensor | None]:
    bias = constant(graph, layer.bias).double() if layer.bias is not None else None
    return constant(graph, layer.weight).double(), bias


def _store(graph: GraphModule, layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """Give the layer this weight and bias, in the dtype it had."""
    node, name = layer.node, layer_name(layer.node)
    dtype = constant(graph, layer.weight).dtype
    new_weight = add_constant(graph, f"{name}_folded_weight", weight.to(dtype), node)
    new_bias = add_constant(graph, f"{name}_folded_bias", bias.to(dtype), node) if bias is not None else None
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    node.args = (node.args[0], new_weight, new_bias, *node.args[3:])
    return Layer(node, new_weight, new_bias, layer.transposed, layer.groups)


def value_of(node: object) -> Tensor | None:
    """The (fake) tensor that capture knows of a node; None where it knows none."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def constant_operand(graph: GraphModule, item: object) -> Tensor | None:
    """A number or a constant as a tensor; None for anything computed."""
    if isinstance(item, int | float) and not isinstance(item, bool):
        return torch.tensor(float(item), dtype=torch.float64)
    return constant(graph, item) if isinstance(item, Node) and is_constant(item) else None
