"""MIL's image resizing on the last two axes, and sampling at given coordinates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.errors import TargetError

from .values import ints


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    height, width = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    return resize_nearest_neighbor(x, height, width)


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Element floor(i * size / target) of each axis."""
    for axis, target in ((-2, target_size_height), (-1, target_size_width)):
        places = (torch.arange(target) * x.shape[axis]) // target
        x = x.index_select(x.ndim + axis, places)
    return x


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    height, width = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    if half_pixel_centers is False and not align_corners:
        return resize_bilinear(x, height, width, "DEFAULT")
    return resize_bilinear(x, height, width, "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS")


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    for axis, target in ((-2, target_size_height), (-1, target_size_width)):
        x = _interpolate(x, x.ndim + axis, target, sampling_mode)
    return x


def resize(
    x: Tensor,
    shape: Tensor | Sequence[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resize the last `resized_dims` axes to the last sizes of `shape`; linear only."""
    if interpolation_mode != "LINEAR":
        raise TargetError(f"the MIL executor resizes linearly only, not by '{interpolation_mode}'")
    count = int(resized_dims)
    for axis, target in zip(range(x.ndim - count, x.ndim), ints(shape)[-count:], strict=True):
        x = _interpolate(x, axis, target, sampling_mode)
    return x


def _interpolate(x: Tensor, axis: int, target: int, sampling_mode: str) -> Tensor:
    """Linear interpolation along one axis."""
    size = x.shape[axis]
    places = _places(size, target, sampling_mode).clamp(0, size - 1)
    low = places.floor().long()
    high = (low + 1).clamp(max=size - 1)
    weight = (places - low).float().view([-1 if a == axis else 1 for a in range(x.ndim)])
    below, above = x.index_select(axis, low), x.index_select(axis, high)
    return below + (above - below) * weight


def _places(size: int, target: int, sampling_mode: str) -> Tensor:
    """Where each output lies on the input's axis (coremltools, MIL operators, resize_bilinear)."""
    steps = torch.arange(target, dtype=torch.float64)
    between = max(target - 1, 1)
    if sampling_mode == "ALIGN_CORNERS" and target == 1:
        return torch.full((1,), (size - 1) / 2, dtype=torch.float64)
    if sampling_mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        return steps * ((size - 1) / between)
    if sampling_mode == "DEFAULT":
        return steps * ((size - size / target) / between)
    if sampling_mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / target
        return 0.5 * delta + steps * delta
    if sampling_mode == "UNALIGN_CORNERS":
        spacing = size / target
        return steps * spacing + 0.5 * spacing - 0.5
    raise TargetError(f"resizing has no sampling mode '{sampling_mode}'")


_PADDING = {"constant": "zeros", "border": "border", "reflection": "reflection"}


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """x: (N, C, H, W), coordinates: (N, H', W', 2) as (x, y) in [-1, 1] or [0, 1]."""
    if padding_mode not in _PADDING or (padding_mode == "constant" and padding_value != 0.0):
        raise TargetError(f"the MIL executor cannot resample with padding '{padding_mode}' of {padding_value}")
    if coordinates_mode == "normalized_zero_to_one":
        coordinates = coordinates * 2 - 1
    elif coordinates_mode != "normalized_minus_one_to_one":
        raise TargetError(f"the MIL executor cannot resample at '{coordinates_mode}' coordinates")
    return F.grid_sample(x, coordinates, sampling_mode, _PADDING[padding_mode], align_corners)


OPS: dict[str, Callable[..., Any]] = {
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
