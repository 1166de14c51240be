"""Weights of few bits in Core ML: which operator stores them in the fewest bytes, and which system reads it.

Core ML has codes of 4 and 8 bits with one scale per block (constexpr_blockwise_shift_scale) and tables with indices of
1, 2, 3, 4, 6 or 8 bits (constexpr_lut_to_dense). Codes of other widths become a table of their multiples of the scale,
one per block: the same numbers, as long as the tables cost less than the bits they save. Rows that use two or four
of their codes only become indices of 1 or 2 bits into a table of their own: signs with a scale per channel are exactly
the palette {-a, a}.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import add_constant, constant, is_constant, layer_name
from calibrate.levels import alphabet

from .errors import TargetError

# Bits of one stored code; TABLE: indices into a table.
Width = Literal[8, 4, 0]
TABLE: Width = 0
SYSTEMS = ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26")
TABLE_BITS = (1, 2, 3, 4, 6, 8)


@torch.library.custom_op("tightfit::packed_weight", mutates_args=())
def packed_weight(codes: Tensor, scales: Tensor, bits: int, width: int) -> Tensor:
    """Codes int8 [out, ...] of `bits` times scales float32 [out] or [out, groups]; `width`: how Core ML stores them."""
    blocks = _blocks(codes, scales)
    for axis, (size, count) in enumerate(zip(codes.shape, blocks.shape, strict=True)):
        blocks = blocks.repeat_interleave(size // count, axis) if count != 1 else blocks
    return codes.float() * blocks


@packed_weight.register_fake
def _(codes: Tensor, scales: Tensor, bits: int, width: int) -> Tensor:
    return scales.new_empty(codes.shape)


PACKED_WEIGHT = torch.ops.tightfit.packed_weight.default


def system_of(module: GraphModule, node: Node) -> str:
    """The first system whose Core ML can hold this node; "iOS15", the first with ML programs, for plain operators."""
    if node.target is qdq.QUANTIZE:
        return "iOS17"
    if node.target is qdq.LOOKUP:
        return "iOS18" if _entries(module, node) == 8 else "iOS16"
    if node.target is qdq.DEQUANTIZE_GROUP:
        return "iOS18"
    if node.target is qdq.DEQUANTIZE_CHANNEL:
        return "iOS16" if _bits(node) > 4 and _levels(module, node) is None else "iOS18"
    return "iOS15"


def refuse(module: GraphModule, node: Node) -> None:
    """Raise TargetError for stored numbers that Core ML has no type for: 8-bit floats, tables of other sizes."""
    if node.target in (qdq.QUANTIZE_FLOAT8, qdq.DEQUANTIZE_FLOAT8):
        raise TargetError(
            f"layer '{layer_name(node)}' holds 8-bit floats, for which Core ML has no type; "
            "use the recipe int8-weights, w4 or palette4 for this device"
        )
    if node.target is qdq.LOOKUP and _entries(module, node) not in {2**bits for bits in TABLE_BITS}:
        raise TargetError(
            f"'{layer_name(node)}' has a palette of {_entries(module, node)} values; "
            "Core ML's have 2, 4, 8, 16, 64 or 256: give it 1, 2, 3, 4, 6 or 8 bits"
        )


def mark_weights(module: GraphModule, half: bool) -> None:
    """Rewrite codes of up to 4 bits, of few levels, or with groups, to `packed_weight` in the form that takes the least
    room; the others stay for constexpr_affine_dequantize."""
    for node in list(module.graph.nodes):
        grouped = node.target is qdq.DEQUANTIZE_GROUP
        if not grouped and node.target is not qdq.DEQUANTIZE_CHANNEL:
            continue
        levels = None if grouped else _levels(module, node)
        if not grouped and _bits(node) > 4 and levels is None:
            continue
        codes, scales = node.args[:2]
        if not (is_constant(codes) and is_constant(scales)):
            raise TargetError(f"the codes of '{layer_name(node)}' are computed, and Core ML unpacks only constants")
        bits = _bits(node) if levels is None else levels.shape[1].bit_length() - 1
        steps = constant(module, scales)
        if half:  # as constexpr_blockwise_shift_scale keeps them: a table of their multiples must not round otherwise
            scales = add_constant(module, "half_scales", steps.half().float(), node)
        width = cheapest(constant(module, codes), steps, bits, half, _bits(node))
        node.target, node.args, node.kwargs = PACKED_WEIGHT, (codes, scales, bits, width), {}


def cheapest(codes: Tensor, scales: Tensor, bits: int, half: bool, plainly: int | None = None) -> Width:
    """The width that stores these codes in the fewest bytes; `half`: scales and tables hold float16 numbers.

    `bits` of an index into a table, `plainly` of a code where that differs.
    """
    number = 16 if half else 32
    wide: Width = 4 if (plainly or bits) <= 4 else 8
    plain = codes.numel() * wide + scales.numel() * number
    table = codes.numel() * bits + scales.numel() * number * 2**bits
    return TABLE if bits in TABLE_BITS and table < plain else wide


def register(mil: Any) -> None:
    """Teach coremltools' frontend `tightfit::packed_weight` and `tightfit::lookup`; `mil` is its Builder."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def packed(context: Any, node: Any) -> None:
        codes, scales = (np.asarray(context[name].val) for name in node.inputs[:2])
        bits, width = (int(_value(context, given)) for given in node.inputs[2:])
        context.add(_packed(mil, codes, scales, bits, width, node.name))

    def lookup(context: Any, node: Any) -> None:
        indices, table = (np.asarray(context[name].val) for name in node.inputs)
        context.add(_lookup(mil, indices, table, node.name))

    register_torch_op(packed, torch_alias=["tightfit::packed_weight"], override=True)
    register_torch_op(lookup, torch_alias=["tightfit::lookup"], override=True)


