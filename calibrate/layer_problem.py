"""One coded layer as a least-squares problem: what it read at some positions, what it should have computed there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .coded import CodedLayer
from .graph import constant, is_constant, kind, weight_nodes
from .lockstep import Visit
from .weights import spread

# Positions per layer: a convolution sees thousands per image, and more rows than a few times its columns teach little.
ROWS = 8192
# Numbers that the rows of one layer may fill (128 MiB as float32): a depthwise layer of many channels gets fewer rows.
NUMBERS = 2**25
# Every such sample is kept aside: codes must be better on what they weren't fitted to.
HELD = 4


@dataclass(frozen=True)
class LayerProblem:
    """g convolution groups (1 for linear), o outputs and k weights per output in each.

    weight: the float weight, float64 [g, o, k]. x: what the quantized layer reads, float32 [g, n, k]. y: the float
    layer's output at the same positions, less the quantized layer's bias, float32 [g, n, o]. held: rows of samples kept
    aside, bool [n]. shape: the weight's own. offset: the float layer's bias less the quantized layer's, float64 [g, o];
    None where neither has one, or it is computed.
    """

    layer: CodedLayer
    shape: tuple[int, ...]
    weight: Tensor
    x: Tensor
    y: Tensor
    held: Tensor
    offset: Tensor | None

    @property
    def fitted(self) -> Tensor:
        """The other rows, bool [n]; all of them where too few samples came to keep one aside."""
        return self.held if bool(self.held.all()) else ~self.held

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight [out, in / g, ...] as float64 [g, o, k]."""
        return weight.double().reshape(self.weight.shape)

    def restored(self, matrix: Tensor) -> Tensor:
        """[g, o, k] in the weight's own shape."""
        return matrix.reshape(self.shape)

    def current(self, graph: GraphModule) -> Tensor:
        """The weight that the layer's codes stand for now, float64 [g, o, k]."""
        return self.matrix(self.layer.weight(graph))

    def step(self, scales: Tensor) -> Tensor:
        """Scales [out] or [out, groups] as float64 [g, o, k]."""
        return self.matrix(spread(scales.double(), self.shape))

    def error(self, weight: Tensor, goal: Tensor, bias: Tensor | None = None) -> float:
        """Mean square of X W^T + bias - goal on the rows kept aside; weight [g, o, k], goal [g, n, o], bias [g, o]."""
        got = self.x[:, self.held] @ weight.float().transpose(1, 2)
        if bias is not None:
            got = got + bias[:, None].float()
        return float((got - goal[:, self.held]).double().square().mean())


def refusal(graph: GraphModule, float_graph: GraphModule, found: Visit) -> str | None:
    """Why this layer makes no such problem, or None."""
    weight, _ = weight_nodes(found.partner)
    layer = found.layer
    if weight is None:
        return "the float layer's weight is not constant"
    if constant(float_graph, weight).shape != constant(graph, layer.codes).shape:
        return "a step since quantization gave its weight another shape"
    if kind(layer.node) != kind(found.partner):
        return "the float layer is another operator"
    if kind(layer.node) == "conv":
        try:
            layer.geometry()
        except ValueError as reason:
            return str(reason)
    if any(a.shape != b.shape for a, b in zip(found.inputs, found.wanted, strict=True)):
        return "its input has another shape than the float layer's"
    return None


