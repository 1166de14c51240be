"""Levels at even distance around zero, scale searched: ParetoQ's grids without its training (arXiv 2502.02631)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, alternate, plain_classes
from calibrate.errors import CalibrationError
from calibrate.levels import Grid

FACTORS = {1: (-1.0, 1.0), 1.58: (-1.0, 0.0, 1.0), 2: (-3.0, -1.0, 1.0, 3.0)}
# Of the largest weight, what the outermost level is tried at: ParetoQ starts training from all of it, which without
# training is half as good as the best of these.
REACHES = tuple(i / 24 for i in range(5, 25))


class Elastic:
    """`bits` 1: ±a. 1.58: 0, ±a. 2: ±a, ±3a (the "stretched" levels of ParetoQ, section 3.2: none is zero).

    The scale with the least squared error of those that clip the row at some share of its largest weight, then scale
    and levels in turns. Two bits are two planes of which one is twice the other.
    """

    levels = 4
    defaults: ClassVar[Mapping[str, Any]] = {"bits": 2, "rounds": 10}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        if options["bits"] not in FACTORS:
            raise CalibrationError(f"elastic has no grid of {options['bits']} bits: use 1, 1.58 or 2")
        factors = torch.tensor(FACTORS[options["bits"]], dtype=torch.float64)
        grid = Grid(factors[None, :, None], plain_classes(weight.shape[2]))
        most = weight.abs().amax(2) / factors.max()
        best, least = most, torch.full_like(most, torch.inf)
        for reach in REACHES:
            scale = most * reach
            values = grid.values(grid.nearest(weight, scale[..., None]), scale[..., None])
            error = ((values - weight).square() * importance[:, None]).sum(2)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return alternate(weight, importance, grid, best[..., None], int(options["rounds"]))


BINARIZER = Elastic()
