"""What flows between ONNX nodes: tensors, constants, and small lists of numbers known to Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = int | float | bool | torch.SymInt
# ONNX computes shapes with vectors; anything longer than this is data.
MOST_NUMBERS = 64


@dataclass(frozen=True)
class Constant:
    """A tensor known before anything runs. `name`: ONNX's name for it; `numbers`: its elements where they are few.

    The numbers are read at once: while torch.export traces, reading them from the tensor would be traced too.
    """

    name: str
    tensor: Tensor
    numbers: tuple[Number, ...] | None


def constant(name: str, tensor: Tensor) -> Constant:
    """A constant, its numbers read."""
    few = tensor.numel() <= MOST_NUMBERS
    return Constant(name, tensor, tuple(tensor.reshape(-1).tolist()) if few else None)


@dataclass(frozen=True)
class Numbers:
    """A vector (or a scalar) of numbers that Python knows while tracing; sizes that depend on the batch are SymInts."""

    values: tuple[Number, ...]
    scalar: bool = False


Value: TypeAlias = Tensor | Constant | Numbers | None


def as_numbers(value: Value) -> Numbers | None:
    """The numbers behind a value, or None for run-time tensors and for constants too large to be a shape."""
    if isinstance(value, Numbers):
        return value
    if isinstance(value, Constant) and value.numbers is not None and value.tensor.dim() <= 1:
        return Numbers(value.numbers, value.tensor.dim() == 0)
    return None


def materialised(numbers: Numbers) -> Tensor:
    """Numbers as a tensor: int64, float32 or bool."""
    dtype = _dtype(numbers.values)
    if all(not isinstance(v, torch.SymInt) for v in numbers.values):
        return torch.tensor(numbers.values[0] if numbers.scalar else numbers.values, dtype=dtype)
    parts = [torch.full((), v, dtype=dtype) for v in numbers.values]
    return parts[0] if numbers.scalar else torch.stack(parts)


def _dtype(values: Sequence[Number]) -> torch.dtype:
    if values and all(isinstance(v, bool) for v in values):
        return torch.bool
    return torch.float32 if any(isinstance(v, float) for v in values) else torch.int64
