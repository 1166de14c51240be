"""Binarizers: what levels a weight of one to two bits gets. One per file; the file's name is its name in recipes.

A binarizer only says which levels there are and how large they are at first; which weight takes which, and what the
scales become when inputs are known, is the same for all of them (`calibrate/levels.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import registry
from ..levels import Grid, descend, fit_scales, propagate


@dataclass(frozen=True)
class Binarized:
    """A weight of few levels: `grid`, the level of each weight (int64 [g, o, k]) and the scales [g, o, p] float64."""

    grid: Grid
    chosen: Tensor
    scales: Tensor

    @property
    def values(self) -> Tensor:
        """The weight that is stored, float64 [g, o, k]."""
        return self.grid.values(self.chosen, self.scales)

    @property
    def planes(self) -> Tensor:
        """The factor of each scale, float64 [p, g, o, k]: codes of -1, 0 and 1 for all but `elastic`."""
        bare = replace(self.grid, columns=None)
        return bare.parts(self.chosen).movedim(-1, 0)


class Binarizer(Protocol):
    """`levels`: how many a row has, 2 to 4. `defaults`: its options. `patterns`, where true: whole kernels are chosen
    from a few (see `kernels`), so that columns can't be chosen one by one."""

    levels: int
    defaults: Mapping[str, Any]

    def fit(self, weight: Tensor, importance: Tensor, options: Mapping[str, Any]) -> Binarized:
        """Levels for `weight` float64 [g, o, k], every error weighed by `importance` float64 [g, k] > 0."""
        ...


def names() -> list[str]:
    """The binarizers there are; imports none."""
    return registry.names(__path__)


def find(name: str) -> Binarizer:
    """The binarizer called `name`. Raises CalibrationError when there is none."""
    found: Binarizer = registry.find(__name__, __path__, name, "BINARIZER", "binarizer")
    return found


# A column that the samples hardly used may be used in life: no column counts less than this share of the mean.
LEAST_IMPORTANCE = 0.01


def importance_of(h: Tensor) -> Tensor:
    """How much an error in each column counts, float64 [g, k]: H's diagonal, never nothing."""
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    return torch.maximum(diagonal, LEAST_IMPORTANCE * mean).clamp(min=torch.finfo(torch.float64).tiny)


def binarize(
    name: str,
    weight: Tensor,
    h: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    rounds: int = 6,
    passes: int = 1,
    damping: float = 0.01,
) -> Binarized:
    """`weight` float64 [g, o, k] in the levels of the binarizer `name`.

    Without `h` (float64 [g, k, k], second moments of the inputs) the squared error in the weights is made small. With
    it, the error at the output: columns in turn, each one's error made up for by those behind it, then scales and
    levels in turns for up to `rounds`, every turn lowering the cost.
    """
    chosen_by = find(name)
    wish = {**chosen_by.defaults, **(options or {})}
    groups, _, width = weight.shape
    flat = torch.ones(groups, width, dtype=torch.float64) if h is None else importance_of(h)
    made = chosen_by.fit(weight.double(), flat, wish)
    if h is None:
        return made
    if getattr(chosen_by, "patterns", False):
        return replace(made, scales=fit_scales(weight.double(), h, made.grid, made.chosen, made.scales))
    return compensated(weight.double(), h, made, rounds, passes, damping)


def compensated(
    weight: Tensor, h: Tensor, made: Binarized, rounds: int = 6, passes: int = 1, damping: float = 0.01
) -> Binarized:
    """`made` with levels and scales that cost less at the output: second-order compensation, then both in turns."""
    grid, scales = made.grid, made.scales
    chosen = propagate(weight, h, grid, scales, damping)
    for _ in range(rounds):
        scales = fit_scales(weight, h, grid, chosen, scales)
        fresh = descend(weight, h, grid, scales, chosen, passes)
        if torch.equal(fresh, chosen):
            break
        chosen = fresh
    return better_rows(made, Binarized(grid, chosen, scales), weight, h)


def better_rows(one: Binarized, other: Binarized, weight: Tensor, h: Tensor) -> Binarized:
    """Row by row whichever of the two, of one grid, costs less."""
    better = cost(other.values - weight, h) < cost(one.values - weight, h)
    chosen = torch.where(better[..., None], other.chosen, one.chosen)
    return Binarized(one.grid, chosen, torch.where(better[..., None], other.scales, one.scales))


def cost(error: Tensor, h: Tensor) -> Tensor:
    """What an error in the weights costs at the output, [g, o]."""
    return ((error @ h) * error).sum(2)


def alternate(weight: Tensor, importance: Tensor, grid: Grid, scales: Tensor, rounds: int) -> Binarized:
    """Levels and scales in turns from `scales` on, squared errors weighed by `importance` [g, k]: never worse.

    Alternating refinement (arXiv 2410.03129, ARB): nearest levels, then each row's least squares.
    """
    h = torch.diag_embed(importance)
    chosen = grid.nearest(weight, scales)
    for _ in range(rounds):
        scales = fit_scales(weight, h, grid, chosen, scales)
        fresh = grid.nearest(weight, scales)
        if torch.equal(fresh, chosen):
            break
        chosen = fresh
    return Binarized(grid, chosen, fit_scales(weight, h, grid, chosen, scales))


def plain_classes(width: int) -> Tensor:
    """All columns of one class."""
    return torch.zeros(width, dtype=torch.int64)


def mean_magnitude(weight: Tensor, importance: Tensor) -> Tensor:
    """The best scale of signs [g, o]: each row's mean |w|, weighed by `importance` [g, k]."""
    counts = importance[:, None, :]
    return (weight.abs() * counts).sum(2) / counts.sum(2)
