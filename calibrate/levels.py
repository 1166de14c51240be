"""Weights of a few levels per output channel: choosing levels column by column, and fitting their sizes.

A level is a sum of scales with small whole factors: sign is ±a, ternary 0 and ±a, two planes ±a ± b. `Grid.factors`
says which sums there are, `scales` how large the parts are in each row. What an error costs is what `hessian` says it
costs: (Ŵ - W) H (Ŵ - W)^T. All float64, for g convolution groups at once: W [g, o, k], H [g, k, k].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import BLOCK, DAMPING, factor, importance_order

# A share of its trace is added to the matrix of a row's scales: where two planes are alike it is singular.
TINY = 1e-9


@dataclass(frozen=True)
class Grid:
    """The levels that a binarizer allows.

    factors: float64 [c, l, p], for each class of columns each level as factors of p scales. classes: int64 [k], the
    class of every column. columns: float64 [k], what the levels of a column are multiplied with; None for ones.
    """

    factors: Tensor
    classes: Tensor
    columns: Tensor | None = None

    def levels(self, scales: Tensor) -> Tensor:
        """The levels [g, o, c, l] for scales [g, o, p]."""
        return torch.einsum("clp,gop->gocl", self.factors, scales)

    def parts(self, chosen: Tensor) -> Tensor:
        """What each scale is multiplied with at the chosen levels (int64 [g, o, k]): float64 [g, o, k, p]."""
        found = self.factors[self.classes.expand(chosen.shape), chosen]
        return found if self.columns is None else found * self.columns[:, None]

    def values(self, chosen: Tensor, scales: Tensor) -> Tensor:
        """The weight that levels `chosen` (int64 [g, o, k]) and scales [g, o, p] stand for."""
        return (self.parts(chosen) * scales[:, :, None, :]).sum(-1)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The level next to each weight, int64 [g, o, k]; of two as near the larger, so that zero becomes +1."""
        levels = self.levels(scales)
        chosen = torch.empty(weight.shape, dtype=torch.int64)
        for j in range(weight.shape[2]):
            chosen[:, :, j] = self._pick(weight[:, :, j], levels, j)
        return chosen

    def _pick(self, column: Tensor, levels: Tensor, j: int) -> Tensor:
        """The level next to each number of column `j`, [g, o]."""
        there = levels[:, :, self.classes[j]]
        if self.columns is not None:
            there = there * self.columns[j]
        return upper_argmin((column[:, :, None] - there).abs())


def upper_argmin(distance: Tensor) -> Tensor:
    """The index of the least number along the last axis; of several the last."""
    return distance.shape[-1] - 1 - distance.flip(-1).argmin(-1)


def propagate(weight: Tensor, h: Tensor, grid: Grid, scales: Tensor, damping: float = DAMPING) -> Tensor:
    """Levels int64 [g, o, k], important columns first, the error of each made up for by the columns still open.

    arXiv 2210.17323, algorithm 1, with `scales` [g, o, p] as they are. Columns that no sample used go to their nearest.
    """
    groups, out, width = weight.shape
    order = importance_order(h, None)
    columns = order[:, None, :].expand(groups, out, width)
    w = weight.double().gather(2, columns)
    sorted_h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    dead = (sorted_h.diagonal(dim1=1, dim2=2) == 0).double()
    upper, _ = factor(sorted_h + torch.diag_embed(dead), damping)
    levels = grid.levels(scales)[:, :, grid.classes]  # [g, o, k, l]
    if grid.columns is not None:
        levels = levels * grid.columns[:, None]
    levels = levels.gather(2, columns[..., None].expand_as(levels))
    chosen = torch.empty(weight.shape, dtype=torch.int64)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.empty(groups, out, end - start, dtype=torch.float64)
        for i in range(start, end):
            here = levels[:, :, i]
            picked = upper_argmin((w[:, :, i, None] - here).abs())
            chosen[:, :, i] = picked
            value = here.gather(-1, picked[..., None]).squeeze(-1)
            error = (w[:, :, i] - value) / upper[:, None, i, i]
            w[:, :, i:end] -= error[:, :, None] * upper[:, None, i, i:end]
            errors[:, :, i - start] = error
        w[:, :, end:] -= errors @ upper[:, start:end, end:]
    return chosen.gather(2, order.argsort(1)[:, None, :].expand_as(columns))


