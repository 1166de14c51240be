"""MIL's quantize and dequantize, and the constexpr operators that unpack compressed weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .values import along, ints, torch_dtype

_RANGE = {"int8": (-128, 127), "uint8": (0, 255)}


def quantize(
    input: Tensor,
    scale: Tensor | float,
    output_dtype: str,
    zero_point: Tensor | int | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point), ties to even, saturated to the type.

    MIL's documentation writes the division and no precision. Here it is a product with the rounded reciprocal, as in
    torch's quantize_per_tensor, so that a program and its simulation agree to the bit; a true division may give the
    neighbouring code where the quotient lies within one rounding error of a tie.
    """
    low, high = _RANGE[output_dtype]
    codes = torch.round(input * (1.0 / along(scale, axis, input.ndim)))
    if zero_point is not None:
        codes = codes + along(zero_point, axis, input.ndim)
    return codes.clamp(low, high).to(torch_dtype(output_dtype))


def dequantize(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int | None = None, axis: int | None = None
) -> Tensor:
    """scale * (input - zero_point) in float32."""
    codes = input.to(torch.float32)
    if zero_point is not None:
        codes = codes - along(zero_point, axis, input.ndim)
    return codes * along(scale, axis, input.ndim)


def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor | int, scale: Tensor | float, axis: int
) -> Tensor:
    """Weights of 8-bit codes; scale and zero point are scalars or one per position on `axis`."""
    return dequantize(quantized_data, scale, zero_point, axis)


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset); scale and offset have data's rank and one entry per block."""
    codes = data.to(torch.float32)
    if offset is not None:
        codes = codes - _blocks(offset, data.shape).to(torch.float32)
    return codes * _blocks(scale, data.shape)


def _blocks(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`values`, each repeated over its block until the shape is reached."""
    for axis, (size, count) in enumerate(zip(shape, values.shape, strict=True)):
        if count not in (1, size):
            values = values.repeat_interleave(size // count, axis)
    return values


def constexpr_lut_to_dense(
    indices: Tensor,
    lut: Tensor,
    shape: Tensor | Sequence[int] | None = None,
    vector_axis: int | None = None,
) -> Tensor:
    """Palettized weights. With `shape` (iOS 16) the indices are packed bits; else (iOS 18) they have their shape."""
    if shape is not None:
        sizes = ints(shape)
        codes = unpacked(indices, int(math.log2(lut.numel())), math.prod(sizes))
        return lut[codes].reshape(sizes)
    rank = indices.ndim
    vectors = lut.shape[-1]
    tables = lut
    for axis in range(rank):
        tables = tables.repeat_interleave(indices.shape[axis] // lut.shape[axis], axis)
    codes = indices.long()[..., None, None].expand(*indices.shape, 1, vectors)
    picked = torch.gather(tables, rank, codes).squeeze(rank)
    if vectors == 1 or vector_axis is None:
        return picked.squeeze(-1)
    place = vector_axis % rank
    return picked.movedim(-1, place + 1).flatten(place, place + 1)


def constexpr_sparse_to_dense(
    nonzero_data: Tensor, mask: Tensor, shape: Tensor | Sequence[int] | None = None
) -> Tensor:
    """`nonzero_data` where the mask's bit is set, 0 elsewhere. With `shape` (iOS 16) the mask is packed bits."""
    if shape is not None:
        sizes = ints(shape)
        mask = unpacked(mask, 1, math.prod(sizes)).reshape(sizes)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """`count` integers of `bits` bits each from bytes, least significant bit first; int64."""
    single = (packed.to(torch.int64)[:, None] >> torch.arange(8)) & 1
    grouped = single.reshape(-1)[: count * bits].reshape(count, bits)
    return (grouped << torch.arange(bits)).sum(1)


def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val.to(torch_dtype(output_dtype))


OPS: dict[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
    "dequantize": dequantize,
    "quantize": quantize,
}
