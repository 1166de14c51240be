"""Faults in a TFLite file."""

import math
from pathlib import Path
from typing import Any

from .._tflite_file import DTYPES, TFLiteFile, schema
from .._tflite_pack import BITS
from ..errors import TargetError
from ._blocks import Block, Weight, faults_of

# Operators with a weight as their second operand -> the axis of its output channels.
_LAYERS = {
    "CONV_2D": 0,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 0,
    "TRANSPOSE_CONV": 0,
    "CONV_3D": 4,
    "BATCH_MATMUL": 0,
}
# Fields of the format's tables (vtable offsets are 4 + 2 * field id).
_BUFFER_DATA = 4
_QUANTIZATION_SCALE = 8


def weights(path: Path) -> list[Weight]:
    """The stored weights of layers, in the graph's order. Raises TargetError for a file that is no TFLite model."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TargetError(f"cannot read {path.name}: {error.strerror}") from error
    return _Graph(path, content).weights()


class _Graph:
    """The main graph of a file, with the places of its constants."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.file = TFLiteFile(content)
        self.root = schema().Model.GetRootAs(content, 0)
        self.unpacked = {
            self.file.outputs(op)[0]: self.file.inputs(op)[0]
            for op in self.file.graph.operators
            if self.file.operator(op) == "DEQUANTIZE"
        }
        for op in self.file.graph.operators:  # groups are unpacked as rows, and then joined
            if self.file.operator(op) == "RESHAPE" and op.inputs[0] in self.unpacked:
                self.unpacked[self.file.outputs(op)[0]] = self.unpacked[op.inputs[0]]

    def weights(self) -> list[Weight]:
        """One for each layer whose second operand is constant."""
        found = []
        for op in self.file.graph.operators:
            kind, inputs = self.file.operator(op), self.file.inputs(op)
            if kind not in _LAYERS or len(inputs) < 2:
                continue
            tensor = self.unpacked.get(inputs[1], inputs[1])
            values = self._values(tensor)
            if values is not None:
                found.append(Weight(self.file.name(tensor).split(";")[0], values, _LAYERS[kind], self._scale(tensor)))
        return found

    def _values(self, tensor: int) -> Block | None:
        dtype = DTYPES.get(self.file.dtype(tensor))
        if self.file.constant(tensor) is None:
            return None
        buffer = self.root.Buffers(self.file.graph.tensors[tensor].buffer)
        offset = _vector(buffer, _BUFFER_DATA)
        if offset is None:
            return None
        bits, shape = BITS.get(self.file.dtype(tensor), 8), self.file.shape(tensor)
        if bits < 8:  # bytes of two or four codes, whole bytes to a row
            return Block(self.path, offset, "uint8", (shape[0], math.prod(shape[1:]) * bits // 8))
        return None if dtype is None else Block(self.path, offset, dtype.__name__, shape)

    def _scale(self, tensor: int) -> Block | None:
        blocks = self.file.block_scales(tensor)
        if blocks is not None:
            place = _vector(self.root.Buffers(self.file.graph.tensors[blocks].buffer), _BUFFER_DATA)
            return None if place is None else Block(self.path, place, "float16", self.file.shape(blocks))
        scales = self.file.scales(tensor)
        offset = _vector(self.root.Subgraphs(0).Tensors(tensor).Quantization(), _QUANTIZATION_SCALE)
        if scales is None or offset is None:
            return None
        return Block(self.path, offset, "float32", (len(scales),))


def _vector(table: Any, field: int) -> int | None:
    """Where in the file the first element of a table's vector lies; None when it has no such field."""
    if table is None:
        return None
    place = table._tab.Offset(field)
    return int(table._tab.Vector(place)) if place else None


FAULTS = faults_of(weights, lambda path: path)
