"""What the program in a .mlpackage, read back from disk, computes in which format."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.fx import Node

from calibrate import qdq
from calibrate.graph import kind, layer_name

from . import Fallback, Job, Placement
from ._coreml_stored import Stored, stored
from .mil import activation, conv, elementwise, linear, norm, pool, recurrent, reduction, resize
from .mil.reader import read_function

INT8_KERNELS = frozenset({"conv", "linear", "matmul", "add", "avg_pool", "max_pool"})
"""Operators Core ML can run on int8 activations; all but matmul are the ones coremltools itself quantizes."""

_OUTPUT_TOO = frozenset({"add", "avg_pool", "max_pool"})
"""Those that multiply no weights: only between dequantize and quantize are they integer work at all."""

_CONVERSIONS = ("quantize", "dequantize")
_FAMILIES = (activation, conv, elementwise, linear, norm, pool, recurrent, reduction, resize)
_NO_COMPUTE = frozenset({"cast", "identity", "select"})
_COMPUTE = frozenset(name for family in _FAMILIES for name in family.OPS) - _NO_COMPUTE
_FORMATS = {"fp16": "float16", "fp32": "float32"}
MULTIPLYING = frozenset({"conv", "conv_transpose", "linear", "matmul"})
_FUSED = frozenset({"relu", "relu6"})
_RENAMED = "_cast_fp16"  # coremltools' float16 pass appends it to every operator it retypes


def placement(path: Path, job: Job) -> Placement:
    """Count the program's operators and name every layer that `job` quantizes but the program computes in float, or
    whose weights it stores as plain float numbers. Weights that only a later system than the profile's deployment
    target can read are counted with that system's name: "float16 linear (int4 weights, iOS18)".

    Integer and boolean work (masks, positions) computes nothing a format could speed up and is not counted; a relu
    between an int8 kernel and `quantize` is part of that kernel, since clamping codes is all there is to it.
    """
    operations = [op for op in read_function(path).operations if op.op_type != "const"]
    computing = [op for op in operations if op.op_type in _COMPUTE and _format(op) is not None and not _is_fused(op)]
    reasons = {id(op): _why_float(op) for op in computing}
    profile = job.rules.deployment_target or "iOS17"
    kinds = Counter(_kind(op, reasons[id(op)] is None, profile) for op in computing)
    int8 = sum(1 for op in computing if reasons[id(op)] is None)
    found = {name: op for op in computing for name in _names(op)}
    everything = {name: op for op in operations for name in _names(op)}
    return Placement(
        int8_ops=int8,
        float_ops=len(computing) - int8,
        conversions=sum(1 for op in operations if op.op_type in _CONVERSIONS),
        fallbacks=(*_fallbacks(job, found, reasons), *_unpacked(job, everything)),
        kinds=dict(sorted(kinds.items())),
    )


def _names(op: Any) -> Iterator[str]:
    """What an operator is called in the file, and what it was called before the float16 pass."""
    for name in (op.name, *(var.name for var in op.outputs)):
        yield name
        yield name.removesuffix(_RENAMED)


def _is_fused(op: Any) -> bool:
    """Whether this is a relu that takes an int8 kernel's only result to `quantize`."""
    if op.op_type not in _FUSED or op.inputs["x"].op is None:
        return False
    maker = op.inputs["x"].op
    alone = len(maker.outputs[0].child_ops) == 1 and {user.op_type for user in op.outputs[0].child_ops} == {"quantize"}
    return alone and maker.op_type in INT8_KERNELS and _why_float(maker) is None


def _format(op: Any) -> str | None:
    from coremltools.converters.mil.mil import types

    return _FORMATS.get(types.builtin_to_string(op.outputs[0].dtype))


def _kind(op: Any, int8: bool, profile: str) -> str:
    if int8:
        return f"int8 {op.op_type}"
    packed = {form.label(profile) for form in _packed(op, "weight", "y", "x")}
    return f"{_format(op)} {op.op_type}" + (f" ({', '.join(sorted(packed))})" if packed else "")


def _packed(op: Any, *keys: str) -> list[Stored]:
    """How those of these arguments are stored that a constexpr operator makes."""
    makers = [getattr(op.inputs.get(key), "op", None) for key in keys]
    forms = [stored(maker) for maker in makers if maker is not None]
    return [form for form in forms if form is not None]


