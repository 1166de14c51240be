"""Faults in a folder of C sources: numbers are changed in the text of weights.h."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._c_pack import block_words, row_words
from .._c_write import number
from ..errors import TargetError
from ._blocks import Block, Fault, Weight, faults_of

ARRAY = re.compile(
    r"/\* (?P<role>weight|scale) of (?P<layer>.*), shape \[(?P<shape>[\d, ]*)\] \*/\n"
    r"static const (?P<ctype>\w+) (?P<name>\w+)\[\d+\] = \{\n(?P<body>[^}]*)\};"
)
DTYPES = {"int8_t": "int8", "uint8_t": "uint8", "uint16_t": "uint16", "uint64_t": "uint64", "float": "float32"}


@dataclass(frozen=True)
class TextBlock(Block):
    """An array as text: `offset` is where its numbers start, `length` how long they are; `signs` are words of bits."""

    length: int = 0
    signs: bool = False

    @property
    def bytes(self) -> int:
        """The length of its text."""
        return self.length

    def read(self) -> NDArray[Any]:
        """A copy of the numbers, [out, ...]; words of signs with one row per output channel."""
        text = self.file.read_text(encoding="utf-8")[self.offset : self.offset + self.length]
        words = [w for w in re.split(r"[,\s]+", text.replace(number(np.nan), "nan")) if w]
        convert: Any = float.fromhex if self.is_float else lambda w: int(w, 0)
        try:
            found = np.array([convert(w.removesuffix("f") if self.is_float else w) for w in words], self.dtype)
        except ValueError as error:
            raise TargetError(f"{self.file.name} has something other than numbers in a weight") from error
        if found.size != int(np.prod(self.shape)):
            raise TargetError(f"{self.file.name} ends within a weight")
        values = found.reshape(self.shape)
        return row_words(values) if self.signs else values

    def write(self, values: NDArray[Any]) -> None:
        """Put `values` in their place."""
        stored = (block_words(values) if self.signs else values).astype(self.dtype).reshape(-1)
        text = self.file.read_text(encoding="utf-8")
        words = [number(v) if self.is_float else str(v) for v in (stored if self.is_float else stored.tolist())]
        body = "\n".join(",".join(words[i : i + 16]) + "," for i in range(0, len(words), 16))
        end = self.offset + self.length
        self.file.write_text(f"{text[: self.offset]}{body}\n{text[end:]}", encoding="utf-8")


def weights(path: Path) -> list[Weight]:
    """The stored weights of layers, in the order of the source. Raises TargetError for what is no such folder."""
    file = path / "weights.h"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read {path.name}/weights.h: it is no folder of Tightfit's C sources") from error
    blocks: dict[str, list[tuple[str, TextBlock]]] = {"weight": [], "scale": []}
    for found in ARRAY.finditer(text):
        shape = tuple(int(n) for n in found["shape"].split(",") if n.strip())
        signs, dtype = found["ctype"] == "uint64_t", DTYPES[found["ctype"]]
        start, end = found.span("body")
        block = TextBlock(file, start, dtype, shape, None, end - start, signs)
        blocks[found["role"]].append((found["layer"], block))
    scales = dict(blocks["scale"])
    return [Weight(layer, block, 0, scales.get(layer)) for layer, block in blocks["weight"]]


def _flip(path: Path) -> str:
    """The lowest bit of the number in the middle of the largest weight."""
    found = weights(path)
    if not found:
        raise TargetError("no layer of the artifact has a weight that lies in its files as plain numbers")
    weight = max(found, key=lambda w: w.values.bytes)
    values = weight.values.read()
    raw = np.ascontiguousarray(values).view(np.uint32 if weight.values.is_float else values.dtype).reshape(-1)
    raw[raw.size // 2] ^= raw.dtype.type(1)
    weight.values.write(raw.view(values.dtype).reshape(values.shape))
    return f"flipped the lowest bit of number {raw.size // 2} of {weight.values.file.name}, in the weight {weight.name}"


FAULTS: dict[str, Fault] = {**faults_of(weights, lambda path: path / "weights.h"), "flipped-bit": _flip}
