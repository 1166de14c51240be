"""MIL's pools. x: (N, C, *spatial) with one to three spatial axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .windows import Pads, flat, pads_of, symmetric

_AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAXIMUM = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


def avg_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    pad_type: str,
    strides: Sequence[int] | None = None,
    pad: Sequence[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    strides, pads = _window(x, kernel_sizes, pad_type, strides, pad)
    pool = _AVERAGE[x.ndim]
    if _torch_pads(pads, kernel_sizes):
        inside = [p for p, _ in pads]
        return pool(x, kernel_sizes, strides, inside, ceil_mode, not exclude_padding_from_average)
    mean = pool(F.pad(x, flat(pads)), kernel_sizes, strides, 0, ceil_mode)
    if not exclude_padding_from_average:
        return mean
    share = pool(F.pad(torch.ones_like(x), flat(pads)), kernel_sizes, strides, 0, ceil_mode)
    return mean / share


def max_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    pad_type: str,
    strides: Sequence[int] | None = None,
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides, pads = _window(x, kernel_sizes, pad_type, strides, pad)
    if _torch_pads(pads, kernel_sizes):
        return _MAXIMUM[x.ndim](x, kernel_sizes, strides, [p for p, _ in pads], 1, ceil_mode)
    padded = F.pad(x, flat(pads), value=-math.inf)
    return _MAXIMUM[x.ndim](padded, kernel_sizes, strides, 0, 1, ceil_mode)


def l2_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    pad_type: str,
    strides: Sequence[int] | None = None,
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The root of the sum of squares in each window; padding adds nothing."""
    return torch.sqrt(avg_pool(x * x, kernel_sizes, pad_type, strides, pad, False, ceil_mode) * math.prod(kernel_sizes))


def _window(
    x: Tensor, kernel: Sequence[int], pad_type: str, strides: Sequence[int] | None, pad: Sequence[int] | None
) -> tuple[Sequence[int], Pads]:
    ones = [1] * len(kernel)
    return strides or ones, pads_of(pad_type, pad, x.shape[2:], kernel, strides or ones, ones)


def _torch_pads(pads: Pads, kernel: Sequence[int]) -> bool:
    """Whether torch's pools take these pads themselves: the same on both sides, at most half the window."""
    return symmetric(pads) and all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True))


OPS: dict[str, Callable[..., Any]] = {"avg_pool": avg_pool, "l2_pool": l2_pool, "max_pool": max_pool}