def fit_scales(weight: Tensor, h: Tensor, grid: Grid, chosen: Tensor, before: Tensor) -> Tensor:
    """The scales [g, o, p] that cost least at the levels chosen: each row's normal equations under H.

    (For one plane a = b H w / b H b, ARB-X of arXiv 2410.03129.) A row whose cost would not fall keeps `before`.
    """
    parts = grid.parts(chosen)  # [g, o, k, p]
    through = torch.einsum("gkm,gomp->gokp", h, parts)
    matrix = parts.transpose(2, 3) @ through
    wanted = torch.einsum("gokp,gok->gop", through, weight)
    trace = matrix.diagonal(dim1=2, dim2=3).sum(-1)
    safe = matrix + torch.diag_embed((TINY * trace + TINY)[..., None].expand(wanted.shape))
    found = torch.linalg.solve(safe, wanted[..., None]).squeeze(-1)
    old, new = (
        (x[..., None, :] @ matrix @ x[..., None])[..., 0, 0] - 2 * (x * wanted).sum(-1) for x in (before, found)
    )
    return torch.where(((new < old) & torch.isfinite(found).all(-1))[..., None], found, before)


def descend(weight: Tensor, h: Tensor, grid: Grid, scales: Tensor, chosen: Tensor, passes: int) -> Tensor:
    """Levels that cost no more than `chosen`: each column in turn set to the best level given all others.

    Cyclic coordinate descent, exact for every column (QuantEase, arXiv 2309.01885); stops when nothing moves.
    """
    chosen = chosen.clone()
    levels = grid.levels(scales)
    error = grid.values(chosen, scales) - weight
    diagonal = h.diagonal(dim1=1, dim2=2)
    for _ in range(passes):
        before = chosen.clone()
        for j in range(weight.shape[2]):
            alive = diagonal[:, j, None] > 0
            slope = torch.einsum("gok,gk->go", error, h[:, :, j])
            now = error[:, :, j] + weight[:, :, j]
            wish = now - slope / diagonal[:, j, None].clamp(min=torch.finfo(h.dtype).tiny)
            picked = torch.where(alive, grid._pick(wish, levels, j), chosen[:, :, j])
            there = levels[:, :, grid.classes[j]].gather(-1, picked[..., None]).squeeze(-1)
            fresh = there if grid.columns is None else there * grid.columns[j]
            moved = (fresh - now).abs() > 0
            chosen[:, :, j] = torch.where(moved, picked, chosen[:, :, j])
            error[:, :, j] = torch.where(moved, fresh, now) - weight[:, :, j]
        if torch.equal(before, chosen):
            break
    return chosen


def to_levels(numbers: Tensor, levels: Tensor) -> Tensor:
    """The nearest of its row's levels for each of `numbers` [out, ...]; levels [out, n] ascending. Halves go up."""
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    shape = (-1, *[1] * (numbers.dim() - 1))
    found = levels[:, 0].view(shape).expand(numbers.shape)
    for i in range(edges.shape[1]):
        found = torch.where(numbers >= edges[:, i].view(shape), levels[:, i + 1].view(shape), found)
    return found


def alphabet(codes: Tensor, most: int = 4) -> Tensor | None:
    """The codes that each row uses, int8 [out, n] ascending, n = 2 or `most`, rows with fewer filled with their own.

    codes int8 [out, ...]; None where a row uses more than `most`, or has so few numbers that this says nothing.
    """
    rows = codes.reshape(len(codes), -1)
    if rows.shape[1] <= 2 * most:
        return None
    ordered = rows.sort(1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = fresh.sum(1)
    if int(counts.max()) > most:
        return None
    size = 2 if int(counts.max()) <= 2 else most
    found = torch.empty(len(rows), size, dtype=codes.dtype)
    for index, (row, first) in enumerate(zip(ordered, fresh, strict=True)):
        own = row[first]
        found[index] = torch.cat([own, own[-1:].expand(size - len(own))])
    return found
