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
from ._tflite_pack import add_codes, storage
from ._tflite_patches import as_matrix, fits, insert_product
from ._tflite_prepare import PackedWeight, codes_key
from .errors import TargetError

# Operators with a kernel for float activations times int8 weights, the axis of the weight's channels, the version.
_HYBRID = {"FULLY_CONNECTED": (0, 12), "CONV_2D": (0, 8), "DEPTHWISE_CONV_2D": (3, 7)}
# The least bits that their kernels compute rightly with (LiteRT 2.3: NaN from a CONV_2D of 2-bit weights).
_LEAST_BITS = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 8}
_LOOKUP = 4
_DEQUANTIZE_INT8, _DEQUANTIZE_SMALL, _DEQUANTIZE_HALF = 5, 6, 3
# Below so many rows the built-in FULLY_CONNECTED reads the dequantized weight once, where XNNPACK would pack it anew.
_FEW_ROWS = 4
_TURNED = "litert-torch turned the weight of '{}' about, so it has no groups; use one scale per output channel."
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
    operators, file.graph.operators = file.graph.operators, []
    for op in operators:
        around = [op]
        for slot, tensor in enumerate(op.inputs):
            found = known.find(file, tensor) if tensor >= 0 else None
            if found is None:
                continue
            weight, layout = found
            name = file.operator(op)
            if weight.form == "dynamic" and slot == 1 and name in _HYBRID:
                _make_hybrid(file, op, tensor, weight, layout)
            elif weight.form == "int8" and slot == 1 and name == "EMBEDDING_LOOKUP":
                _make_table(file, op, tensor, weight)
            else:
                if tensor not in expanded:
                    expanded[tensor] = _store_small(file, head, op, tensor, weight, layout)
                op.inputs[slot] = expanded[tensor]
                if slot == 1 and _is_computed(file, head, op.inputs[slot]):
                    around = _with_computed_weight(file, op)
            replaced.add(tensor)
        file.graph.operators += around
    file.graph.operators[:0] = head
    file.drop_unused_tensors(replaced)


def pack_static(file: TFLiteFile, bits: dict[str, int]) -> None:
    """Pack the codes of integer layers that need fewer than 8 bits (`bits` by the codes' key).

    FULLY_CONNECTED reads them packed. A convolution has no fast kernel for them: it becomes the same sums of products
    over patches of its input (`_tflite_patches`). What fits neither keeps 8 bits per code.
    """
    replaced: set[int] = set()
    operators, file.graph.operators = file.graph.operators, []
    for op in operators:
        around = [op]
        tensor = op.inputs[1] if len(op.inputs) > 1 else -1
        codes = file.constant(tensor) if tensor >= 0 and file.dtype(tensor) == "INT8" else None
        wanted = bits.get(codes_key(codes)) if codes is not None else None
        scales = file.scales(tensor) if wanted is not None else None
        if wanted is not None and codes is not None and scales is not None:
            matrix = codes.reshape(len(codes), -1)
            dtype = storage(wanted, matrix.shape[1])
            if dtype != "INT8" and (file.operator(op) == "FULLY_CONNECTED" or fits(file, op)):
                small = add_codes(file, file.name(tensor), matrix, scales, dtype)
                around = [*as_matrix(file, op), op] if file.operator(op) == "CONV_2D" else [op]
                around = insert_product(file, around, small, "FULLY_CONNECTED")
                replaced.add(tensor)
        file.graph.operators += around
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
    name = file.operator(op)
    channel_axis, version = _HYBRID[name]
    least = _LEAST_BITS.get(name, 2)
    op.inputs[1] = _add_codes(file, tensor, weight, layout, channel_axis, least)
    op.opcodeIndex = file.code(name, version)
    if hasattr(op.builtinOptions, "asymmetricQuantizeInputs"):
        op.builtinOptions.asymmetricQuantizeInputs = True


def _make_table(file: TFLiteFile, op: Any, tensor: int, weight: PackedWeight) -> None:
    """Look rows up as codes: the kernel multiplies them by their scales, and no table of floats is made."""
    assert weight.codes is not None
    assert weight.scales is not None
    grouped = weight.scales.ndim == 2
    dtype = storage(weight.bits, weight.codes.shape[1], grouped, blocks_of_two=True)
    op.inputs[1] = add_codes(file, file.name(tensor), weight.codes, weight.scales, dtype, table=True)
    op.opcodeIndex = file.code("EMBEDDING_LOOKUP", _LOOKUP)


