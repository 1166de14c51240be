"""A histogram that grows with its data: constant memory, one pass, any range, few nanoseconds per value."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
BINS = 4096
# float32 exponents as frexp gives them: -148 (subnormal) to 128.
LOWEST_EXPONENT = -148
EXPONENTS = 128 - LOWEST_EXPONENT + 1
# Of one tensor of one batch, how many values are binned; more than that and every k-th is.
BINNED = 4096
# Neighbours in memory that are taken together: what one cache line holds.
RUN = 16
# Of many values waiting, one in so many has its exponent looked at.
SPARSE = 8
# Values that wait to be binned: many at a time cost little more than few.
WAITING = 16 * BINNED
# A bin's middle from the histogram's, in bins.
CENTERS = np.arange(BINS, dtype=np.float64) + (0.5 - BINS / 2)
# Of the moving average of per-batch extremes, the weight of a new batch (TensorFlow's and PyTorch's constant).
AVERAGING = 0.01


class Histogram:
    """Counts of a stream of values over [-limit, limit], `limit` a power of two that doubles when values outgrow it.

    Doubling merges pairs of bins, so no count is lost. Beside it: the exact minimum and maximum over every value, their
    moving averages over batches, and how many values have which exponent, as one far value makes the bins too wide
    to show the size of all others. Of a large tensor evenly spaced values are binned, `BINNED` of each batch; `seen`
    counts all of them, `batches` the calls of `add`.
    """

    def __init__(self) -> None:
        self.limit = 2.0**-20
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._exponents = torch.zeros(EXPONENTS, dtype=torch.float64)
        self._waiting: list[Tensor] = []
        self._waits = 0
        self.low = float("inf")
        self.high = float("-inf")
        self.average_low = self.average_high = 0.0
        self.seen = 0
        self.batches = 0
        self.finite = True
        self._moments: Floats | None = None

    def add(self, x: Tensor) -> None:
        """Take in `x` (float32, any shape): its extremes exactly, and evenly spaced values of it as counts."""
        if x.numel() == 0:
            return
        flat = in_memory_order(x)
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (abs(low) < 1e30 and abs(high) < 1e30):
            self.finite = False
            return
        pace = AVERAGING if self.batches else 1.0
        self.average_low += pace * (low - self.average_low)
        self.average_high += pace * (high - self.average_high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        if max(abs(low), abs(high)) > self.limit:
            self._bin()
            self._grow(max(abs(low), abs(high)))
        spaced = evenly_spaced(flat, x.shape, self.batches)
        self.seen += x.numel()
        self.batches += 1
        self._moments = None
        self._waiting.append(spaced)
        self._waits += spaced.numel()
        if self._waits >= WAITING:
            self._bin()

    def _bin(self) -> None:
        """Count the values that wait."""
        if not self._waiting:
            return
        values, self._waiting, self._waits = torch.cat(self._waiting), [], 0
        fewer = values[::SPARSE].contiguous() if len(values) > WAITING // 2 else values
        self._exponents += _exponents(fewer) * (len(values) / len(fewer))
        found = torch.bincount(
            values.add_(self.limit).mul_(BINS / (2 * self.limit)).to(torch.int32), minlength=BINS + 1
        )
        self._counts += found[:BINS]
        self._counts[-1] += found[BINS]  # values that are exactly `limit`

    @property
    def counts(self) -> Tensor:
        """How many of the binned values lie in each bin, float64 [BINS]."""
        self._bin()
        return self._counts

    @property
    def exponents(self) -> Tensor:
        """How many of the binned values have exponent `LOWEST_EXPONENT` + i, float64 [EXPONENTS]; zeros have none."""
        self._bin()
        return self._exponents

    def merge(self, other: "Histogram") -> None:
        """Take in the counts of another histogram."""
        self._bin()
        theirs, limit = other.counts, other.limit
        self.finite &= other.finite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.average_low = min(self.average_low, other.average_low)
        self.average_high = max(self.average_high, other.average_high)
        self._grow(limit)
        while limit < self.limit:
            theirs, limit = _halve(theirs), limit * 2
        self._counts += theirs
        self._exponents += other.exponents
        self.seen += other.seen
        self.batches = max(self.batches, other.batches)
        self._moments = None

    def magnitude(self, share: float) -> float:
        """A power of two that `share` of the nonzero values do not exceed, the least such; 0 when all are zero."""
        total = float(self.exponents.sum())
        if total == 0:
            return 0.0
        reached = self.exponents.cumsum(0) >= share * total
        return float(2.0 ** (int(reached.nonzero()[0]) + LOWEST_EXPONENT))

    @property
    def width(self) -> float:
        """Of a bin; a power of two."""
        return 2 * self.limit / BINS

    @property
    def moments(self) -> Floats:
        """Sums over the bins before each edge of counts, counts times centers, and times their squares, [3, BINS + 1].

        Centers in bins. Every sum is a multiple of 1/4 below 2^53, so differences of them are exact.
        """
        if self._moments is None:
            self._moments = np.zeros((3, BINS + 1))
            counts = self.counts.numpy()
            np.cumsum(counts, out=self._moments[0, 1:])
            np.cumsum(counts * CENTERS, out=self._moments[1, 1:])
            np.cumsum(counts * CENTERS**2, out=self._moments[2, 1:])
        return self._moments

    def beyond(self, ends: Floats, sign: int) -> tuple[Floats, Floats]:
        """What clipping at `ends`, of any shape, costs: (mean squared distance of all values to what is left, share
        clipped).

        `sign` +1: values above an end are clipped, -1: those below. From prefix sums of the bins' moments, so that many
        ends cost as much as one. The extreme seen is counted although its value may not have been binned.
        """
        end = ends / self.width
        at = np.clip(np.floor(end + (BINS + 1) / 2) if sign > 0 else np.ceil(end + (BINS - 1) / 2), 0, BINS)
        sums, total = self.moments[:, at.astype(np.int64)], max(self.moments[0, -1], 1.0)
        zeroth, first, second = self.moments[:, -1].reshape(3, *[1] * end.ndim) - sums if sign > 0 else sums
        energy = (second - 2 * end * first + end**2 * zeroth) * self.width**2
        extreme = (self.high - ends) if sign > 0 else (ends - self.low)
        share = np.maximum(zeroth / total, (extreme > 0) / max(self.seen, 1))
        return np.maximum(energy / total, np.maximum(extreme, 0.0) ** 2 / max(self.seen, 1)), share

    @property
    def nonzero(self) -> float:
        """The share of values that are not zero."""
        return min(float(self.exponents.sum()) / max(float(self.counts.sum()), 1.0), 1.0)

    def error(self, lows: Floats, highs: Floats, levels: int) -> Floats:
        """Mean squared error of `levels` codes over each range [low, high], arrays that broadcast.

        Clipping from the counts, rounding as step²/12 for every value that is inside and not zero.
        """
        below, share_below = self.beyond(lows, -1)
        above, share_above = self.beyond(highs, 1)
        inside = np.maximum(self.nonzero - share_below - share_above, 0.0)
        step = (highs - lows) / (levels - 1)
        return np.asarray(below + above + inside * step**2 / 12)

    def _grow(self, reach: float) -> None:
        if self.limit < reach and not self.seen:
            self.limit = 2.0 ** math.ceil(math.log2(reach))
        while self.limit < reach:
            self._counts = _halve(self._counts)
            self.limit *= 2

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64 [BINS]."""
        return torch.from_numpy(CENTERS * self.width)