def _value(context: Any, given: Any) -> Any:
    """A number that the frontend hands over as itself or by the name of its constant."""
    return context[given].val if isinstance(given, str) else given


def _packed(mil: Any, codes: np.ndarray, scales: np.ndarray, bits: int, width: int, name: str) -> Any:
    blocks = _blocks(torch.from_numpy(codes), torch.from_numpy(scales)).numpy()
    if width != TABLE:
        return mil.constexpr_blockwise_shift_scale(data=_typed(codes, f"int{width}"), scale=blocks, name=name)
    own = alphabet(torch.from_numpy(codes)) if scales.ndim == 1 else None
    if own is not None and own.shape[1] <= 2**bits:
        levels = own.numpy().astype(np.float32).reshape(len(codes), *[1] * (codes.ndim - 1), -1)
        rows = codes.reshape(len(codes), -1)
        indices = (rows[:, :, None] == own.numpy()[:, None, :]).argmax(2).reshape(codes.shape)
    else:
        low = -(2 ** (bits - 1))
        levels, indices = np.arange(low, low + 2**bits, dtype=np.float32), codes - low
    tables = (blocks[..., None] * levels)[..., None]
    return mil.constexpr_lut_to_dense(indices=_typed(indices, f"uint{bits}"), lut=tables, name=name)


def _lookup(mil: Any, indices: np.ndarray, table: np.ndarray, name: str) -> Any:
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    bits = int(table.size).bit_length() - 1
    if is_current_opset_version_compatible_with(AvailableTarget.iOS18):
        tables = table.reshape(*[1] * indices.ndim, -1, 1)
        return mil.constexpr_lut_to_dense(indices=_typed(indices, f"uint{bits}"), lut=tables, name=name)
    shape = np.array(indices.shape, np.uint32)
    return mil.constexpr_lut_to_dense(indices=pack(indices, bits), lut=table, shape=shape, name=name)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Indices of any shape as uint8 bytes, `bits` each, least significant bit first: MIL's own order (iOS 16)."""
    single = np.unpackbits(indices.astype(np.uint8).reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return np.packbits(single.reshape(-1), bitorder="little")


def _typed(values: np.ndarray, mil_type: str) -> np.ndarray:
    """Integers as coremltools wants those of a MIL type: NumPy has no int4, so its dtype carries the name."""
    from coremltools.converters.mil.mil import types

    return values.astype(types.nptype_from_builtin(types.string_to_builtin(mil_type)))


def _blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Scales with the rank of the codes: [out, 1, ...] or [out, groups]."""
    return scales if scales.dim() == codes.dim() == 2 else scales.view(-1, *[1] * (codes.dim() - 1))


def _levels(module: GraphModule, node: Node) -> Tensor | None:
    """The codes that each row uses, int8 [out, 2 or 4], where they are so few."""
    codes = node.args[0]
    return alphabet(constant(module, codes)) if isinstance(codes, Node) and is_constant(codes) else None


def _bits(node: Node) -> int:
    bits = qdq.code_bits(node)
    assert bits is not None
    return bits


def _entries(module: GraphModule, node: Node) -> int:
    table = node.args[1]
    assert isinstance(table, Node)
    return constant(module, table).numel()
