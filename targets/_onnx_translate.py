"""How the vocabulary of `calibrate/qdq.py`, and linear layers around it, are said in ONNX.

torch's exporter calls these functions while it builds the model; each emits operators of opset 18 (what needs a newer
one says so in `_onnx_bits.oldest_opset`) and returns the output. A static int8 linear becomes `Reshape, Gemm, Reshape`,
the form that ONNX Runtime fuses to QGemm with its int32 bias; for TensorRT it stays MatMul + Add. All codes are int8
here; `_onnx_bits` stores them in fewer bits at the end.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.ops.nn import aten_linear
from onnxscript.onnx_opset import opset18 as op
from onnxscript.onnx_opset import opset21
from onnxscript.onnx_types import TensorType

from calibrate import qdq

from ._onnx_attention import attention
from ._onnx_fusions import gelu
from .errors import TargetError

Translation = Callable[..., Any]
RANGES = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
}
FLOAT8 = {"float8_e4m3": ir.DataType.FLOAT8E4M3FN, "float8_e5m2": ir.DataType.FLOAT8E5M2}


def translations(*, runtime: str) -> dict[Translation, Translation]:
    """{torch operator: function that emits its ONNX form}; "onnxruntime" gets the forms that it fuses to kernels."""
    common: dict[Translation, Translation] = {
        qdq.QUANTIZE: _quantize,
        qdq.DEQUANTIZE: _dequantize,
        qdq.DEQUANTIZE_CHANNEL: _dequantize_channel,
        qdq.DEQUANTIZE_GROUP: _dequantize_group,
        qdq.DYNAMIC_LINEAR: _dynamic_linear,
        qdq.DYNAMIC_CONV2D: _dynamic_conv2d,
        qdq.LOOKUP: _lookup,
        qdq.QUANTIZE_FLOAT8: _quantize_float8 if runtime == "tensorrt" else _no_float8,
        qdq.DEQUANTIZE_FLOAT8: _dequantize_float8 if runtime == "tensorrt" else _no_float8,
        torch.ops.aten.linear.default: _linear,
    }
    if runtime == "tensorrt":
        return common
    return common | {
        torch.ops.aten.linear.default: _linear_as_gemm,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.gelu.default: gelu,
    }


def _constant(value: float | int | list[int], dtype: ir.DataType) -> TensorType:
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def _code_type(dtype: int, low: int, high: int) -> ir.DataType:
    """The ONNX type of codes; refuses a range narrower than the type's, because QuantizeLinear can't clip to it."""
    code_type = ir.DataType(dtype)
    if RANGES.get(code_type) != (low, high):
        raise TargetError(f"ONNX's QuantizeLinear has no codes of {code_type.name} in [{low}, {high}]")
    return code_type


def _quantize(x: TensorType, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> TensorType:
    codes = _code_type(dtype, quant_min, quant_max)
    return op.QuantizeLinear(x, _constant(scale, ir.DataType.FLOAT), _constant(zero_point, codes))


def _dequantize(x: TensorType, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> TensorType:
    codes = _code_type(dtype, quant_min, quant_max)
    return op.DequantizeLinear(x, _constant(scale, ir.DataType.FLOAT), _constant(zero_point, codes))


def _dequantize_channel(
    codes: TensorType,
    scales: TensorType,
    zero_points: TensorType,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
) -> TensorType:
    return op.DequantizeLinear(codes, scales, op.Cast(zero_points, to=dtype), axis=axis)


def _dequantize_group(
    codes: TensorType,
    scales: TensorType,
    zero_points: TensorType | None,
    quant_min: int,
    quant_max: int,
    dtype: int,
    group_size: int,
    output_dtype: int,
) -> TensorType:
    if zero_points is not None:
        raise TargetError("weights in groups are symmetric here; their zero points have no ONNX form yet")
    return opset21.DequantizeLinear(codes, scales, axis=1, block_size=group_size)


def _quantize_float8(x: TensorType, scale: TensorType, kind: str) -> TensorType:
    return op.QuantizeLinear(x, scale, _constant(0.0, FLOAT8[kind]), axis=0)


def _dequantize_float8(codes: TensorType, scale: TensorType) -> TensorType:
    return op.DequantizeLinear(codes, scale, axis=0)


def _no_float8(*_: Any) -> TensorType:
    raise TargetError("8-bit floats are computed by TensorRT on GPUs that have them; use int8 for this runtime")


def _lookup(indices: TensorType, table: TensorType) -> TensorType:
    raise TargetError("palettes are a Core ML format; choose a recipe with integer weights for onnx")


def _dequantized(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _linear(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
    if not _dequantized(weight):
        return aten_linear(x, weight, bias)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def _linear_as_gemm(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
    if not (_dequantized(x) and _dequantized(weight)):
        return _linear(x, weight, bias)
    transposed = op.Transpose(weight, perm=[1, 0])
    inputs = (transposed,) if bias is None else (transposed, bias)
    if len(x.shape) == 2:
        return op.Gemm(x, *inputs)
    features = int(weight.shape[1])
    rows = op.Reshape(x, _constant([-1, features], ir.DataType.INT64))
    shape = [*(int(d) for d in x.shape[:-1]), int(weight.shape[0])]
    return op.Reshape(op.Gemm(rows, *inputs), _constant(shape, ir.DataType.INT64))


def _dynamic_linear(
    x: TensorType, codes: TensorType, scales: TensorType, bias: TensorType | None, scheme: str, bits: int = 8
) -> TensorType:
    if scheme != "tensor_uint8":
        raise TargetError(f"ONNX Runtime quantizes per tensor at run time; it has no kernel for '{scheme}'")
    if len(scales.shape) == 2:  # measured: 1.2 to 4 times the time of float with groups of 128 to 32
        raise TargetError(
            "ONNX Runtime has no integer kernel for weights in groups whose input is quantized at run time, and sums "
            "of one product per group are slower than float; use one scale per channel, or weights only"
        )
    x_codes, x_scale, x_zero = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(x_codes, op.Transpose(codes, perm=[1, 0]), x_zero), to=1)
    y = op.Mul(product, op.Mul(x_scale, scales))
    return y if bias is None else op.Add(y, bias)


def _dynamic_conv2d(
    x: TensorType,
    codes: TensorType,
    scales: TensorType,
    bias: TensorType | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scheme: str,
    bits: int = 8,
) -> TensorType:
    raise TargetError(
        "ONNX Runtime's ConvInteger is several times slower than its float convolution; "
        "keep convolutions float or quantize them statically"
    )
