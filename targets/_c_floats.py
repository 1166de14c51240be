"""What stays float: plain loops, within rounding of what torch computes."""

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import bounds

from ._c_codes import Geometry, broadcast, columns, finished, geometry, is_depthwise, laid_input, reduced, spread
from ._c_lower import Handler, Lowering, merged
from ._c_moves import cat, cut, expand, getitem, pad, reshape, same, split, transpose, upsample
from ._c_pack import codes_weight, float_weight
from ._c_program import CHUNK, TILE, Struct, Tensor
from .errors import TargetError

UNARY = {
    "relu": "TF_RELU",
    "sigmoid": "TF_SIGMOID",
    "tanh": "TF_TANH",
    "silu": "TF_SILU",
    "hardswish": "TF_HARDSWISH",
    "hardsigmoid": "TF_HARDSIGMOID",
    "exp": "TF_EXP",
    "sqrt": "TF_SQRT",
    "rsqrt": "TF_RSQRT",
    "neg": "TF_NEG",
    "abs": "TF_ABS",
    "erf": "TF_ERF",
    "log": "TF_LOG",
}
BINARY = {"add": "TF_ADD", "sub": "TF_SUB", "mul": "TF_MUL", "div": "TF_DIV"}


def _source(node: Node, index: int = 0) -> Node:
    source = node.args[index]
    assert isinstance(source, Node)
    return source


def _elementwise(state: Lowering, node: Node, word: str, x: Tensor, first: float = 0.0, second: float = 0.0) -> Tensor:
    _float(x, node)
    made = state.program.tensor(x.shape, "float", x.images)
    arguments = (word, x.count, np.float32(first), np.float32(second), x, made)
    state.program.call("tf_unary_f32", *arguments, layer=graphs.layer_name(node))
    return made


def _float(x: Tensor, node: Node) -> Tensor:
    if x.ctype != "float":
        raise TargetError(
            f"'{graphs.layer_name(node)}' computes on {x.ctype}, the target 'c' on floats: cast it before"
        )
    return x


def unary(state: Lowering, node: Node) -> Tensor:
    """Functions of one value."""
    return _elementwise(state, node, UNARY[graphs.kind(node)], state.tensor(_source(node)))


def clamp(state: Lowering, node: Node) -> Tensor:
    """clamp and its kin, relu6 among them."""
    low, high = bounds(node)
    limits = (-math.inf if low is None else low, math.inf if high is None else high)
    return _elementwise(state, node, "TF_CLAMP", state.tensor(_source(node)), *limits)


def gelu(state: Lowering, node: Node) -> Tensor:
    """gelu, exact or by tanh."""
    word = "TF_GELU_TANH" if state.argument(node, 1, "approximate", "none") == "tanh" else "TF_GELU"
    return _elementwise(state, node, word, state.tensor(_source(node)))


def leaky_relu(state: Lowering, node: Node) -> Tensor:
    """leaky_relu with its slope."""
    slope = state.argument(node, 1, "negative_slope", 0.01)
    return _elementwise(state, node, "TF_LEAKY_RELU", state.tensor(_source(node)), slope)


def power(state: Lowering, node: Node) -> Tensor:
    """Squares; other powers are refused."""
    if state.argument(node, 1, "exponent") != 2:
        raise TargetError(
            f"'{graphs.layer_name(node)}' is a power other than 2, for which the target 'c' has no kernel"
        )
    x = state.tensor(_source(node))
    return _combined(state, node, "TF_MUL", x, x)


def binary(state: Lowering, node: Node) -> Tensor:
    """add, sub, mul and div of two tensors, broadcast, or of a tensor and a number."""
    name, layer = graphs.operator_name(node), graphs.layer_name(node)
    left, right = (state.number(a) for a in node.args[:2])
    if name == "rsub":
        left, right = right, left
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None or len(node.args) > 2:
        raise TargetError(f"'{layer}' is an add or division with options, for which the target 'c' has no kernel")
    word = BINARY[graphs.kind(node)]
    if isinstance(left, Node) and isinstance(right, int | float) and word != "TF_DIV":
        value = -right if word == "TF_SUB" else right
        scales = word == "TF_MUL"
        return _elementwise(state, node, "TF_SCALE" if scales else "TF_OFFSET", state.tensor(left), float(value))
    tensors = [state.tensor(v) if isinstance(v, Node) else _number(state, v) for v in (left, right)]
    return _combined(state, node, word, *tensors)


