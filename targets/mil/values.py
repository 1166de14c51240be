"""How a MIL value is held here: every tensor is a torch tensor on the CPU, never of a half-precision type.

A MIL `fp16` tensor is a float32 tensor whose values float16 can represent (`round_to_half`); `uint16` is int32,
because torch computes little in uint16, and `uint32` int64; sub-byte integers are held in a whole byte.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.errors import TargetError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
}


def torch_dtype(mil_dtype: str) -> torch.dtype:
    """The torch dtype that holds a MIL dtype, by MIL's name. Raises TargetError for one MIL lacks here."""
    if mil_dtype not in TORCH_DTYPES:
        raise TargetError(f"the MIL executor holds no values of type '{mil_dtype}'")
    return TORCH_DTYPES[mil_dtype]


def round_to_half(x: Tensor) -> Tensor:
    """Round float32 to the nearest float16 value, ties to even, overflow to infinity; stays float32."""
    return x.half().float()


def tensor_of(value: object, mil_dtype: str) -> Tensor:
    """A tensor of a constant's NumPy value (any shape, rank 0 included)."""
    array = np.array(value)  # a copy: the weights of a package are read-only memory
    return torch.from_numpy(array).to(torch_dtype(mil_dtype)) if array.ndim else _scalar(array, mil_dtype)


def _scalar(array: np.ndarray, mil_dtype: str) -> Tensor:
    return torch.tensor(array.item(), dtype=torch_dtype(mil_dtype))


def ints(value: Tensor | Sequence[int]) -> list[int]:
    """A shape-like argument as a list, whether the program gives it as a constant or computes it."""
    if isinstance(value, Tensor):
        return [int(v) for v in value.reshape(-1).tolist()]
    return [int(v) for v in value]


def axes_of(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; None means all of them."""
    return tuple(range(rank)) if axes is None else tuple(sorted(a % rank for a in axes))


def along(vector: Tensor | Sequence[float] | float, axis: int | None, rank: int) -> Tensor | float:
    """A vector reshaped to broadcast along `axis` of a tensor of `rank`; scalars stay as they are."""
    if isinstance(vector, Sequence):
        vector = torch.tensor(vector)
    if not isinstance(vector, Tensor) or vector.ndim != 1 or axis is None:
        return vector
    shape = [1] * rank
    shape[axis % rank] = -1
    return vector.view(shape)


def argument(value: Any, mil_dtype: str, *, static: bool) -> Any:
    """A constant argument as the operators take it.

    `static` parameters (strides, axes, modes) become Python numbers, strings, booleans or lists of them, but arrays
    of floats, which are tensors like every data argument.
    """
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if not static or (array.ndim and array.dtype.kind == "f"):
        return tensor_of(value, mil_dtype)
    return array.tolist()
