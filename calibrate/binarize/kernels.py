"""Few distinct sign kernels: 3x3 kernels of ±1 follow a power law, so a codebook holds them (arXiv 2303.14470)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, mean_magnitude, plain_classes
from calibrate.binarize.sign import SIGNS
from calibrate.errors import CalibrationError
from calibrate.levels import Grid


class Kernels:
    """Signs whose `size` neighbours (a 3x3 kernel: 9) are one of `count` patterns, found by k-medoids in the error
    that they cost; scales then fitted. A kernel takes log2(count) bits, five ninths of a bit per weight with 32.

    Selection without the paper's training by permutations. Where rows are no multiple of `size`, or have no more
    kernels than patterns, the signs are kept as they are.
    """

    levels = 2
    patterns = True
    defaults: ClassVar[Mapping[str, Any]] = {"count": 32, "size": 9, "rounds": 10}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        size, count = int(options["size"]), int(options["count"])
        if not 2 <= size <= 16 or not 2 <= count <= 2**size:
            raise CalibrationError(f"kernels takes a size of 2 to 16 and 2 to 2^size patterns, not {size} and {count}")
        grid = Grid(SIGNS, plain_classes(weight.shape[2]))
        scales = mean_magnitude(weight, importance)
        signs = torch.where(weight >= 0, 1.0, -1.0).double()
        if weight.shape[2] % size == 0:
            signs = _from_few(weight * importance[:, None] * scales[..., None], size, count, int(options["rounds"]))
        # Where the pattern says otherwise than the weight, the scale shrinks: a = mean(w b).
        counts = importance[:, None]
        scales = ((weight * signs * counts).sum(2) / counts.sum(2)).clamp(min=0)
        return Binarized(grid, (signs > 0).long(), scales[..., None])


def _from_few(gain: Tensor, size: int, count: int, rounds: int) -> Tensor:
    """Signs like `gain` [g, o, k] in which each run of `size` is one of `count` patterns that win most of the gain.

    A pattern's gain at a kernel is the sum of gain where it agrees less where it doesn't: its error in a, to constants.
    """
    kernels = gain.reshape(-1, size)
    signs = torch.where(kernels >= 0, 1.0, -1.0).double()
    keys = ((signs > 0).long() << torch.arange(size)).sum(1)
    weights = torch.zeros(2**size, dtype=torch.float64).index_add_(0, keys, kernels.abs().sum(1))
    if int((weights > 0).sum()) <= count:
        return signs.reshape(gain.shape)
    first = weights.argsort(descending=True, stable=True)[:count]
    book = _patterns(first, size)
    for _ in range(rounds):
        taken = (kernels @ book.T).argmax(1)
        sums = torch.zeros_like(book).index_add_(0, taken, kernels)
        fresh = torch.where(sums == 0, book, torch.where(sums >= 0, 1.0, -1.0).double())
        if torch.equal(fresh, book):
            break
        book = fresh
    return book[(kernels @ book.T).argmax(1)].reshape(gain.shape)


def _patterns(keys: Tensor, size: int) -> Tensor:
    return ((keys[:, None] >> torch.arange(size)) & 1).double() * 2 - 1


BINARIZER = Kernels()
