"""Layers on codes: the kernels whose results are exact."""

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import whole_steps

from ._c_lower import Lowering, check_dtype, rows_of
from ._c_pack import codes_weight, is_signs, row_words, sign_words
from ._c_program import CHUNK, PAD, TILE, Store, Struct, Tensor
from ._c_reuse import reused
from .errors import TargetError

Geometry = dict[str, int]


def integer(state: Lowering, node: Node) -> bool:
    """Lower `node` if it computes on codes; False for everything else."""
    if node.target in qdq.DYNAMIC:
        raise TargetError(
            f"'{graphs.layer_name(node)}' quantizes its input at run time, for which the target 'c' has no kernel. Use "
            "--recipe int8 for static ranges, or --recipe int8-weights for size alone."
        )
    if node in state.kernels:
        _layer(state, node)
    elif node in state.outputs and graphs.kind(node) == "mean":
        _mean(state, node)
    elif node in state.outputs and graphs.kind(node) == "add":
        _add(state, node)
    else:
        return False
    return True


def _keep(state: Lowering, node: Node, made: Tensor) -> None:
    """Codes are the value of the quantize node they stand for, floats of the node itself."""
    state.values[state.writer.get(node, node)] = made


def geometry(state: Lowering, node: Node, weight: tuple[int, ...]) -> tuple[Geometry, Tensor]:
    """The fields of a `tf_conv` for a conv1d, conv2d or linear node with a weight of this shape, and its result.

    Raises TargetError for other convolutions and for padding that is given as a word or lies on one side.
    """
    name, layer = graphs.operator_name(node), graphs.layer_name(node)
    shape = state.shape(node)
    if graphs.kind(node) == "linear":
        if name != "linear":
            raise TargetError(f"'{layer}' is {name}: the target 'c' takes linear layers as aten.linear")
        rows = rows_of(shape)
        sizes = {"batch": 1, "height": 1, "width": rows, "channels": weight[1], "out_height": 1, "out_width": rows}
        ones = dict.fromkeys(("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "groups"), 1)
        return {**sizes, "out_channels": weight[0], **ones, "pad_h": 0, "pad_w": 0}, _like(state, node, False)
    if name not in ("conv1d", "conv2d"):
        raise TargetError(f"'{layer}' is {name}: the target 'c' has conv1d and conv2d. Choose --target onnx.")
    numbers = []
    for index, word, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)):
        value = state.argument(node, index, word, default)
        if isinstance(value, str):
            raise TargetError(f"'{layer}' has padding '{value}': give it as numbers for the target 'c'")
        pair = list(value) if isinstance(value, list) else [value]
        pair = pair * (len(weight) - 2) if len(pair) == 1 else pair
        numbers.append(pair if len(pair) == 2 else [default, pair[0]])
    source = node.args[0]
    assert isinstance(source, Node)
    batch, channels, *size = state.shape(source)
    result, kernel = list(shape[2:]), list(weight[2:])
    height, width = size if len(size) == 2 else (1, size[0])
    fields = {"batch": batch, "height": height, "width": width, "channels": channels}
    fields |= {"out_height": result[0] if len(result) == 2 else 1, "out_width": result[-1], "out_channels": weight[0]}
    fields |= {"kernel_h": kernel[0] if len(kernel) == 2 else 1, "kernel_w": kernel[-1]}
    for word, pair in zip(("stride", "pad", "dilation"), numbers, strict=True):
        fields |= {f"{word}_h": pair[0], f"{word}_w": pair[1]}
    fields["groups"] = state.argument(node, 6, "groups", 1)
    return fields, _like(state, node, True)


def _like(state: Lowering, node: Node, images: bool) -> Tensor:
    """A tensor without memory yet: what the node's result will look like."""
    shape = state.shape(node)
    if images and len(shape) == 3:
        shape = (shape[0], shape[1], 1, shape[2])
    return Tensor(shape, "float", Store(0, 0, 0), images)


