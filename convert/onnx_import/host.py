"""Arithmetic on shapes: what exporters compute sizes with, on Python numbers while torch.export traces."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .reading import DTYPES
from .registry import OnnxNode
from .values import Number, Numbers

Elementwise = Callable[..., Number]


def _divided(a: Any, b: Any) -> Number:
    """Integers are divided towards zero."""
    if isinstance(a, float) or isinstance(b, float):
        return float(a) / float(b)
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a // b  # sizes are positive
    return int(a / b) if abs(a) < 2**52 else a // b


ELEMENTWISE: dict[str, Elementwise] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divided,
    "Mod": lambda a, b: a % b,
    "Neg": lambda a: -a,
    "Abs": lambda a: abs(a),
    "Floor": lambda a: float(math.floor(a)),
    "Ceil": lambda a: float(math.ceil(a)),
    "Sqrt": lambda a: math.sqrt(a),
    "Min": lambda *a: min(a),
    "Max": lambda *a: max(a),
    "Equal": lambda a, b: bool(a == b),
    "Greater": lambda a, b: bool(a > b),
    "GreaterOrEqual": lambda a, b: bool(a >= b),
    "Less": lambda a, b: bool(a < b),
    "LessOrEqual": lambda a, b: bool(a <= b),
    "And": lambda a, b: bool(a and b),
    "Or": lambda a, b: bool(a or b),
    "Not": lambda a: not a,
    "Where": lambda c, a, b: a if c else b,
    "Identity": lambda a: a,
}


def compute(node: OnnxNode, inputs: Sequence[Numbers | None]) -> Numbers | None:
    """The result as numbers, or None where this operator is not one of a shape's."""
    present = [i for i in inputs if i is not None]
    if node.op in ELEMENTWISE and len(present) == len(inputs):
        return _elementwise(ELEMENTWISE[node.op], present)
    if node.op in STRUCTURAL:
        return STRUCTURAL[node.op](node, *inputs)
    return None


def _elementwise(function: Elementwise, inputs: Sequence[Numbers]) -> Numbers | None:
    length = max(len(i.values) for i in inputs)
    if any(len(i.values) not in (1, length) for i in inputs):
        return None
    columns = [i.values if len(i.values) == length else i.values * length for i in inputs]
    return Numbers(tuple(function(*row) for row in zip(*columns, strict=True)), all(i.scalar for i in inputs))


def _gather(node: OnnxNode, data: Numbers, indices: Numbers) -> Numbers | None:
    if node.get("axis", 0) != 0 or data.scalar:
        return None
    return Numbers(tuple(data.values[int(i)] for i in indices.values), indices.scalar)


def _slice(node: OnnxNode, data: Numbers, *bounds: Numbers | None) -> Numbers | None:
    starts, ends, _axes, steps = (*bounds, None, None, None, None)[:4]
    start = starts.values[0] if starts is not None else node.get("starts", [0])[0]
    end = ends.values[0] if ends is not None else node.get("ends", [2**62])[0]
    step = steps.values[0] if steps is not None else 1
    return Numbers(data.values[slice(int(start), int(end), int(step))])


def _cast(node: OnnxNode, data: Numbers) -> Numbers | None:
    dtype = DTYPES[node.get("to")]
    if dtype == torch.bool:
        return Numbers(tuple(bool(v) for v in data.values), data.scalar)
    if dtype.is_floating_point:
        # A batch-dependent size as a float is data, not a shape.
        if any(isinstance(v, torch.SymInt) for v in data.values):
            return None
        return Numbers(tuple(float(v) for v in data.values), data.scalar)
    return Numbers(tuple(v if isinstance(v, torch.SymInt) else int(v) for v in data.values), data.scalar)


def _reshape(node: OnnxNode, data: Numbers, shape: Numbers) -> Numbers | None:
    if len(shape.values) == 0 and len(data.values) == 1:
        return Numbers(data.values, True)
    return Numbers(data.values) if len(shape.values) == 1 else None


def _filled(node: OnnxNode, shape: Numbers) -> Numbers | None:
    if len(shape.values) != 1 or not isinstance(shape.values[0], int):
        return None
    return Numbers((node.get("fill", 0.0),) * shape.values[0])


def _product(node: OnnxNode, data: Numbers, *axes: Numbers | None) -> Numbers:
    return Numbers((math.prod(data.values),), not node.get("keepdims", 1))


def _range(node: OnnxNode, start: Numbers, limit: Numbers, delta: Numbers) -> Numbers | None:
    bounds = [b.values[0] for b in (start, limit, delta)]
    if not all(type(b) is int for b in bounds):
        return None
    return Numbers(tuple(range(*(int(b) for b in bounds))))


STRUCTURAL: dict[str, Callable[..., Numbers | None]] = {
    "Gather": _gather,
    "Concat": lambda node, *parts: Numbers(tuple(v for p in parts for v in p.values)),
    "Slice": _slice,
    "Squeeze": lambda node, data, *axes: Numbers(data.values, True) if len(data.values) == 1 else None,
    "Unsqueeze": lambda node, data, *axes: Numbers(data.values) if data.scalar else None,
    "Cast": _cast,
    "Reshape": _reshape,
    "ConstantOfShape": _filled,
    "ReduceProd": _product,
    "Range": _range,
}