def problem(graph: GraphModule, float_graph: GraphModule, found: Visit, seed: int, rows: int = ROWS) -> LayerProblem:
    """Gather the problem of one visited layer; which positions are taken depends on `seed` alone."""
    layer, node = found.layer, weight_nodes(found.partner)[0]
    assert node is not None
    weight = constant(float_graph, node)
    groups, out = layer.groups, len(weight)
    width = weight[0].numel()
    open_ = [_open(layer, t, found.visible[i] if found.visible else None) for i, t in enumerate(found.targets)]
    drawn = chosen([len(o) for o in open_], min(rows, max(NUMBERS // (groups * width), 64)), seed)
    taken = [places[at] for places, at in zip(open_, drawn, strict=True)]
    x = torch.cat([rows_of(layer, weight.shape, t, at) for t, at in zip(found.inputs, taken, strict=True)])
    y = torch.cat([_outputs(layer, t, at) for t, at in zip(found.targets, taken, strict=True)])
    if layer.bias is not None:
        y = y - constant(graph, layer.bias)
    samples, seen = [], 0
    for target, at in zip(found.targets, taken, strict=True):
        samples.append(seen + at // (_places(layer, target) // len(target)))
        seen += len(target)
    held = torch.cat(samples) % HELD == HELD - 1
    if not held.any():
        held = torch.ones_like(held)  # too few samples to keep one aside: all are fitted and judged
    return LayerProblem(
        layer,
        tuple(weight.shape),
        weight.double().reshape(groups, out // groups, width),
        x.reshape(len(x), groups, width).transpose(0, 1).contiguous(),
        y.reshape(len(y), groups, out // groups).transpose(0, 1).contiguous(),
        held,
        _offset(graph, float_graph, found),
    )


def _offset(graph: GraphModule, float_graph: GraphModule, found: Visit) -> Tensor | None:
    layer, wanted = found.layer, weight_nodes(found.partner)[1]
    if not own_bias(layer) or (wanted is None and layer.bias is None):
        return None
    out = len(constant(graph, layer.codes))
    there = constant(float_graph, wanted).double() if wanted is not None else torch.zeros(out).double()
    here = constant(graph, layer.bias).double() if layer.bias is not None else torch.zeros(out).double()
    return (there - here).reshape(layer.groups, -1)


def _open(layer: CodedLayer, output: Tensor, visible: Tensor | None) -> Tensor:
    """The positions of an output that may be taken, int64: all but those of padding, where it has one row per token."""
    every = torch.arange(_places(layer, output))
    if visible is None or output.dim() != 3 or output.shape[:2] != visible.shape:
        return every
    return every[visible.flatten()]


def chosen(places: Sequence[int], limit: int, seed: int) -> list[Tensor]:
    """Which positions of each batch to take, int64 and ascending: all, or `limit` of them drawn without repetition."""
    total = sum(places)
    if total <= limit:
        return [torch.arange(count) for count in places]
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    found, start = [], 0
    for count in places:
        found.append(drawn[(drawn >= start) & (drawn < start + count)] - start)
        start += count
    return found


def _places(layer: CodedLayer, output: Tensor) -> int:
    """How many rows an output has: [n, out, ...] of a convolution, else [..., out]."""
    return output.numel() // output.shape[1 if kind(layer.node) == "conv" else -1]


def _outputs(layer: CodedLayer, output: Tensor, at: Tensor) -> Tensor:
    moved = output.movedim(1, -1) if kind(layer.node) == "conv" else output
    return moved.reshape(-1, moved.shape[-1])[at]


def rows_of(layer: CodedLayer, weight: torch.Size | tuple[int, ...], x: Tensor, at: Tensor) -> Tensor:
    """What the layer multiplies with its weight at the output positions `at`: float32 [len(at), in * kernel].

    A linear layer reads rows of x [..., in]. A convolution (weight [out, in / groups, *kernel]) reads patches of
    x [n, in, *size]: only those asked for are copied, channels before taps as in the weight.
    """
    if kind(layer.node) != "conv":
        return x.reshape(-1, x.shape[-1])[at]
    stride, padding, dilation = layer.geometry()
    kernel = weight[2:]
    x = torch.nn.functional.pad(x, [p for side in reversed(padding) for p in (side, side)])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    count = len(kernel)
    patches = x.movedim(1, 1 + count)  # [n, *positions, in, *kernel], a view
    return patches[torch.unravel_index(at, patches.shape[: 1 + count])].flatten(1)


def own_bias(layer: CodedLayer) -> bool:
    """Whether a step may set the layer's bias: it is constant, or there is none."""
    index = 3 if layer.dynamic else 2
    given = layer.node.args[index] if len(layer.node.args) > index else layer.node.kwargs.get("bias")
    return given is None or (isinstance(given, Node) and is_constant(given))