def laid_input(state: Lowering, x: Tensor, images: bool) -> Tensor:
    """A layer's input as its kernel reads it: N H W C, or rows."""
    if not images:
        return state.laid(x, False)
    if len(x.shape) == 3:
        x = state.laid(x, False).reshaped((x.shape[0], x.shape[1], 1, x.shape[2]))
    return state.laid(x, True)


def finished(state: Lowering, node: Node, made: Tensor) -> Tensor:
    """A layer's result in the shape that the graph gives it."""
    shape = state.shape(node)
    return made if made.shape == shape else state.laid(made, False).reshaped(shape)


def columns(weight: np.ndarray) -> np.ndarray:
    """A weight [out, in, ...] with one row per output channel in the kernels' order: taps, then channels."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1) if weight.ndim > 2 else weight


def is_depthwise(fields: Geometry) -> bool:
    """Whether every output channel reads its own input channel."""
    return fields["groups"] == fields["channels"] == fields["out_channels"] > 1


def _layer(state: Lowering, node: Node) -> None:
    layer, kernel, output = graphs.layer_name(node), state.kernels[node], state.outputs.get(node)
    source, weight_node = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(weight_node, Node)
    parameters = tuple(source.args[1:])
    zero: Any = parameters[1]
    check_dtype(parameters, layer)
    codes = kernel.codes.to(torch.int8).numpy()
    fields, like = geometry(state, node, codes.shape)
    flat, depthwise = columns(codes), is_depthwise(fields)
    signs = is_signs(codes) and source.args[0] in state.signs and zero == 0 and fields["groups"] == 1
    low, high = qdq.code_range(weight_node) or (-127, 127)
    reuse: Struct | None = None
    if signs:
        taps = fields["kernel_h"] * fields["kernel_w"]
        words = sign_words(flat.reshape(len(flat), taps, -1))
        if state.job.rules.reuse_outputs:
            reuse = _reuse(state, words, fields)
        data = state.program.constant("signs", "uint64_t", words, "weight", layer) if reuse is None else None
        weight = Struct("tf_weight", {"format": "TF_SIGN", "rows": len(flat), "columns": flat.shape[1], "data": data})
    else:
        weight = codes_weight(state.program, layer, flat, low, high)
    start, bias = _start(state, node, kernel.unit, 0 if signs or depthwise else zero, flat, layer)
    factor = kernel.unit if output is None else kernel.unit / torch.tensor(output.scale, dtype=torch.float32)
    out: dict[str, Any] = {
        "start": state.program.constant("start", "int32_t", start) if start.any() else None,
        "factor": state.program.constant("factor", "float", factor.numpy(), "scale", layer),
        "bias": None if bias is None else state.program.constant("bias", "float", bias.numpy()),
    }
    if output is not None:
        check_dtype((output.dtype,), layer)
        out |= {"codes": 1, "zero": output.zero_point, "low": output.low, "high": output.high}
    pads = signs and (fields["pad_h"] or fields["pad_w"])
    sums = _tap_sums(flat, fields) if pads else None
    conv = state.program.struct(
        "tf_conv",
        **fields,
        zero=zero,
        weight=weight,
        tap_sums=None if sums is None else state.program.constant("tap_sums", "int16_t", sums),
        reuse=reuse,
        out=Struct("tf_output", out),
    )
    name = "tf_conv_w1a1" if signs else "tf_depthwise_i8" if depthwise else "tf_conv_i8"
    x = laid_input(state, state.codes(source), like.images)
    made = state.program.tensor(like.shape, "float" if output is None else "int8_t", like.images)
    state.program.call(name, conv, x, made, "scratch", layer=layer, scratch=_scratch(name, fields, flat.shape[1]))
    _keep(state, node, finished(state, node, made))


def _reuse(state: Lowering, words: np.ndarray, fields: Geometry) -> Struct | None:
    """The tree of a layer of signs, where there is one that is worth it. Every tap starts at a whole word."""
    channels, taps = fields["channels"], fields["kernel_h"] * fields["kernel_w"]
    used = row_words(sign_words(np.full((1, taps, channels), -1, np.int8)))[0]
    return reused(state.program, row_words(words)[: fields["out_channels"]], used, channels * taps)


def _start(
    state: Lowering, node: Node, unit: torch.Tensor, zero: int, codes: np.ndarray, layer: str
) -> tuple[np.ndarray, torch.Tensor | None]:
    """What every sum starts at, int32 [out], and the bias that is added in float, if any."""
    wide = codes.astype(np.int64)
    start = -zero * wide.sum(1)
    bias_node = node.args[2] if len(node.args) > 2 else None
    bias = graphs.constant(state.graph, bias_node) if isinstance(bias_node, Node) else None
    whole = None if bias is None else whole_steps(bias, unit)
    if whole is not None:
        start, bias = start + whole.numpy().astype(np.int64), None
    if (np.abs(start) + 256 * np.abs(wide).sum(1)).max() >= 2**31:
        raise TargetError(
            f"the sums of '{layer}' can leave 32 bits, and the kernels of the target 'c' add in 32. Keep the layer in "
            "float, or choose another target."
        )
    return start.astype(np.int32), bias


def _tap_sums(flat: np.ndarray, fields: Geometry) -> np.ndarray:
    """For each tap and output channel the sum of its signs: what padding of +1 adds."""
    taps = fields["kernel_h"] * fields["kernel_w"]
    return flat.astype(np.int64).reshape(len(flat), taps, -1).sum(-1).T.astype(np.int16)


def _scratch(name: str, fields: Geometry, depth: int) -> int:
    """Bytes of scratch that the kernel uses: see the comment at each of them."""
    channels, taps = fields["out_channels"], fields["kernel_h"] * fields["kernel_w"]
    if name == "tf_depthwise_i8":
        return channels * 4 + taps * channels * 2 + taps
    if name == "tf_conv_w1a1":
        per_tap, inputs = -(-fields["channels"] // 64), fields["batch"] * fields["height"] * fields["width"]
        return 8 * (inputs + TILE * taps) * per_tap + TILE * -(-channels // 8) * 8 * 4
    stride = -(-depth // PAD) * PAD
    return (TILE + CHUNK) * stride + TILE * CHUNK * 4


def _mean(state: Lowering, node: Node) -> None:
    source, output = node.args[0], state.outputs[node]
    assert isinstance(source, Node)
    check_dtype(tuple(source.args[1:]), graphs.layer_name(node))
    check_dtype((output.dtype,), graphs.layer_name(node))
    x = state.codes(source)
    outer, count, inner, x = reduced(state, node, x)
    divisor = torch.tensor(output.scale, dtype=torch.float32) * count
    factor = (torch.tensor(source.args[1], dtype=torch.float32) / divisor).reshape(1)
    out = state.program.struct(
        "tf_output",
        factor=state.program.constant("factor", "float", factor.numpy()),
        codes=1,
        zero=output.zero_point,
        low=output.low,
        high=output.high,
    )
    made = state.program.tensor(state.shape(node), "int8_t")
    arguments = (outer, count, inner, source.args[2], out, x, made)
    state.program.call("tf_mean_i8", *arguments, layer=graphs.layer_name(node))
    _keep(state, node, made)


def reduced(state: Lowering, node: Node, x: Tensor) -> tuple[int, int, int, Tensor]:
    """How a reduction walks: outer, count, inner, and its operand laid out so that the reduced axes are neighbours.

    Raises TargetError where they are not.
    """
    if graphs.operator_name(node).startswith("adaptive"):
        axes: Any = list(range(2, len(x.shape)))
    else:
        axes = state.argument(node, 1, "dim")
    axes = list(range(len(x.shape))) if axes in (None, []) else axes if isinstance(axes, list) else [axes]
    axes = sorted(a % len(x.shape) for a in axes)
    if x.images and axes == [2, 3]:
        return x.shape[0], x.shape[2] * x.shape[3], x.shape[1], x
    x = state.laid(x, False)
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise TargetError(
            f"'{graphs.layer_name(node)}' reduces the axes {axes}, which are no neighbours: the target 'c' reduces "
            "neighbours alone. Reduce them one after the other."
        )
    sizes = np.array(x.shape, np.int64)
    first, last = axes[0], axes[-1] + 1
    return int(sizes[:first].prod()), int(sizes[first:last].prod()), int(sizes[last:].prod()), x


def _add(state: Lowering, node: Node) -> None:
    layer, output = graphs.layer_name(node), state.outputs[node]
    left, right = node.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    for parameters in (tuple(left.args[1:]), tuple(right.args[1:]), (output.dtype,)):
        check_dtype(parameters, layer)
    scales = [float(left.args[1]), float(right.args[1])]
    ratios = torch.tensor(scales, dtype=torch.float32) / torch.tensor(output.scale, dtype=torch.float32)
    shift = 20 - int(torch.floor(torch.log2(ratios.max().double())))
    if not 1 <= shift <= 62:
        raise TargetError(f"the scales of '{layer}' lie too far apart for an add of codes. Keep the layer in float.")
    multipliers = torch.round(ratios.double() * 2.0**shift).tolist()
    a, b = state.codes(left), state.codes(right)
    images = a.images or b.images
    shape = state.shape(node)
    a, b = (spread(state, state.laid(t, images) if t.shape == shape else t, shape, images, layer) for t in (a, b))
    made = state.program.tensor(shape, "int8_t", images)
    addition = state.program.struct(
        "tf_sum",
        zero_a=left.args[2],
        zero_b=right.args[2],
        multiplier_a=int(multipliers[0]),
        multiplier_b=int(multipliers[1]),
        shift=shift,
        zero=output.zero_point,
        low=output.low,
        high=output.high,
    )
    state.program.call("tf_add_i8", addition, made.count, a, b, made, layer=layer)
    _keep(state, node, made)


def spread(state: Lowering, x: Tensor, shape: tuple[int, ...], images: bool, layer: str) -> Tensor:
    """`x` repeated to `shape`."""
    if x.shape == shape and x.images == images:
        return x
    made = state.program.tensor(shape, x.ctype, images)
    state.copy(x, made, layer, strides=broadcast(x, shape))
    return made


def broadcast(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The steps of `x` along the axes of `shape`, 0 where it is repeated."""
    missing = len(shape) - len(x.shape)
    return (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))


