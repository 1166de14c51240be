"""How many bytes bits and scales alone take: codes, one number per row and plane, and what stays wide.

And what a file itself says it stores its layers' weights as.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import constant, is_constant
from calibrate.levels import alphabet

FORMS = ("INT2", "INT4", "INT8", "FLOAT32")


def predicted(graph: GraphModule, half: bool = False) -> float:
    """Bytes of a file that holds nothing but numbers; `half`: scales and float constants take two bytes, not four.

    A weight whose rows use two of their codes counts one bit each and one scale per row; four codes, two bits and two
    scales, but ternary one; any other weight the bits its codes are given and the scales it has. Constants that are
    equal count once: files share them.
    """
    counted: set[str] = set()
    seen: set[tuple[str, bytes]] = set()
    total = 0.0
    for codes, scales, zeros, bits in _weights(graph):
        if str(codes.target) in counted:
            continue
        counted |= {str(n.target) for n in (codes, scales, zeros) if n is not None}
        numbers = constant(graph, codes)
        each, planes = _levels(numbers, bits)
        total += numbers.numel() * each / 8 + constant(graph, scales).numel() * planes * (2 if half else 4)
    for node in graph.graph.nodes:
        if is_constant(node) and node.users and str(node.target) not in counted:
            counted.add(str(node.target))
            value = constant(graph, node)
            if isinstance(value, Tensor) and _is_new(value, seen):
                size = 2 if half and value.is_floating_point() else value.element_size()
                total += value.numel() * size
    return total


def _is_new(value: Tensor, seen: set[tuple[str, bytes]]) -> bool:
    """Whether no equal constant was counted; notes this one."""
    key = (f"{value.dtype} {tuple(value.shape)}", value.contiguous().numpy().tobytes())
    fresh = key not in seen
    seen.add(key)
    return fresh


def _weights(graph: GraphModule) -> Iterator[tuple[Node, Node, Node | None, int]]:
    """(codes, scales, zero points, bits of a code) of every node that reads weight codes."""
    for node in graph.graph.nodes:
        bits = qdq.code_bits(node)
        if bits is None:
            continue
        first = 1 if node.target in qdq.DYNAMIC else 0
        codes, scales = node.args[first : first + 2]
        zeros = None if node.target in qdq.DYNAMIC else node.args[2]
        if is_constant(codes) and is_constant(scales):
            yield codes, scales, zeros if is_constant(zeros) else None, bits


def _levels(codes: Tensor, bits: int) -> tuple[int, int]:
    """(bits of a weight, scales of a row): signs (1, 1), ternary (2, 1), two planes (2, 2), others (`bits`, 1)."""
    ternary = int(codes.min()) >= -1 and int(codes.max()) <= 1 and bool((codes == 0).any())
    own = None if ternary else alphabet(codes)
    if ternary:
        return 2, 1
    if own is None:
        return bits, 1
    return (1, 1) if own.shape[1] == 2 else (2, 2)


def stored(path: Path, target: str) -> str:
    """How many weights a file holds in which form, as read from the file: such as "24 INT2, 2 INT8"."""
    found = {"onnx": _onnx_forms, "tflite": _tflite_forms, "coreml": _coreml_forms}[target](path)
    return ", ".join(f"{count} {form}" for form, count in sorted(found.items()))


def _onnx_forms(path: Path) -> Counter[str]:
    """Tables of bytes that stand for codes, packed operators, and constants of two dimensions and more by type."""
    import onnx

    graph = onnx.load(path).graph
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0].startswith("bytes_as_"):
            found[f"looked up as {node.input[0].removeprefix('bytes_as_')}"] += 1
        if node.op_type == "MatMulNBits":
            found[f"MatMulNBits {next(a.i for a in node.attribute if a.name == 'bits')} bits"] += 1
    read = {i for n in graph.node if n.op_type != "MatMulNBits" for i in n.input}
    for value in graph.initializer:
        if len(value.dims) >= 2 and value.name in read and min(value.dims[:2]) > 1 and "bytes_as" not in value.name:
            found[onnx.TensorProto.DataType.Name(value.data_type)] += "_levels" not in value.name
    return +found


def _tflite_forms(path: Path) -> Counter[str]:
    from targets._tflite_file import TFLiteFile, schema

    file = TFLiteFile.read(path)
    types = {number: name for name, number in vars(schema().TensorType).items() if isinstance(number, int)}
    read = {i for op in file.graph.operators for i in op.inputs}
    return Counter(
        types[t.type]
        for i, t in enumerate(file.graph.tensors)
        if i in read
        and types[t.type] in FORMS
        and len(t.shape) >= 2
        and t.shape[0] > 1
        and _is_held(file.model.buffers[t.buffer])
    )


def _is_held(buffer: Any) -> bool:
    """Whether a TFLite buffer has bytes, in the flatbuffer or behind it."""
    return buffer.data is not None or buffer.offset > 1


def _coreml_forms(path: Path) -> Counter[str]:
    """Operators that expand stored weights, by the type of what they read."""
    import coremltools

    function = coremltools.models.utils.load_spec(str(path)).mlProgram.functions["main"]
    types = coremltools.proto.MIL_pb2.DataType
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    for op in function.block_specializations[function.opset].operations:
        if op.outputs and op.outputs[0].type.HasField("tensorType"):
            names[op.outputs[0].name] = types.Name(op.outputs[0].type.tensorType.dataType)
        key = {"constexpr_lut_to_dense": "indices", "constexpr_blockwise_shift_scale": "data"}.get(op.type)
        if op.type == "constexpr_affine_dequantize":
            found["INT8"] += 1
        if key is not None:
            argument = op.inputs[key].arguments[0]
            given = argument.value.type.tensorType.dataType
            found[names[argument.name] if argument.name else types.Name(given)] += 1
    return found
