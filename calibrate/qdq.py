"""The vocabulary of a quantized graph: what steps write and targets read.

Beside ATen as `torch.export` gives it, a graph may hold:

1. Static activations: `quantized_decomposed.quantize_per_tensor.default(x, scale, zero_point, qmin, qmax, dtype)`
   followed by `dequantize_per_tensor.default` with the same parameters; dtype int8 or uint8. Inputs of a quantized
   layer are dequantized tensors; its output is quantized again where the runtime's kernel wants it.
2. Weights: a constant of int8 codes (`get_attr`) followed by
   `quantized_decomposed.dequantize_per_channel.default(codes, scales, zero_points, axis, qmin, qmax, int8)`;
   scales float32, zero_points int64 zeros, axis 0 of conv, linear and embedding weights. qmin and qmax say how many
   bits a file gives each code: ±127 eight, -8..7 four, -2..1 two (`bits_of`); ±1 two, and where none is zero one.
   A row that uses few of its codes may be stored as indices into them (`calibrate/levels.py`, `alphabet`).
   Without (1) around the layer this is weight-only quantization. With one scale per group of neighbours along the
   input axis of a linear weight or an embedding table: `dequantize_per_channel_group.default(codes [out, in],
   scales [out, in / group], None, qmin, qmax, int8, group, float32)`.
3. Dynamic int8: `tightfit.dynamic_linear(x, codes, scales, bias, scheme, bits)` and
   `tightfit.dynamic_conv2d(x, codes, scales, bias, stride, padding, dilation, groups, scheme, bits)`; x is quantized at
   run time, the product is exact in integers. Codes are int8 tensors, `bits` is what a file gives each (1: codes of
   -1, 0 and 1, which take two bits as long as any is zero). scales [out],
   or for linear [out, in / group]: the products of each group are exact, their scaled sum is float32.
   `scheme` is how the runtime quantizes x:
   "tensor_uint8": one asymmetric scale for the whole tensor, as ONNX DynamicQuantizeLinear does;
   "row_int8": one asymmetric scale per row (linear: all but the last axis; conv: per sample), as XNNPACK's qd8 does.
4. Half-precision weights: a float16 constant followed by `aten.to.dtype(w, float32)`.
5. 16-bit activations: as (1) with dtype int16, zero_point 0, codes in [-32768, 32767].
6. Palettes: `tightfit.lookup(indices, table)`: a uint8 constant of indices into a float32 table [2^bits].
7. 8-bit floats: a weight is a float8 constant followed by `tightfit.dequantize_float8(codes, scales)`, scales [out]; an
   activation `tightfit.quantize_float8(x, scale, kind)` followed by `tightfit.dequantize_float8(codes, scale)`, scale
   float32 []; kind "float8_e4m3" or "float8_e5m2".
"""

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Node

OPS = torch.ops.quantized_decomposed
QUANTIZE = OPS.quantize_per_tensor.default
DEQUANTIZE = OPS.dequantize_per_tensor.default
QUANTIZE_CHANNEL = OPS.quantize_per_channel.default
DEQUANTIZE_CHANNEL = OPS.dequantize_per_channel.default
DEQUANTIZE_GROUP = OPS.dequantize_per_channel_group.default

SCHEMES = ("tensor_uint8", "row_int8")
FLOAT8 = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def bits_of(qmin: int, qmax: int) -> int:
    """How many bits hold codes in [qmin, qmax]: 8 for ±127 and ±63, 4 for -8..7, 2 for -2..1, 1 for -1..0."""
    return 8 if qmax >= 63 else max((qmax + 1).bit_length(), (-qmin).bit_length())


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
def dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scheme: str, bits: int = 8) -> Tensor:
    """Dynamic int8 linear: x (..., in) float32, codes (out, in) int8 -> (..., out) float32.

    scales float32 (out,), or (out, in / group) for one scale per group of neighbouring inputs.
    """
    q, scale = dynamic_codes(x, scheme, (-1,))
    if scales.dim() == 2:
        y = grouped_product(q, codes, scales) * scale
    else:
        # float32 holds sums below 2^24 exactly, float64 every sum of int8 products.
        wide = torch.float32 if float(codes.float().abs().sum(1).max()) * 255 < 2**24 else torch.float64
        product = torch.nn.functional.linear(q.to(wide), codes.to(wide)).float()
        y = product * (scale * scales)
    return y if bias is None else y + bias


