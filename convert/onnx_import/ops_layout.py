"""Operators that move numbers about or make constants: reshape, transpose, slice, concat, pad, ..."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator

PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Reshape", host=(1,))
def reshape(node: OnnxNode, x: Tensor, shape: list[int]) -> Tensor:
    """0 keeps an axis (unless allowzero), -1 is what remains."""
    keep = not node.get("allowzero", 0)
    return x.reshape([x.shape[i] if keep and type(s) is int and s == 0 else s for i, s in enumerate(shape)])


@operator("Flatten")
def flatten(node: OnnxNode, x: Tensor) -> Tensor:
    """Always a matrix: the axes before `axis`, and the others."""
    axis = node.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if axis == 1:
        return x.flatten(1) if x.dim() > 1 else x.reshape(x.shape[0], 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def transpose(node: OnnxNode, x: Tensor) -> Tensor:
    """All axes reversed where no order is given."""
    return x.permute(node.get("perm", list(reversed(range(x.dim())))))


@operator("Squeeze", host=(1,))
def squeeze(node: OnnxNode, x: Tensor, axes: list[int] | None = None) -> Tensor:
    """The axes are an attribute before opset 13; without them every axis of length 1 goes."""
    chosen = axes if axes is not None else node.get("axes")
    if chosen is None:
        chosen = [i for i, d in enumerate(x.shape) if type(d) is int and d == 1]
    return x.squeeze(tuple(chosen))


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: OnnxNode, x: Tensor, axes: list[int] | None = None) -> Tensor:
    """The axes count in the result."""
    chosen = axes if axes is not None else node.get("axes")
    rank = x.dim() + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(node: OnnxNode, *parts: Tensor) -> Tensor:
    """Along one axis."""
    return torch.cat(parts, node.get("axis"))


@operator("Split", host=(1,))
def split(node: OnnxNode, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    """By sizes, or into equal parts with a smaller last one."""
    axis = node.get("axis", 0)
    given = sizes or node.get("split")
    if given:
        return tuple(torch.split(x, list(given), axis))
    length = math.ceil(x.shape[axis] / node.get("num_outputs", len(node.outputs)))
    return tuple(torch.split(x, length, axis))


@operator("Slice", host=(1, 2, 3, 4))
def slice_(
    node: OnnxNode,
    x: Tensor,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    """Python's slices; everything but x is an attribute before opset 10."""
    starts, ends = starts or node.get("starts"), ends or node.get("ends")
    axes = axes or node.get("axes") or list(range(len(starts or [])))
    steps = steps or [1] * len(axes)
    for start, end, axis, step in zip(starts or [], ends or [], axes, steps, strict=True):
        if step > 0:
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
        else:
            positions = list(range(*slice(start, end, step).indices(x.shape[axis])))
            x = x.index_select(axis, torch.tensor(positions, dtype=torch.int64))
    return x


@operator("Expand", host=(1,))
def expand(node: OnnxNode, x: Tensor, shape: list[int]) -> Tensor:
    """Broadcasting in both directions."""
    rank = max(x.dim(), len(shape))
    x = x.reshape([1] * (rank - x.dim()) + list(x.shape))
    wanted = [1] * (rank - len(shape)) + list(shape)
    return x.expand([d if type(w) is int and w == 1 else w for d, w in zip(x.shape, wanted, strict=True)])


@operator("Tile", host=(1,))
def tile(node: OnnxNode, x: Tensor, repeats: list[int]) -> Tensor:
    """Each axis repeated."""
    return x.repeat(repeats)


@operator("Pad", host=(1, 2, 3))
def pad(
    node: OnnxNode,
    x: Tensor,
    pads: list[int] | None = None,
    fill: list[float] | None = None,
    axes: list[int] | None = None,
) -> Tensor:
    """Negative amounts cut off; amounts and value are attributes before opset 11."""
    amounts = pads if pads is not None else node.get("pads") or node.get("paddings")
    chosen = [a % x.dim() for a in axes] if axes else list(range(x.dim()))
    count = len(chosen)
    before, after = [0] * x.dim(), [0] * x.dim()
    for axis, b, a in zip(chosen, amounts[:count], amounts[count:], strict=True):
        before[axis], after[axis] = b, a
    mode = PAD_MODES[node.get("mode", "constant")]
    first = next((i for i in range(x.dim()) if before[i] or after[i]), None)
    if first is None:
        return x
    sides = [n for i in reversed(range(first, x.dim())) for n in (before[i], after[i])]
    if mode == "constant":
        return F.pad(x, sides, value=fill[0] if fill else node.get("value", 0.0))
    if first < 2 or min(sides) < 0:
        raise node.refuse(f"pads batch or channels, or cuts off, in mode {node.get('mode')}")
    return F.pad(x, _whole(sides, x.dim() - 2), mode=mode)


def _whole(sides: Sequence[int], spatial: int) -> list[int]:
    """torch wants all spatial axes in the modes that copy."""
    return [*sides, *[0] * (2 * spatial - len(sides))]


@operator("Trilu", host=(1,))
def triangle(node: OnnxNode, x: Tensor, diagonal: list[int] | None = None) -> Tensor:
    """The upper or the lower triangle of the last two axes."""
    offset = diagonal[0] if diagonal else 0
    return torch.triu(x, offset) if node.get("upper", 1) else torch.tril(x, offset)


@operator("Constant")
def constant(node: OnnxNode) -> Tensor:
    """A tensor from one of several attributes."""
    if "value" in node.attributes:
        return node.attributes["value"]
    name, value = next(iter(node.attributes.items()))
    if name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise node.refuse(f"holds a {name}")
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(node: OnnxNode, shape: list[int]) -> Tensor:
    """Filled with one value, float32 0 where none is given."""
    return torch.full(shape, node.get("fill", 0.0), dtype=node.get("dtype", torch.float32))


@operator("Range", host=(0, 1, 2))
def range_(node: OnnxNode, start: list[Any], limit: list[Any], delta: list[Any]) -> Tensor:
    """start, start + delta, ... below limit."""
    return torch.arange(start[0], limit[0], delta[0])


@operator("EyeLike")
def eye_like(node: OnnxNode, x: Tensor) -> Tensor:
    """Ones on one diagonal."""
    from .reading import DTYPES

    dtype = DTYPES[node.get("dtype")] if node.get("dtype") else x.dtype
    rows, columns = x.shape
    return (torch.arange(columns) - torch.arange(rows)[:, None] == node.get("k", 0)).to(dtype)


@operator("Shape")
def shape_of(node: OnnxNode, x: Tensor) -> Tensor:
    """Of a constant; run-time shapes never become tensors."""
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end", None)], dtype=torch.int64)


@operator("Size")
def size_of(node: OnnxNode, x: Tensor) -> Tensor:
    """How many numbers a tensor holds."""
    count = math.prod(x.shape)
    return torch.full((), count, dtype=torch.int64)
