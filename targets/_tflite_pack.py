"""Weight codes of 8, 4 and 2 bits as a .tflite file stores them, and the tensors that hold them.

What LiteRT 2.3 computes with (each found by running it, codes and scales compared with `calibrate/qdq.py`):

| weight | INT8 | INT4 | INT2 | groups (blockwise, float16 scales) |
|---|---|---|---|---|
| FULLY_CONNECTED | XNNPACK | XNNPACK, even inputs | XNNPACK, inputs in fours | dynamic, INT4, in 32s |
| CONV_2D static | XNNPACK | built-in: half as fast | none | none |
| CONV_2D dynamic | XNNPACK | built-in: half as fast | built-in: gives NaN | none |
| EMBEDDING_LOOKUP | built-in | built-in | built-in | INT4 and INT2 |
| DEQUANTIZE, run once | unpacked by XNNPACK | built-in | built-in | reads them wrongly |

So codes of 3 bits take 4, of 5 to 7 take 8, and 2-bit codes take 4 in groups of a linear layer and in a
convolution that quantizes its input at run time.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tflite_file import TFLiteFile

BITS = {"INT8": 8, "INT4": 4, "INT2": 2}


def storage(bits: int, columns: int, grouped: bool = False, blocks_of_two: bool = False) -> str:
    """The type that holds codes of `bits` bits in rows of `columns`; `blocks_of_two`: groups may have 2 bits."""
    if bits <= 2 and columns % 4 == 0 and (not grouped or blocks_of_two):
        return "INT2"
    return "INT4" if bits <= 4 and columns % 2 == 0 else "INT8"


def pack(codes: NDArray[np.int8], dtype: str) -> NDArray[Any]:
    """The bytes of codes: the first of a byte in its lowest bits."""
    bits = BITS[dtype]
    if bits == 8:
        return codes
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.uint8) & (2**bits - 1)
    rows = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    packed = np.zeros(len(rows), np.uint8)
    for position in range(each):
        packed |= rows[:, position] << (bits * position)
    return packed


def add_codes(
    file: TFLiteFile,
    name: str,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    dtype: str,
    axis: int = 0,
    table: bool = False,
) -> int:
    """A constant tensor with one scale per index of `axis`; scales [rows, groups] make it blockwise (codes [rows, k]).

    `table`: rows are looked up, which takes the scales as they are in the file.
    """
    if scales.ndim == 1:
        small = _add(file, f"{name};{dtype.lower()}", codes, dtype)
        file.quantize_tensor(small, scales, axis=axis)
        return small
    halves = scales.astype(np.float16) if table else stored_scales(scales, codes.shape[1] // scales.shape[1])
    steps = file.add_tensor(f"{name};scales", "FLOAT16", scales.shape, halves)
    small = _add(file, f"{name};{dtype.lower()}", codes, dtype)
    file.quantize_blocks(small, steps, codes.shape[1] // scales.shape[1])
    return small


def stored_scales(scales: NDArray[np.float32], group: int) -> NDArray[np.float16]:
    """Scales of groups as the file holds them: bfloat16 numbers where XNNPACK makes them such, so that all agree."""
    if group % 32:
        return scales.astype(np.float16)
    bits = np.ascontiguousarray(scales, dtype=np.float32).view(np.uint32)
    even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (even & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float16)


def _add(file: TFLiteFile, name: str, codes: NDArray[np.int8], dtype: str) -> int:
    small = file.add_tensor(name, dtype, codes.shape)
    file.graph.tensors[small].buffer = file.add_buffer(pack(codes, dtype))
    return small
