"""Reading and editing the captured graph: what a node computes, its constants, how to run it."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# What a node computes, in the words that plans, profiles and reports use; keyed by the ATen operator's name.
KINDS: dict[str, str] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv_transpose"),
    **dict.fromkeys(("linear", "addmm"), "linear"),
    **dict.fromkeys(("matmul", "mm", "bmm", "baddbmm"), "matmul"),
    "scaled_dot_product_attention": "attention",
    "embedding": "embedding",
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("sub", "rsub"), "sub"),
    **dict.fromkeys(("mul", "mul_"), "mul"),
    "div": "div",
    "neg": "neg",
    "pow": "pow",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "exp": "exp",
    "log": "log",
    "erf": "erf",
    "abs": "abs",
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh", "hardtanh_", "relu6"), "clamp"),
    "leaky_relu": "leaky_relu",
    "prelu": "prelu",
    "elu": "elu",
    "gelu": "gelu",
    **dict.fromkeys(("silu", "silu_"), "silu"),
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    **dict.fromkeys(("hardswish", "hardswish_"), "hardswish"),
    "hardsigmoid": "hardsigmoid",
    "mish": "mish",
    "softplus": "softplus",
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("log_softmax", "_log_softmax"), "log_softmax"),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), "layer_norm"),
    "rms_norm": "rms_norm",
    **dict.fromkeys(("group_norm", "native_group_norm"), "group_norm"),
    "instance_norm": "instance_norm",
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), "batch_norm"),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d"),
        "max_pool",
    ),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), "avg_pool"
    ),
    "mean": "mean",
    "sum": "sum",
    **dict.fromkeys(("amax", "max", "amin", "min"), "amax"),
    **dict.fromkeys(("argmax", "argmin"), "argmax"),
    **dict.fromkeys(("cat", "concat"), "cat"),
    "stack": "stack",
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), "pad"),
    **dict.fromkeys(("reshape", "view", "flatten", "squeeze", "unsqueeze", "unflatten", "_unsafe_view"), "reshape"),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "swapaxes"), "transpose"),
    **dict.fromkeys(("slice", "narrow"), "slice"),
    "select": "select",
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), "split"),
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile", "repeat_interleave"), "expand"),
    **dict.fromkeys(("index", "index_select", "gather"), "gather"),
    **dict.fromkeys(("scatter", "index_put", "scatter_add", "scatter_reduce", "slice_scatter"), "scatter"),
    **dict.fromkeys(("where", "masked_fill"), "where"),
    **dict.fromkeys(
        ("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_not"),
        "compare",
    ),
    "topk": "topk",
    **dict.fromkeys(("sort", "argsort"), "sort"),
    "one_hot": "one_hot",
    "cumsum": "cumsum",
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "interpolate"), "upsample"),
    "pixel_shuffle": "pixel_shuffle",
    **dict.fromkeys(("to", "_to_copy", "type_as"), "cast"),
    **dict.fromkeys(("lstm", "gru"), "lstm"),
    "einsum": "einsum",
    "linalg_vector_norm": "sum",
    **dict.fromkeys(
        ("arange", "full", "ones", "zeros", "new_ones", "new_zeros", "full_like", "zeros_like"), "constant"
    ),
    "dynamic_linear": "linear",
    "dynamic_conv2d": "conv",
}

# A mark in `meta`: which cut this operator belongs to, of those that decide which tokens stay, or take them;
# or the head that makes bits of an embedding, which decides by comparison likewise.
CHOOSES_TOKENS = "chooses_tokens"

# Kinds that hold trained weights as their second argument; (input, weight, bias).
WEIGHTED = ("conv", "linear")
# Kinds that only move values about: they cost no arithmetic and change no number.
MOVEMENT = frozenset(
    (
        "cat",
        "stack",
        "pad",
        "reshape",
        "transpose",
        "slice",
        "select",
        "split",
        "expand",
        "gather",
        "cast",
        "constant",
    )
)


def operator_name(node: Node) -> str:
    """The ATen operator's bare name: "conv2d" of aten.conv2d.default; "" for anything that is no operator."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet is None:
        return ""
    return str(packet.__name__)


