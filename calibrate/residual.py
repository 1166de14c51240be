"""Find a transformer's residual stream: every operator that writes to it, and every one that reads it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .affine import layer_of
from .channels import LabelledRun, few, moved, moves, plain
from .graph import is_constant, is_weighted, kind, layer_name

# Tensor -> (how many axes it has, which of them holds the stream's channels, in order).
Axes = dict[Node, tuple[int, int]]


class NotCoveredError(Exception):
    """Why the stream is not wholly known: one clause that names the operator."""


@dataclass
class Stream:
    """The tensors that carry a residual stream of one width, and what is at its ends.

    `writers`: linears and convolutions; `constants`: tensors whose last axis holds the channels, added or joined;
    `tables`: embeddings; `norms`: LayerNorms that read it; `readers`: linears that read it -> the norm between, if any.
    """

    width: int
    nodes: set[Node] = field(default_factory=set)
    writers: list[Node] = field(default_factory=list)
    constants: list[Node] = field(default_factory=list)
    tables: list[Node] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    readers: dict[Node, Node | None] = field(default_factory=dict)


def widths(graph: GraphModule) -> dict[int, Node]:
    """Width -> the first LayerNorm over so many channels."""
    found: dict[int, Node] = {}
    for node in graph.graph.nodes:
        if plain(node):
            found.setdefault(int(node.args[1][0]), node)
    return found


def cover(graph: GraphModule, norm: Node, axes: Axes) -> Stream:
    """The stream that `norm` reads, followed up and down to all its ends. `axes` as `channel_axes` finds them.

    Raises NotCoveredError, naming an operator through which the stream can't be followed.
    """
    stream = Stream(int(norm.args[1][0]))
    assert isinstance(norm.args[0], Node)
    walk = [norm.args[0]]
    while walk:
        node = walk.pop()
        if node not in stream.nodes:
            stream.nodes.add(node)
            if node not in axes:
                raise NotCoveredError(f"{_called(node)} mixes channels or reads other values than the residual stream")
            walk += _upstream(graph, stream, node)
            walk += _downstream(graph, stream, node, axes)
    for reader in stream.norms:
        _past_norm(graph, stream, reader, axes)
    return stream


def _upstream(graph: GraphModule, stream: Stream, node: Node) -> list[Node]:
    """What writes `node`: noted where it is an end of the stream, returned where it is the stream."""
    what = kind(node)
    if what == "weight":
        stream.constants.append(node)
    elif what in ("linear", "conv"):
        layer = layer_of(graph, node)
        if layer is None or layer.groups != 1 or layer.transposed:
            raise NotCoveredError(f"{_called(node)} writes to the stream with a weight that can't be rotated")
        stream.writers.append(node)
    elif what == "embedding":
        stream.tables.append(node)
    elif what == "layer_norm":
        raise NotCoveredError(
            f"{_called(node)} writes to the residual stream (post-LN): its affine can't be folded away"
        )
    elif _joins(node):
        return [a for a in node.all_input_nodes if kind(a) != "shape"]
    else:
        raise NotCoveredError(f"{_called(node)} stands in the residual stream")
    return []


def _joins(node: Node) -> bool:
    """Whether `node`, given rotated streams, computes a rotated stream: sums, means over tokens, movements."""
    return kind(node) in ("add", "mean") or moves(node)


def _downstream(graph: GraphModule, stream: Stream, node: Node, axes: Axes) -> list[Node]:
    onward = []
    for user in node.users:
        if kind(user) == "layer_norm":
            if not plain(user) or user.args[0] is not node or axes[node][1] != axes[node][0] - 1:
                raise NotCoveredError(f"{_called(user)} normalises the residual stream in a way of its own")
            stream.norms.append(user)
        elif kind(user) == "linear":
            _reads(graph, stream, user, node, axes, None)
        elif _joins(user):
            onward.append(user)
        elif kind(user) != "shape":
            raise NotCoveredError(f"{_called(user)} reads the residual stream itself")
    return onward


def _past_norm(graph: GraphModule, stream: Stream, norm: Node, axes: Axes) -> None:
    """Every reader of a LayerNorm's output must be a linear, past movements and means over tokens."""
    seen: set[Node] = set()
    walk = [norm]
    while walk:
        node = walk.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in axes:
            raise NotCoveredError(f"{_called(node)} mixes channels after {_called(norm)}")
        for user in node.users:
            if kind(user) == "linear":
                _reads(graph, stream, user, node, axes, norm)
            elif kind(user) == "mean" or moves(user):
                walk.append(user)
            elif kind(user) == "add":
                raise NotCoveredError(f"{_called(user)} reads the output of {_called(norm)} (post-LN)")
            elif kind(user) != "shape":
                raise NotCoveredError(f"{_called(user)} reads the output of {_called(norm)}")


