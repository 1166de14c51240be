"""What a .tflite file computes in which format, read back from its operators and tensors."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.fx import Node

from calibrate import graph as graphs
from calibrate import qdq

from . import Fallback, Job, Placement
from ._tflite_fence import after_activation, has_float_constant
from ._tflite_file import TFLiteFile
from ._tflite_prepare import codes_key, is_static
from ._tflite_run import delegation

# Operators that move values or indices about; they cost no arithmetic.
_MOVEMENT = frozenset(
    (
        *("RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "PAD", "PADV2", "MIRROR_PAD", "CONCATENATION", "PACK"),
        *("UNPACK", "SPLIT", "SPLIT_V", "SQUEEZE", "EXPAND_DIMS", "BROADCAST_TO", "TILE", "GATHER", "GATHER_ND"),
        *("EMBEDDING_LOOKUP", "CAST", "SHAPE", "REVERSE_V2", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "SELECT", "SELECT_V2"),
    )
)
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "CONV_3D", "TRANSPOSE_CONV", "BATCH_MATMUL")
_DYNAMIC = "int8-dynamic"
_FORMATS = {"FLOAT32": "float32", "FLOAT16": "float16", "INT8": "int8", "UINT8": "int8", "INT16": "int16"}


def placement(path: Path, job: Job) -> Placement:
    """Read `path` and compare it with the layers `job` quantizes.

    `kinds` counts operators by "<format> <OPERATOR>", a conversion as "conversion <OPERATOR>", and, where the runtime
    is installed, "XNNPACK operators" and "built-in operators": what executes the file here. Raises TargetError when
    `path` is no TFLite file.
    """
    file = TFLiteFile.read(path)
    kinds: Counter[str] = Counter()
    int8 = other = conversions = 0
    for op in file.graph.operators:
        name = file.operator(op)
        what = operator_format(file, op)
        if name in _CONVERSIONS:
            if _is_activation(file, op):
                conversions += 1
                kinds[f"conversion {name}"] += 1
            else:
                kinds[f"weights {name}"] += 1
            continue
        kinds[f"{what} {name}"] += 1
        if name not in _MOVEMENT and what in ("int8", _DYNAMIC):
            int8 += 1
        elif name not in _MOVEMENT and what.startswith("float"):
            other += 1
    kinds.update(delegation(path))
    return Placement(int8, other, conversions, tuple(_fallbacks(file, job)), dict(sorted(kinds.items())))


def operator_format(file: TFLiteFile, op: Any) -> str:
    """The format an operator computes in: "int8" where its activations are, "int8-dynamic" for float activations on
    int8 weights, else the format of its output ("float32", "int32", "bool", ...)."""
    outputs = [file.dtype(t) for t in file.outputs(op)]
    activations = [file.dtype(t) for t in file.inputs(op) if file.constant(t) is None]
    result = _FORMATS.get(outputs[0], outputs[0].lower()) if outputs else "none"
    if result == "int8":
        return "int8" if all(a in ("INT8", "UINT8", "INT32", "BOOL") for a in activations) else "float32"
    inputs = file.inputs(op)
    if result == "float32" and file.operator(op) in _WEIGHTED and len(inputs) > 1 and file.dtype(inputs[1]) == "INT8":
        return _DYNAMIC
    return result


def _is_activation(file: TFLiteFile, op: Any) -> bool:
    return all(file.constant(t) is None for t in file.inputs(op))


def _fallbacks(file: TFLiteFile, job: Job) -> Iterator[Fallback]:
    """Each layer that the job quantizes and the file computes in float, once."""
    seen: set[str] = set()
    planned = (*job.rules.quantize_inputs, *job.rules.shared_scale)
    weights = _int8_weights(file)
    float_ops = _float_operators(file)
    results = _results(job)
    for name, layer in results.items():  # the file's outputs bear the job's names, not the layers'
        if name in float_ops:
            float_ops.setdefault(_sanitized(layer), float_ops[name])
    for node in job.graph.graph.nodes:
        layer, reason = graphs.layer_name(node), None
        codes = _codes_of(node)
        if codes is not None:
            reason = _weight_reason(node, weights.get(codes_key(graphs.constant(job.graph, codes).numpy()), set()))
        elif _is_small_weight(node):
            if codes_key(graphs.constant(job.graph, node.args[0]).numpy()) not in weights:
                layer = graphs.layer_name(next(iter(node.users), node))
                reason = "its int8 weights are not in the file: the converter changed or merged them"
        elif graphs.kind(node) in planned and _wants_int8(node):
            names = float_ops.get(_sanitized(layer))
            reason = f"{names} runs in float: its inputs and output are not all int8 here" if names else None
        if reason is not None and layer not in seen:
            seen.add(layer)
            yield Fallback(layer, reason)


def _sanitized(layer: str) -> str:
    """The layer's name as `_tflite_prepare` writes it into the file."""
    return layer.replace(";", "_").replace("/", ".")


