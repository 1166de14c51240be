"""MIL's convolutions. x: (N, C_in, *spatial) with one to three spatial axes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .values import along, ints
from .windows import flat, pads_of, symmetric

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """weight: (C_out, C_in / groups, *kernel)."""
    ones = [1] * (x.ndim - 2)
    strides, dilations = strides or ones, dilations or ones
    pads = pads_of(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations)
    if symmetric(pads):
        return _CONV[x.ndim](x, weight, bias, strides, [p for p, _ in pads], dilations, groups)
    return _CONV[x.ndim](F.pad(x, flat(pads)), weight, bias, strides, 0, dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Sequence[int] | None = None,
    output_shape: Tensor | Sequence[int] | None = None,
    pad_type: str = "valid",
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """weight: (C_in, C_out / groups, *kernel). The whole output is computed, then cut to what padding leaves."""
    rank = x.ndim - 2
    strides = strides or [1] * rank
    full = _TRANSPOSED[x.ndim](x, weight, None, strides, 0, 0, groups, dilations or [1] * rank)
    begins, sizes = _kept(full.shape[2:], x.shape[2:], strides, pad_type, pad)
    if output_shape is not None:
        sizes = ints(output_shape)[-rank:]
    missing = [max(b + s - f, 0) for b, s, f in zip(begins, sizes, full.shape[2:], strict=True)]
    full = F.pad(full, flat([(0, m) for m in missing]))
    for axis, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        full = full.narrow(axis + 2, begin, size)
    return full if bias is None else full + along(bias, 1, x.ndim)


def _kept(
    full: Sequence[int], sizes: Sequence[int], strides: Sequence[int], pad_type: str, pad: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Where the kept part of a transposed convolution's whole output begins, and its size, per spatial axis."""
    if pad_type in ("same", "same_lower"):
        kept = [size * stride for size, stride in zip(sizes, strides, strict=True)]
        cut = [max(f - k, 0) for f, k in zip(full, kept, strict=True)]
        return [c // 2 if pad_type == "same" else c - c // 2 for c in cut], kept
    pads = pads_of(pad_type, pad, sizes, full, strides, strides)
    return [before for before, _ in pads], [f - b - a for f, (b, a) in zip(full, pads, strict=True)]


OPS: dict[str, Callable[..., Any]] = {"conv": conv, "conv_transpose": conv_transpose}
