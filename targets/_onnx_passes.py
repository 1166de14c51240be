"""What is true of every ONNX model before it is written; each function is named for it."""

import onnx_ir as ir
from onnxscript.optimizer import optimize_ir

from ._onnx_export import LAYER_KEY, quiet
from ._onnx_graph import constant

WORK = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "MultiHeadAttention"))
NO_LIMIT = 1 << 40


def constants_are_folded(model: ir.Model) -> None:
    """Fold what is constant, drop what is unused or does nothing. Half-precision weights keep their Cast."""

    def should_fold(node: ir.Node) -> bool | None:
        value = node.inputs[0] if node.op_type == "Cast" else None
        if value is not None and value.dtype == ir.DataType.FLOAT16 and constant(value) is not None:
            return False
        return None

    with quiet():
        optimize_ir(model, should_fold=should_fold, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)


def nodes_bear_layer_names(model: ir.Model) -> None:
    """Name the nodes `<layer>` where they do the layer's work, else `<layer>/<operator>`; `#2` and on for repeats."""
    taken: dict[str, int] = {}
    for node in model.graph:
        layer = node.metadata_props.get(LAYER_KEY, node.op_type)
        base = layer if node.op_type in WORK else f"{layer}/{node.op_type}"
        taken[base] = taken.get(base, 0) + 1
        node.name = base if taken[base] == 1 else f"{base}#{taken[base]}"


def constants_are_read(model: ir.Model) -> None:
    """Drop the initializers that nothing reads."""
    kept = set(model.graph.outputs)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and value not in kept:
            del model.graph.initializers[name]


def domains_are_named(model: ir.Model) -> None:
    """The model imports the operator sets that its nodes are of, and no other."""
    used = {node.domain for node in model.graph if node.domain not in ("", "ai.onnx")}
    for domain in [d for d in model.opset_imports if d and d not in used]:
        del model.opset_imports[domain]
    for domain in sorted(used):
        model.opset_imports.setdefault(domain, 1)


def nothing_machine_specific_is_kept(model: ir.Model) -> None:
    """Drop metadata, doc strings and the types of inner values: the same job gives the same bytes on every machine."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "tightfit", None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "main_graph"
    outputs = set(model.graph.outputs)
    inner = [value for node in model.graph for value in node.outputs]
    for value in [*model.graph.inputs, *model.graph.initializers.values(), *inner]:
        value.metadata_props.clear()
        value.doc_string = None
    for value in inner:
        if value not in outputs:
            value.shape, value.type = None, None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
