"""Three levels per output channel, 0 and ±a: threshold searched, as in ternary weight networks, or by the mean."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, alternate, mean_magnitude, plain_classes
from calibrate.errors import CalibrationError
from calibrate.levels import Grid

TERNARY = torch.tensor([[[-1.0], [0.0], [1.0]]], dtype=torch.float64)
# Thresholds tried, in means of |w|: TWN's own is 0.7 (arXiv 1605.04711, equation 6).
THRESHOLDS = (0.7, 0.5, 0.6, 0.8, 0.9, 1.0, 1.2)
RULES = ("searched", "absmean")


class Ternary:
    """`rule` "searched": of several thresholds the one with the least squared error, then threshold and scale in turns.

    "absmean": clip(round(w / mean |w|)) times mean |w|, BitNet b1.58's rule for training (arXiv 2402.17764). Without
    training it errs by a third more than TWN's, so it is not the default.
    """

    levels = 3
    defaults: ClassVar[Mapping[str, Any]] = {"rule": "searched", "rounds": 10}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        if options["rule"] not in RULES:
            raise CalibrationError(f"ternary has no rule {options['rule']!r}: use {' or '.join(RULES)}")
        grid = Grid(TERNARY, plain_classes(weight.shape[2]))
        mean = mean_magnitude(weight, importance)
        if options["rule"] == "absmean":
            codes = torch.round(weight / mean.clamp(min=1e-30)[..., None]).clamp(-1, 1)
            return Binarized(grid, codes.long() + 1, mean[..., None])
        counts = importance[:, None, :]
        best, least = mean, torch.full_like(mean, torch.inf)
        for threshold in THRESHOLDS:
            kept = (weight.abs() > threshold * mean[..., None]) * counts
            scale = (weight.abs() * kept).sum(2) / kept.sum(2).clamp(min=1e-30)
            codes = grid.nearest(weight, scale[..., None])
            error = ((grid.values(codes, scale[..., None]) - weight).square() * counts).sum(2)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return alternate(weight, importance, grid, best[..., None], int(options["rounds"]))


BINARIZER = Ternary()
