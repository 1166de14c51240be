"""What TensorRT asks of a model with Q/DQ, checked on the file; nothing here was run on TensorRT hardware.

Rules: NVIDIA TensorRT, "Working with Quantized Types" (explicit quantization): symmetric codes (int8, 8-bit floats
E4M3, int4 weights), zero points zero, scales positive constants, per-channel scales on weights only, biases in float,
all inputs of a weighted operator quantized. The numbers of the file are checked in ONNX Runtime.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from . import Fallback, Placement
from .errors import TargetError

WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
DYNAMIC = frozenset(("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"))
TYPES = ("int8", "int4", "float8_e4m3fn")
THROUGH = frozenset(("Relu", "Clip"))

Array = NDArray[np.generic]


def check_tensorrt(path: Path) -> None:
    """Raise TargetError, all violations listed, where the file breaks a rule that TensorRT refuses a network for."""
    model = onnx.load(path)
    broken = list(_violations(model.graph))
    if broken:
        raise TargetError(f"TensorRT won't take {path.name}: " + "; ".join(broken))


def _violations(graph: onnx.GraphProto) -> Iterator[str]:
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type in DYNAMIC:
            yield f"{node.name} quantizes at run time ({node.op_type}); use static int8 or weights only"
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = _value(constants, node, 1), _value(constants, node, 2)
        if scale is None:
            yield f"the scale of {node.name} is not constant"
            continue
        if not np.all(scale.astype(np.float32) > 0):
            yield f"a scale of {node.name} is not positive"
        if zero is not None and np.any(zero != 0):
            yield f"{node.name} has the zero point {zero.flat[np.flatnonzero(zero)[0]]}; symmetric int8 has 0"
        codes = _code_type(graph, constants, node, zero)
        if codes not in TYPES:
            yield f"{node.name} has codes of {codes}, not of {', '.join(TYPES)}"
        if scale.size > 1 and node.input[0] not in constants:
            yield f"{node.name} has a scale per channel on an activation"


def _code_type(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], node: onnx.NodeProto, zero: Array | None
) -> str:
    """The type of the codes: the zero point's, the stored weight's, or that of the Quantize before; else uint8."""
    if zero is not None:
        return str(zero.dtype)
    if node.op_type == "DequantizeLinear" and node.input[0] in constants:
        return str(numpy_helper.to_array(constants[node.input[0]]).dtype)
    for before in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in before.output and before.op_type == "QuantizeLinear":
            before_zero = _value(constants, before, 2)
            return "uint8" if before_zero is None else str(before_zero.dtype)
    return "uint8"


def _value(constants: dict[str, onnx.TensorProto], node: onnx.NodeProto, index: int) -> Array | None:
    if len(node.input) <= index or node.input[index] not in constants:
        return None
    return numpy_helper.to_array(constants[node.input[index]])


def predicted_placement(path: Path, layers: Counter[str]) -> Placement:
    """TensorRT's rules applied to the file: a weighted operator is int8 when both its operands are dequantized codes,
    any other when it also writes codes. A prediction: `kinds` says so in every line. 8-bit floats count as int8 does,
    and are called "float8" there."""
    from ._onnx_placement import CONVERSIONS, MOVES, layer_of
    from ._onnx_session import FLOAT8

    graph = onnx.load(path, load_external_data=False).graph
    made = {out: node for node in graph.node for out in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kinds: Counter[str] = Counter()
    found: Counter[str] = Counter()
    constants = {t.name for t in graph.initializer}
    narrow = "float8" if any(t.data_type in FLOAT8 for t in graph.initializer) else "int8"
    for node in graph.node:
        if node.op_type in CONVERSIONS:
            form = "weights" if node.input[0] in constants else "convert"
        elif node.op_type in MOVES:
            form = "move"
        else:
            form = narrow if _is_int8(node, made, readers) else "float"
        kinds[f"{form} {node.op_type} (predicted, not run on TensorRT)"] += 1
        found[layer_of(node.name, layers)] += form == narrow
    totals: Counter[str] = Counter()
    for name, count in kinds.items():
        totals[name.split()[0]] += count
    reason = "predicted, not run on TensorRT: not all inputs of the operator come from DequantizeLinear"
    fallbacks = tuple(Fallback(name, reason) for name in sorted(layers) if found[name] < layers[name])
    return Placement(totals[narrow], totals["float"], totals["convert"], fallbacks, dict(sorted(kinds.items())))


def _is_int8(node: onnx.NodeProto, made: dict[str, onnx.NodeProto], readers: dict[str, list[onnx.NodeProto]]) -> bool:
    operands = node.input[:2] if node.op_type in WEIGHTED else node.input[:1] if len(node.input) else []
    if node.op_type in ("Add", "Mul", "Sub", "Concat"):
        operands = node.input
    dequantized = bool(operands) and all(n in made and made[n].op_type == "DequantizeLinear" for n in operands)
    if not dequantized or node.op_type in WEIGHTED:
        return dequantized
    after = readers.get(node.output[0], [])
    while len(after) == 1 and after[0].op_type in THROUGH:
        after = readers.get(after[0].output[0], [])
    return bool(after) and all(n.op_type == "QuantizeLinear" for n in after)
