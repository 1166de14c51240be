"""MIL's operators that move data without computing: reshapes, slices, blocks of space and depth."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .values import axes_of, ints

Ints: TypeAlias = Tensor | Sequence[int]


def reshape(x: Tensor, shape: Ints) -> Tensor:
    """0 stands for x's own size (counted from the right; 1 where x has no such axis), -1 for what is left."""
    sizes = ints(shape)
    shift = x.ndim - len(sizes)
    own = [x.shape[i + shift] if i + shift >= 0 else 1 for i in range(len(sizes))]
    return x.reshape([o if s == 0 else s for s, o in zip(sizes, own, strict=True)])


def reshape_like(
    x: Tensor,
    ref_tensors: Sequence[Tensor],
    begins: Sequence[int],
    ends: Sequence[int],
    end_masks: Sequence[bool],
) -> Tensor:
    sizes: list[int] = []
    for ref, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += ref.shape[int(begin) :] if to_end else ref.shape[int(begin) : int(end)]
    return x.reshape(sizes)


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """New axes of size 1 at these places of the result."""
    rank = x.ndim + len(ints(axes))
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.ndim))


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """(product of the axes before `axis`, product of the others)."""
    lead = 1
    for size in x.shape[: axis % x.ndim if axis < 0 else axis]:
        lead *= size
    return x.reshape(lead, -1)


def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(*perm)


def reverse(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.flip(axes_of(axes, x.ndim))


def reverse_sequence(x: Tensor, lengths: Ints, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Reverse the first `lengths[b]` steps of every element b of the batch."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1))
    parts = [torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(moved, ints(lengths), strict=True)]
    return torch.stack(parts).movedim((0, 1), (batch_axis, seq_axis))


def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    """x[begin:end:stride] on every axis; a true mask ignores its bound, a true squeeze keeps only `begin`."""
    slices = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    squeezed = [axis for axis, one in enumerate(squeeze_mask or []) if one]
    for axis, span in enumerate(slices):
        if span.step < 0:
            x = x.index_select(axis, torch.tensor(list(span), dtype=torch.int64))
        elif len(span) != x.shape[axis] or span.step != 1:
            x = x[(slice(None),) * axis + (slice(span.start, span.stop, span.step),)]
    return x.squeeze(tuple(squeezed)) if squeezed else x


def _slices(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> list[range]:
    """The positions taken on every axis."""
    begins, ends = ints(begin), ints(end)
    no = [False] * x.ndim
    strides, begin_mask, end_mask = stride or [1] * x.ndim, begin_mask or no, end_mask or no
    squeeze_mask = squeeze_mask or no
    spans = []
    for axis, size in enumerate(x.shape):
        if squeeze_mask[axis]:
            start = begins[axis] % size
            spans.append(range(start, start + 1))
            continue
        low = None if begin_mask[axis] else begins[axis]
        high = None if end_mask[axis] else ends[axis]
        spans.append(range(*slice(low, high, strides[axis]).indices(size)))
    return spans


def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """`size` elements from `begin` on every axis; -1 means up to the end."""
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first %= max(x.shape[axis], 1)
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    """x with the part that slice_by_index takes replaced by `update`."""
    spans = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.clone()
    grid = torch.meshgrid(*[torch.tensor(list(span), dtype=torch.int64) for span in spans], indexing="ij")
    result[grid] = update.reshape([len(span) for span in spans])
    return result


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """(N, C, H, W) -> (N, C / b^2, H b, W b); the block's place is the slow part of the channel."""
    n, c, h, w = x.shape
    y = x.reshape(n, block_size, block_size, c // block_size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block_size**2, h * block_size, w * block_size)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of depth_to_space."""
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block_size**2, h // block_size, w // block_size)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))


def space_to_batch(x: Tensor, block_shape: Sequence[int], paddings: Sequence[Sequence[int]]) -> Tensor:
    """Zero-pad the two spatial axes, then move blocks of them to the front of the batch axis."""
    (top, bottom), (left, right) = paddings
    x = F.pad(x, (left, right, top, bottom))
    (n, c, h, w), (bh, bw) = x.shape, block_shape
    y = x.reshape(n, c, h // bh, bh, w // bw, bw).permute(3, 5, 0, 1, 2, 4)
    return y.reshape(n * bh * bw, c, h // bh, w // bw)


def batch_to_space(x: Tensor, block_shape: Sequence[int], crops: Sequence[Sequence[int]]) -> Tensor:
    """The inverse of space_to_batch; `crops` cuts what the paddings added."""
    (n, c, h, w), (bh, bw) = x.shape, block_shape
    y = x.reshape(bh, bw, n // (bh * bw), c, h, w).permute(2, 3, 4, 0, 5, 1)
    y = y.reshape(n // (bh * bw), c, h * bh, w * bw)
    (top, bottom), (left, right) = crops
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Windows of `size` along an axis: ..., count, size, ..."""
    axis %= x.ndim
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def crop(x: Tensor, crop_height: Sequence[int], crop_width: Sequence[int]) -> Tensor:
    """Cut (top, bottom) rows and (left, right) columns from the last two axes."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


OPS: dict[str, Callable[..., Any]] = {
    "batch_to_space": batch_to_space,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "squeeze": squeeze,
    "transpose": transpose,
}
