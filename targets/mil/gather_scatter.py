"""MIL's gathers and scatters. Indices are integers; negative ones count from the end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from targets.errors import TargetError


def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]."""
    axis %= x.ndim
    if batch_dims:
        parts = [gather(a, b, axis - 1, batch_dims - 1) for a, b in zip(x, indices, strict=True)]
        return torch.stack(parts)
    picked = x.index_select(axis, _positive(indices, x.shape[axis]).reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    """numpy.take_along_axis."""
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last axis of `indices` addresses the leading axes of x."""
    if batch_dims:
        return torch.stack([gather_nd(a, b, batch_dims - 1) for a, b in zip(x, indices, strict=True)])
    return x[tuple(indices.long().unbind(-1))]


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Combine `updates` into the slices of `data` that `indices` names along `axis`."""
    axis %= data.ndim
    moved = data.movedim(axis, 0)
    rows = _positive(indices, data.shape[axis]).reshape(-1)
    order = [axis + i for i in range(indices.ndim)]
    flat = updates.movedim(order, list(range(indices.ndim))) if indices.ndim else updates[None]
    return _combine(moved, rows, flat.reshape(rows.numel(), *moved.shape[1:]), mode).movedim(0, axis)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The counterpart of gather_along_axis: element by element."""
    axis %= data.ndim
    positions = torch.arange(data.numel()).reshape(data.shape)
    rows = torch.gather(positions, axis, _positive(indices, data.shape[axis]))
    return _combine(data.reshape(-1), rows.reshape(-1), updates.reshape(-1), mode).reshape(data.shape)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """The counterpart of gather_nd."""
    depth = indices.shape[-1]
    lead, rest = data.shape[:depth], data.shape[depth:]
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for size, column in zip(lead, indices.unbind(-1), strict=True):
        rows = rows * size + _positive(column, size)
    flat = _combine(data.reshape(-1, *rest), rows.reshape(-1), updates.reshape(-1, *rest), mode)
    return flat.reshape(data.shape)


_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": lambda old, new: new,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _combine(data: Tensor, rows: Tensor, updates: Tensor, mode: str) -> Tensor:
    """data with row r combined with its updates, one after the other where a row comes up again."""
    if mode not in _COMBINE:
        raise TargetError(f"scatter has no mode '{mode}'")
    result = data.clone()
    if mode == "add":
        return result.index_add_(0, rows, updates)
    if rows.unique().numel() == rows.numel():
        result[rows] = _COMBINE[mode](result[rows], updates)
        return result
    for row, update in zip(rows.tolist(), updates, strict=True):
        result[row] = _COMBINE[mode](result[row], update)
    return result


def _positive(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


OPS: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
