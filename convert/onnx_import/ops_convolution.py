"""Convolution, pooling, resizing: operators over the spatial axes, which follow batch and channels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator

CONVS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def amounts(node: OnnxNode, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """(before, after) per spatial axis, from `pads` or `auto_pad` (SAME_*: output = ceil(input / stride))."""
    rank = len(kernel)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode == "NOTSET":
        pads = node.get("pads") or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    wanted = [(math.ceil(n / s) - 1) * s for n, s in zip(sizes, strides, strict=True)]
    totals = [max(0, w + k - n) for w, k, n in zip(wanted, spans, sizes, strict=True)]
    small = [t // 2 for t in totals]
    large = [t - s for t, s in zip(totals, small, strict=True)]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the spatial axes; torch lists the last axis first."""
    sides = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


@operator("Conv")
def conv(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Unequal padding on the two sides becomes a pad before the convolution."""
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    before, after = amounts(node, x.shape[2:], kernel)
    if before != after:
        x, before = padded(x, before, after), [0] * rank
    stride, dilation = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    return CONVS[rank - 1](x, weight, bias, stride, before, dilation, node.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Padding takes away from the output; unequal sides are cut off by a negative pad."""
    rank = weight.dim() - 2
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    extra = node.get("output_padding", [0] * rank)
    full = [
        s * (n - 1) + e + (k - 1) * d + 1
        for s, n, e, k, d in zip(strides, x.shape[2:], extra, weight.shape[2:], dilations, strict=True)
    ]
    before, after = _cut(node, full, list(x.shape[2:]), strides)
    groups = node.get("group", 1)
    function = TRANSPOSED[rank - 1]
    if before == after:
        return function(x, weight, bias, strides, before, extra, groups, dilations)
    whole = function(x, weight, bias, strides, 0, extra, groups, dilations)
    return padded(whole, [-b for b in before], [-a for a in after])


def _cut(node: OnnxNode, full: list[int], sizes: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    rank = len(full)
    shape = node.get("output_shape")
    mode = node.get("auto_pad", "NOTSET")
    if shape is None and mode in ("NOTSET", "VALID"):
        pads = node.get("pads") or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    wanted = shape[-rank:] if shape is not None else [n * s for n, s in zip(sizes, strides, strict=True)]
    totals = [f - w for f, w in zip(full, wanted, strict=True)]
    small = [t // 2 for t in totals]
    large = [t - s for t, s in zip(totals, small, strict=True)]
    return (small, large) if mode != "SAME_LOWER" and shape is None else (large, small)


@operator("MaxPool")
def max_pool(node: OnnxNode, x: Tensor) -> Tensor:
    """Padding never wins: it is -inf."""
    if len([o for o in node.outputs if o]) > 1:
        raise node.refuse("returns the positions of the maxima")
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    before, after = amounts(node, x.shape[2:], kernel)
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x, before = padded(x, before, after, -math.inf), [0] * rank
    stride, dilation = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    return MAX_POOLS[rank - 1](x, kernel, stride, before, dilation, bool(node.get("ceil_mode", 0)))


@operator("AveragePool")
def average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    """Padding counts in the divisor only with count_include_pad."""
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    if any(d != 1 for d in node.get("dilations", [1])):
        raise node.refuse("has a dilation")
    before, after = amounts(node, x.shape[2:], kernel)
    stride, ceil = node.get("strides", [1] * rank), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    pool = AVERAGE_POOLS[rank - 1]
    if before == after and all(2 * b <= k for b, k in zip(before, kernel, strict=True)):
        return pool(x, kernel, stride, before, ceil, counted)
    whole = padded(x, before, after)
    if counted:
        return pool(whole, kernel, stride, 0, ceil)
    ones = padded(torch.ones_like(x), before, after)
    return pool(whole, kernel, stride, 0, ceil) / pool(ones, kernel, stride, 0, ceil)


@operator("GlobalAveragePool")
def global_average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    """One number per channel, the spatial axes kept with length 1."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: OnnxNode, x: Tensor) -> Tensor:
    """One number per channel, the spatial axes kept with length 1."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("DepthToSpace")
def depth_to_space(node: OnnxNode, x: Tensor) -> Tensor:
    """CRD is pixel shuffle; DCR has the block first among the channels."""
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(node: OnnxNode, x: Tensor) -> Tensor:
    """The inverse of DepthToSpace in DCR order."""
    block = node.get("blocksize")
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


@operator("Upsample", host=(1,))
def upsample(node: OnnxNode, x: Tensor, scales: list[float] | None = None) -> Tensor:
    """Opset 9: what Resize is with asymmetric coordinates, rounded down."""
    return _resized(node, x, scales or node.get("scales"), None, "asymmetric", "floor")


@operator("Resize", host=(1, 2, 3))
def resize(
    node: OnnxNode,
    x: Tensor,
    region: list[float] | None = None,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """Nearest, linear and cubic over the spatial axes."""
    if node.opset < 11:
        return _resized(node, x, region, None, "asymmetric", "floor")
    coordinates = node.get("coordinate_transformation_mode", "half_pixel")
    return _resized(node, x, scales or None, sizes or None, coordinates, node.get("nearest_mode", "round_prefer_floor"))


def _resized(
    node: OnnxNode, x: Tensor, scales: list[float] | None, sizes: list[int] | None, coordinates: str, rounding: str
) -> Tensor:
    axes = node.get("axes") or list(range(x.dim()))
    factors = dict(zip(axes, scales, strict=True)) if scales else {}
    lengths = dict(zip(axes, sizes, strict=True)) if sizes else {}
    if any(factors.get(a, 1.0) != 1.0 for a in (0, 1)) or node.get("antialias", 0):
        raise node.refuse("resizes batch or channels, or smooths (antialias)")
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse(f"keeps the aspect ratio ({node.get('keep_aspect_ratio_policy')})")
    spatial = range(2, x.dim())
    out = [int(lengths[a]) if a in lengths else math.floor(x.shape[a] * factors.get(a, 1.0)) for a in spatial]
    ratios = [factors.get(a, o / x.shape[a]) for a, o in zip(spatial, out, strict=True)]
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return _nearest(node, x, out, ratios, coordinates, rounding)
    kinds = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    kind = kinds.get((mode, len(out)))
    aligned = coordinates == "align_corners"
    exact = all(abs(r * x.shape[a] - o) < 1e-6 for a, o, r in zip(spatial, out, ratios, strict=True))
    if kind is None or not (aligned or coordinates in ("half_pixel", "pytorch_half_pixel")) or not (aligned or exact):
        raise node.refuse(f"resizes with mode {mode}, coordinates {coordinates} and scales {ratios}")
    if mode == "cubic" and abs(node.get("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        raise node.refuse("has another cubic coefficient than -0.75")
    return F.interpolate(x, size=out, mode=kind, align_corners=aligned)


def _nearest(node: OnnxNode, x: Tensor, out: list[int], ratios: list[float], coordinates: str, rounding: str) -> Tensor:
    if all(r == int(r) and r >= 1 for r in ratios) and (coordinates, rounding) in WHOLE_FACTORS and len(out) <= 3:
        return F.interpolate(x, size=out, mode="nearest")  # each number repeated: the same in all these modes
    for axis, (length, ratio) in enumerate(zip(out, ratios, strict=True), 2):
        positions = [_position(node, i, ratio, x.shape[axis], length, coordinates, rounding) for i in range(length)]
        x = x.index_select(axis, torch.tensor(positions))
    return x


WHOLE_FACTORS = (
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
)


def _position(
    node: OnnxNode, index: int, ratio: float, length: int, wanted: int, coordinates: str, rounding: str
) -> int:
    if coordinates == "asymmetric":
        at = index / ratio
    elif coordinates == "align_corners":
        at = index * (length - 1) / (wanted - 1) if wanted > 1 else 0.0
    elif coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and wanted > 1):
        at = (index + 0.5) / ratio - 0.5
    elif coordinates == "pytorch_half_pixel":
        at = 0.0
    else:
        raise node.refuse(f"resizes with coordinates {coordinates}")
    roundings = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda v: math.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: math.floor(v + 0.5),
    }
    return min(max(int(roundings[rounding](at)), 0), length - 1)
