"""Where a layer's channels go: through reshapes, transposes, splits and attention, to the layers that read them.

Instead of reasoning about shapes, one run of the graph carries a second tensor beside every value: which channel of
which layer each element holds. Operators that only move values move these labels too, so any layout of heads and any
fusion of query, key and value is followed alike.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .graph import MOVEMENT, is_constant, is_weighted, kind, operator_name

# Samples in the labelled run: two, so that an axis on which the samples lie is seen to hold no channels.
SAMPLES = 2
# Movements that may bring in values from elsewhere or choose values by other values.
IMPURE = ("pad", "gather", "constant")
COPIES = ("contiguous", "clone", "alias", "detach")


@dataclass(frozen=True)
class Product:
    """Two operands multiplied channel by channel and summed: queries and keys.

    `left`, `right`: labels int64 [heads, channels of a head]; entry (h, d) of one meets entry (h, d) of the other.
    """

    node: Node
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Average:
    """A sum over tokens, channel by channel: attention's values. `channels`: labels int64 [heads, of a head]."""

    node: Node
    channels: Tensor


@dataclass
class Channels:
    """The labels of one graph. A label is `base[layer] + channel`; 0 says that it is not known.

    `columns`: linear layer -> label of each of its input columns, int64 [in], where they do not vary over the other
    axes. `products`: attention and matmul operators whose two operands' channels are known; `averages` likewise.
    """

    base: dict[Node, int] = field(default_factory=dict)
    width: dict[Node, int] = field(default_factory=dict)
    columns: dict[Node, Tensor] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)

    @property
    def sums(self) -> set[Node]:
        """The operators that average values."""
        return {a.node for a in self.averages}

    def source(self, labels: Tensor) -> tuple[Node, Tensor] | None:
        """The one layer that all `labels` are of, and the channels of it; None where there are several, or none."""
        low, high = int(labels.min()), int(labels.max())
        for node, base in self.base.items():
            if base <= low and high < base + self.width[node]:
                return node, labels - base
        return None


def trace(graph: GraphModule, inputs: list[Tensor]) -> Channels:
    """Follow the channels of every linear, convolution and LayerNorm of `graph`; `inputs` is one batch of samples."""
    run = _Labelled(graph)
    with torch.no_grad():
        run.run(*few(graph, inputs))
    return run.found


def few(graph: GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """The first samples of a batch, where the graph takes any batch; else all of them."""
    first = next((n for n in graph.graph.nodes if n.op == "placeholder"), None)
    value = first.meta.get("val") if first is not None else None
    free = isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value.shape[0], int)
    return [t[:SAMPLES] for t in inputs] if free else inputs


def readers(node: Node, sums: Collection[Node] | None = None) -> Iterator[tuple[Node, Node]]:
    """Every (reader, tensor it reads) of `node`'s values, past movements; a reader of sizes is none.

    With `sums` (`Channels.sums`) attention that averages the values is passed too, its output being made of the same
    channels, and so is a multiplication by one number: a scale of a channel passes through these, a shift does not.
    """
    seen: set[Node] = set()
    stack = [node]
    while stack:
        tensor = stack.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        for user in tensor.users:
            if kind(user) == "shape":
                continue
            if moves(user) or (sums is not None and ((user in sums and averages(user, tensor)) or scales(user))):
                stack.append(user)
            else:
                yield user, tensor


def moves(node: Node) -> bool:
    """Whether every value of `node` is a value that it reads, in another place."""
    what = kind(node)
    if operator_name(node) == "dropout":
        return node.args[2] is False
    return what == "getitem" or (what in MOVEMENT and what not in IMPURE) or operator_name(node) in COPIES


def averages(node: Node, tensor: Node) -> bool:
    """Whether `node` makes sums over the tokens of `tensor`, channel by channel: attention's values."""
    what = kind(node)
    index = {"attention": 2, "matmul": 1}.get(what)
    return index is not None and node.args[index] is tensor and tensor not in node.args[:index]


def scales(node: Node) -> bool:
    """Whether `node` multiplies a tensor by one number."""
    return kind(node) in ("mul", "div") and isinstance(node.args[0], Node) and isinstance(node.args[1], int | float)