def _add_codes(
    file: TFLiteFile,
    tensor: int,
    weight: PackedWeight,
    layout: tuple[int, ...],
    preferred: int = 0,
    least: int = 2,
) -> int:
    """The codes in the file's layout, as small as there are kernels for, `least` bits each."""
    assert weight.codes is not None
    assert weight.scales is not None
    shape = file.shape(tensor)
    if weight.scales.ndim == 2:
        if layout != (0, 1):
            raise TargetError(
                f"litert-torch turned the weight of '{weight.layer}' about, so its groups cannot be kept."
            )
        dtype = storage(weight.bits, shape[1], grouped=True)
        return add_codes(file, file.name(tensor), weight.codes, weight.scales, dtype)
    codes, axis = _codes(weight, layout, shape, preferred)
    dtype = storage(max(weight.bits, least), codes.size // len(weight.scales))
    return add_codes(file, file.name(tensor), codes, weight.scales, dtype, axis)


def _store_small(
    file: TFLiteFile, head: list[Any], op: Any, tensor: int, weight: PackedWeight, layout: tuple[int, ...]
) -> int:
    if weight.codes is None or weight.scales is None:
        values = file.constant(tensor)
        assert values is not None
        return _store_half(file, head, tensor, values)
    if weight.scales.ndim == 2:
        return _store_groups(file, head, tensor, weight, layout)
    # XNNPACK unpacks constants of 8 bits when it loads them; fewer bits need an operator that takes computed weights.
    whole = file.operator(op) == "DEPTHWISE_CONV_2D" or (file.operator(op) == "CONV_2D" and not fits(file, op))
    small = _add_codes(file, tensor, weight, layout, least=8 if whole else 2)
    wide = file.add_tensor(f"{file.name(tensor)};float", "FLOAT32", file.shape(tensor))
    version = _DEQUANTIZE_INT8 if file.dtype(small) == "INT8" else _DEQUANTIZE_SMALL
    head.append(file.make_operator("DEQUANTIZE", version, [small], [wide]))
    return wide


def _is_computed(file: TFLiteFile, head: list[Any], tensor: int) -> bool:
    """Whether the operators in `head` compute `tensor` in a way that XNNPACK does not undo when it loads the file."""
    maker = next((op for op in head if tensor in op.outputs), None)
    return maker is not None and file.dtype(maker.inputs[0]) not in ("INT8", "FLOAT16")


def _store_groups(file: TFLiteFile, head: list[Any], tensor: int, weight: PackedWeight, layout: tuple[int, ...]) -> int:
    """Groups as rows of their own with a float32 scale each: DEQUANTIZE reads blocks wrongly, rows rightly."""
    assert weight.codes is not None
    assert weight.scales is not None
    if layout != (0, 1):
        raise TargetError(_TURNED.format(weight.layer))
    rows = weight.codes.reshape(weight.scales.size, -1)
    name = file.name(tensor)
    small = add_codes(file, name, rows, weight.scales.reshape(-1), storage(weight.bits, rows.shape[1]))
    wide = file.add_tensor(f"{name};rows", "FLOAT32", rows.shape)
    joined = file.add_tensor(f"{name};float", "FLOAT32", file.shape(tensor))
    head.append(file.make_operator("DEQUANTIZE", _DEQUANTIZE_SMALL, [small], [wide]))
    head.append(file.reshape(wide, joined))
    return joined


def _with_computed_weight(file: TFLiteFile, op: Any) -> list[Any]:
    """`op`, whose weight is now computed, in operators that XNNPACK takes with such weights."""
    name, weight = file.operator(op), op.inputs[1]
    few = math.prod(file.shape(op.inputs[0])[:-1]) < _FEW_ROWS
    if name == "FULLY_CONNECTED":
        return [op] if few else insert_product(file, [op], weight, "BATCH_MATMUL")
    if name != "CONV_2D" or not fits(file, op):
        return [op]
    shape = file.shape(weight)
    matrix = file.add_tensor(f"{file.name(weight)};matrix", "FLOAT32", (shape[0], math.prod(shape[1:])))
    return [file.reshape(weight, matrix), *insert_product(file, [*as_matrix(file, op), op], matrix, "BATCH_MATMUL")]


def _store_half(file: TFLiteFile, head: list[Any], tensor: int, values: NDArray[Any]) -> int:
    half = file.add_tensor(f"{file.name(tensor)};float16", "FLOAT16", values.shape, values.astype(np.float16))
    wide = file.add_tensor(f"{file.name(tensor)};float", "FLOAT32", values.shape)
    head.append(file.make_operator("DEQUANTIZE", _DEQUANTIZE_HALF, [half], [wide]))
    return wide
