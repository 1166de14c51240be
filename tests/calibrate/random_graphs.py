"""Random float graphs made node by node: layers, norms, activations, branches, constants; for properties of steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from calibrate.graph import finish

aten = torch.ops.aten


class Builder:
    """A graph under construction on one input; every node knows its value, as after capture."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self.graph, self.root, self.generator = Graph(), nn.Module(), torch.Generator().manual_seed(seed)
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = x

    def constant(self, value: Tensor) -> Node:
        name = f"c{len(list(self.root.buffers()))}"
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def normal(self, *shape: int, spread: float = 1.0) -> Node:
        return self.constant(torch.randn(shape, generator=self.generator) * spread)

    def positive(self, *shape: int) -> Node:
        return self.constant(torch.rand(shape, generator=self.generator) + 0.5)

    def call(self, target: Callable, *args: object) -> Node:  # type: ignore[type-arg]
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*values)
        return node

    def pick(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def finish(self, *outputs: Node) -> GraphModule:
        self.graph.output(tuple(outputs))
        return finish(GraphModule(self.root, self.graph))


def channels(x: Node) -> int:
    return int(x.meta["val"].shape[1])


def conv(b: Builder, x: Node, padding: int | None = None, kernel: int | None = None, groups: int = 1) -> Node:
    """A convolution with weights that keep the variance; padding, kernel and stride at random where not given."""
    kernel = kernel or (1, 3)[b.pick(2)]
    if min(x.meta["val"].shape[2:]) < kernel:
        kernel = 1
    padding = b.pick(2) if padding is None else padding
    out = groups if groups > 1 else (4, 6)[b.pick(2)]
    inside = channels(x) // groups
    weight = b.normal(out, inside, kernel, kernel, spread=(inside * kernel * kernel) ** -0.5)
    bias = b.normal(out, spread=0.3) if b.pick(2) else None
    return b.call(aten.conv2d.default, x, weight, bias, [1, 1], [padding, padding], [1, 1], groups)


def depthwise(b: Builder, x: Node) -> Node:
    return conv(b, x, kernel=3, groups=channels(x))


def transposed(b: Builder, x: Node) -> Node:
    groups = (1, 2)[b.pick(2)] if channels(x) % 2 == 0 else 1
    weight = b.normal(channels(x), 4 // groups, 2, 2, spread=0.5)
    return b.call(aten.conv_transpose2d.input, x, weight, b.normal(4), [2, 2], [0, 0], [0, 0], groups, [1, 1])


def norm(b: Builder, x: Node) -> Node:
    c = channels(x)
    affine = (b.positive(c), b.normal(c)) if b.pick(4) else (None, None)
    return b.call(aten.batch_norm.default, x, *affine, b.normal(c), b.positive(c), False, 0.1, 1e-5, False)


def affine(b: Builder, x: Node) -> Node:
    """x combined with a constant: a number, one per channel, or (what must be left alone) one per position."""
    c = channels(x)
    shapes = [(), (c, 1, 1), (1, c, 1, 1), (1, 1, x.meta["val"].shape[3])]
    op = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)[b.pick(4)]
    other = b.positive(*shapes[b.pick(4)]) if b.pick(3) else 0.75
    swapped = op in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor) and b.pick(2) and isinstance(other, Node)
    return b.call(op, other, x) if swapped else b.call(op, x, other)


def clamp(b: Builder, x: Node) -> Node:
    forms = [
        (aten.relu.default,),
        (aten.clamp.default, 0),
        (aten.clamp.default, 0, 6),
        (aten.clamp_min.default, 0.0),
        (aten.clamp_max.default, 1.0),
        (aten.hardtanh.default,),
        (aten.hardtanh.default, -0.5, 2.0),
        (aten.relu6.default,),
        (aten.clamp.default, None, 1.5),
        (aten.clamp.default, 1.0, -1.0),
    ]
    target, *bounds = forms[b.pick(len(forms))]
    return b.call(target, x, *bounds)


def leaky(b: Builder, x: Node) -> Node:
    if b.pick(2):
        return b.call(aten.leaky_relu.default, x, 0.1)
    return b.call(aten.prelu.default, x, b.positive(channels(x) if b.pick(2) else 1))


def gate(b: Builder, x: Node) -> Node:
    """Hard swish, hard sigmoid or SiLU, spelled out."""
    which = b.pick(3)
    if which == 2:
        return b.call(aten.mul.Tensor, x, b.call(aten.sigmoid.default, x))
    clipped = b.call(aten.clamp.default, b.call(aten.add.Tensor, x, 3.0), 0, 6)
    sixth = b.call(aten.div.Tensor, clipped, 6.0)
    return b.call(aten.mul.Tensor, sixth, x) if which else sixth


def pool(b: Builder, x: Node) -> Node:
    return b.call(aten.max_pool2d.default, x, [2, 2], [1, 1]) if min(x.meta["val"].shape[2:]) > 2 else x


def residual(b: Builder, x: Node) -> Node:
    """x + conv(x): a branch that ends in an add."""
    y = conv(b, x, padding=1, kernel=3)
    return b.call(aten.add.Tensor, y, x) if y.meta["val"].shape == x.meta["val"].shape else y


def joined(b: Builder, x: Node) -> Node:
    return b.call(aten.cat.default, [x, conv(b, x, padding=0, kernel=1)], 1)


PIECES = {
    f.__name__: f for f in (conv, depthwise, transposed, norm, affine, clamp, leaky, gate, pool, residual, joined)
}


def network(pieces: list[str], seed: int) -> GraphModule:
    """The pieces in a row on an image [2, 4, 6, 6]; then, a mean and a linear layer. Some tensors go out as well."""
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    b = Builder(x, seed)
    at, outputs = b.x, []
    for piece in pieces:
        at = PIECES[piece](b, at)
        if b.pick(8) == 0:
            outputs.append(at)
    mean = b.call(aten.mean.dim, at, [2, 3])
    head = b.call(aten.linear.default, mean, b.normal(3, channels(at)), b.normal(3))
    return b.finish(head, *outputs)


def inputs(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed + 1))