def _results(job: Job) -> dict[str, str]:
    """Output name -> the layer that computes it."""
    output = next(n for n in job.graph.graph.nodes if n.op == "output")
    nodes = [n for n in output.args[0] if isinstance(n, Node)]
    return {name: graphs.layer_name(node) for name, node in zip(job.outputs, nodes, strict=False)}


def _weight_reason(node: Node, formats: set[str]) -> str | None:
    wanted = _DYNAMIC if node.target in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D) else "int8"
    if wanted in formats:
        return None
    if not formats:
        return "its int8 weights are not in the file: the converter changed or merged the layer, which runs in float"
    if formats == {"float32"}:
        return "its int8 weights are dequantized and it runs in float, because its input or output is not int8 here"
    return f"it runs as {', '.join(sorted(formats))} where {wanted} was asked for"


def _codes_of(node: Node) -> Node | None:
    """The codes of a conv or linear that is to run in int8; None for every other node."""
    if node.target in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D):
        codes = node.args[1]
    elif graphs.kind(node) in graphs.WEIGHTED and node.op == "call_function" and is_static(node):
        weight = node.args[1]
        codes = weight.args[0] if isinstance(weight, Node) and weight.target == qdq.DEQUANTIZE_CHANNEL else None
    else:
        return None
    return codes if isinstance(codes, Node) and graphs.is_constant(codes) else None


def _is_small_weight(node: Node) -> bool:
    """True for int8 codes of a layer that computes in float."""
    if node.target != qdq.DEQUANTIZE_CHANNEL or not graphs.is_constant(node.args[0]):
        return False
    return not all(is_static(user) for user in node.users)


def _wants_int8(node: Node) -> bool:
    """True for an operator without weights that reads dequantized tensors only, and whose value is quantized again."""
    if node.op != "call_function" or graphs.kind(node) in ("qdq", *graphs.MOVEMENT) or has_float_constant(node):
        return False
    operands = [a for a in node.all_input_nodes if not graphs.is_constant(a)]
    reads = bool(operands) and all(a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in operands)
    return reads and any(u.target == qdq.QUANTIZE for u in after_activation(node).users)


def _int8_weights(file: TFLiteFile) -> dict[str, set[str]]:
    """What computes with each int8 weight of the file: the weight's key -> formats of its operators."""
    found: dict[str, set[str]] = {}
    reads: dict[int, list[Any]] = {}
    for op in file.graph.operators:
        for tensor in file.inputs(op):
            reads.setdefault(tensor, []).append(op)
    for tensor, ops in reads.items():
        codes = file.constant(tensor) if file.dtype(tensor) == "INT8" else None
        if codes is not None:
            formats = {"float32" if file.operator(op) == "DEQUANTIZE" else operator_format(file, op) for op in ops}
            found.setdefault(codes_key(codes), set()).update(formats)
    return found


def _float_operators(file: TFLiteFile) -> dict[str, str]:
    """The layers whose names tensors written by float arithmetic bear -> the operator."""
    found: dict[str, str] = {}
    for op in file.graph.operators:
        name = file.operator(op)
        if name in _MOVEMENT or name in _CONVERSIONS or operator_format(file, op) != "float32":
            continue
        for tensor in file.outputs(op):
            for part in file.name(tensor).split(";"):
                found.setdefault(part, name)
    return found