class LabelledRun(Interpreter):
    """Runs the graph with a tensor of labels beside each value that `labels_of` gives one."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.labels: dict[Node, Any] = {}

    def labels_of(self, n: Node, value: Any) -> Any:
        """The labels of `n`'s value, from those of what it reads (`self.labels`); None where it has none."""
        raise NotImplementedError

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        labels = self.labels_of(n, value)
        if labels is not None:
            self.labels[n] = labels
        for old in self.user_to_last_uses.get(n, ()):
            self.labels.pop(old, None)
        return value


class _Labelled(LabelledRun):
    """Every channel that a layer makes has a label of its own."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found = Channels()
        self.next = 1

    def labels_of(self, n: Node, value: Any) -> Any:
        what = kind(n)
        if n.op != "call_function" or what == "shape":
            return None
        self._note(n, what)
        if moves(n):
            return moved(n, self.labels, self.env)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        if scales(n):
            return self.labels.get(n.args[0])
        if what in ("attention", "matmul") and operator_name(n) != "baddbmm":
            return self._averaged(n, n.args[2 if what == "attention" else 1], value)
        axis = {"linear": -1, "conv": 1, "layer_norm": -1}.get(what)
        if axis is None or (what in ("linear", "conv") and not is_weighted(n)):
            return None
        return self._fresh(n, value, axis)

    def _fresh(self, n: Node, value: Tensor, axis: int) -> Tensor:
        width = value.shape[axis]
        self.found.base[n], self.found.width[n] = self.next, width
        line = torch.arange(self.next, self.next + width)
        self.next += width
        shape = [1] * value.dim()
        shape[axis] = width
        return line.view(shape).expand(value.shape)

    def _averaged(self, n: Node, values: Any, out: Tensor) -> Tensor | None:
        """A sum over tokens, the second axis from the right, holds the channels of its values."""
        labels = self.labels.get(values)
        line = _constant_along(labels, -2) if isinstance(labels, Tensor) else None
        if line is None or line.shape[:-1] != out.shape[:-2] or line.shape[-1] != out.shape[-1]:
            return None
        self.found.averages.append(Average(n, line.reshape(-1, line.shape[-1]).unique(dim=0)))
        return line.unsqueeze(-2).expand(out.shape)

    def _note(self, n: Node, what: str) -> None:
        """Remember what a linear's columns are and which channels a product pairs."""
        if what == "linear" and is_weighted(n):
            labels = self.labels.get(n.args[0])
            if isinstance(labels, Tensor):
                flat = labels.reshape(-1, labels.shape[-1])
                if bool((flat == flat[0]).all()):
                    self.found.columns[n] = flat[0].clone()
        elif what in ("attention", "matmul") and operator_name(n) != "baddbmm":
            left, right = self.labels.get(n.args[0]), self.labels.get(n.args[1])
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                # A matmul reads its keys transposed: [..., channels, tokens].
                pair = _constant_along(left, -2), _constant_along(right, -2 if what == "attention" else -1)
                if pair[0] is not None and pair[1] is not None and pair[0].shape == pair[1].shape:
                    both = torch.cat([p.reshape(-1, p.shape[-1]) for p in pair], -1).unique(dim=0)  # type: ignore[union-attr]
                    self.found.products.append(Product(n, *both.chunk(2, -1)))


def moved(n: Node, labels: dict[Node, Any], env: dict[Node, Any]) -> Any:
    """The same movement as `n`'s, applied to the labels; what has none counts as 0. None where no operand has any."""
    if not any(a in labels for a in n.all_input_nodes):
        return None
    if kind(n) == "cast":
        return labels[n.all_input_nodes[0]]

    def swap(a: Node) -> Any:
        if a in labels:
            return labels[a]
        return torch.zeros_like(env[a], dtype=torch.int64) if isinstance(env[a], Tensor) else env[a]

    args = torch.fx.node.map_arg(n.args, swap)
    return n.target(*args, **torch.fx.node.map_arg(n.kwargs, swap))


def _constant_along(labels: Tensor, axis: int) -> Tensor | None:
    """`labels` without `axis`, along which they must not vary; None where they do."""
    if labels.dim() < 2:
        return None
    line = labels.select(axis, 0)
    return line if bool((labels == line.unsqueeze(axis)).all()) else None


def plain(node: Node) -> bool:
    """Whether a LayerNorm is the normal form's, over the last axis alone, with constant weight and bias or none."""
    if kind(node) != "layer_norm" or operator_name(node) != "layer_norm":
        return False
    shape = node.args[1]
    affine = node.args[2:4]
    return isinstance(shape, list | tuple) and len(shape) == 1 and all(a is None or is_constant(a) for a in affine)
