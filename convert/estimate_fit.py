"""The roofline with its factors, fitted on measured pairs, and how wrong it is on pairs that it has not seen.

    time = sum over operators of max(operations / (peak x efficiency), bytes / (bandwidth x efficiency)) + overheads

Efficiencies are products of named factors. On processors: one of the number class, what this runtime differs by, one
for depthwise convolutions; memory has its own, and `threads` is the exponent by which speed grows with threads. An
accelerator's peak is seldom known, so its factor is a rate itself, of one device and one number class. All are found
together by least squares on the logarithm of the time, held near what is plausible where few pairs speak.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.estimate_data import Pair, pairs
from convert.estimate_machine import Processor
from convert.estimate_work import Work

# What one operator costs beside its work, in cycles: assumed, since all measured networks are too large to show it.
OVERHEAD_CYCLES = 1e4
SCATTER = 0.2
# Beginning of a factor's name -> logarithm expected, and how far from it is plausible.
_PRIORS = (
    ("efficiency", math.log(0.5), 1.0),
    ("memory", math.log(0.5), 0.5),
    ("depthwise", math.log(0.2), 1.0),
    ("winograd", math.log(2.0), 0.4),
    ("threads", 0.8, 0.3),
    ("overhead", math.log(2e-6), 1.0),
    ("ridge", math.log(200.0), 1.0),
    ("rate", math.log(1e4), 2.0),
    ("runtime", 0.0, 0.35),
)

Factors = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One network on one machine, as vectors over its operators: seconds at the peak and at the full bandwidth, how
    often each is run; the factors of each; and for all of them the overhead in seconds and the threads."""

    compute: NDArray[np.float64]
    memory: NDArray[np.float64]
    count: NDArray[np.float64]
    compute_factors: tuple[Factors, ...]
    memory_factors: tuple[Factors, ...]
    overhead: float
    overhead_factors: Factors
    speed_factors: Factors
    threads: int


def on_processor(work: Sequence[Work], chip: Processor, runtime: str, threads: int) -> Case:
    """The work on some of a processor's cores."""
    threads = min(threads, chip.cores)
    compute, compute_factors = [], []
    for one in work:
        group = chip.number_class(one.format)
        names = [f"efficiency {group}", f"runtime {runtime} {group}"]
        if one.depthwise:
            names.append("depthwise")
        if one.square and runtime == "ncnn":
            names.append("winograd")
        # The peak is that of all cores: one thread's share of it, which `threads` scales up again.
        compute.append(2 * one.macs / (chip.peaks[group] * 1e9) * chip.cores)
        compute_factors.append(tuple(names))
    memory = [one.bytes / (chip.bandwidth * 1e9) for one in work]
    return Case(
        np.array(compute),
        np.array(memory),
        np.array([one.count for one in work], dtype=float),
        tuple(compute_factors),
        tuple(("memory", f"runtime memory {runtime}") for _ in work),
        sum(one.count for one in work) * OVERHEAD_CYCLES / (chip.clock_ghz * 1e9),
        (),
        ("threads",),
        threads,
    )


def on_accelerator(work: Sequence[Work], device: str) -> Case:
    """The work on an accelerator of which nothing but measurements is known."""
    rates = [f"rate {device} {one.format}" for one in work]
    return Case(
        np.array([2 * one.macs / 1e9 for one in work]),
        np.array([one.bytes / 1e9 for one in work]),
        np.array([one.count for one in work], dtype=float),
        tuple((rate, "depthwise") if one.depthwise else (rate,) for rate, one in zip(rates, work, strict=True)),
        # What the memory beside it gives is taken to grow with its arithmetic: `ridge` is operations per byte.
        tuple((rate, "inverse ridge") for rate in rates),
        float(sum(one.count for one in work)),
        ("overhead",),
        (),
        1,
    )


def case_of(pair: Pair) -> Case:
    """A measured pair's."""
    if pair.processor is None:
        return on_accelerator(pair.work, pair.device)
    return on_processor(pair.work, pair.processor, pair.runtime, pair.threads)


class Fit:
    """Factors by name (logarithms; `threads` an exponent)."""

    def __init__(self, factors: dict[str, float]) -> None:
        self.factors = factors

    def seconds(self, case: Case) -> float:
        """The time of a case. Factors that were not fitted take what is expected of them."""
        return float(_Batch([case], sorted(_names([case]) | set(self.factors))).seconds(self._vector([case]))[0])

    def overhead(self, case: Case) -> float:
        """Its part that is overhead."""
        return case.overhead * math.exp(sum(self._value(n) for n in case.overhead_factors))

    def _vector(self, cases: Sequence[Case]) -> NDArray[np.float64]:
        return np.array([self._value(n) for n in sorted(_names(cases) | set(self.factors))])

    def _value(self, name: str) -> float:
        return self.factors.get(name, _prior(name)[0])


