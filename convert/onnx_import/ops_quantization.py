"""Quantized models computed in float: every code is rounded as ONNX says, so the numbers are those of the integers."""

import torch
from torch import Tensor

from .registry import OnnxNode, operator


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale or zero point broadcast along the channel axis."""
    if parameter.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@operator("QuantizeLinear")
def quantize(node: OnnxNode, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """saturate(round_half_even(x / scale) + zero point)."""
    if node.get("block_size", 0):
        raise node.refuse("quantizes in blocks")
    axis = node.get("axis", 1)
    dtype = torch.uint8 if zero is None else zero.dtype
    limits = torch.iinfo(dtype)
    codes = torch.round(x / _along(scale, x, axis))
    codes = codes if zero is None else codes + _along(zero, x, axis).to(x.dtype)
    return torch.clamp(codes, limits.min, limits.max).to(dtype)


@operator("DequantizeLinear")
def dequantize(node: OnnxNode, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(code - zero point) scale."""
    if node.get("block_size", 0):
        raise node.refuse("dequantizes in blocks")
    axis = node.get("axis", 1)
    values = codes.to(scale.dtype)
    values = values if zero is None else values - _along(zero, codes, axis).to(scale.dtype)
    return values * _along(scale, codes, axis)


@operator("DynamicQuantizeLinear")
def dynamic_quantize(node: OnnxNode, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8, scale, zero point) from the range of x, widened to hold 0."""
    low, high = torch.clamp(x.amin(), max=0.0), torch.clamp(x.amax(), min=0.0)
    scale = (high - low) / 255.0
    zero = torch.clamp(torch.round(-low / scale), 0.0, 255.0)
    codes = torch.clamp(torch.round(x / scale) + zero, 0.0, 255.0)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


@operator("MatMulInteger")
def matmul_integer(
    node: OnnxNode, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """int32 sums; float64 holds every one of them exactly."""
    left = a.double() - (0.0 if a_zero is None else _along(a_zero, a, -2).double())
    right = b.double() - (0.0 if b_zero is None else _along(b_zero, b, -1).double())
    return torch.matmul(left, right).to(torch.int32)
