"""A histogram that grows with its data: constant memory, one pass, any range."""

import torch
from torch import Tensor

BINS = 4096
# float32 exponents as frexp gives them: -148 (subnormal) to 128.
LOWEST_EXPONENT = -148
EXPONENTS = 128 - LOWEST_EXPONENT + 1


class Histogram:
    """Counts of a stream of values over [-limit, limit], `limit` a power of two that doubles when values outgrow it.

    Doubling merges pairs of bins, so no count is lost. Beside it: the exact minimum and maximum, and how many values
    have which exponent, as one far value makes the bins too wide to show the size of all others.
    """

    def __init__(self) -> None:
        self.limit = 2.0**-20
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponents = torch.zeros(EXPONENTS, dtype=torch.float64)
        self.low = float("inf")
        self.high = float("-inf")
        self.finite = True

    def add(self, x: Tensor) -> None:
        """Count every element of `x` (float32, any shape)."""
        low, high = (float(v) for v in torch.aminmax(x))
        if not (abs(low) < 1e30 and abs(high) < 1e30):
            self.finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(abs(low), abs(high)))
        self.counts += torch.histc(x, BINS, -self.limit, self.limit).double()
        exponents = torch.frexp(x[x != 0]).exponent.long() - LOWEST_EXPONENT
        self.exponents += torch.bincount(exponents, minlength=EXPONENTS).double()

    def merge(self, other: "Histogram") -> None:
        """Take in the counts of another histogram."""
        self.finite &= other.finite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._grow(other.limit)
        theirs = other.counts
        limit = other.limit
        while limit < self.limit:
            theirs, limit = _halve(theirs), limit * 2
        self.counts += theirs
        self.exponents += other.exponents

    def magnitude(self, share: float) -> float:
        """A power of two that `share` of the nonzero values do not exceed, the least such; 0 when all are zero."""
        total = float(self.exponents.sum())
        if total == 0:
            return 0.0
        reached = self.exponents.cumsum(0) >= share * total
        return float(2.0 ** (int(reached.nonzero()[0]) + LOWEST_EXPONENT))

    def _grow(self, reach: float) -> None:
        while self.limit < reach:
            self.counts = _halve(self.counts)
            self.limit *= 2

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64 [BINS]."""
        width = 2 * self.limit / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.limit


def _halve(counts: Tensor) -> Tensor:
    """The same counts over twice the range: inner pairs merged, the outer quarters empty."""
    merged = counts.view(-1, 2).sum(1)
    empty = torch.zeros(BINS // 4, dtype=counts.dtype)
    return torch.cat([empty, merged, empty])
