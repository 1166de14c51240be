"""Two sign planes: the second is the first one's residual, then both are refined in turns (ARB-RC, BinaryDM)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, alternate, mean_magnitude, plain_classes
from calibrate.binarize.onebit import rank_one
from calibrate.levels import Grid

PLANES = torch.tensor([[[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64)


class Planes:
    """Ŵ = a1 B1 + a2 B2 per row: a1 = mean |W|, a2 = mean |W - a1 B1|, then nearest of the four levels ±a1 ± a2 and
    each row's normal equations in turns (arXiv 2410.03129; the residual start: arXiv 2404.05662, BEBR 2302.08714).

    `columns`: a scale per column besides (ARB-RC). It is worth as much as columns differ in size.
    """

    levels = 4
    defaults: ClassVar[Mapping[str, Any]] = {"columns": False, "rounds": 15}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        rounds = int(options["rounds"])
        columns = None
        if options["columns"] and len(weight) == 1:
            columns = rank_one(weight.abs(), importance, rounds)[1][0].clamp(min=1e-30)
        grid = Grid(PLANES, plain_classes(weight.shape[2]), columns)
        even, counts = (weight, importance) if columns is None else (weight / columns, importance * columns.square())
        first = mean_magnitude(even, counts)
        rest = even - first[..., None] * torch.where(even >= 0, 1.0, -1.0)
        return alternate(weight, importance, grid, torch.stack([first, mean_magnitude(rest, counts)], -1), rounds)


BINARIZER = Planes()
