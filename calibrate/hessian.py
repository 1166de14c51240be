"""Weights and the second moments of what they read: rounding column by column, ridge updates, single flips.

A layer is a batch of independent least-squares problems, one per convolution group (one for linear): weights
W [g, o, k], inputs X [g, n, k], outputs X W^T. H = X^T X [g, k, k] says what an error in the weights costs:
((Ŵ - W) H (Ŵ - W)^T). All float64; a depthwise convolution is g small problems solved at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# X^T X is summed over chunks of so many rows in float32, the chunks in float64: half the time of float64, and what is
# lost is 1e-7 of a sum to which `DAMPING` is about to be added.
CHUNK = 1024
# A share of H's mean diagonal is added to it (arXiv 2210.17323, section 3.3), ten times more while that isn't enough.
DAMPING = 0.01
MOST_DAMPING = 1e4
BLOCK = 128

# Fits the scale of one group: (current weights [o, group], their columns [group]) -> scales [o].
Refit = Callable[[Tensor, Tensor], Tensor]


def gram(x: Tensor) -> Tensor:
    """X^T X, float64 [g, k, k], of rows x float32 [g, n, k]."""
    total = torch.zeros(x.shape[0], x.shape[2], x.shape[2], dtype=torch.float64)
    for part in x.split(CHUNK, 1):
        total += (part.transpose(1, 2) @ part).double()
    return total


def damped(h: Tensor, share: float) -> Tensor:
    """H plus `share` of its mean diagonal on the diagonal, group by group; where that is zero, plus one."""
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    extra = torch.where(mean > 0, share * mean, torch.ones_like(mean)).expand_as(diagonal)
    return h + torch.diag_embed(extra)


def factor(h: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """(U, the damping it took): U upper triangular [g, k, k] with U^T U = (H + damping * mean diagonal)^-1.

    Raises ValueError when H stays singular to the last (not finite).
    """
    share = damping
    while share <= max(MOST_DAMPING, damping):
        lower, failed = torch.linalg.cholesky_ex(damped(h, share))
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any() and bool(torch.isfinite(upper).all()):
                return upper, share
        share *= 10
    raise ValueError("its inputs are not finite numbers")


def importance_order(h: Tensor, group: int | None) -> Tensor:
    """In which order columns are rounded, int64 [g, k]: large diag(H) first, while all others can still make up for it.

    With groups that share a scale, groups by their largest entry and columns within their group (group-aware
    reordering, arXiv 2505.14638): a column never leaves its group, so nothing has to be gathered at run time.
    """
    diagonal = h.diagonal(dim1=1, dim2=2)
    if group is None:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    parts = diagonal.unflatten(1, (-1, group))
    inside = parts.argsort(dim=2, descending=True, stable=True)
    between = parts.amax(2).argsort(dim=1, descending=True, stable=True)
    columns = inside + torch.arange(parts.shape[1])[None, :, None] * group
    return columns.gather(1, between[:, :, None].expand_as(columns)).flatten(1)


def gptq(
    weight: Tensor,
    h: Tensor,
    step: Tensor,
    low: int,
    high: int,
    *,
    order: Tensor | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
    group: int | None = None,
    refit: Refit | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [g, o, k] (float64, whole numbers in [low, high]) and the step of each: column by column, the error of each
    made up for by the columns still open (arXiv 2210.17323, algorithm 1).

    weight, step [g, o, k]; `order` [g, k] int64, None as they stand. Columns that no sample ever used (a zero on H's
    diagonal) are rounded to nearest: what is dead in the samples may live later. With `refit` (g = 1, `group` columns
    that stand together in `order`) each group's step is fitted on the weights as they are when its turn comes. Updates
    beyond a block of columns are made at its end, all at once.
    """
    groups, out, width = weight.shape
    order = torch.arange(width).expand(groups, width) if order is None else order
    columns = order[:, None, :].expand(groups, out, width)
    w = weight.double().gather(2, columns)
    steps = step.double().gather(2, columns)
    sorted_h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    dead = (sorted_h.diagonal(dim1=1, dim2=2) == 0).double()
    upper, _ = factor(sorted_h + torch.diag_embed(dead), damping)
    codes = torch.empty_like(w)
    block = -(-block // group) * group if refit is not None and group else block
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.empty(groups, out, end - start, dtype=torch.float64)
        for i in range(start, end):
            if refit is not None and group and i % group == 0:
                fitted = refit(w[0, :, i : i + group], order[0, i : i + group])
                steps[0, :, i : i + group] = fitted.double()[:, None]
            codes[:, :, i] = torch.round(w[:, :, i] / steps[:, :, i]).clamp(low, high)
            error = (w[:, :, i] - codes[:, :, i] * steps[:, :, i]) / upper[:, None, i, i]
            w[:, :, i:end] -= error[:, :, None] * upper[:, None, i, i:end]
            errors[:, :, i - start] = error
        w[:, :, end:] -= errors @ upper[:, start:end, end:]
    back = order.argsort(1)[:, None, :].expand_as(columns)
    return codes.gather(2, back), steps.gather(2, back)


def ridge(x: Tensor, missing: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What to add to W [g, o, k] and to the bias [g, o] so that X dW^T + db comes near `missing` [g, n, o].

    Ridge regression, dW = (X^T X + lambda I)^-1 X^T missing (ERQ, ICML 2024, section 3.2), lambda = `damping` times the
    mean diagonal; X and `missing` are centred first, so that the bias takes their means and is not held back.
    """
    mean_x, mean_y = x.double().mean(1, keepdim=True), missing.double().mean(1, keepdim=True)
    centred = (x - mean_x).float()
    cross = centred.transpose(1, 2).double() @ (missing - mean_y).double()
    upper, _ = factor(gram(centred), damping)
    change = (upper.transpose(1, 2) @ (upper @ cross)).transpose(1, 2)
    return change, (mean_y - mean_x @ change.transpose(1, 2)).squeeze(1)


def cost(error: Tensor, h: Tensor) -> Tensor:
    """What an error in the weights [g, o, k] costs at the output: sum of squares over all rows, [g, o]."""
    return ((error.double() @ h) * error.double()).sum(2)


def descend(
    codes: Tensor, weight: Tensor, h: Tensor, step: Tensor, low: Tensor, high: Tensor, passes: int
) -> tuple[Tensor, int]:
    """Codes that cost no more than `codes`, and how many moved: each in turn set to the best number given all others.

    Cyclic coordinate descent on (Ŵ - W) H (Ŵ - W)^T, exact for every column (QuantEase, arXiv 2309.01885); it stops
    early when nothing moves. `low` and `high` [g, o, k] bound every code: one step from nearest for mere flips.
    """
    codes, moved = codes.double().clone(), 0
    error = codes * step - weight
    diagonal = h.diagonal(dim1=1, dim2=2)
    for _ in range(passes):
        before = codes.clone()
        for i in range(weight.shape[2]):
            alive = diagonal[:, i, None] > 0
            slope = torch.einsum("gok,gk->go", error, h[:, :, i])
            wish = codes[:, :, i] - slope / (diagonal[:, i, None] * step[:, :, i]).clamp(min=torch.finfo(h.dtype).tiny)
            best = torch.maximum(torch.minimum(torch.round(wish), high[:, :, i]), low[:, :, i])
            codes[:, :, i] = torch.where(alive, best, codes[:, :, i])
            error[:, :, i] = codes[:, :, i] * step[:, :, i] - weight[:, :, i]
        changed = int((codes != before).sum())
        moved += changed
        if not changed:
            break
    return codes, moved