def kind(node: Node) -> str:
    """What a node computes, in the vocabulary of plans and profiles; "input", "weight", "output" for the others."""
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "weight", "output": "output"}.get(node.op, "other")
    if getattr(node.target, "__name__", "") == "getitem":
        return "getitem"
    if getattr(node.target, "__module__", "") == "_operator":
        return "shape"  # arithmetic on sizes
    name = operator_name(node)
    if name.startswith(("quantize_per", "dequantize_per", "quantize_float8", "dequantize_float8", "lookup")):
        return "qdq"
    if name in ("sym_size", "sym_constrain_range_for_size"):
        return "shape"
    if name.startswith("adaptive_avg_pool") and _pools_all(node):
        return "mean"  # what runtimes have a kernel for
    return KINDS.get(name, KINDS.get(name.rstrip("_"), "other"))


def _pools_all(node: Node) -> bool:
    size = node.args[1]
    return all(n == 1 for n in (size if isinstance(size, list | tuple) else [size]))


def layer_name(node: Node) -> str:
    """The name people know a node by: its module path where capture kept one, else the node's own name."""
    return str(node.meta.get("layer", node.name))


def kept_float(node: Node, kept: Mapping[str, str]) -> str | None:
    """Why this layer stays float: the reason the plan has for its name, or one a step left in `meta["keep_float"]`."""
    return kept.get(layer_name(node)) or node.meta.get("keep_float")


def chooses_tokens(node: Node) -> bool:
    """Whether the node belongs to a token cut: scores and ranks in codes would tie, and other tokens stay."""
    return CHOOSES_TOKENS in node.meta


def constant(graph: GraphModule, node: Node) -> Tensor:
    """The tensor behind a get_attr node."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def is_constant(node: object) -> bool:
    """True for a get_attr node: a tensor known before anything runs."""
    return isinstance(node, Node) and node.op == "get_attr"


def add_constant(graph: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Store `value` as a buffer under a fresh name like `name`, and return a get_attr node placed before `before`."""
    stem = name.replace(".", "_")
    unique, count = stem, 0
    while hasattr(graph, unique):
        count += 1
        unique = f"{stem}_{count}"
    graph.register_buffer(unique, value.detach().contiguous())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(unique)
    node.meta["val"] = value.detach()
    return node


def constant_made(nodes: Iterable[Node]) -> set[Node]:
    """Nodes computed from constants and sizes alone: an expanded class token, a mask."""
    made: set[Node] = set()
    for node in nodes:
        if node.op != "call_function" or kind(node) == "shape":
            continue
        if all(is_constant(a) or a in made or kind(a) == "shape" for a in node.all_input_nodes):
            made.add(node)
    return made


def weight_nodes(node: Node) -> tuple[Node | None, Node | None]:
    """The (weight, bias) constants of a conv or linear; None where there is none or it is computed."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return (
        weight if isinstance(weight, Node) and is_constant(weight) else None,
        bias if isinstance(bias, Node) and is_constant(bias) else None,
    )


def is_weighted(node: Node) -> bool:
    """True for a conv or linear whose weight is a float constant."""
    return node.op == "call_function" and kind(node) in WEIGHTED and weight_nodes(node)[0] is not None


def is_table(node: Node, fixed: set[Node]) -> bool:
    """True for an embedding that looks up rows of a constant table by computed indices (`fixed`: see constant_made)."""
    if kind(node) != "embedding" or not is_constant(node.args[0]):
        return False
    return node not in fixed


def finish(graph: GraphModule) -> GraphModule:
    """Drop dead nodes and unused constants, check the graph and recompile it."""
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in list(graph.named_buffers()) + list(graph.named_parameters())]:
        if name not in used:
            _delete(graph, name)
    graph.recompile()
    return graph


def _delete(graph: GraphModule, name: str) -> None:
    *path, last = name.split(".")
    owner: Any = graph
    for part in path:
        owner = getattr(owner, part)
    delattr(owner, last)


def clone(graph: GraphModule) -> GraphModule:
    """A graph of its own that shares the constants' memory with `graph` until a step replaces them."""
    memo: dict[int, Any] = {}
    for tensor in [*graph.parameters(), *graph.buffers()]:
        memo[id(tensor)] = tensor
    return copy.deepcopy(graph, memo)


def run(graph: GraphModule, inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Run the graph as it stands, without gradients; outputs always as a tuple."""
    with torch.no_grad():
        result = graph(*inputs)
    return tuple(result) if isinstance(result, tuple | list) else (result,)
