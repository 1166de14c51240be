"""Signs with a scale per row and one per column (OneBit's sign-value decomposition, arXiv 2402.11295, equation 5)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, plain_classes
from calibrate.binarize.sign import SIGNS
from calibrate.levels import Grid


def rank_one(magnitude: Tensor, importance: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Rows [g, o] and columns [k] with rows x columns next to |W| [g, o, k] in the squares weighed by [g, k].

    Power iteration, which is ARB-RC's alternation (arXiv 2410.03129). Columns are shared by all groups and have mean
    square 1, so that rows keep the size of the weights.
    """
    groups, _, width = magnitude.shape
    columns = torch.ones(groups, width, dtype=torch.float64)
    rows = magnitude.mean(2)
    for _ in range(rounds):
        counts = importance * columns
        rows = (magnitude * counts[:, None]).sum(2) / (counts * columns).sum(1, keepdim=True).clamp(min=1e-30)
        columns = (magnitude * rows[..., None]).sum(1) / rows.square().sum(1, keepdim=True).clamp(min=1e-30)
        size = columns.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        columns, rows = columns / size, rows * size
    return rows, columns


class OneBit:
    """Ŵ = diag(a) sign(W) diag(c), a c^T the best rank-one approximation of |W|. One convolution group only: columns of
    several groups would need scales of their own, and get ones."""

    levels = 2
    defaults: ClassVar[Mapping[str, Any]] = {"rounds": 15}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        rows, columns = rank_one(weight.abs(), importance, int(options["rounds"]))
        if len(weight) > 1:
            columns = torch.ones_like(columns)
            rows = (weight.abs() * importance[:, None]).sum(2) / importance.sum(1, keepdim=True)
        grid = Grid(SIGNS, plain_classes(weight.shape[2]), columns[0])
        return Binarized(grid, (weight >= 0).long(), rows[..., None])


BINARIZER = OneBit()
