"""Levels as the codes of an int8 layer: whole multiples of one scale per output channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .binarize import Binarized, cost
from .levels import Grid, descend
from .ranges import SMALLEST_FLOAT, SMALLEST_HALF

# Up to this code every number of steps is tried for the largest level: another than the largest may fit the others
# better. Beyond it the steps are fine enough.
COARSE = 7


@dataclass(frozen=True)
class Stored:
    """What a layer stores: codes float64 [g, o, k], whole numbers in [low, high]; scales float32 [g * o]; the weight
    they stand for, float64 [g, o, k]; how many levels a row has."""

    codes: Tensor
    scales: Tensor
    values: Tensor
    low: int
    high: int
    count: int


def stored(weight: Tensor, h: Tensor, made: Binarized, largest: int, half: bool = False) -> Stored:
    """`made` as codes of at most `largest`, near `weight` [g, o, k] under `h` [g, k, k]; `half`: scales are float16.

    One scale times whole factors is exact. The levels of several scales (±a ± b) become the nearest multiples of one
    step: at 127 codes that moves them by less than half a percent, and levels are chosen once more from what they have
    become. Raises ValueError where columns have scales of their own.
    """
    grid = made.grid
    if grid.columns is not None:
        raise ValueError("a scale per column has no place among the codes of a row")
    if grid.factors.shape[-1] == 1:
        codes, scales = grid.parts(made.chosen)[..., 0], made.scales[..., 0]
        reach = int(grid.factors.abs().max())
    else:
        codes, scales = _snapped(weight, h, made, largest)
        reach = largest
    # A row of negative scale is the same row with other signs.
    codes = torch.where((scales < 0)[..., None], -codes, codes)
    scales = _as_stored(scales.abs(), half)
    low, high = (-reach, reach) if reach == 1 or reach > COARSE else (-COARSE - 1, COARSE)
    values = codes * scales.double()[..., None]
    return Stored(codes, scales.flatten(), values, low, high, grid.factors.shape[0] * grid.factors.shape[1])


class _RowGrid(Grid):
    """A grid of one scale whose `factors` [g, o, c, l] differ from row to row."""

    def levels(self, scales: Tensor) -> Tensor:
        return self.factors * scales[..., None]

    def parts(self, chosen: Tensor) -> Tensor:
        return self.factors[:, :, self.classes].gather(-1, chosen[..., None])


def _snapped(weight: Tensor, h: Tensor, made: Binarized, largest: int) -> tuple[Tensor, Tensor]:
    """Codes [g, o, k] and scales [g, o] float64: each row's levels as multiples of the same step."""
    levels = made.grid.levels(made.scales)  # [g, o, c, l]
    top = levels.abs().amax((2, 3)).clamp(min=SMALLEST_FLOAT)
    shares = levels / top[..., None, None]
    numbers = torch.arange(largest if largest > COARSE else 1, largest + 1, dtype=torch.float64).flip(0)
    steps = numbers.view(-1, 1, 1, 1, 1)
    off = (torch.round(shares * steps) / steps - shares).square().sum((-1, -2))
    most = numbers[off.argmin(0)]  # of equals the finest
    grid = _RowGrid(torch.round(shares * most[..., None, None]), made.grid.classes)
    scales = (top / most)[..., None]
    chosen = descend(weight, h, grid, scales, made.chosen, 1)
    codes = grid.parts(chosen)[..., 0]
    through = codes @ h
    power = (through * codes).sum(2)
    fitted = (through * weight).sum(2) / power.clamp(min=SMALLEST_FLOAT)
    better = cost(codes * fitted[..., None] - weight, h) < cost(codes * scales - weight, h)
    return codes, torch.where(better & (power > 0), fitted, scales[..., 0])


def _as_stored(scales: Tensor, half: bool) -> Tensor:
    """Scales float32 as the file holds them; a row of zeros gets the largest row's."""
    largest = float(scales.max()) or 1.0
    scales = torch.where(scales > 0, scales, torch.full_like(scales, largest))
    return scales.clamp(min=SMALLEST_HALF).half().float() if half else scales.clamp(min=SMALLEST_FLOAT).float()
