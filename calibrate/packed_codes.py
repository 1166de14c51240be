"""Codes of ±1 as bits: packing, exact search by XOR and popcount, and how much of a float search it finds.

A code of P planes has its planes side by side, plane 0 first: ±1 [n, P * bits] and packed uint8 [n, P * bits / 8]. The
likeness of two codes is sum over plane pairs (s, t) of 2^-(s+t) <a_s, b_t> (BEBR, arXiv 2302.08714), divided by the
length of the second; for one plane that orders as the Hamming distance does.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import CalibrationError

Packed = NDArray[np.uint8]
KERNEL = Path(__file__).with_name("hamming_search.c")
# What one block of queries may take besides the base: XORs of 64-bit words.
BLOCK_BYTES = 1 << 25
_COUNTS = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


def pack(codes: NDArray) -> Packed:
    """±1 of any dtype [n, bits] -> uint8 [n, bits / 8]: bit i of a byte is column 8 * byte + i, set for +1.

    Raises CalibrationError for other values and for bits that fill no whole bytes.
    """
    if codes.ndim != 2 or codes.shape[1] == 0 or codes.shape[1] % 8:
        raise CalibrationError(f"codes to pack have the shape [n, multiple of 8], not {list(codes.shape)}")
    if not (np.abs(codes) == 1).all():
        raise CalibrationError("codes to pack are +1 and -1 alone: pass the output of a model with binary embeddings")
    return np.packbits(codes > 0, axis=1, bitorder="little")


def unpack(packed: Packed) -> NDArray[np.int8]:
    """uint8 [n, bytes] -> int8 ±1 [n, 8 * bytes]."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.int8) * 2 - 1


def inverse_norms(packed: Packed, planes: int = 1) -> NDArray[np.float64]:
    """1 / length of each code [n]; 1 for all codes of one plane, which have one length."""
    if planes == 1:
        return np.ones(len(packed))
    each = _planes(packed, planes)
    squares = np.zeros(len(packed), dtype=np.int64)
    for s in range(planes):
        for t in range(planes):
            squares += _dots(each[s], each[t], packed.shape[1] * 8 // planes) << _shift(s, t, planes)
    return 1 / np.sqrt(squares)


def search(queries: Packed, base: Packed, k: int, planes: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `k` codes of `base` most like each query: indices and scores, both [queries, k], best first.

    Exact but for the last bit of a code's length, where there are two planes or more; of equals the lower index comes
    first. A score is the likeness times 4^(planes - 1): bits - 2 * Hamming
    distance for one plane. Raises CalibrationError for codes that don't fit each other or a `k` beyond the base.
    """
    _check(queries, base, k, planes)
    inverse = inverse_norms(base, planes)
    step = max(1, BLOCK_BYTES // (len(base) * (base.shape[1] + 8)))
    bits = base.shape[1] * 8 // planes
    of_base = _planes(base, planes)
    index, score = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for start in range(0, len(queries), step):
        of_query = [p[:, None] for p in _planes(queries[start : start + step], planes)]
        total = np.zeros((len(of_query[0]), len(base)), np.int64)
        for s in range(planes):
            for t in range(planes):
                total += _dots(of_query[s], of_base[t], bits) << _shift(s, t, planes)
        for row, scores in enumerate(total * inverse, start):
            index[row], score[row] = _best(scores, k)
    return index, score


def neighbours(queries: NDArray, base: NDArray, k: int) -> NDArray[np.int64]:
    """The `k` rows of `base` [n, d] of largest cosine with each query [m, d]: indices [m, k], in float64."""
    length = np.linalg.norm(base.astype(np.float64), axis=1)
    scores = queries.astype(np.float64) @ base.astype(np.float64).T / np.where(length > 0, length, 1.0)
    return np.stack([_best(row, k)[0] for row in scores])


def recall(found: NDArray, wanted: NDArray) -> float:
    """The mean share of `wanted` [m, k] that is among `found` [m, any]."""
    return float((wanted[:, :, None] == found[:, None, :]).any(2).mean())


def _check(queries: Packed, base: Packed, k: int, planes: int) -> None:
    for name, codes in (("queries", queries), ("base", base)):
        if codes.dtype != np.uint8 or codes.ndim != 2:
            raise CalibrationError(f"the {name} of a search are packed codes, uint8 [n, bytes]: use pack() first")
    if queries.shape[1] != base.shape[1] or planes < 1 or not base.shape[1] or base.shape[1] % planes:
        raise CalibrationError(
            f"queries of {queries.shape[1]} bytes cannot be searched among codes of {base.shape[1]} bytes in "
            f"{planes} planes: both come from one model, and a plane has whole bytes"
        )
    if not 0 < k <= len(base):
        raise CalibrationError(f"k = {k} neighbours cannot be found among {len(base)} codes: give 1 to {len(base)}")


def _shift(s: int, t: int, planes: int) -> int:
    """log2 of a plane pair's weight, times 4^(planes - 1) so that all are whole numbers."""
    return 2 * (planes - 1) - s - t


def _planes(packed: Packed, planes: int) -> list[NDArray[np.uint64]]:
    """Each plane as words [n, words]; bytes beyond the code are zero and so never differ."""
    width = packed.shape[1] // planes
    padded = np.zeros((planes, len(packed), -(-width // 8) * 8), np.uint8)
    padded[:, :, :width] = packed.reshape(len(packed), planes, width).swapaxes(0, 1)
    return list(padded.view(np.uint64))


def _dots(a: NDArray[np.uint64], b: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """<a, b> of ±1 codes as words [..., words]: bits - 2 * Hamming distance."""
    differing = a ^ b
    if hasattr(np, "bitwise_count"):  # numpy 2
        count = np.bitwise_count(differing).sum(-1, dtype=np.int64)
    else:
        count = _COUNTS[differing.view(np.uint8)].sum(-1, dtype=np.int64)
    return bits - 2 * count


def _best(scores: NDArray, k: int) -> tuple[NDArray[np.int64], NDArray]:
    """The k largest, best first, of equals the first."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= least)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return order, scores[order]