def in_memory_order(x: Tensor) -> Tensor:
    """All values of `x`, one axis, in the order they lie in memory: a view where they lie without gaps."""
    count = x.numel()
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.as_strided((count,), (1,), x.storage_offset())
    return x.permute(sorted(range(x.dim()), key=lambda axis: -x.stride(axis))).reshape(-1)


def evenly_spaced(flat: Tensor, shape: Sequence[int], turn: int = 0, most: int = BINNED) -> Tensor:
    """About `most` of the values `flat` [n] (dense), copied: runs of `RUN` neighbours at equal distances.

    `turn` moves the first run. The distance in runs shares no factor with any axis of `shape`, so that no channel or
    position is passed over.
    """
    if len(flat) <= most:
        return flat.clone()
    stride = _stride(tuple(shape), most)
    first = turn * 7919 % stride
    count = (len(flat) // RUN - first + stride - 1) // stride
    offset = flat.storage_offset() + first * RUN
    return flat.as_strided((count, RUN), (stride * RUN, 1), offset).reshape(-1)


@functools.lru_cache(4096)
def _stride(shape: tuple[int, ...], most: int) -> int:
    """So many runs from one to the next that about `most` values of `shape` are met, and no axis is passed over."""
    count = math.prod(shape)
    stride = -(-count // most)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _exponents(x: Tensor) -> Tensor:
    """How many nonzero values have which exponent, float64 [EXPONENTS], from the bits of float32."""
    bits = x.numpy().view(np.int32)
    counts = np.bincount(bits >> 23 & 255, minlength=256)
    counts[0] -= len(bits) - np.count_nonzero(bits << 1)
    found = np.zeros(EXPONENTS)
    # Biased exponent e stands for [2^(e - 127), 2^(e - 126)): frexp's e - 126. All subnormals count as the largest.
    found[-126 - LOWEST_EXPONENT :] = counts[: EXPONENTS + 126 + LOWEST_EXPONENT]
    return torch.from_numpy(found)


def _halve(counts: Tensor) -> Tensor:
    """The same counts over twice the range: inner pairs merged, the outer quarters empty."""
    merged = counts.view(-1, 2).sum(1)
    empty = torch.zeros(BINS // 4, dtype=counts.dtype)
    return torch.cat([empty, merged, empty])
