"""One-dimensional k-means: the table of 2^bits values that stands for a weight with the least squared error."""

import numpy as np
import torch
from torch import Tensor

# So many distinct values (else bins of them) are searched for the best partition, at a cost of EXACT^2 * entries.
EXACT = 512
# No stretch of the best partition is expected to hold more than so many times the bins of an average one.
LONGEST = 16
DENSITY_BINS = 4096
ROUNDS = 100


def palette(weight: Tensor, entries: int, importance: Tensor | None = None, half: bool = False) -> Tensor:
    """The table float32 [entries], ascending, for a float weight of any shape; the last value repeats where fewer do.

    Minimises sum importance * (weight - nearest entry)^2; `importance` (same shape, >= 0) defaults to one. The optimal
    partition by dynamic programming (Wang & Song 2011, "Ckmeans.1d.dp"): of the distinct values where they are few,
    else of bins whose width follows the density to the power 1/3, as that of the best stretches does (Panter & Dite
    1951). Then Lloyd's iteration on all values. Nothing is random. `half`: entries are float16 numbers.
    """
    values, masses = _sorted(weight, importance)
    sums = _Sums(values, masses)
    distinct = torch.unique_consecutive(values)
    if len(distinct) <= entries:
        table = distinct
    else:
        cuts = _best_cuts(values, distinct, sums, entries)
        table = _lloyd(values, sums, sums.means(cuts))
    if half:
        table = table.half().double()
    table = torch.cat([table, table[-1:].expand(entries - len(table))])
    return table.float()


def nearest(weight: Tensor, table: Tensor) -> Tensor:
    """uint8 indices of the entries nearest to `weight` (any shape) in an ascending `table` [<= 256]; ties go down."""
    middles = (table[1:].double() + table[:-1].double()) / 2
    return torch.bucketize(weight.detach().double(), middles).to(torch.uint8)


def _sorted(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values in ascending order and their importance, float64; sorted by NumPy, ten times as fast as torch."""
    flat = weight.detach().flatten().numpy()
    if importance is None or float(importance.sum()) <= 0:
        values = torch.from_numpy(np.sort(flat)).double()
        return values, torch.ones_like(values)
    order = torch.from_numpy(np.argsort(flat, kind="stable"))
    masses = importance.detach().double().flatten()[order]
    # A value that no input ever meets still wants a near entry.
    return weight.detach().flatten()[order].double(), masses + masses.mean() * 1e-9


class _Sums:
    """Running sums over sorted values, so that the mean and error of any stretch cost three lookups."""

    def __init__(self, values: Tensor, masses: Tensor) -> None:
        self.middle = (values * masses).sum() / masses.sum()  # sums about the mean: squares would cancel otherwise
        centred = values - self.middle
        moments = (masses, masses * centred, masses * centred.square())
        self.zero, self.one, self.two = (torch.cat([m.new_zeros(1), m.cumsum(0)]) for m in moments)

    def means(self, cuts: Tensor) -> Tensor:
        """The mean of each stretch between neighbouring cuts, float64 [cuts - 1]; empty stretches are left out."""
        mass = self.zero[cuts[1:]] - self.zero[cuts[:-1]]
        kept = cuts[1:] > cuts[:-1]
        return ((self.one[cuts[1:]] - self.one[cuts[:-1]])[kept] / mass[kept]) + self.middle

    def errors(self, starts: Tensor, ends: Tensor) -> Tensor:
        """The squared error of the stretches [start, end) about their means."""
        mass, first, second = (s[ends] - s[starts] for s in (self.zero, self.one, self.two))
        return (second - first.square() / mass.clamp(min=1e-300)).clamp(min=0)


def _best_cuts(values: Tensor, distinct: Tensor, sums: _Sums, entries: int) -> Tensor:
    """Where to cut the sorted values into `entries` stretches: int64 [entries + 1], from 0 to the end."""
    if len(distinct) <= EXACT:
        return _partition(torch.searchsorted(values, distinct), len(values), sums, entries, len(distinct))
    starts = _dense_cuts(values, max(EXACT, 4 * entries))
    return _partition(starts, len(values), sums, entries, min(len(starts), LONGEST * len(starts) // entries))


def _dense_cuts(values: Tensor, count: int) -> Tensor:
    """Starts (int64, from 0) of at most `count` bins of sorted values, narrow where the values are dense."""
    low, high = float(values[0]), float(values[-1])
    bins = max(count // 4, min(DENSITY_BINS, len(values) // 32))  # fewer would be coarse, more would be noise
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    starts = torch.searchsorted(values, edges)
    starts[-1] = len(values)
    share = (starts[1:] - starts[:-1]).double().pow(1 / 3).cumsum(0)
    share = torch.cat([share.new_zeros(1), share]) / share[-1]
    wanted = torch.arange(count, dtype=torch.float64) / count
    right = torch.searchsorted(share, wanted).clamp(1, bins)
    left = right - 1
    inside = (wanted - share[left]) / (share[right] - share[left]).clamp(min=1e-300)
    places = edges[left] + inside.clamp(0, 1) * (edges[right] - edges[left])
    return torch.unique(torch.cat([torch.tensor([0]), torch.searchsorted(values, places)]))


def _partition(starts: Tensor, size: int, sums: _Sums, entries: int, longest: int) -> Tensor:
    """The best partition whose cuts are among `starts` and whose stretches hold at most `longest` of them.

    Dynamic programming over the number of stretches: best[e] is the least error of what ends with bin e.
    """
    count = len(starts)
    bounds = torch.cat([starts, torch.tensor([size])])
    last = torch.arange(count)[:, None]
    first = last - longest + 1 + torch.arange(longest)  # [last bin, which first bin]
    cost = sums.errors(bounds[first.clamp(min=0)], bounds[last + 1]).masked_fill(first < 0, torch.inf)
    best = torch.where(last[:, 0] < longest, sums.errors(bounds[:1], bounds[1:]), torch.inf)
    choices = []
    for _ in range(min(entries, count) - 1):
        before = torch.cat([best.new_full((longest,), torch.inf), best[:-1]])
        best, choice = (cost + before.unfold(0, longest, 1)).min(1)
        choices.append(choice)
    cut, cuts = count - 1, [size]
    for choice in reversed(choices):
        start = int(first[cut, choice[cut]])
        cuts.append(int(bounds[start]))
        cut = start - 1
    return torch.tensor([0, *reversed(cuts)])


def _lloyd(values: Tensor, sums: _Sums, table: Tensor) -> Tensor:
    """Move entries to the mean of the values nearest to them until nothing moves (at most ROUNDS times)."""
    ends = torch.tensor([0, len(values)])
    for _ in range(ROUNDS):
        inner = torch.searchsorted(values, (table[1:] + table[:-1]) / 2, right=True)
        moved = sums.means(torch.cat([ends[:1], inner, ends[1:]]))
        if len(moved) == len(table) and torch.equal(moved, table):
            break
        table = moved
    return table
