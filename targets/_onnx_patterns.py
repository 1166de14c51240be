"""Convolutions whose kernels of signs are few: the file holds the patterns once, and which of them each kernel is.

With 2^b patterns a kernel takes b bits where its signs take nine (the codebook of arXiv 2303.14470); as many such
numbers as fit make a word of 16 bits. All is constant, so ONNX Runtime turns it into codes when it loads the file.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ._onnx_graph import Array, new_constant

WORD = 16
MOST = 256
# What the nodes that look kernels up cost in the file beyond those for signs, in bytes, at most.
NODES = 560

Before = Callable[..., ir.Value]


def patterns_of(codes: Array) -> tuple[Array, Array] | None:
    """(patterns int8 [n, kh * kw], the number of its pattern for each kernel, flat) of codes [out, in, kh, kw]; None
    where these are no signs, no kernels, or so many patterns that it would not make the file smaller."""
    if codes.ndim != 4 or codes.shape[2] * codes.shape[3] < 2 or not bool((np.abs(codes) == 1).all()):
        return None
    book, places = np.unique(codes.reshape(-1, codes.shape[2] * codes.shape[3]), axis=0, return_inverse=True)
    if len(book) > MOST:
        return None
    words = -(-places.size // _each(len(book)))
    return (book, places.reshape(-1)) if 2 * words + book.size + NODES < codes.size / 8 else None


def _each(count: int) -> int:
    """How many numbers below `count` a word holds."""
    return WORD // max(1, (count - 1).bit_length())


def packed(places: Array, count: int) -> Array:
    """Numbers below `count` as uint16 words [n, 1], the first in the lowest digit; zeros fill the last word."""
    each = _each(count)
    full = np.concatenate([places, np.zeros(-len(places) % each, np.int64)]).reshape(-1, each)
    return np.asarray((full << _shifts(count)).sum(1, keepdims=True), dtype=np.uint16)


def _shifts(count: int) -> Array:
    return WORD // _each(count) * np.arange(_each(count))


def looked_up(graph: ir.Graph, name: str, codes: Array, found: tuple[Array, Array], before: Before) -> ir.Value:
    """int8 codes [out, in, kh, kw], as nodes that `before(operator, inputs, **attributes)` puts into the graph."""
    book, places = found
    count, words = len(book), packed(places, len(book))

    def number(kind: str, value: Array) -> ir.Value:
        return new_constant(graph, f"{name}_{kind}", value)

    value = before("Cast", [number("patterns_taken", words)], to=ir.DataType.INT32)
    value = before("Div", [value, number("digits", (1 << _shifts(count)).astype(np.int32))])
    value = before("Mod", [value, number("base", np.array(1 << (WORD // _each(count)), np.int32))])
    value = before("Reshape", [value, number("flat", np.array([-1], np.int64))])
    if words.size * _each(count) != places.size:
        bounds = [number(kind, np.array([n], np.int64)) for kind, n in (("from", 0), ("to", places.size))]
        value = before("Slice", [value, *bounds])
    value = before("Gather", [number("patterns", np.ascontiguousarray(book)), value], axis=0)
    return before("Reshape", [value, number("shape", np.array(codes.shape, np.int64))])
