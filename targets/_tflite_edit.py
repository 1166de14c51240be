"""Edits of a lowered .tflite file: the interface the job asks for, and weights in the form they are to be stored in.

Operator versions are those of TensorFlow Lite's `tools/versioning/op_version.cc`: a runtime too old for a form refuses
the file instead of computing something else.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import InputSpec

from ._tflite_file import SIGNATURE, TFLiteFile
from ._tflite_prepare import PackedWeight

# Operators with a kernel for float activations times int8 weights, the axis of the weight's channels, the version.
_HYBRID = {"FULLY_CONNECTED": (0, 12), "CONV_2D": (0, 5), "DEPTHWISE_CONV_2D": (3, 6)}
_DEQUANTIZE_INT8, _DEQUANTIZE_HALF = 5, 3
# Layouts that litert-torch gives to a weight, as permutations of PyTorch's axes.
_LAYOUTS = {2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (0, 2, 1), (1, 2, 0)), 4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0))}


def name_interface(
    file: TFLiteFile, inputs: Sequence[InputSpec], outputs: Sequence[str], codes_outside: bool = False
) -> None:
    """Give the signature and its tensors the job's names, in the job's order; floats outside where it is int8 inside.

    litert-torch folds the first Q and the last DQ into the interface; both are put back, as operators, unless
    `codes_outside`: then the interface itself is int8, for compilers that take nothing else.
    """
    signature = file.model.signatureDefs[0]
    signature.signatureKey = SIGNATURE.encode()
    file.graph.name = b"main"
    file.model.description = b"Tightfit"
    sources = [_entry(signature.inputs, f"args_{i}") for i in range(len(inputs))]
    results = [_entry(signature.outputs, f"output_{i}") for i in range(len(outputs))]
    head: list[Any] = []
    for entry, spec in zip(sources, inputs, strict=True):
        inner = entry.tensorIndex
        if spec.dtype == "float32" and file.scales(inner) is not None and not codes_outside:
            entry.tensorIndex = file.add_tensor(spec.name, "FLOAT32", file.shape(inner))
            file.graph.tensors[inner].name = f"{spec.name};quantized".encode()
            head.append(file.make_operator("QUANTIZE", 1, [entry.tensorIndex], [inner]))
        entry.name = file.graph.tensors[entry.tensorIndex].name = spec.name.encode()
    for entry, name in zip(results, outputs, strict=True):
        inner = entry.tensorIndex
        if file.scales(inner) is not None and not codes_outside:
            entry.tensorIndex = file.add_tensor(name, "FLOAT32", file.shape(inner))
            file.graph.tensors[inner].name = f"{name};quantized".encode()
            file.graph.operators.append(file.make_operator("DEQUANTIZE", 2, [inner], [entry.tensorIndex]))
        entry.name = file.graph.tensors[entry.tensorIndex].name = name.encode()
    file.graph.operators[:0] = head
    signature.inputs, signature.outputs = sources, results
    file.graph.inputs = [e.tensorIndex for e in sources]
    file.graph.outputs = [e.tensorIndex for e in results]


def _entry(entries: Sequence[Any], name: str) -> Any:
    return next(e for e in entries if e.name == name.encode())


def pack_weights(file: TFLiteFile, packed: Sequence[PackedWeight]) -> None:
    """Store each weight of `packed` in its form, found by the bytes of the float32 weight the converter wrote."""
    known = _Known(packed)
    head: list[Any] = []
    replaced: set[int] = set()
    expanded: dict[int, int] = {}
    for op in list(file.graph.operators):
        for slot, tensor in enumerate(op.inputs):
            found = known.find(file, tensor) if tensor >= 0 else None
            if found is None:
                continue
            weight, layout = found
            if weight.form == "dynamic" and slot == 1 and file.operator(op) in _HYBRID:
                _make_hybrid(file, op, tensor, weight, layout)
            else:
                if tensor not in expanded:
                    expanded[tensor] = _store_small(file, head, tensor, weight, layout)
                op.inputs[slot] = expanded[tensor]
            replaced.add(tensor)
    file.graph.operators[:0] = head
    file.drop_unused_tensors(replaced)


def halve_constants(file: TFLiteFile) -> None:
    """Store every float32 constant that an operator reads as float16 with a DEQUANTIZE in front."""
    head: list[Any] = []
    halves: dict[int, int] = {}
    for op in list(file.graph.operators):
        for slot, tensor in enumerate(op.inputs):
            values = file.constant(tensor) if tensor >= 0 else None
            if values is None or values.dtype != np.float32 or values.size < 2:
                continue
            if tensor not in halves:
                halves[tensor] = _store_half(file, head, tensor, values)
            op.inputs[slot] = halves[tensor]
    file.graph.operators[:0] = head
    file.drop_unused_tensors(set(halves))


class _Known:
    """The packed weights by the bytes of their float values in every layout the converter may have chosen."""

    def __init__(self, packed: Sequence[PackedWeight]) -> None:
        self._by_bytes: dict[str, tuple[PackedWeight, tuple[int, ...]]] = {}
        self._sizes = {w.values.size for w in packed}
        for weight in packed:
            for layout, values in _layouts(weight.values):
                self._by_bytes.setdefault(_digest(values), (weight, layout))

    def find(self, file: TFLiteFile, tensor: int) -> tuple[PackedWeight, tuple[int, ...]] | None:
        """The weight that a float32 constant of the file holds, and its layout."""
        if file.dtype(tensor) != "FLOAT32" or math.prod(file.shape(tensor)) not in self._sizes:
            return None
        values = file.constant(tensor)
        return None if values is None else self._by_bytes.get(_digest(values))


def _layouts(values: NDArray[Any]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    for layout in _LAYOUTS.get(values.ndim, (tuple(range(values.ndim)),)):
        yield layout, values.transpose(layout)


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _codes(
    weight: PackedWeight, layout: tuple[int, ...], shape: tuple[int, ...], preferred: int = 0
) -> tuple[NDArray[np.int8], int]:
    """The codes in the file's layout, and the axis of that shape along which the scales run.

    Axes of length 1 can make several axes fit; `preferred` is taken when it does.
    """
    assert weight.codes is not None
    assert weight.scales is not None
    codes = weight.codes.transpose(layout)
    outer = math.prod(codes.shape[: layout.index(0)])
    fits = [a for a, d in enumerate(shape) if d == len(weight.scales) and math.prod(shape[:a]) == outer]
    return np.ascontiguousarray(codes).reshape(shape), preferred if preferred in fits else fits[0]


def _make_hybrid(file: TFLiteFile, op: Any, tensor: int, weight: PackedWeight, layout: tuple[int, ...]) -> None:
    channel_axis, version = _HYBRID[file.operator(op)]
    op.inputs[1] = _add_codes(file, tensor, weight, layout, channel_axis)
    op.opcodeIndex = file.code(file.operator(op), version)
    if hasattr(op.builtinOptions, "asymmetricQuantizeInputs"):
        op.builtinOptions.asymmetricQuantizeInputs = True


def _add_codes(file: TFLiteFile, tensor: int, weight: PackedWeight, layout: tuple[int, ...], preferred: int = 0) -> int:
    shape = file.shape(tensor)
    codes, axis = _codes(weight, layout, shape, preferred)
    small = file.add_tensor(f"{file.name(tensor)};int8", "INT8", shape, codes)
    assert weight.scales is not None
    file.quantize_tensor(small, weight.scales, axis=axis)
    return small


def _store_small(file: TFLiteFile, head: list[Any], tensor: int, weight: PackedWeight, layout: tuple[int, ...]) -> int:
    if weight.codes is None or weight.scales is None:
        values = file.constant(tensor)
        assert values is not None
        return _store_half(file, head, tensor, values)
    small = _add_codes(file, tensor, weight, layout)
    wide = file.add_tensor(f"{file.name(tensor)};float", "FLOAT32", file.shape(tensor))
    head.append(file.make_operator("DEQUANTIZE", _DEQUANTIZE_INT8, [small], [wide]))
    return wide


def _store_half(file: TFLiteFile, head: list[Any], tensor: int, values: NDArray[Any]) -> int:
    half = file.add_tensor(f"{file.name(tensor)};float16", "FLOAT16", values.shape, values.astype(np.float16))
    wide = file.add_tensor(f"{file.name(tensor)};float", "FLOAT32", values.shape)
    head.append(file.make_operator("DEQUANTIZE", _DEQUANTIZE_HALF, [half], [wide]))
    return wide
