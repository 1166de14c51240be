"""Signs with two magnitudes per row: salient columns have one of their own (BiLLM and PB-LLM, one bit per weight)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibrate.binarize import Binarized, mean_magnitude
from calibrate.errors import CalibrationError
from calibrate.levels import Grid

SPLIT = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]], [[0.0, -1.0], [0.0, 1.0]]], dtype=torch.float64)
# Shares of columns tried as salient; none is tried too, so that the error never exceeds that of plain signs.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)


class Salient:
    """Ŵ = a sign(W) in most columns and b sign(W) in the salient ones: those with the most weight power times input
    power (BiLLM's column saliency, arXiv 2402.04291, section 3.1, by the diagonal of H). Of `shares` the share with the
    least error is taken. The classes are those of whole columns, so a file needs one bit per weight and one per column;
    BiLLM's bitmap over single weights would be a second bit.
    """

    levels = 4
    defaults: ClassVar[Mapping[str, Any]] = {"shares": SHARES}

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        shares = sorted({0.0, *(float(s) for s in options["shares"])})
        if shares[-1] > 1 or shares[0] < 0:
            raise CalibrationError(f"salient takes shares from 0 to 1, not {options['shares']}")
        width = weight.shape[2]
        ranking = (weight.square().mean(1) * importance).sum(0).argsort(descending=True, stable=True)
        chosen = (weight >= 0).long()
        best: Binarized | None = None
        least = torch.inf
        for share in shares:
            classes = torch.zeros(width, dtype=torch.int64)
            classes[ranking[: round(share * width)]] = 1
            usual, special = ((classes == c).double() * importance + 1e-12 * importance for c in (0, 1))
            scales = torch.stack([mean_magnitude(weight, usual), mean_magnitude(weight, special)], -1)
            tried = Binarized(Grid(SPLIT, classes), chosen, scales)
            error = float(((tried.values - weight).square() * importance[:, None]).sum())
            if error < least:
                best, least = tried, error
        assert best is not None
        return best


BINARIZER = Salient()
