"""Operators that read or write by index: gather, scatter, one-hot, top-k, ..."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator
from .values import Numbers, materialised

REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _wrapped(indices: Tensor, length: int) -> Tensor:
    """Negative indices count from the end; torch's gather takes none."""
    return torch.where(indices < 0, indices + length, indices)


@operator("Gather", hint=(1,))
def gather(node: OnnxNode, data: Tensor, indices: Tensor | Numbers) -> Tensor:
    """Whole slices along one axis; rows of a matrix of floats are an embedding (whose ids are never negative)."""
    axis = node.get("axis", 0) % data.dim()
    if isinstance(indices, Numbers):
        if indices.scalar:
            return data.select(axis, indices.values[0])
        indices = materialised(indices)
    indices = indices.long()
    if axis == 0 and data.dim() == 2 and data.is_floating_point() and indices.dim() > 0:
        return F.embedding(indices, data)
    positions = _wrapped(indices, data.shape[axis])
    taken = data.index_select(axis, positions.reshape(-1))
    return taken.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(node: OnnxNode, data: Tensor, indices: Tensor) -> Tensor:
    """One number per index."""
    axis = node.get("axis", 0) % data.dim()
    return torch.gather(data, axis, _wrapped(indices.long(), data.shape[axis]))


@operator("GatherND")
def gather_nd(node: OnnxNode, data: Tensor, indices: Tensor) -> Tensor:
    """The last axis of the indices is a position."""
    if node.get("batch_dims", 0):
        raise node.refuse("has batch axes")
    return data[tuple(indices.long().unbind(-1))]


@operator("ScatterElements", "Scatter")
def scatter_elements(node: OnnxNode, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """One number written per index."""
    axis = node.get("axis", 0) % data.dim()
    positions = _wrapped(indices.long(), data.shape[axis])
    reduction = node.get("reduction", "none")
    if reduction == "none":
        return data.scatter(axis, positions, updates)
    return data.scatter_reduce(axis, positions, updates, REDUCTIONS[reduction], include_self=True)


@operator("ScatterND")
def scatter_nd(node: OnnxNode, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The last axis of the indices is a position; what is written there is a slice."""
    reduction = node.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise node.refuse(f"reduces by {reduction}")
    return data.index_put(tuple(indices.long().unbind(-1)), updates, accumulate=reduction == "add")


@operator("OneHot", host=(1,))
def one_hot(node: OnnxNode, indices: Tensor, depth: list[int], values: Tensor) -> Tensor:
    """values = [off, on]; the new axis stands at `axis`."""
    size = int(depth[0])
    classes = torch.arange(size)
    axis = node.get("axis", -1)
    hot = (_wrapped(indices.long(), size).unsqueeze(-1) == classes).movedim(-1, axis)
    return torch.where(hot, values[1], values[0])


@operator("TopK", host=(1,))
def top_k(node: OnnxNode, x: Tensor, k: list[int]) -> tuple[Tensor, Tensor]:
    """(values, indices), sorted."""
    values, indices = torch.topk(x, int(k[0]), node.get("axis", -1), bool(node.get("largest", 1)), True)
    return values, indices


@operator("ArgMax", "ArgMin")
def arg_extreme(node: OnnxNode, x: Tensor) -> Tensor:
    """The first, or with select_last_index the last."""
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not node.get("select_last_index", 0):
        return function(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)


@operator("CumSum", host=(1,))
def cumulative_sum(node: OnnxNode, x: Tensor, axis: list[int]) -> Tensor:
    """Forwards or in reverse; exclusive leaves the number itself out."""
    along = axis[0]
    reverse = bool(node.get("reverse", 0))
    turned = x.flip(along) if reverse else x
    total = torch.cumsum(turned, along)
    total = total - turned if node.get("exclusive", 0) else total
    return total.flip(along) if reverse else total


@operator("ReverseSequence")
def reverse_sequence(node: OnnxNode, x: Tensor, lengths: Tensor) -> Tensor:
    """The first `length` steps of each sample backwards, the others as they are."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    steps = torch.arange(x.shape[time])
    moved = x.movedim((batch, time), (0, 1))
    limit = lengths[:, None]
    order = torch.where(steps < limit, limit - 1 - steps, steps)
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(moved.shape)
    return moved.gather(1, index).movedim((0, 1), (batch, time))
