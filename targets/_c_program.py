"""A model as the target `c` writes it: constants, buffers and calls of kernels, and where every buffer lies."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES = {"int8_t": 1, "float": 4, "int64_t": 8, "int32_t": 4, "uint8_t": 1, "int16_t": 2, "uint16_t": 2, "uint64_t": 8}
ALIGNMENT = 64
# What the kernels count on; kernels.h has the same numbers.
TILE, CHUNK, PAD = 16, 32, 32


@dataclass(eq=False)
class Store:
    """Memory for one tensor: in the arena, or an input that the caller owns. `last` is the last call that reads it."""

    size: int
    first: int
    last: int
    argument: int | None = None  # which input of the model
    offset: int = 0


@dataclass(eq=False)
class Constant:
    """An array of the source: `values` as they stand there, in C order; what the numbers mean is the kernels' matter.

    `axis`, `format` and `layer` say what the array is to a layer: the axis of its output channels, and "weight",
    "scale" or "other".
    """

    name: str
    ctype: str
    values: NDArray[Any]
    role: str = "other"
    layer: str = ""
    tail: int = 0  # zeros behind the last number

    @property
    def bytes(self) -> int:
        """Its size in the compiled model."""
        return (self.values.size + self.tail) * BYTES[self.ctype]


@dataclass(eq=False)
class Tensor:
    """A value of the running model: its shape as the graph has it, and how it lies in memory.

    `images`: N H W C though the shape says N C H W. A tensor whose `home` is a Constant is one.
    """

    shape: tuple[int, ...]
    ctype: str
    home: Store | Constant
    images: bool = False

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.count * BYTES[self.ctype]

    @property
    def strides(self) -> tuple[int, ...]:
        """The step of every axis of the shape, in elements."""
        if self.images:
            _, c, h, w = self.shape
            return (h * w * c, 1, w * c, c)
        steps, step = [], 1
        for size in reversed(self.shape):
            steps.append(step)
            step *= size
        return tuple(reversed(steps))

    def reshaped(self, shape: tuple[int, ...]) -> "Tensor":
        """The same memory under another shape."""
        return Tensor(shape, self.ctype, self.home)


@dataclass(eq=False)
class Struct:
    """A constant structure of the source: the C type and its fields; a field may be a Constant, a Struct, a number."""

    ctype: str
    fields: dict[str, Any]
    name: str = ""


@dataclass(eq=False)
class Call:
    """One call of a kernel. `arguments` are numbers, words of C, Tensors, Structs and Constants, in order."""

    kernel: str
    arguments: tuple[Any, ...]
    layer: str
    scratch: int = 0


@dataclass
class Program:
    """What a graph has become. `inputs` and `outputs` are in the job's order."""

    name: str
    calls: list[Call] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    structs: list[Struct] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    inputs: list[tuple[str, Tensor, str]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    arena: int = 0

    def tensor(self, shape: tuple[int, ...], ctype: str, images: bool = False) -> Tensor:
        """A tensor in memory of its own, which the next call writes."""
        store = Store(math.prod(shape) * BYTES[ctype], len(self.calls), len(self.calls))
        self.stores.append(store)
        return Tensor(shape, ctype, store, images)

    def constant(
        self, stem: str, ctype: str, values: NDArray[Any], role: str = "other", layer: str = "", tail: int = 0
    ) -> Constant:
        """An array of the source under a name like `stem`; equal ones of no layer are written once."""
        for known in self.constants:
            same = role == known.role == "other" and known.ctype == ctype and known.values.shape == values.shape
            if same and known.tail == tail and np.array_equal(known.values, values):
                return known
        made = Constant(f"{stem}_{len(self.constants)}", ctype, np.ascontiguousarray(values), role, layer, tail)
        self.constants.append(made)
        return made

    def struct(self, ctype: str, **fields: Any) -> Struct:
        """A structure of the source, for the next call."""
        made = Struct(ctype, fields, f"{ctype.removeprefix('tf_')}_of_{len(self.structs)}")
        self.structs.append(made)
        return made

    def call(self, kernel: str, *arguments: Any, layer: str, scratch: int = 0) -> None:
        """Add a call; every tensor among its arguments lives until here at least."""
        for argument in arguments:
            if isinstance(argument, Tensor) and isinstance(argument.home, Store):
                argument.home.last = max(argument.home.last, len(self.calls))
        self.calls.append(Call(kernel, arguments, layer, scratch))

    @property
    def scratch(self) -> int:
        """The most memory a kernel asks for beside its inputs and outputs, in bytes."""
        return max((c.scratch for c in self.calls), default=0)

    @property
    def constant_bytes(self) -> int:
        """What all arrays take in the compiled model."""
        return sum(c.bytes for c in self.constants)

    def plan_memory(self) -> None:
        """Give every store a place in the arena: the largest first, at the lowest offset that is free in its time."""
        for _, tensor in self.outputs:
            if isinstance(tensor.home, Store):
                tensor.home.last = len(self.calls)
        placed: list[Store] = []
        for store in sorted((s for s in self.stores if s.argument is None), key=lambda s: (-s.size, s.first)):
            offset = 0
            busy = sorted(
                (p for p in placed if p.first <= store.last and store.first <= p.last), key=lambda p: p.offset
            )
            for other in busy:
                if offset + store.size <= other.offset:
                    break
                offset = max(offset, other.offset + -(-other.size // ALIGNMENT) * ALIGNMENT)
            store.offset = offset
            placed.append(store)
        self.arena = max((s.offset + s.size for s in placed), default=0)
