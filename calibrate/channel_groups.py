"""Linear layers that read the same channels, and scaling these where they are made or on the way to the layers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .affine import argument, layer_of, scale_inputs, scale_outputs
from .channels import Channels, plain, readers
from .graph import add_constant, constant, is_weighted, kind, layer_name

# What a multiplication is put after where all tensors that linear layers read may get one.
MAKERS = ("gelu", "silu", "relu", "mul", "attention", "reshape", "transpose")


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same channels, and what made these.

    `columns`: for every layer the channel of each of its columns, int64 [in]. `source` is scaled by folding where
    `folds`; else each tensor that the layers read gets a multiplication, and `why` says what stands in the way.
    """

    source: Node
    layers: tuple[Node, ...]
    columns: tuple[Tensor, ...]
    width: int
    folds: bool
    why: str = ""


def find_groups(graph: GraphModule, channels: Channels, explicit: str) -> list[Group]:
    """The groups that can be smoothed, in the order in which they run; `explicit` as the step's parameter."""
    by_source: dict[Node, list[Node]] = {}
    apart: list[Node] = []  # layers whose input's maker is no LayerNorm and no value projection
    for node in graph.graph.nodes:
        if is_weighted(node) and kind(node) == "linear" and layer_of(graph, node) is not None:
            found = channels.source(channels.columns[node]) if node in channels.columns else None
            if found is not None and (plain(found[0]) or _projects(graph, found[0])):
                by_source.setdefault(found[0], []).append(node)
            else:
                apart.append(node)
    groups = []
    for source, layers in by_source.items():
        columns = tuple(channels.columns[n] - channels.base[source] for n in layers)
        why = other_reader(source, layers, columns, channels)
        group = Group(source, tuple(layers), columns, channels.width[source], why is None, why or "")
        if group.folds or explicit == "all" or (explicit == "norm" and kind(source) == "layer_norm"):
            groups.append(group)
    if explicit == "all":
        shared: dict[Node, list[Node]] = {}
        for node in apart:
            if kind(tensor_of(node)) in MAKERS:
                shared.setdefault(tensor_of(node), []).append(node)
        for tensor, layers in shared.items():
            layer = layer_of(graph, layers[0])
            assert layer is not None
            line = torch.arange(layer.inputs)
            why = f"{kind(tensor)} can't take a scale per channel"
            groups.append(Group(tensor, tuple(layers), (line,) * len(layers), len(line), False, why))
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    return sorted(groups, key=lambda g: order[g.layers[0]])


def _projects(graph: GraphModule, node: Node) -> bool:
    return kind(node) == "linear" and layer_of(graph, node) is not None


def other_reader(source: Node, layers: list[Node], columns: tuple[Tensor, ...], channels: Channels) -> str | None:
    """Why the channels can't be scaled where they are made: something else reads them. None when nothing does."""
    scaled = set(torch.cat(columns).tolist())
    for reader, tensor in readers(source, channels.sums):
        if reader in layers and reader.args[0] is tensor:
            continue
        paired = [p for p in channels.products if p.node is reader]
        sides = [channels.source(x) for p in paired for x in (p.left, p.right)]
        met = [set(s[1].flatten().tolist()) for s in sides if s is not None and s[0] is source]
        # The queries and keys of a fused projection are other channels of it.
        if len(paired) == 1 and None not in sides and met and not any(m & scaled for m in met):
            continue
        return f"{layer_name(reader)} reads it too"
    return None


def tensor_of(layer: Node) -> Node:
    source = layer.args[0]
    assert isinstance(source, Node)
    return source


def scale_group(graph: GraphModule, group: Group, scale: Tensor) -> None:
    """Divide the channels by `scale` (float64 [C]) and multiply the columns that read them."""
    if not group.folds:
        for tensor in dict.fromkeys(tensor_of(n) for n in group.layers):
            _multiply(graph, group, tensor, scale)
    elif kind(group.source) == "layer_norm":
        scale_norm(graph, group.source, 1 / scale)
    else:
        layer = layer_of(graph, group.source)
        assert layer is not None
        factor = torch.ones(layer.outputs, dtype=torch.float64)
        rows = torch.cat(group.columns).unique()
        factor[rows] = 1 / scale[rows]
        scale_outputs(graph, layer, factor)
    for node, columns in zip(group.layers, group.columns, strict=True):
        layer = layer_of(graph, node)
        assert layer is not None
        scale_inputs(graph, layer, scale[columns])


def _multiply(graph: GraphModule, group: Group, tensor: Node, scale: Tensor) -> None:
    """Put `tensor` times 1/scale before the group's layers that read it."""
    users = [(n, c) for n, c in zip(group.layers, group.columns, strict=True) if tensor_of(n) is tensor]
    first = next(n for n in graph.graph.nodes if any(n is u for u, _ in users))
    inverse = add_constant(graph, f"{layer_name(tensor)}_smooth", (1 / scale[users[0][1]]).float(), first)
    with graph.graph.inserting_before(first):
        made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (tensor, inverse))
    made.meta["layer"] = f"{layer_name(tensor)}.smooth"
    if "val" in tensor.meta:
        made.meta["val"] = tensor.meta["val"]
    for node, _ in users:
        node.args = (made, *node.args[1:])


def scale_norm(graph: GraphModule, norm: Node, factor: Tensor, shift: Tensor | None = None) -> None:
    """Make a LayerNorm compute y * factor + shift; both float64 [C]."""
    old_weight, old_bias = argument(norm, 2, "weight", None), argument(norm, 3, "bias", None)
    weight = constant(graph, old_weight).double() if old_weight is not None else torch.ones_like(factor)
    bias = constant(graph, old_bias).double() * factor if old_bias is not None else None
    if shift is not None:
        bias = shift + (bias if bias is not None else 0)
    name, dtype = layer_name(norm), torch.float32
    new_weight = add_constant(graph, f"{name}_scaled_weight", (weight * factor).to(dtype), norm)
    new_bias = add_constant(graph, f"{name}_scaled_bias", bias.to(dtype), norm) if bias is not None else None
    norm.kwargs = {k: v for k, v in norm.kwargs.items() if k not in ("weight", "bias")}
    norm.args = (*norm.args[:2], new_weight, new_bias, *norm.args[4:])