def batch_norm(state: Lowering, node: Node) -> Tensor:
    """A norm that no layer could take: a product and a sum per channel. Statistics of the batch are refused."""
    name = graphs.operator_name(node)
    values = [graphs.constant(state.graph, a).double() if isinstance(a, Node) else None for a in node.args[1:5]]
    weight, bias, mean, variance = values
    if name != "batch_norm" or mean is None or variance is None or state.argument(node, 5, "training", False):
        raise TargetError(f"'{_name(node)}' normalises with the statistics of the batch: call eval() on the model")
    factor = 1 / torch.sqrt(variance + state.argument(node, 7, "eps", 1e-5))
    factor = factor if weight is None else factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (len(state.shape(node)) - 2))
    x = state.tensor(_source(node))
    for word, value in (("TF_MUL", factor), ("TF_ADD", offset)):
        array = value.float().view(shape).numpy()
        x = _combined(
            state, node, word, x, Tensor(array.shape, "float", state.program.constant("norm", "float", array))
        )
    return x


def _number(state: Lowering, value: Any) -> Tensor:
    return Tensor((1,), "float", state.program.constant("value", "float", np.array([value], np.float32)))


def _combined(state: Lowering, node: Node, word: str, a: Tensor, b: Tensor) -> Tensor:
    shape = state.shape(node)
    images = any(t.images and t.shape == shape for t in (_float(a, node), _float(b, node)))
    made = state.program.tensor(shape, "float", images)
    order = (0, 2, 3, 1) if images else tuple(range(len(shape)))
    steps = [[broadcast(t, shape)[axis] for axis in order] for t in (a, b)]
    axes, left, right = merged(tuple(shape[o] for o in order), tuple(steps[0]), tuple(steps[1]))
    if len(axes) > 6:
        raise TargetError(f"'{graphs.layer_name(node)}' combines tensors along {len(axes)} axes, more than 6")
    walk = state.walk(axes, left, right)
    state.program.call("tf_binary_f32", word, walk, a, b, made, layer=graphs.layer_name(node))
    return made


def layer_weight(state: Lowering, node: Node, index: int = 1) -> tuple[Struct, tuple[int, ...]]:
    """The weight of a float layer or table as a `tf_weight`, and its shape. Raises TargetError for computed weights,
    palettes and 8-bit floats."""
    source, layer = _source(node, index), graphs.layer_name(node)
    if graphs.is_constant(source):
        values = graphs.constant(state.graph, source)
        return float_weight(state.program, layer, columns(values.float().numpy())), tuple(values.shape)
    inner = source.args[0] if source.args else None
    if graphs.kind(source) == "cast" and graphs.is_constant(inner):
        assert isinstance(inner, Node)
        values = graphs.constant(state.graph, inner)
        if values.dtype == torch.float16:
            return float_weight(state.program, layer, columns(values.numpy())), tuple(values.shape)
    bounds_ = qdq.code_range(source)
    if bounds_ is None or not graphs.is_constant(inner):
        what = "a palette or of 8-bit floats" if source.target in qdq.EXPANDING else "computed"
        raise TargetError(
            f"the weight of '{layer}' is {what}, for which the target 'c' has no kernel. Use --recipe int8, w4 or "
            "int8-weights, or choose --target onnx."
        )
    assert isinstance(inner, Node)
    codes = graphs.constant(state.graph, inner)
    scales = graphs.constant(state.graph, _source(source, 1)).float()
    more: dict[str, Any] = {}
    if scales.dim() == 2:
        more["group"] = codes.shape[1] // scales.shape[1]
        if graphs.kind(node) == "embedding":
            scales = scales.half().float()  # as the simulation has the scales of a table's groups
    stored = state.program.constant("scale", "float", scales.numpy(), "scale", layer)
    flat = columns(codes.numpy())
    return codes_weight(state.program, layer, flat, *bounds_, scale=stored, **more), tuple(codes.shape)


def layer(state: Lowering, node: Node) -> Tensor:
    """Convolution and linear layers in float, on weights of any stored form."""
    weight, shape = layer_weight(state, node)
    fields, like = geometry(state, node, shape)
    bias_node = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    bias = None
    if isinstance(bias_node, Node):
        if bias_node not in state.facts.constants:
            raise TargetError(f"the bias of '{graphs.layer_name(node)}' is computed; the target 'c' takes constants")
        bias = state.program.constant("bias", "float", state.facts.constants[bias_node].float().numpy())
    depthwise = is_depthwise(fields)
    conv = state.program.struct("tf_conv", **fields, zero=0, weight=weight, out=Struct("tf_output", {"bias": bias}))
    x = laid_input(state, _float(state.tensor(_source(node)), node), like.images)
    made = state.program.tensor(like.shape, "float", like.images)
    name = "tf_depthwise_f32" if depthwise else "tf_conv_f32"
    scratch = _scratch(fields, shape, depthwise)
    state.program.call(name, conv, x, made, "scratch", layer=graphs.layer_name(node), scratch=scratch)
    return finished(state, node, made)


