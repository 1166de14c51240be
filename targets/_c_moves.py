"""Operators that only move values: views where memory allows it, else one copy. They work on codes as on floats."""

import math

from torch.fx import Node

from calibrate import graph as graphs

from ._c_codes import broadcast
from ._c_lower import Lowering
from ._c_program import Tensor
from .errors import TargetError


def same(state: Lowering, node: Node) -> Tensor:
    """An operator that hands its input on."""
    return state.tensor(_source(node))


def reshape(state: Lowering, node: Node) -> Tensor:
    """reshape, view, flatten, squeeze, unsqueeze, unflatten: the same memory."""
    return state.plain(_source(node)).reshaped(state.shape(node))


def transpose(state: Lowering, node: Node) -> Tensor:
    """permute, transpose and t, as one copy."""
    x, name = state.tensor(_source(node)), graphs.operator_name(node)
    rank = len(x.shape)
    order = list(range(rank))
    if name == "permute":
        dims = state.argument(node, 1, "dims")
        order = [d % rank for d in dims]
    elif name in ("transpose", "swapaxes", "t"):
        first, second = (0, rank - 1) if name == "t" else (state.argument(node, i, f"dim{i - 1}") for i in (1, 2))
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    else:
        raise _unknown(node)
    return _copied(state, node, x, tuple(x.strides[o] for o in order))


def cut(state: Lowering, node: Node) -> Tensor:
    """slice, narrow and select: one copy from an offset."""
    x, name = state.tensor(_source(node)), graphs.operator_name(node)
    axis = state.argument(node, 1, "dim", 0) % len(x.shape)
    strides, size = list(x.strides), x.shape[axis]
    start = state.argument(node, 2, "index" if name == "select" else "start", 0) or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    offset = start * strides[axis]
    if name == "select":
        del strides[axis]
    elif name == "slice":
        strides[axis] *= state.argument(node, 4, "step", 1)
    elif name != "narrow":
        raise _unknown(node)
    return _copied(state, node, x, tuple(strides), offset)


def split(state: Lowering, node: Node) -> list[Tensor]:
    """split, split_with_sizes, chunk and unbind: one copy for each part."""
    x, name = state.tensor(_source(node)), graphs.operator_name(node)
    layer = graphs.layer_name(node)
    axis = state.argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(x.shape)
    size = x.shape[axis]
    if name == "unbind":
        parts = [1] * size
    else:
        asked = state.argument(node, 1, "split_size")
        step = -(-size // asked) if name == "chunk" else asked
        parts = list(step) if isinstance(step, list) else [min(step, size - i) for i in range(0, size, step)]
    made, offset = [], 0
    for part in parts:
        shape = (*x.shape[:axis], part, *x.shape[axis + 1 :])
        piece = state.program.tensor(shape, x.ctype)
        state.copy(x, piece, layer, strides=x.strides, offset=offset * x.strides[axis])
        made.append(piece.reshaped((*shape[:axis], *shape[axis + 1 :])) if name == "unbind" else piece)
        offset += part
    return made


def getitem(state: Lowering, node: Node) -> Tensor:
    """One of the tensors of a split."""
    source = _source(node)
    if source not in state.values:
        state.values[source] = state.handlers[graphs.kind(source)](state, source)
    found = state.values[source]
    if isinstance(found, Tensor):
        raise _unknown(source)
    index = node.args[1]
    assert isinstance(index, int)
    return found[index]


def expand(state: Lowering, node: Node) -> Tensor:
    """expand and expand_as: one copy that repeats."""
    if graphs.operator_name(node) not in ("expand", "expand_as"):
        raise _unknown(node)
    x = state.tensor(_source(node))
    return _copied(state, node, x, broadcast(x, state.shape(node)))


def cat(state: Lowering, node: Node) -> Tensor:
    """cat and stack: each part is copied to its place."""
    layer, shape = graphs.layer_name(node), state.shape(node)
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    tensors = [state.tensor(p) for p in parts if isinstance(p, Node)]
    axis = state.argument(node, 1, "dim", 0) % len(shape)
    if graphs.operator_name(node) == "stack":
        tensors = [state.laid(t, False).reshaped((*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors]
    images = all(t.images for t in tensors)
    made, offset = state.program.tensor(shape, tensors[0].ctype, images), 0
    for part in tensors:
        place = offset * made.strides[axis]
        state.copy(part, made, layer, strides=part.strides, to=made.strides, to_offset=place, shape=part.shape)
        offset += part.shape[axis]
    return made


def pad(state: Lowering, node: Node) -> Tensor:
    """Constant padding: what is outside is filled first. Negative padding cuts, and is refused."""
    name = graphs.operator_name(node)
    mode = state.argument(node, 2, "mode", "constant") if name == "pad" else "constant"
    value = state.argument(node, 3 if name == "pad" else 2, "value", 0.0) or 0.0
    x, shape, layer = state.tensor(_source(node)), state.shape(node), graphs.layer_name(node)
    sizes = state.argument(node, 1, "pad")
    if mode != "constant" or name not in ("pad", "constant_pad_nd") or min(sizes) < 0:
        raise _unknown(node)
    if value and x.ctype == "int8_t":
        raise TargetError(f"'{layer}' pads codes with {value}: the target 'c' pads them with zero alone")
    made = state.program.tensor(shape, x.ctype, x.images)
    before = [0] * len(shape)
    for i in range(len(sizes) // 2):
        before[-1 - i] = sizes[2 * i]
    offset = sum(b * s for b, s in zip(before, made.strides, strict=True))
    if x.ctype == "int8_t":
        state.program.call("tf_fill_i8", made.count, int(state.zero_of(node, x)), made, layer=layer)
    else:
        state.program.call("tf_fill_f32", made.count, float(value), made, layer=layer)
    state.copy(x, made, layer, strides=x.strides, to=made.strides, to_offset=offset, shape=x.shape)
    return made


def upsample(state: Lowering, node: Node) -> Tensor:
    """Nearest neighbours by whole factors: one copy that repeats."""
    x, shape = state.laid(state.tensor(_source(node)), True), state.shape(node)
    factors = [o // i for o, i in zip(shape[2:], x.shape[2:], strict=True)]
    if graphs.operator_name(node) != "upsample_nearest2d" or [
        f * i for f, i in zip(factors, x.shape[2:], strict=True)
    ] != list(shape[2:]):
        raise _unknown(node)
    n, c, h, w = x.shape
    made = state.program.tensor(shape, x.ctype, images=True)
    sn, sc, sh, sw = x.strides
    axes = (n, h, factors[0], w, factors[1], c)
    wide = w * factors[1] * c
    to = (h * factors[0] * wide, factors[0] * wide, wide, factors[1] * c, c, 1)
    state.copy(x, made, graphs.layer_name(node), (sn, sh, 0, sw, 0, sc), to=to, shape=axes)
    return made


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _copied(state: Lowering, node: Node, x: Tensor, strides: tuple[int, ...], offset: int = 0) -> Tensor:
    made = state.program.tensor(state.shape(node), x.ctype)
    assert math.prod(made.shape) == made.count
    state.copy(x, made, graphs.layer_name(node), strides=strides, offset=offset)
    return made


def _unknown(node: Node) -> TargetError:
    name, layer = graphs.operator_name(node), graphs.layer_name(node)
    return TargetError(
        f"the target 'c' has no {name} of this form (layer '{layer}', arguments {tuple(map(str, node.args[1:]))}). "
        "Write it with simpler operators, or choose --target onnx or tflite."
    )
