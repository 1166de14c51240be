"""Faults in an ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TargetError
from ._blocks import Block, Weight, faults_of

_LAYERS = {
    "Conv": 0,
    "ConvTranspose": 1,
    "ConvInteger": 0,
    "Gemm": 0,
    "MatMul": -1,
    "MatMulInteger": -1,
    "MatMulNBits": 0,
}
_INTEGER = ("ConvInteger", "MatMulInteger")
# What may stand between a stored weight and the layer that reads it.
_UNPACKING = ("DequantizeLinear", "Cast", "Mul", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")


def weights(path: Path) -> list[Weight]:
    """The stored weights of layers, in the graph's order. Raises TargetError for a file that is no ONNX model."""
    return _Graph(path).weights()


class _Graph:
    """The model's nodes by what they make, its constants by name, and where these lie in the file."""

    def __init__(self, path: Path) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.path = path
        self.content = path.read_bytes()
        try:
            self.graph = onnx.load_model_from_string(self.content).graph
        except DecodeError as error:
            raise TargetError(f"{path.name} is no ONNX model: {error}") from error
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}

    def weights(self) -> list[Weight]:
        """One for each layer whose second operand is constant."""
        found = []
        for node in self.graph.node:
            if node.op_type in _LAYERS and len(node.input) > 1:
                weight = self._weight(node)
                if weight is not None:
                    found.append(weight)
        return found

    def _weight(self, node: Any) -> Weight | None:
        stored = self._stored(node.input[1])
        if not stored:
            return None
        tensor = max(stored, key=lambda t: int(np.prod(t.dims)))
        values = self._block(tensor)
        if values is None or len(values.shape) < 2:
            return None
        factors = [t for t in stored if t is not tensor] or (self._factors(node) if node.op_type in _INTEGER else [])
        if node.op_type == "MatMulNBits":
            factors = self._stored(node.input[2])
        blocks = [block for block in map(self._block, factors) if block is not None and block.is_float]
        return Weight(tensor.name, values, _LAYERS[node.op_type], blocks[0] if blocks else None)

    def _stored(self, name: str) -> list[Any]:
        """The constants a value is unpacked from; none when it depends on anything else."""
        if name in self.constants:
            return [self.constants[name]]
        maker = self.makers.get(name)
        if maker is None or maker.op_type not in _UNPACKING:
            return []
        parts = [self._stored(part) for part in maker.input if part]
        return [tensor for part in parts for tensor in part] if all(parts) else []

    def _factors(self, node: Any) -> list[Any]:
        """The constants an integer layer's sums are multiplied with: its output, cast, times scales."""
        names = {node.output[0]}
        for reader in self.graph.node:
            if reader.op_type == "Cast" and reader.input[0] in names:
                names.add(reader.output[0])
        products = [n for n in self.graph.node if n.op_type == "Mul" and names & set(n.input)]
        operands = [name for product in products for name in product.input if name not in names]
        for name in list(operands):
            maker = self.makers.get(name)
            if maker is not None and maker.op_type == "Mul":
                operands += maker.input
        return [self.constants[name] for name in operands if name in self.constants]

    def _block(self, tensor: Any) -> Block | None:
        """Where a constant's bytes lie: within its own message, whose name makes it unique.

        Codes of 4 and 2 bits are seen as the bytes that hold two and four neighbours along the last axis.
        """
        from onnx import TensorProto, helper

        raw = tensor.raw_data
        message = self.content.find(tensor.SerializeToString(deterministic=True))
        if not raw or message < 0:
            return None
        offset = self.content.index(raw, message)
        in_a_byte = {TensorProto.INT4: 2, TensorProto.INT2: 4}.get(tensor.data_type)
        if in_a_byte is not None:
            *outer, last = tensor.dims
            return None if last % in_a_byte else Block(self.path, offset, "uint8", (*outer, last // in_a_byte))
        return Block(self.path, offset, helper.tensor_dtype_to_np_dtype(tensor.data_type).name, tuple(tensor.dims))


FAULTS = faults_of(weights, lambda path: path)