def _scratch(fields: Geometry, shape: tuple[int, ...], depthwise: bool) -> int:
    depth = math.prod(shape[1:])
    return depth * fields["out_channels"] * 4 if depthwise else (CHUNK + TILE) * depth * 4


def embedding(state: Lowering, node: Node) -> Tensor:
    """Rows of a constant table by int64 indices."""
    weight, _ = layer_weight(state, node, 0)
    ids = state.plain(_source(node, 1))
    if ids.ctype != "int64_t":
        raise TargetError(f"'{graphs.layer_name(node)}' looks up {ids.ctype} indices; the target 'c' takes int64")
    made = state.program.tensor(state.shape(node), "float")
    state.program.call("tf_embedding_f32", weight_struct(state, weight), ids.count, ids, made, layer=_name(node))
    return made


def weight_struct(state: Lowering, weight: Struct) -> Struct:
    """A weight that stands alone: a structure with a name."""
    return state.program.struct(weight.ctype, **weight.fields)


def _name(node: Node) -> str:
    return graphs.layer_name(node)


def matmul(state: Lowering, node: Node) -> Tensor:
    """Products of two computed matrices, batched and broadcast."""
    if graphs.operator_name(node) not in ("matmul", "mm", "bmm"):
        raise TargetError(f"the target 'c' has no {graphs.operator_name(node)} (layer '{_name(node)}')")
    a, b = (state.plain(_source(node, i)) for i in (0, 1))
    return product(state, node, a, b, state.shape(node))