def fit(cases: Sequence[Case], seconds: Sequence[float]) -> Fit:
    """The factors that explain measured times best."""
    from scipy.optimize import least_squares

    names = sorted(_names(cases))
    batch = _Batch(cases, names)
    expected = np.array([_prior(n) for n in names])
    measured = np.log(np.array(seconds))

    def residuals(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        off = (np.log(batch.seconds(vector)) - measured) / SCATTER
        return np.concatenate([off, (vector - expected[:, 0]) / expected[:, 1]])

    found = least_squares(residuals, expected[:, 0], diff_step=1e-4)
    return Fit(dict(zip(names, found.x.tolist(), strict=True)))


def _prior(name: str) -> tuple[float, float]:
    return next((mean, width) for start, mean, width in _PRIORS if name.removeprefix("inverse ").startswith(start))


def _names(cases: Iterable[Case]) -> set[str]:
    lists = ((*c.compute_factors, *c.memory_factors, c.overhead_factors, c.speed_factors) for c in cases)
    return {name for factors in lists for names in factors for name in names}


class _Batch:
    """Many cases as one set of vectors."""

    def __init__(self, cases: Sequence[Case], names: Sequence[str]) -> None:
        self.index = {name: i for i, name in enumerate(names)}
        sets = sorted({f for c in cases for f in (*c.compute_factors, *c.memory_factors)})
        place = {f: i for i, f in enumerate(sets)}
        self.products = self._matrix(sets)
        self.compute = np.concatenate([c.compute for c in cases])
        self.memory = np.concatenate([c.memory for c in cases])
        self.count = np.concatenate([c.count for c in cases])
        self.compute_set = np.array([place[f] for c in cases for f in c.compute_factors])
        self.memory_set = np.array([place[f] for c in cases for f in c.memory_factors])
        self.starts = np.cumsum([0, *(len(c.compute) for c in cases)])[:-1]
        self.owner = np.repeat(np.arange(len(cases)), [len(c.compute) for c in cases])
        self.overhead = np.array([c.overhead for c in cases])
        self.overhead_of = self._matrix([c.overhead_factors for c in cases])
        self.speed_of = self._matrix([c.speed_factors for c in cases])
        self.log_threads = np.log([c.threads for c in cases])

    def _matrix(self, sets: Sequence[Factors]) -> NDArray[np.float64]:
        matrix = np.zeros((len(sets), len(self.index)))
        for row, factors in enumerate(sets):
            for name in factors:
                matrix[row, self.index[name]] = -1.0 if name.startswith("inverse ") else 1.0
        return matrix

    def seconds(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The time of each case with these factors."""
        efficiency = np.exp(self.products @ vector)
        speed = np.exp((self.speed_of @ vector) * self.log_threads)
        compute = self.compute / (efficiency[self.compute_set] * speed[self.owner])
        memory = self.memory / efficiency[self.memory_set]
        sums = np.add.reduceat(np.maximum(compute, memory) * self.count, self.starts)
        total: NDArray[np.float64] = sums + self.overhead * np.exp(self.overhead_of @ vector)
        return total


def family(pair: Pair) -> str:
    """Pairs that are fitted together: all processors; each accelerator's runtime by itself."""
    return "processors" if pair.processor is not None else pair.runtime


@functools.cache
def members(name: str) -> tuple[Pair, ...]:
    """The measured pairs of a family."""
    return tuple(p for p in pairs() if family(p) == name)


@functools.cache
def fitted(name: str) -> Fit:
    """The factors of a family, fitted on all its pairs."""
    found = members(name)
    return fit([case_of(p) for p in found], [p.ms / 1e3 for p in found])


# What is left out together: the same network on the same device; everything of a device; everything of a runtime.
LEFT_OUT: dict[str, Callable[[Pair], object]] = {
    "network": lambda p: (p.device, p.net),
    "device": lambda p: p.device,
    "runtime": lambda p: p.runtime,
}


@functools.cache
def held_out(name: str, unseen: str) -> tuple[tuple[Pair, float], ...]:
    """(pair, milliseconds) predicted by a fit that has seen neither the pair nor others of its network on the device,
    its device, or its runtime, as `unseen` says."""
    found, key = members(name), LEFT_OUT[unseen]
    cases = [case_of(p) for p in found]
    guesses: dict[int, float] = {}
    for group in {key(p) for p in found}:
        inside = [i for i, p in enumerate(found) if key(p) == group]
        rest = [i for i in range(len(found)) if i not in set(inside)]
        if not rest:
            continue
        other = fit([cases[i] for i in rest], [found[i].ms / 1e3 for i in rest])
        guesses.update({i: other.seconds(cases[i]) * 1e3 for i in inside})
    return tuple((found[i], guesses[i]) for i in sorted(guesses))
