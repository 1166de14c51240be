"""MIL's operators that make, join, split, repeat, mask and pad tensors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.errors import TargetError

from .values import ints, torch_dtype

Ints: TypeAlias = Tensor | Sequence[int]


def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Join along an axis; interleaved, element i of every value comes before element i + 1 of any."""
    if not interleave:
        return torch.cat(list(values), axis)
    axis %= values[0].ndim
    return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), axis)
    if num_splits is None:
        raise TargetError("split has neither num_splits nor split_sizes")
    return torch.split(x, x.shape[axis] // num_splits, axis)


def stack(values: Sequence[Tensor], axis: int) -> Tensor:
    return torch.stack(list(values), axis)


def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(ints(reps))


def fill(shape: Ints, value: float | int | bool = 0.0) -> Tensor:
    return torch.full(ints(shape), value)


def fill_like(ref_tensor: Tensor, value: float | int | bool = 0.0) -> Tensor:
    return torch.full(tuple(ref_tensor.shape), value)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """start, start + step, ... below end."""
    return torch.arange(start.item(), end.item(), step.item())


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor | int,
    axis: int = -1,
    on_value: float = 1,
    off_value: float = 0,
    dtype: str | None = None,
) -> Tensor:
    """A new axis, `on_value` at each index; an index out of range gives a row of `off_value`."""
    place = axis % (indices.ndim + 1)
    hit = indices.unsqueeze(place) == torch.arange(int(one_hot_vector_size)).view(
        [-1 if i == place else 1 for i in range(indices.ndim + 1)]
    )
    kind = torch.float32 if isinstance(on_value, float) else torch.int32
    on, off = torch.tensor(on_value, dtype=kind), torch.tensor(off_value, dtype=kind)
    y = torch.where(hit, on, off)
    return y if dtype is None else y.to(torch_dtype(dtype))


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """x inside the band of `lower` sub- and `upper` superdiagonals (-1: all of them), 0 outside."""
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])[None]
    keep = torch.ones(x.shape[-2:], dtype=torch.bool)
    if lower >= 0:
        keep &= rows - columns <= lower
    if upper >= 0:
        keep &= columns - rows <= upper
    return torch.where(keep, x, torch.zeros_like(x))


def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """pad: (before, after) of the last len(pad) / 2 axes, first of them first. mode: constant, reflect, replicate."""
    sides = ints(pad)
    pairs = [(sides[2 * i], sides[2 * i + 1]) for i in range(len(sides) // 2)]
    if mode == "constant":
        return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        if before or after:
            x = x.index_select(axis, _border(x.shape[axis], before, after, mode))
    return x


def _border(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which element stands at every place of a padded axis."""
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    if mode == "reflect":
        return (size - 1) - ((size - 1) - places.abs()).abs()
    raise TargetError(f"pad has no mode '{mode}'")


OPS: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "concat": concat,
    "fill": fill,
    "fill_like": fill_like,
    "one_hot": one_hot,
    "pad": pad,
    "range_1d": range_1d,
    "shape": shape,
    "split": split,
    "stack": stack,
    "tile": tile,
}
