"""What a .tflite file computes in which format, read back from its operators and tensors."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from calibrate import graph as graphs
from calibrate import qdq

from . import Fallback, Job, Placement
from ._tflite_fence import after_activation, has_float_constant
from ._tflite_file import TFLiteFile
from ._tflite_pack import BITS
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
_DEQUANTIZED = (qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE_GROUP)
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
        if name not in _MOVEMENT and what.startswith(("int8", "int16")):
            int8 += 1
        elif name not in _MOVEMENT and what.startswith("float"):
            other += 1
    kinds.update(delegation(path))
    return Placement(int8, other, conversions, tuple(_fallbacks(file, job)), dict(sorted(kinds.items())))


def operator_format(file: TFLiteFile, op: Any) -> str:
    """The format an operator computes in: "int8" or "int16" where its activations are, "int8-dynamic" for float
    activations on integer weights, else the format of its output ("float32", "int32", "bool", ...). Weights of fewer
    bits than 8 are named behind it: "int8-w4", "int8-dynamic-w2"."""
    outputs = [file.dtype(t) for t in file.outputs(op)]
    activations = [file.dtype(t) for t in file.inputs(op) if file.constant(t) is None]
    result = _FORMATS.get(outputs[0], outputs[0].lower()) if outputs else "none"
    inputs = file.inputs(op)
    bits = BITS.get(file.dtype(inputs[1]), 8) if len(inputs) > 1 and file.operator(op) in _WEIGHTED else 8
    small = f"-w{bits}" if bits < 8 else ""
    if result in ("int8", "int16"):
        codes = ("INT8", "UINT8", "INT16", "INT32", "BOOL")
        return result + small if all(a in codes for a in activations) else "float32"
    if result == "float32" and file.operator(op) in _WEIGHTED and len(inputs) > 1 and file.dtype(inputs[1]) in BITS:
        return _DYNAMIC + small
    return result


def _is_activation(file: TFLiteFile, op: Any) -> bool:
    return all(file.constant(t) is None for t in file.inputs(op))


def _fallbacks(file: TFLiteFile, job: Job) -> Iterator[Fallback]:
    """Each layer that the job quantizes and the file computes in float, once."""
    seen: set[str] = set()
    planned = (*job.rules.quantize_inputs, *job.rules.shared_scale)
    weights, stored = _int8_weights(file)
    float_ops = _float_operators(file)
    results = _results(job)
    for name, layer in results.items():  # the file's outputs bear the job's names, not the layers'
        if name in float_ops:
            float_ops.setdefault(_sanitized(layer), float_ops[name])
    for node in job.graph.graph.nodes:
        layer, reason = graphs.layer_name(node), None
        codes = _codes_of(node)
        if codes is not None:
            key = codes_key(graphs.constant(job.graph, codes).numpy())
            formats = weights.get(key, set())
            reason = _weight_reason(node, formats) or _size_reason(bits_of(node), stored.get(key, 8), formats)
        elif _is_small_weight(node):
            key = codes_key(graphs.constant(job.graph, node.args[0]).numpy())
            layer = graphs.layer_name(next(iter(node.users), node))
            if key not in weights:
                reason = "its weights are not in the file as codes: the converter changed or merged them"
            else:
                reason = _size_reason(bits_of(node), stored[key], weights[key])
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


def bits_of(node: Node) -> int:
    """How many bits the graph gives each weight of a layer, or of the dequantize node of its weight."""
    weight = node if qdq.code_range(node) else node.args[1]
    assert isinstance(weight, Node)
    return qdq.code_bits(weight) or 8


def _size_reason(wanted: int, stored: int, formats: set[str]) -> str | None:
    """Why weights take more bits than the graph gives them, or run slowly because of them."""
    needed = next(b for b in (2, 4, 8) if b >= wanted)
    if stored > needed:
        return f"its {wanted}-bit weights take {stored} bits each in the file: TFLite has no kernel for fewer here"
    if any(f.startswith("conv ") for f in formats):
        return (
            f"its {wanted}-bit weights run on LiteRT's built-in kernel, about half as fast as XNNPACK's int8: no fast "
            "kernel quantizes a convolution's input at run time for them; static int8 activations have one"
        )
    return None


def _weight_reason(node: Node, formats: set[str]) -> str | None:
    wanted = _DYNAMIC if node.target in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D) else _activations(node)
    if any(f.removeprefix("conv ").split("-w")[0] == wanted for f in formats):
        return None
    if not formats:
        return "its int8 weights are not in the file: the converter changed or merged the layer, which runs in float"
    if formats == {"float32"}:
        return "its int8 weights are dequantized and it runs in float, because its input or output is not int8 here"
    return f"it runs as {', '.join(sorted(formats))} where {wanted} was asked for"


def _activations(node: Node) -> str:
    source = node.args[0]
    return "int16" if isinstance(source, Node) and source.args[5] == torch.int16 else "int8"


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
    if node.target not in _DEQUANTIZED or not graphs.is_constant(node.args[0]):
        return False
    return not all(is_static(user) for user in node.users)


def _wants_int8(node: Node) -> bool:
    """True for an operator without weights that reads dequantized tensors only, and whose value is quantized again."""
    if node.op != "call_function" or graphs.kind(node) in ("qdq", *graphs.MOVEMENT) or has_float_constant(node):
        return False
    operands = [a for a in node.all_input_nodes if not graphs.is_constant(a)]
    reads = bool(operands) and all(a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in operands)
    return reads and any(u.target == qdq.QUANTIZE for u in after_activation(node).users)


def _int8_weights(file: TFLiteFile) -> tuple[dict[str, set[str]], dict[str, int]]:
    """What computes with each integer weight of the file: its key -> formats of its operators; its key -> bits.

    A format of a convolution on fewer than 8 bits starts with "conv ".
    """
    found: dict[str, set[str]] = {}
    stored: dict[str, int] = {}
    for op in file.graph.operators:
        for tensor in file.inputs(op):
            bits = BITS.get(file.dtype(tensor))
            codes = file.constant(tensor) if bits is not None else None
            if codes is None or bits is None:
                continue
            name, key = file.operator(op), codes_key(codes)
            what = "float32" if name in ("DEQUANTIZE", "EMBEDDING_LOOKUP") else operator_format(file, op)
            slow = bits < 8 and name == "CONV_2D"
            found.setdefault(key, set()).add(f"conv {what}" if slow else what)
            stored[key] = max(bits, stored.get(key, 0))
    return found, stored


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
