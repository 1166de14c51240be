"""Signs with one scale per output channel (XNOR-Net, arXiv 1603.05279, equation 6)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, mean_magnitude, plain_classes
from calibrate.levels import Grid

SIGNS = torch.tensor([[[-1.0], [1.0]]], dtype=torch.float64)


class Sign:
    """Ŵ = a sign(W), a = mean |W| of a row: the least squared error that signs can have. sign(0) = +1."""

    levels = 2
    defaults: ClassVar[Mapping[str, Any]] = {}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        grid = Grid(SIGNS, plain_classes(weight.shape[2]))
        scales = mean_magnitude(weight, importance)[..., None]
        return Binarized(grid, (weight >= 0).long(), scales)


BINARIZER = Sign()
