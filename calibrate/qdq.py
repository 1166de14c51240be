"""The vocabulary of a quantized graph: what steps write and targets read.

Beside ATen as `torch.export` gives it, a graph may hold:

1. Static activations: `quantized_decomposed.quantize_per_tensor.default(x, scale, zero_point, qmin, qmax, dtype)`
   followed by `dequantize_per_tensor.default` with the same parameters; dtype int8 or uint8. Inputs of a quantized
   layer are dequantized tensors; its output is quantized again where the runtime's kernel wants it.
2. Weights: a constant of int8 codes (`get_attr`) followed by
   `quantized_decomposed.dequantize_per_channel.default(codes, scales, zero_points, axis, qmin, qmax, int8)`;
   scales float32, zero_points int64 zeros, axis 0 of conv, linear and embedding weights. Without (1) around the
   layer this is weight-only quantization.
3. Dynamic int8: `tightfit.dynamic_linear(x, codes, scales, bias, scheme)` and
   `tightfit.dynamic_conv2d(x, codes, scales, bias, stride, padding, dilation, groups, scheme)`; x is quantized at run
   time, the product is exact in integers. `scheme` is how the runtime quantizes x:
   "tensor_uint8": one asymmetric scale for the whole tensor, as ONNX DynamicQuantizeLinear does;
   "row_int8": one asymmetric scale per row (linear: all but the last axis; conv: per sample), as XNNPACK's qd8 does.
4. Half-precision weights: a float16 constant followed by `aten.to.dtype(w, float32)`.
"""

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor

OPS = torch.ops.quantized_decomposed
QUANTIZE = OPS.quantize_per_tensor.default
DEQUANTIZE = OPS.dequantize_per_tensor.default
QUANTIZE_CHANNEL = OPS.quantize_per_channel.default
DEQUANTIZE_CHANNEL = OPS.dequantize_per_channel.default

SCHEMES = ("tensor_uint8", "row_int8")


def dynamic_codes(x: Tensor, scheme: str, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Quantize `x` as a runtime does at run time.

    Returns (codes minus zero point, float32, exact integers; scale, broadcastable to x).
    "tensor_uint8" is ONNX DynamicQuantizeLinear (opset 11): range widened to include 0, scale = range / 255,
    zero_point = round(-min / scale) saturated, ties to even. "row_int8" reduces over `axes` only and uses
    [-128, 127], as XNNPACK's qd8 kernels.
    """
    if scheme == "tensor_uint8":
        low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
        span = high - low
        scale = torch.where(span > 0, span / 255.0, torch.ones_like(span))
        zero = torch.round(torch.clamp(-low / scale, 0, 255))
        codes = torch.clamp(torch.round(x / scale) + zero, 0, 255)
        return codes - zero, scale
    low, high = x.amin(axes, keepdim=True).clamp(max=0.0), x.amax(axes, keepdim=True).clamp(min=0.0)
    span = high - low
    inverse = torch.where(span > 0, 255.0 / span, torch.ones_like(span))
    scale = 1.0 / inverse
    # XNNPACK picks the zero point whose end of the range carries the smaller rounding error (XNNPACK
    # src/xnnpack/quantization.h, xnn_qd8_asymmetric_quantization_params).
    scaled_low, scaled_high = low * inverse, high * inverse
    from_low, from_high = -128.0 - scaled_low, 127.0 - scaled_high
    zero = torch.where((-128.0 + scaled_low) + (127.0 + scaled_high) > 0, from_low, from_high)
    zero = torch.round(torch.clamp(zero, -128, 127))
    codes = torch.clamp(torch.round(x * inverse) + zero, -128, 127)
    return codes - zero, scale


@torch.library.custom_op("tightfit::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    """Dynamic int8 linear: x (..., in) float32, codes (out, in) int8, scales (out,) float32 -> (..., out) float32."""
    q, scale = dynamic_codes(x, scheme, (-1,))
    # float64 holds every int8 dot product exactly: |sum| < in * 2^15 * ... stays far below 2^53.
    product = torch.nn.functional.linear(q.double(), codes.double()).float()
    y = product * (scale * scales)
    return y if bias is None else y + bias


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("tightfit::dynamic_conv2d", mutates_args=())
def dynamic_conv2d(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scheme: str,
) -> Tensor:
    """Dynamic int8 convolution: x (N, C, H, W) float32, codes (out, C/groups, kh, kw) int8, scales (out,) float32."""
    q, scale = dynamic_codes(x, scheme, (1, 2, 3))
    product = torch.nn.functional.conv2d(q.double(), codes.double(), None, stride, padding, dilation, groups).float()
    y = product * (scale * scales.view(1, -1, 1, 1))
    return y if bias is None else y + bias.view(1, -1, 1, 1)


@dynamic_conv2d.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scheme: str,
) -> Tensor:
    return torch.nn.functional.conv2d(x, codes.to(x.dtype), None, stride, padding, dilation, groups)


DYNAMIC_LINEAR = torch.ops.tightfit.dynamic_linear.default
DYNAMIC_CONV2D = torch.ops.tightfit.dynamic_conv2d.default