def product(state: Lowering, node: Node, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """a [..., rows, inner] times b [..., inner, columns] as [..., rows, columns]: `shape`."""
    if min(len(a.shape), len(b.shape)) < 2:
        raise TargetError(f"'{_name(node)}' is a product with a vector; write it as a linear layer or a matrix product")
    batch = shape[:-2]
    a, b = (spread(state, t, (*batch, *t.shape[-2:]), False, _name(node)) for t in (a, b))
    rows, inner, width = a.shape[-2], a.shape[-1], b.shape[-1]
    made = state.program.tensor(shape, "float")
    sizes = (math.prod(batch), rows * inner, inner * width, rows, inner, width)
    state.program.call("tf_matmul_f32", *sizes, a, b, made, layer=_name(node))
    return made


def attention(state: Lowering, node: Node) -> Tensor:
    """softmax(q k^T * scale + mask) v, step by step. Causal and grouped attention are refused."""
    if state.argument(node, 5, "is_causal", False) or node.kwargs.get("enable_gqa", False):
        raise TargetError(f"'{_name(node)}' is causal or grouped attention, for which the target 'c' has no kernel")
    q, k, v = (state.plain(_source(node, i)) for i in range(3))
    scale = state.argument(node, 6, "scale") or 1 / math.sqrt(q.shape[-1])
    swapped = (*k.strides[:-2], k.strides[-1], k.strides[-2])
    turned = state.program.tensor((*k.shape[:-2], k.shape[-1], k.shape[-2]), "float")
    state.copy(k, turned, _name(node), strides=swapped)
    shape = (*q.shape[:-1], k.shape[-2])
    scores = product(state, node, _elementwise(state, node, "TF_SCALE", q, scale), turned, shape)
    mask = state.argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        given = _float(state.tensor(mask), node)
        masked = state.program.tensor(shape, "float")
        axes, left, right = merged(shape, scores.strides, broadcast(given, shape))
        walk = state.walk(axes, left, right)
        state.program.call("tf_binary_f32", "TF_ADD", walk, scores, given, masked, layer=_name(node))
        scores = masked
    weights = _softmax(state, node, scores, -1)
    return product(state, node, weights, v, state.shape(node))


def softmax(state: Lowering, node: Node) -> Tensor:
    """softmax along one axis."""
    return _softmax(state, node, state.plain(_source(node)), state.argument(node, 1, "dim"))


def _softmax(state: Lowering, node: Node, x: Tensor, axis: int) -> Tensor:
    axis %= len(x.shape)
    made = state.program.tensor(x.shape, "float")
    sizes = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    state.program.call("tf_softmax_f32", *sizes, _float(x, node), made, layer=_name(node))
    return made


def layer_norm(state: Lowering, node: Node) -> Tensor:
    """layer_norm over the last axes."""
    if graphs.operator_name(node) != "layer_norm":
        raise TargetError(f"the target 'c' has no {graphs.operator_name(node)} (layer '{_name(node)}')")
    x = _float(state.plain(_source(node)), node)
    count = math.prod(state.argument(node, 1, "normalized_shape"))
    affine = [_parameter(state, state.argument(node, i, w)) for i, w in ((2, "weight"), (3, "bias"))]
    epsilon = np.float32(state.argument(node, 4, "eps", 1e-5))
    made = state.program.tensor(x.shape, "float")
    sizes = (x.count // count, count, epsilon)
    state.program.call("tf_layer_norm_f32", *sizes, *affine, x, made, layer=_name(node))
    return made


def _parameter(state: Lowering, node: Any) -> Any:
    return state.plain(node) if isinstance(node, Node) else "NULL"


def reduction(state: Lowering, node: Node) -> Tensor:
    """mean, sum and amax over neighbouring axes."""
    name = graphs.operator_name(node)
    words = {"mean": "TF_MEAN", "sum": "TF_SUM", "amax": "TF_MAX"}
    word = "TF_MEAN" if name.startswith("adaptive_avg") else words.get(name)
    if word is None:
        raise TargetError(f"the target 'c' has no {name} (layer '{_name(node)}')")
    outer, count, inner, x = reduced(state, node, _float(state.tensor(_source(node)), node))
    made = state.program.tensor(state.shape(node), "float")
    state.program.call("tf_reduce_f32", word, outer, count, inner, x, made, layer=_name(node))
    return made


def pooling(state: Lowering, node: Node) -> Tensor:
    """max_pool2d, on codes or floats, and avg_pool2d."""
    name, source = graphs.operator_name(node), state.tensor(_source(node))
    if name not in ("max_pool2d", "avg_pool2d") or any(u.target is not None and _takes(u) for u in node.users):
        raise TargetError(f"the target 'c' has no {name} of this form (layer '{_name(node)}')")
    x, shape = state.laid(source, True), state.shape(node)
    kernel = _pair(state.argument(node, 1, "kernel_size"))
    stride = _pair(state.argument(node, 2, "stride") or kernel)
    padding = _pair(state.argument(node, 3, "padding", 0))
    average = name == "avg_pool2d"
    dilation = [1, 1] if average else _pair(state.argument(node, 4, "dilation", 1))
    n, c, h, w = x.shape
    fields = {"batch": n, "height": h, "width": w, "channels": c, "out_height": shape[2], "out_width": shape[3]}
    for word, pair in zip(("kernel", "stride", "pad", "dilation"), (kernel, stride, padding, dilation), strict=True):
        fields |= {f"{word}_h": pair[0], f"{word}_w": pair[1]}
    if average:
        fields["count_padding"] = int(state.argument(node, 5, "count_include_pad", True))
        fields["divisor"] = state.argument(node, 6, "divisor_override") or 0
    made = state.program.tensor(shape, x.ctype, images=True)
    word = "tf_avg_pool_f32" if average else "tf_max_pool_i8" if x.ctype == "int8_t" else "tf_max_pool_f32"
    state.program.call(word, state.program.struct("tf_pool", **fields), x, made, layer=_name(node))
    return made


def _takes(user: Node) -> bool:
    return graphs.kind(user) == "getitem"


def _pair(value: Any) -> list[int]:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return numbers * 2 if len(numbers) == 1 else numbers


def cast(state: Lowering, node: Node) -> Tensor:
    """To float32, from float32 or int64."""
    x = state.tensor(_source(node))
    wanted = next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)), torch.float32)
    if x.ctype == "float" and wanted is torch.float32:
        return x
    if x.ctype != "int64_t" or wanted is not torch.float32:
        raise TargetError(f"the target 'c' has no cast from {x.ctype} to {wanted} (layer '{_name(node)}')")
    made = state.program.tensor(x.shape, "float", x.images)
    state.program.call("tf_cast_i64_f32", x.count, x, made, layer=_name(node))
    return made


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(("conv", "linear"), layer),
    **dict.fromkeys(("mean", "sum", "amax"), reduction),
    **dict.fromkeys(("max_pool", "avg_pool"), pooling),
    **dict.fromkeys(("slice", "select"), cut),
    **dict.fromkeys(("cat", "stack"), cat),
    "clamp": clamp,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "pow": power,
    "embedding": embedding,
    "same": same,
    "matmul": matmul,
    "attention": attention,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "cast": cast,
    "reshape": reshape,
    "transpose": transpose,
    "split": split,
    "getitem": getitem,
    "expand": expand,
    "pad": pad,
    "upsample": upsample,
    "batch_norm": batch_norm,
}
