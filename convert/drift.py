"""Drift: how far outputs are from the float model's, accumulated over batches in constant memory."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclass
class OutputDrift:
    """Sums over one output tensor; `add` takes reference and value of the same shape [n, ...]."""

    signal: float = 0.0
    noise: float = 0.0
    cosine_sum: float = 0.0
    samples: int = 0
    max_abs: float = 0.0
    equal: int = 0
    values: int = 0
    finite: bool = True

    def add(self, reference: Array, value: Array) -> None:
        if reference.shape != value.shape:
            raise ValueError(f"outputs of shape {value.shape} compared with a reference of shape {reference.shape}")
        a = reference.astype(np.float64).reshape(len(reference), -1)
        b = value.astype(np.float64).reshape(len(value), -1)
        if not np.isfinite(b).all() or not np.isfinite(a).all():
            self.finite = False
            return
        difference = b - a
        self.signal += float((a * a).sum())
        self.noise += float((difference * difference).sum())
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        dots = (a * b).sum(1)
        same = (difference == 0).all(1)
        self.cosine_sum += float(np.where(same, 1.0, dots / np.where(norms > 0, norms, 1.0)).sum())
        self.samples += len(a)
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)))
        self.equal += int((difference == 0).sum())
        self.values += difference.size

    @property
    def sqnr_db(self) -> float:
        """10 log10(sum of squares of the reference / of the difference); +inf when equal, NaN when not finite."""
        if not self.finite or not self.samples:
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """Mean cosine similarity over samples."""
        return self.cosine_sum / self.samples if self.finite and self.samples else math.nan


@dataclass
class Drift:
    """Drift over all outputs of a model: the worst output speaks for all, so that a small one cannot hide.

    `classifies` says that the first output holds one row of class scores per sample.
    """

    classifies: bool
    outputs: dict[str, OutputDrift] = field(default_factory=dict)
    top1_equal: int = 0
    top1_seen: int = 0

    def add(self, reference: dict[str, Array], value: dict[str, Array]) -> None:
        missing = set(reference) - set(value)
        if missing:
            raise ValueError(f"outputs {sorted(missing)} are missing; there are {sorted(value)}")
        for index, (name, expected) in enumerate(reference.items()):
            self.outputs.setdefault(name, OutputDrift()).add(expected, value[name])
            if index == 0 and self.classifies:
                self.top1_equal += int((top1(expected) == top1(value[name])).sum())
                self.top1_seen += len(expected)

    @property
    def sqnr_db(self) -> float:
        """The lowest SQNR over outputs; NaN when any output is not finite."""
        found = [o.sqnr_db for o in self.outputs.values()]
        return math.nan if not found or any(math.isnan(s) for s in found) else min(found)

    @property
    def cosine(self) -> float:
        found = [o.cosine for o in self.outputs.values()]
        return math.nan if not found or any(math.isnan(c) for c in found) else min(found)

    @property
    def max_abs(self) -> float:
        if not self.outputs or any(not o.finite for o in self.outputs.values()):
            return math.nan
        return max(o.max_abs for o in self.outputs.values())

    @property
    def rms(self) -> float:
        """The root mean square of the difference over all values of all outputs."""
        values = sum(o.values for o in self.outputs.values())
        return math.sqrt(sum(o.noise for o in self.outputs.values()) / values) if values else 0.0

    @property
    def share_equal(self) -> float:
        values = sum(o.values for o in self.outputs.values())
        return sum(o.equal for o in self.outputs.values()) / values if values else 0.0

    @property
    def top1_agreement(self) -> float | None:
        return self.top1_equal / self.top1_seen if self.top1_seen else None


def top1(scores: Array) -> NDArray[np.int64]:
    """The class with the largest score, [n, classes] -> [n]. A row that is not finite has no class: -1."""
    best = scores.argmax(1).astype(np.int64)
    return np.where(np.isfinite(scores).all(1), best, -1)


def classifies(outputs: dict[str, Array], labels: NDArray[np.int64] | None) -> bool:
    """Whether the first output is class scores: rows of at least two numbers, not vectors of unit length nor ±1 codes.

    Labels, when given, must fit the number of columns.
    """
    first = next(iter(outputs.values()))
    if first.ndim != 2 or first.shape[1] < 2 or not np.issubdtype(first.dtype, np.floating):
        return False
    if (np.abs(first) == 1).all():
        return False
    if labels is not None and len(labels):
        return int(labels.max()) < first.shape[1]
    unit = np.allclose(np.linalg.norm(first.astype(np.float64), axis=1), 1.0, atol=1e-3)
    return not unit