def sign_codes(state: Lowering, quantize: Node) -> Tensor | None:
    """The codes of a quantize node that reads where(x >= t, +a, -b), when they are surely +1 and -1; else None."""
    node, scale, zero, low, high = quantize.args[:5]
    found = sign_of(state, node)
    if found is None or zero != 0 or low > -1 or high < 1:
        return None
    x, threshold, equal, above, below = found
    inverse = np.float32(1.0 / scale)
    if [np.rint(np.float32(v) * inverse) for v in (above, below)] != [1, -1]:
        return None
    source = state.tensor(x)
    made = state.program.tensor(source.shape, "int8_t", source.images)
    arguments = (source.count, np.float32(threshold), int(equal), source, made)
    state.program.call("tf_sign_i8", *arguments, layer=graphs.layer_name(node))
    return made


def sign_of(state: Lowering, node: Any) -> tuple[Node, float, bool, float, float] | None:
    """(x, threshold, whether equal counts as above, value above, value below) of a `where` on one comparison."""
    if graphs.operator_name(node) != "where" or not isinstance(node.args[0], Node):
        return None
    test, above, below = node.args[0], *(_single(state, a) for a in node.args[1:3])
    name = graphs.operator_name(test)
    if name not in ("ge", "gt", "le", "lt") or above is None or below is None or not isinstance(test.args[0], Node):
        return None
    threshold = _single(state, test.args[1])
    if threshold is None or np.float32(threshold) != threshold:
        return None
    if name in ("le", "lt"):  # x <= t is not x > t where x is no number, but then nothing is right anyway
        return test.args[0], threshold, name == "lt", below, above
    return test.args[0], threshold, name == "ge", above, below


def _single(state: Lowering, value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    found = state.facts.constants.get(value) if isinstance(value, Node) else None
    return float(found.reshape(-1)[0]) if found is not None and found.numel() == 1 else None