def _reads(graph: GraphModule, stream: Stream, user: Node, node: Node, axes: Axes, norm: Node | None) -> None:
    layer = layer_of(graph, user)
    rank, axis = axes[node]
    if layer is None or user.args[0] is not node or axis != rank - 1 or layer.inputs != stream.width:
        raise NotCoveredError(f"{_called(user)} reads the residual stream in a way that can't be rotated")
    stream.readers[user] = norm


def _called(node: Node) -> str:
    if node.op == "output":
        return "the model's output"
    return f"{kind(node)} {layer_name(node)}" if node.op == "call_function" else str(node.target)


def channel_axes(graph: GraphModule, inputs: list[Tensor], width: int) -> Axes:
    """Which tensors hold `width` channels in order along one axis, found by one labelled run on a batch of samples."""
    run = _Axes(graph, width)
    with torch.no_grad():
        run.run(*few(graph, inputs))
    return run.axes


class _Axes(LabelledRun):
    """Every element's label is the number, from 1, of the channel that it belongs to."""

    def __init__(self, graph: GraphModule, width: int) -> None:
        super().__init__(graph)
        self.width = width
        self.axes: Axes = {}

    def labels_of(self, n: Node, value: Any) -> Any:
        labels = self._channels(n, value)
        if isinstance(labels, Tensor):
            axis = self._axis(labels)
            if axis is not None:
                self.axes[n] = (labels.dim(), axis)
        elif isinstance(labels, tuple | list):
            self.axes[n] = (0, 0)  # several tensors, each looked at where it is taken
        return labels

    def _channels(self, n: Node, value: Any) -> Any:
        what = kind(n)
        if moves(n):
            return moved(n, self.labels, self.env)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            return None
        if what == "add":
            both = [self.labels.get(a) for a in n.all_input_nodes]
            if any(b is None for b in both):
                return None
            wide = [b.expand(value.shape) for b in both if b is not None]
            return wide[0] if all(torch.equal(wide[0], w) for w in wide) else None
        if what == "mean":
            return self._mean(n)
        ends = what in ("weight", "layer_norm") or (what == "embedding" and is_constant(n.args[0]))
        axis = 1 if what == "conv" else -1
        if not (ends or (what in ("linear", "conv") and is_weighted(n))) or value.shape[axis] != self.width:
            return None
        shape = [1] * value.dim()
        shape[axis] = self.width
        return torch.arange(1, self.width + 1).view(shape).expand(value.shape)

    def _mean(self, n: Node) -> Tensor | None:
        """The labels of a mean over axes along which they do not vary."""
        labels = self.labels.get(n.args[0])
        if labels is None or operator_takes_no_axes(n):
            return None
        dims, keep = n.args[1], bool(n.args[2]) if len(n.args) > 2 else bool(n.kwargs.get("keepdim", False))
        least, most = labels.amin(dims, keep), labels.amax(dims, keep)
        return least if torch.equal(least, most) else None

    def _axis(self, labels: Tensor) -> int | None:
        for axis, size in enumerate(labels.shape):
            if size == self.width:
                shape = [1] * labels.dim()
                shape[axis] = size
                if bool((labels == torch.arange(1, size + 1).view(shape)).all()):
                    return axis
        return None


def operator_takes_no_axes(n: Node) -> bool:
    """Whether a mean is over everything, or a pooling."""
    return len(n.args) < 2 or not isinstance(n.args[1], list | tuple | int) or "mean" not in str(n.target)
