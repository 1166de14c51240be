"""How the vocabulary of `calibrate/qdq.py`, and linear layers around it, are said in ONNX.

torch's exporter calls these functions while it builds the model; each emits operators of opset 18 and returns the
output. A static int8 linear becomes `Reshape, Gemm, Reshape`, the form that ONNX Runtime fuses to QGemm with its
int32 bias; for TensorRT it stays MatMul + Add.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.ops.nn import aten_linear
from onnxscript.onnx_opset import opset18 as op
from onnxscript.onnx_types import TensorType

from calibrate import qdq

from .errors import TargetError

Translation = Callable[..., Any]
TYPES = {torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8}
RANGES = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}


def translations(*, gemm: bool) -> dict[Translation, Translation]:
    """{torch operator: function that emits its ONNX form}; `gemm` asks for the form ONNX Runtime fuses to QGemm."""
    return {
        qdq.QUANTIZE: _quantize,
        qdq.DEQUANTIZE: _dequantize,
        qdq.DEQUANTIZE_CHANNEL: _dequantize_channel,
        qdq.DYNAMIC_LINEAR: _dynamic_linear,
        qdq.DYNAMIC_CONV2D: _dynamic_conv2d,
        torch.ops.aten.linear.default: _linear_as_gemm if gemm else _linear,
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
    x: TensorType, codes: TensorType, scales: TensorType, bias: TensorType | None, scheme: str
) -> TensorType:
    if scheme != "tensor_uint8":
        raise TargetError(f"ONNX Runtime quantizes per tensor at run time; it has no kernel for '{scheme}'")
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
) -> TensorType:
    raise TargetError(
        "ONNX Runtime's ConvInteger is several times slower than its float convolution; "
        "keep convolutions float or quantize them statically"
    )
