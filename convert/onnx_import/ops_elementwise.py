"""Element by element: arithmetic, comparison, logic, casts. (ONNX Operators, sections of the same names.)"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reading import DTYPES
from .registry import OnnxNode, operator, unary

unary(
    {
        "Abs": torch.abs,
        "Neg": torch.neg,
        "Sign": torch.sign,
        "Ceil": torch.ceil,
        "Floor": torch.floor,
        "Round": torch.round,  # half to even, as ONNX
        "Sqrt": torch.sqrt,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Tan": torch.tan,
        "Asin": torch.asin,
        "Acos": torch.acos,
        "Atan": torch.atan,
        "Sinh": torch.sinh,
        "Cosh": torch.cosh,
        "Tanh": torch.tanh,
        "Asinh": torch.asinh,
        "Acosh": torch.acosh,
        "Atanh": torch.atanh,
        "Erf": torch.erf,
        "Reciprocal": torch.reciprocal,
        "IsNaN": torch.isnan,
        "Not": torch.logical_not,
        "BitwiseNot": torch.bitwise_not,
        "Identity": lambda x: x,
    }
)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    operator(name)(lambda node, a, b: function(a, b))


for _name, _function in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}.items():
    _binary(_name, _function)


@operator("Div")
def divide(node: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Pow")
def power(node: OnnxNode, base: Tensor, exponent: Tensor) -> Tensor:
    """The result has the base's dtype."""
    return torch.pow(base, exponent).to(base.dtype)


@operator("Mod")
def modulo(node: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    """fmod=1: the sign of the dividend, as C; else of the divisor, as Python."""
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("Min")
def minimum(node: OnnxNode, *values: Tensor) -> Tensor:
    """Of any number of tensors."""
    return functools.reduce(torch.minimum, values)


@operator("Max")
def maximum(node: OnnxNode, *values: Tensor) -> Tensor:
    """Of any number of tensors."""
    return functools.reduce(torch.maximum, values)


@operator("Sum")
def total(node: OnnxNode, *values: Tensor) -> Tensor:
    """Of any number of tensors."""
    return functools.reduce(torch.add, values)


@operator("Mean")
def mean(node: OnnxNode, *values: Tensor) -> Tensor:
    """Of any number of tensors."""
    return functools.reduce(torch.add, values) / len(values)


@operator("Where")
def where(node: OnnxNode, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Choose element by element."""
    return torch.where(condition, a, b)


@operator("BitShift")
def shift(node: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    """In the direction of the attribute."""
    left = node.get("direction") == "LEFT"
    return torch.bitwise_left_shift(a, b) if left else torch.bitwise_right_shift(a, b)


@operator("IsInf")
def is_infinite(node: OnnxNode, x: Tensor) -> Tensor:
    """One sign can be left out."""
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    return torch.isposinf(x) if positive else torch.isneginf(x) if negative else torch.zeros_like(x, dtype=torch.bool)


@operator("Clip", host=(1, 2))
def clip(node: OnnxNode, x: Tensor, low: list[Any] | None = None, high: list[Any] | None = None) -> Tensor:
    """The bounds are attributes before opset 11."""
    least = low[0] if low else node.get("min")
    most = high[0] if high else node.get("max")
    return x if least is None and most is None else torch.clamp(x, least, most)


@operator("Cast")
def cast(node: OnnxNode, x: Tensor) -> Tensor:
    """To the dtype of the attribute; floats are truncated to integers."""
    dtype = DTYPES.get(node.get("to"))
    if dtype is None:
        raise node.refuse(f"casts to the type {node.get('to')} of ONNX's DataType")
    return x.to(dtype)


@operator("CastLike")
def cast_like(node: OnnxNode, x: Tensor, like: Tensor) -> Tensor:
    """To the dtype of the second input."""
    return x.to(like.dtype)