def grouped_product(q: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """q (..., in) times codes (out, in): exact within a group, groups scaled and added in float32 -> (..., out)."""
    parts = scales.shape[1]
    left = q.double().unflatten(-1, (parts, -1))
    right = codes.double().unflatten(-1, (parts, -1))
    products = torch.einsum("...gk,ogk->...og", left, right).float()
    return (products * scales).sum(-1)


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scheme: str, bits: int = 8) -> Tensor:
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
    bits: int = 8,
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
    bits: int = 8,
) -> Tensor:
    return torch.nn.functional.conv2d(x, codes.to(x.dtype), None, stride, padding, dilation, groups)


DYNAMIC_LINEAR = torch.ops.tightfit.dynamic_linear.default
DYNAMIC_CONV2D = torch.ops.tightfit.dynamic_conv2d.default


@torch.library.custom_op("tightfit::lookup", mutates_args=())
def lookup(indices: Tensor, table: Tensor) -> Tensor:
    """A palettized weight: indices uint8 [...], table float32 [2^bits] -> float32 [...]."""
    return table[indices.long()]


@lookup.register_fake
def _(indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(indices.shape)


@torch.library.custom_op("tightfit::quantize_float8", mutates_args=())
def quantize_float8(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """x / scale rounded to 8-bit floats (half to even, saturated): scale float32 [] or [out] along axis 0."""
    dtype = FLOAT8[kind]
    reach = torch.finfo(dtype).max
    shape = scale if scale.dim() == 0 else scale.view(-1, *[1] * (x.dim() - 1))
    return (x / shape).clamp(-reach, reach).to(dtype)


@quantize_float8.register_fake
def _(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape, dtype=FLOAT8[kind])


@torch.library.custom_op("tightfit::dequantize_float8", mutates_args=())
def dequantize_float8(codes: Tensor, scale: Tensor) -> Tensor:
    """8-bit floats times their scale, float32: scale [] or [out] along axis 0."""
    shape = scale if scale.dim() == 0 else scale.view(-1, *[1] * (codes.dim() - 1))
    return codes.float() * shape


@dequantize_float8.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(codes.shape)


LOOKUP = torch.ops.tightfit.lookup.default
QUANTIZE_FLOAT8 = torch.ops.tightfit.quantize_float8.default
DEQUANTIZE_FLOAT8 = torch.ops.tightfit.dequantize_float8.default
DYNAMIC = (DYNAMIC_LINEAR, DYNAMIC_CONV2D)
# What stands between a stored weight and the layer that reads it.
EXPANDING = (DEQUANTIZE_CHANNEL, DEQUANTIZE_GROUP, LOOKUP, DEQUANTIZE_FLOAT8)


def code_range(node: Node) -> tuple[int, int] | None:
    """The least and largest weight code that `node` reads: a dynamic layer, or what dequantizes a weight; else None."""
    if node.target in DYNAMIC:
        after_scheme = next(i for i, a in enumerate(node.args) if isinstance(a, str)) + 1
        bits = node.args[after_scheme] if len(node.args) > after_scheme else node.kwargs.get("bits", 8)
        assert isinstance(bits, int)
        if bits == 1:
            return (-1, 1)
        return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if node.target not in (DEQUANTIZE_CHANNEL, DEQUANTIZE_GROUP):
        return None
    first = 4 if node.target is DEQUANTIZE_CHANNEL else 3
    low, high = node.args[first : first + 2]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high


def code_bits(node: Node) -> int | None:
    """How many bits a file gives each weight code that `node` reads; None where it reads none."""
    found = code_range(node)
    return None if found is None else bits_of(*found)


def stray_codes(graph: GraphModule) -> str | None:
    """What is wrong where static codes are read by something other than their dequantize; None where nothing is."""
    for node in graph.graph.nodes:
        if node.target is QUANTIZE and any(u.target is not DEQUANTIZE for u in node.users):
            return f"{node.name} is read by something other than a dequantize"
    return None