def _why_float(op: Any) -> str | None:
    """Why an operator computes in float; None when it computes in int8."""
    if op.op_type not in INT8_KERNELS:
        return f"Core ML has no int8 '{op.op_type}'"
    keys = ("x", "y") if op.op_type in ("matmul", "add") else ("x",)
    for key in keys:
        maker = op.inputs[key].op
        made = "the model's input" if maker is None else f"'{maker.op_type}'"
        packed = op.op_type == "matmul" and key == "y" and any(form.int8 for form in _packed(op, "y"))
        if made != "'dequantize'" and not packed:
            return f"its operand {key} comes from {made}, not from 'dequantize'"
    if op.op_type in ("conv", "linear"):
        weight = next(iter(_packed(op, "weight")), None)
        if weight is None or not weight.int8:
            return f"its weights are {weight.name if weight else 'float numbers'}, and the int8 kernels read int8 codes"
    if op.op_type in _OUTPUT_TOO:
        users = _users(op)
        if users != {"quantize"}:
            return f"its result is used as float by {', '.join(sorted(users - {'quantize'})) or 'an output'}"
    return None


def _users(op: Any) -> set[str]:
    """The types of the operators that read a result, seen through a relu that is its only reader."""
    readers = op.outputs[0].child_ops
    if len(readers) == 1 and readers[0].op_type in _FUSED:
        readers = readers[0].outputs[0].child_ops
    return {reader.op_type for reader in readers}


def _fallbacks(job: Job, found: dict[str, Any], reasons: dict[int, str | None]) -> Iterator[Fallback]:
    """The layers that the graph quantizes on both sides of their kernel, and that did not come out in int8."""
    for node in job.graph.graph.nodes:
        if not _is_quantized(node, job):
            continue
        op = next((found[name] for name in _aliases(node, job) if name in found), None)
        if op is None:
            yield Fallback(layer_name(node), "no operator of this name is left in the Core ML program")
        elif (reason := reasons[id(op)]) is not None:
            yield Fallback(layer_name(node), f"runs as {_format(op)} {op.op_type}: {reason}")


def _unpacked(job: Job, everything: dict[str, Any]) -> Iterator[Fallback]:
    """The layers whose weights the graph stores in few bits and the file as plain numbers."""
    for node in job.graph.graph.nodes:
        if node.target not in qdq.EXPANDING or any(source.op != "get_attr" for source in node.all_input_nodes):
            continue
        ops = [everything[name] for name in (node.name, f"{node.name}_0") if name in everything]
        # One operator serves layers whose weights are the same: then it is found behind the layer.
        readers = [everything[name] for user in node.users for name in _aliases(user, job) if name in everything]
        if any(stored(op) for op in ops) or any(_packed(op, "weight", "x", "y") for op in readers):
            continue
        reader = next(iter(node.users), node)
        yield Fallback(layer_name(reader), "its weights are plain float numbers in the file, not codes or a palette")


def _is_quantized(node: Node, job: Job) -> bool:
    """Whether the graph wants this layer in int8: of a kind its rules quantize, codes dequantized in and quantized out.

    A mean or layer_norm that merely stands between two quantized layers is not one that was quantized. Layers that
    multiply by quantized weights are quantized whatever becomes of their result.
    """
    if kind(node) not in job.rules.quantize_inputs:
        return False
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    activations = [source for source in sources if source.target not in qdq.EXPANDING]
    if not activations or any(source.target is not qdq.DEQUANTIZE for source in activations):
        return False
    return kind(node) in MULTIPLYING or {user.target for user in _beyond_relu(node)} == {qdq.QUANTIZE}


def _beyond_relu(node: Node) -> list[Node]:
    users = list(node.users)
    return list(users[0].users) if len(users) == 1 and kind(users[0]) == "relu" else users


def _aliases(node: Node, job: Job) -> Iterator[str]:
    """The names an operator of this node may bear: its own, or that of the output it is.

    coremltools numbers a name that is an operator's type: 'linear' becomes 'linear_0'.
    """
    yield node.name
    yield f"{node.name}_0"
    results = job.graph.graph.output_node().args[0]
    for result, name in zip(results if isinstance(results, list | tuple) else (results,), job.outputs, strict=True):
        if result is node:
            yield name
