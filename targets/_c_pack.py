"""Weights as arrays of C: codes by how many bits they need, signs as words, floats."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._c_program import Constant, Program, Struct

Codes = NDArray[np.int8]
LANES = 8  # output channels whose sign words lie side by side


def is_signs(codes: Codes) -> bool:
    """Whether all codes are -1 or +1: one bit each."""
    return bool((np.abs(codes) == 1).all())


def stored_bits(codes: Codes, low: int, high: int) -> int:
    """How many bits the source gives each code of a weight whose codes lie in [low, high]: 1, 2, 4 or 8."""
    if is_signs(codes):
        return 1
    needed = 8 if high >= 63 else max((high + 1).bit_length(), (-low).bit_length())
    return next(b for b in (1, 2, 4, 8) if b >= needed)


def codes_weight(program: Program, layer: str, codes: Codes, low: int, high: int, **scales: Any) -> Struct:
    """Codes [rows, columns] in as few bits as they need, as a `tf_weight`."""
    rows, columns = codes.shape
    bits = stored_bits(codes, low, high)
    if is_signs(codes):
        words = sign_words(codes[:, None, :])
        constant = program.constant("signs", "uint64_t", words, "weight", layer)
        return _struct("TF_SIGN", rows, columns, constant, **scales)
    if bits == 8:
        constant = program.constant("codes", "int8_t", codes, "weight", layer)
        return _struct("TF_W8", rows, columns, constant, **scales)
    least = -(1 << (bits - 1))
    constant = program.constant(f"codes{bits}", "uint8_t", packed(codes, bits, least), "weight", layer)
    return _struct(f"TF_W{bits}", rows, columns, constant, low=least, **scales)


def float_weight(program: Program, layer: str, values: NDArray[Any]) -> Struct:
    """A weight [rows, columns] of float32 or float16 numbers, as a `tf_weight`."""
    rows, columns = values.shape
    if values.dtype == np.float16:
        constant = program.constant("halves", "uint16_t", values.view(np.uint16), "weight", layer)
        return _struct("TF_F16", rows, columns, constant)
    constant = program.constant("weight", "float", values.astype(np.float32), "weight", layer)
    return _struct("TF_F32", rows, columns, constant)


def _struct(form: str, rows: int, columns: int, data: Constant, **more: Any) -> Struct:
    return Struct("tf_weight", {"format": form, "rows": rows, "columns": columns, "data": data, **more})


def packed(codes: Codes, bits: int, least: int) -> NDArray[np.uint8]:
    """Codes [rows, columns] less `least`, `bits` each from the lowest of a byte on, whole bytes to a row."""
    single = np.unpackbits((codes.astype(np.int16) - least).astype(np.uint8)[..., None], axis=-1, bitorder="little")
    return np.packbits(single[..., :bits].reshape(len(codes), -1), axis=1, bitorder="little")


def sign_words(codes: Codes) -> NDArray[np.uint64]:
    """Signs [rows, taps, channels] as words [blocks of 8 rows, words, 8]: every tap starts at a whole word.

    Bit 1 is -1; bits behind the last channel and rows behind the last are 0.
    """
    rows, taps, channels = codes.shape
    bits = np.zeros((-(-rows // LANES) * LANES, taps, -(-channels // 64) * 64), np.uint8)
    bits[:rows, :, :channels] = codes < 0
    words = np.packbits(bits, axis=-1, bitorder="little").reshape(len(bits), -1, 8).view("<u8")[..., 0]
    return np.ascontiguousarray(words.reshape(-1, LANES, words.shape[1]).transpose(0, 2, 1)).astype(np.uint64)


def row_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What `sign_words` gave, [blocks, words, 8], with one row of words per output channel: [8 * blocks, words]."""
    return words.transpose(0, 2, 1).reshape(-1, words.shape[1])


def block_words(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The inverse of `row_words`."""
    return np.ascontiguousarray(rows.reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1))
