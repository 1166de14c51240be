"""Faults in weights that lie as plain numbers in a file, whatever the format around them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TargetError

Fault = Callable[[Path], str]
FACTOR = 1.5


@dataclass(frozen=True)
class Block:
    """An array as it lies in `file` from byte `offset` on: C order, little-endian, `dtype` by its NumPy name.

    `bits`: where they are fewer than the type's, numbers stand bit behind bit, each from its lowest on. They are read
    and written without a sign: as fields of bits that stand for codes, or as indices.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    bits: int | None = None

    @property
    def bytes(self) -> int:
        """Its length in the file."""
        count = int(np.prod(self.shape))
        return count * np.dtype(self.dtype).itemsize if self.bits is None else -(-count * self.bits // 8)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return np.dtype(self.dtype).kind == "f"

    def read(self) -> NDArray[Any]:
        """A copy of the array; raises TargetError when the file ends before it does."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.bytes)
        if len(content) != self.bytes:
            raise TargetError(f"{self.file.name} ends within a weight")
        if self.bits is not None:
            single = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
            fields = single[: int(np.prod(self.shape)) * self.bits].reshape(*self.shape, self.bits)
            return np.packbits(fields, axis=-1, bitorder="little")[..., 0]
        return np.frombuffer(content, self.dtype).reshape(self.shape).copy()

    def write(self, values: NDArray[Any]) -> None:
        """Put `values` (same shape) in its place."""
        stored = np.ascontiguousarray(values.astype(self.dtype))
        if self.bits is not None:
            single = np.unpackbits(stored[..., None], axis=-1, bitorder="little")[..., : self.bits]
            stored = np.packbits(single.reshape(-1), bitorder="little")
        content = stored.tobytes()
        assert len(content) == self.bytes
        with self.file.open("r+b") as file:
            file.seek(self.offset)
            file.write(content)


@dataclass(frozen=True)
class Weight:
    """The weight of a layer: its numbers, codes or indices, the axis of its output channels, and what it is made with:
    the scale of codes, or the table that indices point into (float, its last axes [2^bits] or [2^bits, 1])."""

    name: str
    values: Block
    axis: int
    scale: Block | None = None
    table: Block | None = None


Finder = Callable[[Path], list[Weight]]


def faults_of(weights: Finder, data_file: Callable[[Path], Path]) -> dict[str, Fault]:
    """The faults of a format, given how its weights are found (in the order of layers) and which file holds them."""

    def largest(path: Path) -> Weight:
        return max(_some(weights(path)), key=lambda w: w.values.bytes)

    return {
        "flipped-bit": lambda path: _flip(largest(path)),
        "permuted-channels": lambda path: _permute(largest(path)),
        "scaled-weight": lambda path: _scale(largest(path)),
        # In the last layer: an activation such as ReLU may turn NaN into a harmless number further up.
        "not-a-number": lambda path: _not_a_number(_some(weights(path))[-1]),
        "truncated-file": lambda path: _truncate(data_file(path)),
        "missing-file": lambda path: _remove(data_file(path)),
    }


def _some(weights: list[Weight]) -> list[Weight]:
    if not weights:
        raise TargetError("no layer of the artifact has a weight that lies in its files as plain numbers")
    return weights


def _flip(weight: Weight) -> str:
    position = weight.values.offset + weight.values.bytes // 2
    with weight.values.file.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    return f"flipped the lowest bit of byte {position} of {weight.values.file.name}, in the weight {weight.name}"


def _permute(weight: Weight) -> str:
    values = weight.values.read()
    rolled = np.roll(values, 1, weight.axis)
    if np.array_equal(rolled, values):
        raise TargetError(f"the channels of the weight {weight.name} are all the same")
    weight.values.write(rolled)
    return f"moved the output channels of the weight {weight.name} by one"


def _scale(weight: Weight) -> str:
    block, what = _factor(weight)
    before = block.read()
    block.write(before * np.asarray(FACTOR, before.dtype))
    return f"multiplied {what} by {FACTOR}"


def _not_a_number(weight: Weight) -> str:
    block, what = _factor(weight)
    values = block.read()
    values.reshape(-1)[values.size // 2 if block is not weight.table else _in_use(weight, values)] = np.nan
    block.write(values)
    return f"wrote a NaN into {what}"


def _in_use(weight: Weight, table: NDArray[Any]) -> int:
    """Where in a table, one for all or one per block, the number lies that the middle one of the weights stands for."""
    indices = weight.values.read()
    middle = np.unravel_index(indices.size // 2, indices.shape)
    blocks = table.shape[: indices.ndim] if table.ndim > indices.ndim else (1,) * indices.ndim
    place = [int(i) * count // size for i, count, size in zip(middle, blocks, indices.shape, strict=True)]
    entries = table.size // int(np.prod(blocks))
    return int(np.ravel_multi_index((*place, int(indices[middle])), (*blocks, entries)))


def _factor(weight: Weight) -> tuple[Block, str]:
    """The floating-point numbers a weight is made with: its table, its scale, else itself."""
    if weight.table is not None:
        return weight.table, f"the table of the weight {weight.name}"
    if weight.scale is not None:
        return weight.scale, f"the scale of the weight {weight.name}"
    if weight.values.is_float:
        return weight.values, f"the weight {weight.name}"
    raise TargetError(f"the scale of the weight {weight.name} does not lie in the files as plain numbers")


def _truncate(file: Path) -> str:
    size = file.stat().st_size
    os.truncate(file, size // 2)
    return f"cut {file.name} from {size} to {size // 2} bytes"


def _remove(file: Path) -> str:
    file.unlink()
    return f"removed {file.name}"
