"""Faults in a Core ML package."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .._coreml_package import MODEL, WEIGHTS
from ..errors import TargetError
from ..mil.reader import read_spec
from ._blocks import Block, Weight, faults_of

_LAYERS = ("conv", "conv_transpose", "linear", "matmul")
_OPERANDS = ("weight", "y", "x")
# Of constexpr_affine_dequantize, constexpr_blockwise_shift_scale, constexpr_cast.
_PACKED = ("quantized_data", "data", "source_val")
# MIL's DataType numbers (coremltools' MIL.proto) of what is stored byte by byte; how many bits the packed ones have.
_DTYPES = {10: "float16", 11: "float32", 21: "int8", 23: "int32", 31: "uint8", 32: "uint16", 33: "uint32"}
_BITS = {25: 4, 35: 4, 36: 2, 37: 1, 38: 6, 39: 3}
# Blob storage: 64 bytes of metadata in front of each array (coremltools' mlmodel/src/MILBlob/Blob/StorageFormat.hpp).
_METADATA = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF


def weights(path: Path) -> list[Weight]:
    """The stored weights of layers, in the program's order. Raises TargetError for a damaged package."""
    return _Program(path).weights()


def data_file(path: Path) -> Path:
    """The file with the weights; the program itself where it is small enough to hold them."""
    blobs = path / "Data" / WEIGHTS / "weight.bin"
    return blobs if blobs.is_file() else path / "Data" / MODEL


class _Program:
    """The operations of `main` by what they make, and the blobs behind their constants."""

    def __init__(self, path: Path) -> None:
        function = read_spec(path).mlProgram.functions["main"]
        self.operations = list(function.block_specializations[function.opset].operations)
        self.makers = {output.name: op for op in self.operations for output in op.outputs}
        self.path, self.blobs = path, data_file(path)

    def weights(self) -> list[Weight]:
        """One for each layer with a constant operand."""
        layers = [op for op in self.operations if op.type in _LAYERS]
        return [weight for layer in layers if (weight := self._weight(layer)) is not None]

    def _weight(self, layer: Any) -> Weight | None:
        for operand in _OPERANDS:
            maker = self._maker(layer, operand)
            if maker is None:
                continue
            # A matmul's second operand has its output channels last; weights have them first.
            axis = -1 if operand == "y" else 0
            if maker.type == "const":
                values = self._block(maker, "val")
                return None if values is None else Weight(maker.outputs[0].name, values, axis)
            if maker.type == "constexpr_lut_to_dense":
                return self._palette(maker, axis)
            for packed in _PACKED:
                values = self._block(maker, packed)
                if values is not None:
                    return Weight(maker.outputs[0].name, values, axis, self._block(maker, "scale"))
        return None

    def _palette(self, op: Any, axis: int) -> Weight | None:
        """Indices of the weight's shape (iOS 18), or as bytes with the shape beside them (iOS 16), and their table."""
        indices, table = self._block(op, "indices"), self._block(op, "lut")
        if indices is None or table is None:
            return None
        if "shape" in op.attributes:
            sizes = self._block(op, "shape")
            assert sizes is not None
            bits = int(np.prod(table.shape)).bit_length() - 1
            indices = replace(indices, shape=tuple(int(n) for n in sizes.read()), bits=bits)
        return Weight(op.outputs[0].name, indices, axis, table=table)

    def _maker(self, op: Any, operand: str) -> Any | None:
        """The constant or constexpr operation behind an operand; None for what is computed."""
        if operand not in op.inputs or not op.inputs[operand].arguments:
            return None
        maker = self.makers.get(op.inputs[operand].arguments[0].name)
        return maker if maker is not None and (maker.type == "const" or maker.type.startswith("constexpr_")) else None

    def _block(self, op: Any, name: str) -> Block | None:
        """The array behind an attribute, an input's own value, or the constant an input refers to; None for others."""
        if name in op.attributes:
            value = op.attributes[name]
        elif name in op.inputs and op.inputs[name].arguments and op.inputs[name].arguments[0].HasField("value"):
            value = op.inputs[name].arguments[0].value
        else:
            maker = self._maker(op, name)
            return None if maker is None or maker.type != "const" else self._block(maker, "val")
        kind = value.type.tensorType
        bits = _BITS.get(kind.dataType)
        dtype = "uint8" if bits is not None else _DTYPES.get(kind.dataType)
        if dtype is None:
            return None
        shape = tuple(int(d.constant.size) for d in kind.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            return Block(self.blobs, self._data(value.blobFileValue.offset), dtype, shape, bits)
        place = self._inline(op, value, dtype) if bits is None else None
        return None if place is None else Block(self.path / "Data" / MODEL, place, dtype, shape)

    def _inline(self, op: Any, value: Any, dtype: str) -> int | None:
        """Where in the program's own file the numbers of a small constant lie: within its operation, whose name makes
        it unique. None for what is not written as plain numbers there."""
        tensor = value.immediateValue.tensor
        form = tensor.WhichOneof("value")
        if form not in ("bytes", "floats"):
            return None
        raw = tensor.bytes.values if form == "bytes" else np.asarray(tensor.floats.values, dtype).tobytes()
        content, message = (self.path / "Data" / MODEL).read_bytes(), value.SerializeToString(deterministic=True)
        place = content.find(op.SerializeToString(deterministic=True))
        if not raw or place < 0:
            return None
        return content.index(message, place) + message.rindex(raw)

    def _data(self, metadata: int) -> int:
        """Where the array begins whose metadata lies at this offset."""
        with self.blobs.open("rb") as file:
            file.seek(metadata)
            content = file.read(_METADATA.size)
        if len(content) < _METADATA.size:
            raise TargetError(f"{self.blobs.name} ends before the weights the program names")
        sentinel, _, _, offset = _METADATA.unpack(content)
        if sentinel != _SENTINEL:
            raise TargetError(f"{self.blobs.name} has no weight at byte {metadata}")
        return int(offset)


FAULTS = faults_of(weights, data_file)
