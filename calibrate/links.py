"""Layers whose output only other layers read, channel by channel: where a scale can move from one to the next."""

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from .affine import argument, layer_of, pads, value_of
from .clamps import clamp_bounds
from .graph import is_constant, kind, layer_name, operator_name

# f(s x) = s f(x) for s > 0, element by element.
HOMOGENEOUS = ("relu", "leaky_relu", "prelu")
# Means and maxima over positions of one channel.
POOLS = ("max_pool", "avg_pool", "upsample")
GATES = ("silu", "hardswish")


@dataclass
class Link:
    """`source` is a layer; `readers` are all layers that read its channels, with how many neighbouring inputs of each
    hold one channel (1, or the positions that a flatten put side by side).

    `gates` (silu, hardswish) and `bounded` (relu6) stand on the way and need rewriting when channels are scaled;
    `axes` is the channel axis at each of them, negative. `bends`: an activation is on the way, so that a shift is only
    exact where it is the identity. `edges`: zeros are added on the way or by a reader, which a shift would not reach.
    """

    source: Node
    readers: dict[Node, int] = field(default_factory=dict)
    gates: list[Node] = field(default_factory=list)
    bounded: list[Node] = field(default_factory=list)
    axes: dict[Node, int] = field(default_factory=dict)
    bends: bool = False
    edges: bool = False

    @property
    def name(self) -> str:
        """The readers' names, for the ledger."""
        return ", ".join(layer_name(r) for r in self.readers)


def find(graph: GraphModule, gates: bool = False, bounded: bool = False) -> tuple[list[Link], dict[str, str]]:
    """All links of the graph in the order they run, and layer -> why it starts none.

    `gates` and `bounded` say whether silu and hardswish, and clamps from 0 on, may stand on the way.
    """
    links, refused = [], {}
    for node in graph.graph.nodes:
        layer = layer_of(graph, node)
        if layer is None:
            continue
        link = Link(node)
        reason = _walk(graph, link, node, layer.axis, layer.outputs, 1, (gates, bounded))
        if reason is None and not link.readers:
            reason = "no layer reads its output"
        if reason is None:
            links.append(link)
        else:
            refused[layer_name(node)] = reason
    return links, refused


def _walk(
    graph: GraphModule, link: Link, tensor: Node, axis: int, count: int, repeat: int, allowed: tuple[bool, bool]
) -> str | None:
    """Follow the channels to every reader; why that ends somewhere else, or None."""
    for user in tensor.users:
        what = kind(user)
        if what == "shape":
            continue
        layer = layer_of(graph, user)
        if layer is not None and user.args[0] is tensor and layer.axis == axis and layer.inputs == count * repeat:
            if user in link.readers:
                return f"{layer_name(user)} reads it twice"
            link.readers[user] = repeat
            link.edges |= pads(layer)
            continue
        passed = _pass(graph, link, user, tensor, axis, repeat, allowed)
        if isinstance(passed, str):
            return passed
        reason = _walk(graph, link, user, *passed[:1], count, passed[1], allowed)
        if reason is not None:
            return reason
    return None if tensor.users else "its output leaves the model"


def _pass(
    graph: GraphModule, link: Link, user: Node, tensor: Node, axis: int, repeat: int, allowed: tuple[bool, bool]
) -> tuple[int, int] | str:
    """(channel axis, repeat) behind `user`, or why scaled channels cannot pass it."""
    what = kind(user)
    if user.op == "output":
        return "its output leaves the model"
    before, after = value_of(tensor), value_of(user)
    if before is None or after is None or user.args[0] is not tensor:
        return f"{layer_name(user)} ({what}) joins its channels with others"
    if what in HOMOGENEOUS:
        if what == "prelu" and not is_constant(user.args[1]):
            return f"the slopes of {layer_name(user)} are computed"
        link.bends = True
        return axis, repeat
    if what in GATES or what == "clamp":
        return _special(link, user, what, axis, repeat, allowed)
    if what in POOLS and axis == before.dim() * -1 + 1:
        padding = argument(user, 3, "padding", 0) if operator_name(user).startswith("avg_pool") else 0
        link.edges |= any(padding) if isinstance(padding, list | tuple) else bool(padding)
        return axis, repeat
    if what == "mean":
        return _mean(user, before, axis, repeat)
    if what == "pad":
        amounts, mode, fill = user.args[1], argument(user, 2, "mode", "constant"), argument(user, 3, "value", None)
        link.edges |= mode == "constant"
        if len(amounts) // 2 < -axis and (mode != "constant" or not fill):
            return axis, repeat
        return f"{layer_name(user)} pads with something else than zeros, or with channels"
    if what == "reshape" and repeat == 1 and axis == 1 - before.dim() and after.dim() == 2:
        sizes = before.shape[1:]
        if all(isinstance(d, int) for d in sizes) and str(after.shape[1]) == str(math.prod(sizes)):
            return -1, math.prod(sizes[1:])
    if what in ("gelu", "sigmoid", "tanh", "elu", "mish", "softplus", "hardsigmoid", "softmax", "layer_norm"):
        return f"{what} is not positively homogeneous"
    return f"{layer_name(user)} ({what}) mixes or joins its channels"


def _special(
    link: Link, user: Node, what: str, axis: int, repeat: int, allowed: tuple[bool, bool]
) -> tuple[int, int] | str:
    """An activation that lets scaled channels pass only when it is rewritten."""
    link.bends = True
    if what in GATES:
        if not allowed[0]:
            return f"{what} is not positively homogeneous (silu = true rewrites it at the price of one multiplication)"
        link.gates.append(user)
    else:
        bounds = clamp_bounds(user)
        if bounds is None or bounds[0] != 0:
            return "a clamp that does not start at 0 is not positively homogeneous"
        if not allowed[1]:
            return 'its relu6 would need a bound per channel, which kernels do not fuse (relu6 = "channels" does it)'
        link.bounded.append(user)
    link.axes[user] = axis
    return axis, repeat


def _mean(user: Node, before: Tensor, axis: int, repeat: int) -> tuple[int, int] | str:
    if operator_name(user) != "mean":
        return axis, repeat  # adaptive pooling to one value per channel keeps its axes
    dims = argument(user, 1, "dim", None)
    if not isinstance(dims, list | tuple) or not dims:
        return "a mean over all axes mixes its channels"
    gone = {int(d) % before.dim() for d in dims}
    at = before.dim() + axis
    if at in gone:
        return f"{layer_name(user)} (mean) mixes its channels"
    return (axis, repeat) if argument(user, 2, "keepdim", False) else (axis + sum(d > at for d in gone), repeat)
