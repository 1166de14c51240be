"""Output channels of a binary layer computed from one another: a minimum spanning tree (MST-compression, 2308.13735).

The paper adds up the inputs at the positions in which two rows of signs differ. Here a word of 64 positions is
a popcount whether one bit of it differs or all do, so that the tree's edges weigh the words in which two rows differ.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._c_program import Program, Struct

Words = NDArray[np.uint64]
# Entries that a layer may have for each word of its plain weights: more than 0.08 to 0.1 take longer than the plain
# kernel, where a word of the input meets 8 channels at once (benchmarks/binary_reuse.py: Cortex-A72 and AVX2).
WORTH = 0.08


@dataclass(frozen=True)
class Tree:
    """`order`: channels, each behind its `parent` (-1: none). An entry is a word: its place, mask, and masked signs.

    `first` [channels + 1] says which entries are a channel's, `add` what comes to its sum besides: in order's order.
    """

    order: NDArray[np.int32]
    parent: NDArray[np.int32]
    first: NDArray[np.int32]
    add: NDArray[np.int32]
    place: NDArray[np.int32]
    mask: Words
    bits: Words


def spanning(words: Words) -> list[tuple[int, int]]:
    """Prim's tree over rows [rows, words]: (row, its parent or -1), parents first; equal weights: the lower row."""
    cost = np.full(len(words), np.iinfo(np.int64).max)
    nearest, open_ = np.full(len(words), -1), np.ones(len(words), bool)
    found, row = [], 0
    for _ in range(len(words)):
        found.append((row, int(nearest[row])))
        open_[row] = False
        differing = (words != words[row]).sum(1)
        closer = open_ & (differing < cost)
        cost[closer], nearest[closer] = differing[closer], row
        row = int(np.where(open_, cost, np.iinfo(np.int64).max).argmin())
    return found


def tree(words: Words, used: Words, total: int) -> Tree:
    """The tree of rows [rows, words] of signs; `used` [words] has the bits that stand for inputs, `total` of them."""
    order, parents, first, add = [], [], [0], []
    entries: list[tuple[int, int, int]] = []
    for row, parent in spanning(words):
        masks = used if parent < 0 else words[row] ^ words[parent]
        places = np.flatnonzero(masks)
        entries += [(int(k), int(masks[k]), int(words[row, k] & masks[k])) for k in places]
        differing = sum(int(masks[k]).bit_count() for k in places)
        order.append(row)
        parents.append(parent)
        first.append(len(entries))
        # sum = total - 2 * popcount for a root; a child's is its parent's + 2 * (differing - 2 * popcount).
        add.append(total if parent < 0 else 2 * differing)
    columns: Any = list(zip(*entries, strict=True)) or [(), (), ()]
    return Tree(
        order=np.array(order, np.int32),
        parent=np.array(parents, np.int32),
        first=np.array(first, np.int32),
        add=np.array(add, np.int32),
        place=np.array(columns[0], np.int32),
        mask=np.array(columns[1], np.uint64),
        bits=np.array(columns[2], np.uint64),
    )


def reused(program: Program, words: Words, used: Words, total: int) -> Struct | None:
    """The `tf_reuse` of rows of signs; None where computing every row from its words is less work."""
    found = tree(words, used, total)
    if len(found.place) > WORTH * words.size:
        return None
    types = {"order": "int32_t", "parent": "int32_t", "first": "int32_t", "add": "int32_t", "place": "int32_t"}
    types |= {"mask": "uint64_t", "bits": "uint64_t"}
    fields = {n: program.constant(f"tree_{n}", t, getattr(found, n)) for n, t in types.items()}
    return Struct("tf_reuse", fields)
