"""A .tflite file as objects: tensors, operators and constants, to be read or edited and written again."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import TargetError

SIGNATURE = "serving_default"
_IDENTIFIER = b"TFL3"
# How many bytes a flatbuffer can address with its signed 32-bit offsets.
_LIMIT = 2**31 - 1
_COMPOSITE = "STABLEHLO_COMPOSITE"
# Operators that refer to a subgraph of their own by its position.
_WITH_BODIES = (
    "WHILE",
    "IF",
    "CALL_ONCE",
    "STABLEHLO_CASE",
    "STABLEHLO_WHILE",
    "STABLEHLO_REDUCE",
    "STABLEHLO_REDUCE_WINDOW",
    "STABLEHLO_SCATTER",
    "STABLEHLO_SORT",
)

DTYPES = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
_PACKED = {"INT4": 4, "INT2": 2}


def schema() -> Any:
    """The generated flatbuffer classes of the format; raises ImportError without ai-edge-litert."""
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


class TFLiteFile:
    """The main graph of a .tflite model. Tensors and operators are named by position, as in the file."""

    def __init__(self, content: bytes) -> None:
        if content[4:8] != _IDENTIFIER:
            raise TargetError("this is no TFLite model (the file identifier TFL3 is missing).")
        self._schema = schema()
        try:
            self.model = self._schema.ModelT.InitFromPackedBuf(content, 0)
        except Exception as error:  # struct.error, IndexError, ValueError: whatever a torn offset leads to
            raise TargetError("the TFLite file is damaged; convert the model again.") from error
        self.graph = self.model.subgraphs[0]
        for graph in self.model.subgraphs:  # flatbuffers hands out read-only arrays
            for op in graph.operators:
                op.inputs = [] if op.inputs is None else [int(i) for i in op.inputs]
        self._operators = _names(self._schema.BuiltinOperator)
        self._types = _names(self._schema.TensorType)
        self._integers: dict[tuple[tuple[int, ...], bytes], int] = {}

    @classmethod
    def read(cls, path: Path) -> "TFLiteFile":
        """Read `path`; raises TargetError when it is no TFLite model."""
        return cls(path.read_bytes())

    def to_bytes(self) -> bytes:
        """The file's bytes; the same objects give the same bytes. Raises TargetError above 2 GiB."""
        import flatbuffers

        if sum(0 if b.data is None else len(b.data) for b in self.model.buffers) > _LIMIT:
            raise TargetError("the model's weights exceed the 2 GiB that a TFLite file can hold; compress them more.")
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def operator(self, op: Any) -> str:
        """An operator's name: "CONV_2D", or the custom operator's own."""
        code = self.model.operatorCodes[op.opcodeIndex]
        name = self._operators[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return code.customCode.decode() if name == "CUSTOM" else name

    def version(self, op: Any) -> int:
        """The version of an operator."""
        return int(self.model.operatorCodes[op.opcodeIndex].version)

    def dtype(self, tensor: int) -> str:
        """A tensor's type in the format's words: "INT8", "FLOAT32", ..."""
        return self._types[self.graph.tensors[tensor].type]

    def schema_type(self, dtype: str) -> int:
        """The number of a type in the file: of "INT16"."""
        return int(getattr(self._schema.TensorType, dtype))

    def name(self, tensor: int) -> str:
        """A tensor's name."""
        return str(self.graph.tensors[tensor].name.decode())

    def scales(self, tensor: int) -> NDArray[np.float32] | None:
        """The scales of a quantized tensor [1 or channels], None for one that is not quantized."""
        quantization = self.graph.tensors[tensor].quantization
        if quantization is None or quantization.scale is None or len(quantization.scale) == 0:
            return None
        return np.asarray(quantization.scale, dtype=np.float32)

    def block_scales(self, tensor: int) -> int | None:
        """The tensor with the scales of a blockwise quantized one; None for any other."""
        quantization = self.graph.tensors[tensor].quantization
        blocks = None if quantization is None else quantization.details
        return int(blocks.scales) if isinstance(blocks, self._schema.BlockwiseQuantizationT) else None

    def constant(self, tensor: int) -> NDArray[Any] | None:
        """The values of a constant tensor, in the file's layout; None for one that is computed.

        Codes of 4 and 2 bits come as int8.
        """
        entry = self.graph.tensors[tensor]
        data = self.model.buffers[entry.buffer].data
        bits = _PACKED.get(self._types[entry.type])
        if bits is not None and data is not None and len(data):
            return _unpacked(np.asarray(data, dtype=np.uint8), bits, self.shape(tensor))
        dtype = DTYPES.get(self._types[entry.type])
        if data is None or dtype is None or len(data) == 0:
            return None
        return np.frombuffer(np.asarray(data, dtype=np.uint8).tobytes(), dtype=dtype).reshape(self.shape(tensor))

    def shape(self, tensor: int) -> tuple[int, ...]:
        """A tensor's shape."""
        shape = self.graph.tensors[tensor].shape
        return () if shape is None else tuple(int(d) for d in shape)

    def inputs(self, op: Any) -> list[int]:
        """The tensors an operator reads, without the optional ones left out."""
        return [i for i in op.inputs if i >= 0]

    def outputs(self, op: Any) -> list[int]:
        """The tensors an operator writes."""
        return [int(i) for i in op.outputs]

    def add_tensor(self, name: str, dtype: str, shape: Sequence[int], values: NDArray[Any] | None = None) -> int:
        """Append a tensor, constant where `values` are given; returns its position."""
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape = name.encode(), list(shape)
        tensor.type = getattr(self._schema.TensorType, dtype)
        tensor.hasRank = True
        tensor.buffer = 0  # by the format's convention buffer 0 is empty: "computed"
        if values is not None:
            assert values.size == math.prod(shape)
            tensor.buffer = self.add_buffer(values)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add_buffer(self, values: NDArray[Any]) -> int:
        """Append a buffer with the bytes of `values`; returns its position."""
        buffer = self._schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def quantize_tensor(self, tensor: int, scales: NDArray[np.float32], zero: int = 0, axis: int = 0) -> None:
        """Write the scales and the zero point that a tensor's integer codes are read with."""
        parameters = self._schema.QuantizationParametersT()
        parameters.scale = np.asarray(scales, dtype=np.float32)
        parameters.zeroPoint = np.full(len(scales), zero, dtype=np.int64)
        parameters.quantizedDimension = axis
        self.graph.tensors[tensor].quantization = parameters

    def quantize_blocks(self, tensor: int, scales: int, size: int) -> None:
        """Let the tensor `scales` (float16 [rows, blocks]) hold the scales of a tensor's blocks of `size` codes."""
        blocks = self._schema.BlockwiseQuantizationT()
        blocks.scales, blocks.zeroPoints, blocks.blockSize = scales, -1, size
        parameters = self._schema.QuantizationParametersT()
        parameters.detailsType = self._schema.QuantizationDetails.BlockwiseQuantization
        parameters.details = blocks
        self.graph.tensors[tensor].quantization = parameters

    def options(self, name: str) -> Any:
        """New options of the kind `name`: "ConcatenationOptions"."""
        return getattr(self._schema, f"{name}T")()

    def make_operator(
        self, name: str, version: int, inputs: list[int], outputs: list[int], options: Any | None = None
    ) -> Any:
        """An operator, not yet in the graph."""
        op = self._schema.OperatorT()
        op.opcodeIndex = self.code(name, version)
        op.inputs, op.outputs = inputs, outputs
        op.debugMetadataIndex = -1
        if options is not None:
            op.builtinOptionsType = getattr(self._schema.BuiltinOptions, type(options).__name__[:-1])
            op.builtinOptions = options
        return op

    def reshape(self, tensor: int, result: int) -> Any:
        """A RESHAPE of `tensor` to the shape that `result` has, not yet in the graph."""
        return self.make_operator("RESHAPE", 1, [tensor, self.integers(self.shape(result))], [result])

    def integers(self, values: Sequence[Any] | NDArray[Any]) -> int:
        """A constant int32 tensor of these numbers (a shape, the start of a slice), one for all that ask for them."""
        numbers = np.asarray(values, dtype=np.int32)
        key = (numbers.shape, numbers.tobytes())
        if key not in self._integers:
            self._integers[key] = self.add_tensor(f"integers{len(self._integers)}", "INT32", numbers.shape, numbers)
        return self._integers[key]

    def code(self, name: str, version: int) -> int:
        """The position of the operator code `name` in `version`, added where it is new."""
        wanted = getattr(self._schema.BuiltinOperator, name)
        for index, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == wanted and code.version == version:
                return index
        code = self._schema.OperatorCodeT()
        code.builtinCode, code.version = wanted, version
        code.deprecatedBuiltinCode = min(wanted, 127)  # readers of the old format look here
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def inline_composites(self) -> None:
        """Replace each composite by the operators it stands for.

        A composite is a named group the converter found no operator for. LiteRT would run its subgraph one by one;
        inlined, the operators can be delegated, edited and counted like all others.
        """
        while any(self.operator(op) == _COMPOSITE for op in self.graph.operators):
            operators, self.graph.operators = self.graph.operators, []
            for op in operators:
                self.graph.operators += self._inlined(op) if self.operator(op) == _COMPOSITE else [op]
        if not any(self.operator(op) in _WITH_BODIES for op in self.graph.operators):
            del self.model.subgraphs[1:]

    def _inlined(self, composite: Any) -> list[Any]:
        body = copy.deepcopy(self.model.subgraphs[composite.builtinOptions2.decompositionSubgraphIndex])
        position = {int(i): int(o) for i, o in zip(body.inputs, composite.inputs, strict=True)}
        forwarded = [(int(i), int(o)) for i, o in zip(body.outputs, composite.outputs, strict=True)]
        position.update({i: o for i, o in forwarded if i not in position})
        for index, tensor in enumerate(body.tensors):
            if index not in position:
                self.graph.tensors.append(tensor)
                position[index] = len(self.graph.tensors) - 1
        for op in body.operators:
            op.inputs = [-1 if i < 0 else position[int(i)] for i in op.inputs]
            op.outputs = [position[int(o)] for o in op.outputs]
        return list(body.operators)

    def drop_unused_buffers(self) -> None:
        """Empty the buffers that no tensor and no metadata entry refers to, so that replaced weights leave the file."""
        used = {t.buffer for t in self.graph.tensors} | {m.buffer for m in self.model.metadata or []}
        for index, buffer in enumerate(self.model.buffers):
            if index not in used:
                buffer.data = None

    def names_are_unique(self) -> None:
        """Give a tensor whose name another one bears already a number behind it: other tools refuse the file else."""
        seen: set[bytes] = set()
        for index, tensor in enumerate(self.graph.tensors):
            name = bytes(tensor.name or b"")
            if name in seen:
                tensor.name = name + f";{index}".encode()
            seen.add(bytes(tensor.name or b""))

    def drop_unused_tensors(self, candidates: set[int]) -> None:
        """Detach the constants among `candidates` that nothing reads any more from their bytes."""
        read = {i for op in self.graph.operators for i in self.inputs(op)} | {int(i) for i in self.graph.outputs}
        for index in candidates - read:
            self.graph.tensors[index].buffer = 0
            self.graph.tensors[index].shape = []
        self.drop_unused_buffers()


def _unpacked(data: NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Codes of `bits` bits, the first of a byte in its lowest bits, as int8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (data[:, None] >> shifts) & np.uint8(2**bits - 1)
    codes = (fields.astype(np.int8) ^ (1 << (bits - 1))) - (1 << (bits - 1))
    return codes.reshape(-1)[: math.prod(shape)].astype(np.int8).reshape(shape)


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}
