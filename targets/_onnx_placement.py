"""What an ONNX file will compute in which format: read back after ONNX Runtime's own optimisation."""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import torch

from calibrate import qdq
from calibrate.graph import is_constant, kind, layer_name

from . import Fallback, Job, Placement
from ._onnx_session import load, session_options

CONVERSIONS = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"))
INTEGER = frozenset(("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger"))
ON_CODES = frozenset(("MaxPool", "Clip", "Max", "Min"))
"""Operators that compute on codes where they get codes, and on floats otherwise."""
MOVEMENT = frozenset(
    [
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "ReorderInput",
        "ReorderOutput",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
LOGIC = frozenset(
    "And Constant ConstantOfShape Equal Greater GreaterOrEqual Less LessOrEqual Not Or Range Shape Size".split()  # noqa: SIM905
)
"""Shapes, masks and indices: no arithmetic on the model's values."""
MOVES = MOVEMENT | LOGIC
DEQUANTIZING = (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE_GROUP, qdq.DEQUANTIZE_FLOAT8)
EDGE_KINDS = frozenset(("add", "sub", "mul", "mean", "avg_pool", "cat", "sigmoid", "softmax", "leaky_relu"))
"""Kinds whose integer kernel reads and writes codes."""


def placement(path: Path, job: Job) -> Placement:
    """Count the operators of the file at `path`, and name each quantized layer of `job` that came out float."""
    if job.rules.runtime == "tensorrt":
        from ._onnx_tensorrt import predicted_placement

        return predicted_placement(path, quantized_layers(job.graph))
    found = counted(optimised(path), quantized_layers(job.graph), floats_by_format(job.graph))
    return replace(found, kinds=dict(sorted((found.kinds | stored(path)).items())))


def stored(path: Path) -> dict[str, int]:
    """{"weights int4": how many tensors of weight codes the file holds in so few bits, ...}; 8 bits are not counted.

    "weights float16": constants of half precision that are cast for float32 arithmetic when the file is loaded.
    """
    model = onnx.load(path, load_external_data=False)
    names = {onnx.TensorProto.INT4: "int4", onnx.TensorProto.INT2: "int2"}
    kinds = Counter(f"weights {names[t.data_type]}" for t in model.graph.initializer if t.data_type in names)
    kinds["weights int4"] += sum(n.op_type == "MatMulNBits" for n in model.graph.node)
    halves = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    kinds["weights float16"] += sum(n.op_type == "Cast" and n.input[0] in halves for n in model.graph.node)
    return {name: count for name, count in kinds.items() if count}


def floats_by_format(graph: torch.fx.GraphModule) -> dict[str, str]:
    """{layer: why its format has no integer kernel, so that it runs in float on what the codes stand for}."""
    reasons = {}
    for node in graph.graph.nodes:
        operands = list(_operands(node)) if node.op == "call_function" else []
        if any(a.target is qdq.DEQUANTIZE and torch.int16 in a.args for a in operands):
            reasons[layer_name(node)] = "it has no integer kernels for 16-bit activations"
        elif any(a.target is qdq.DEQUANTIZE_GROUP for a in operands):
            reasons[layer_name(node)] = "it has no integer kernel for weights with one scale per group"
    return reasons


def optimised(path: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it: optimised to the level that is the same on every processor, read back."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        written = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(written)
        load(path, options)
        return onnx.load(written, load_external_data=False)


def counted(model: onnx.ModelProto, layers: Counter[str], known: Mapping[str, str] | None = None) -> Placement:
    """`layers` says how many integer operators each layer's name must answer for; `known` why one can't."""
    codes: set[str] = set()
    kinds: Counter[str] = Counter()
    found: Counter[str] = Counter()
    floats: dict[str, str] = {}
    for node in model.graph.node:
        form = _format(node, codes)
        kinds[f"{form} {node.op_type}"] += 1
        layer = layer_of(node.name, layers)
        if form == "int8":
            found[layer] += 1
        elif form == "float" and layer:
            floats[layer] = node.op_type
    by_format: Counter[str] = Counter()
    for name, count in kinds.items():
        by_format[name.split()[0]] += count
    fallbacks = tuple(
        Fallback(name, _reason(floats.get(name), (known or {}).get(name)))
        for name in sorted(layers)
        if found[name] < layers[name]
    )
    return Placement(
        by_format["int8"], by_format["float"], by_format["convert"], fallbacks, dict(sorted(kinds.items()))
    )


def _format(node: onnx.NodeProto, codes: set[str]) -> str:
    """ "int8", "float", "convert" or "move"; adds the node's outputs to `codes` where they are codes."""
    reads_codes = bool(node.input) and node.input[0] in codes
    if node.op_type in CONVERSIONS:
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            codes.add(node.output[0])
        return "convert"
    if node.op_type in MOVES:
        if reads_codes:
            codes.update(node.output)
        return "move"
    if node.op_type.startswith("QLinear") or node.op_type in INTEGER:
        if node.op_type.startswith("QLinear") or (node.op_type == "QGemm" and len(node.input) > 7):
            codes.add(node.output[0])
        return "int8"
    if node.op_type in ON_CODES and reads_codes:
        codes.add(node.output[0])
        return "int8"
    return "float"


def layer_of(name: str, layers: Counter[str]) -> str:
    """The layer a node's name belongs to ("conv", "conv/Add", "conv#2"); "" for none of `layers`."""
    stem = re.sub(r"(_token_\d+)+$", "", name)  # what ONNX Runtime appends where it fuses
    while stem:
        if stem in layers:
            return stem
        cut = max(stem.rfind("/"), stem.rfind("#"))
        stem = stem[:cut] if cut >= 0 else ""
    return ""


def _reason(op_type: str | None, known: str | None) -> str:
    version = onnxruntime.__version__
    if known is not None:
        return f"ONNX Runtime {version} runs it in float: {known}"
    if op_type is None:
        return f"ONNX Runtime {version} fused it into another operator that computes in float"
    return (
        f"ONNX Runtime {version} runs it as {op_type} in float: no integer kernel matched "
        "(its output must be quantized too, over a range that the following relu or clamp does not cut)"
    )


def quantized_layers(graph: torch.fx.GraphModule) -> Counter[str]:
    """{layer: how many of its operators the graph means to run in integers}."""
    layers: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_function" and _is_quantized(node):
            layers[layer_name(node)] += 1
    return layers


def _is_quantized(node: torch.fx.Node) -> bool:
    if node.target in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D):
        return True
    what = kind(node)
    operands = list(_operands(node))
    if not operands or not all(a.target in DEQUANTIZING for a in operands):
        return False
    if what in ("conv", "linear", "matmul"):
        return len(operands) == 2
    return what in EDGE_KINDS and any(user.target is qdq.QUANTIZE for user in _after_clamp(node).users)


def _operands(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The tensors that the operator multiplies, adds or pools: not biases, not shapes."""
    if kind(node) == "cat":
        yield from node.args[0]
        return
    limit = 2 if kind(node) in ("conv", "linear", "matmul", "add", "sub", "mul") else 1
    for operand in node.args[:limit]:
        if isinstance(operand, torch.fx.Node) and not (is_constant(operand) and kind(node) == "cat"):
            yield operand


def _after_clamp(node: torch.fx.Node) -> torch.fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and kind(users[0]) in ("relu", "clamp") else node
