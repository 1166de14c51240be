"""How long one call takes, beside the float model, so that the comparison survives a busy machine.

`targets/agent/timing.py` is the loop, here and on devices; this module makes a Latency of its raw seconds.

A measurement is `stable` when the medians of its blocks scatter by less than MAX_BLOCK_CV (both models), the interval
of the speed-up is narrower than +-MAX_HALF_WIDTH of it, and other processes took less than MAX_OTHERS of the cores'
time, where that is known.

The interval is to hold for another run of the same measurement too, not for this one alone. A bootstrap over rounds
takes each for a fresh look at the machine; but what disturbs rounds lasts for seconds, and what differs between
processes, such as where their memory lies, lasts for all of a run. So the interval is the bootstrap's, made as wide as
to hold the speed-up of every quarter of the rounds on its own, and MIN_HALF_WIDTH to either side.
`benchmarks/repeat.py` counts how often the intervals of two runs overlap.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.agent import timing
from targets.agent.load import Others

from .errors import TightfitError
from .host import cpu_name, governor
from .report.schema import Latency

BLOCKS = timing.ROUNDS
MAX_HALF_WIDTH = 0.10
MAX_BLOCK_CV = 0.10
MAX_OTHERS = 0.10
MIN_HALF_WIDTH = 0.02

_RESAMPLES = 1000
_QUARTERS = 4
_THINNED = 256  # values kept of the longest block for the bootstrap: enough for a median

Run = Callable[[], object]
Clock = Callable[[], float]
Seconds = NDArray[np.float64]


def measure(
    run: Run,
    float_run: Run | None,
    *,
    min_runs: int = 100,
    min_seconds: float = 2.0,
    warmup_seconds: float = 0.5,
    threads: int,
    where: str = "host",
    mind_others: bool = False,
    clock: Clock = time.perf_counter,
    progress: Callable[[float], None] | None = None,
) -> Latency:
    """Time `run` and, in turns with it, `float_run`; each at least `min_runs` calls and `min_seconds` seconds.

    `threads` is recorded, not set. `mind_others`: not stable where other processes kept the cores busy. `clock`
    returns seconds. `progress` is told the share that is done, (0, 1].
    Raises TightfitError for limits that measure nothing, and when the clock does not advance.
    """
    if threads < 1:
        raise TightfitError(f"cannot time with {threads} threads: there must be one at least.")
    contestants = [run] if float_run is None else [run, float_run]

    def between(done: int) -> None:
        if progress is not None:
            progress(done / BLOCKS)

    others = Others()
    try:
        seconds = timing.in_rounds(
            [timing.block_of(contestant, clock) for contestant in contestants],
            min_runs=min_runs,
            min_seconds=min_seconds,
            warmup_seconds=warmup_seconds,
            between=between,
        )
    except timing.TimingError as error:
        raise TightfitError(str(error)) from error
    blocks, *rest = [[np.array(block) for block in rounds] for rounds in seconds]
    return summary(
        blocks,
        rest[0] if rest else None,
        threads=threads,
        where=where,
        cpu=cpu_name(),
        governor=governor(),
        others=others.share() if mind_others else None,
    )


def ratio_interval(blocks: list[Seconds], float_blocks: list[Seconds]) -> tuple[float, float]:
    """Interval of median(float) / median(artifact), from block pairs [rounds][calls]: see the module's docstring.

    The bootstrap, of 95 %, draws rounds, not single calls: calls of one block share their disturbance. The generator
    is seeded, so the same times give the same interval.
    """
    ratio = _median(float_blocks) / _median(blocks)
    candidates = [*_bootstrap(blocks, float_blocks), ratio * (1 - MIN_HALF_WIDTH), ratio * (1 + MIN_HALF_WIDTH)]
    for rounds in np.array_split(np.arange(len(blocks)), min(_QUARTERS, len(blocks))):
        candidates.append(_median([float_blocks[i] for i in rounds]) / _median([blocks[i] for i in rounds]))
    return min(candidates), max(candidates)


def _bootstrap(blocks: list[Seconds], float_blocks: list[Seconds]) -> tuple[float, float]:
    ours, theirs = _thin(blocks), _thin(float_blocks)
    generator = np.random.default_rng(0)
    ratios = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = generator.integers(0, len(ours), len(ours))
        ratios[i] = _median([theirs[j] for j in drawn]) / _median([ours[j] for j in drawn])
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def summary(
    blocks: list[Seconds],
    float_blocks: list[Seconds] | None,
    *,
    threads: int,
    where: str,
    cpu: str,
    governor: str | None,
    load_ms: float | None = None,
    first_ms: float | None = None,
    others: float | None = None,
) -> Latency:
    """The Latency of times [rounds][calls] in seconds, wherever they were taken, of the artifact and its float twin.

    `others`: the share of the cores' time that other processes took meanwhile, where that is known.
    Raises TightfitError where half of the calls took no time.
    """
    ours = _statistics(blocks)
    facts = {
        "where": where,
        "threads": threads,
        "cpu": cpu,
        "governor": governor,
        "load_ms": load_ms,
        "first_ms": first_ms,
    }
    scatter = [("the artifact", _block_cv(blocks))]
    if float_blocks is None:
        warnings = _instabilities(scatter, None, None, others)
        return Latency.model_validate({**facts, **ours, "stable": not warnings, "warnings": tuple(warnings)})
    theirs = _statistics(float_blocks)
    scatter.append(("float", _block_cv(float_blocks)))
    speedup = theirs["p50_ms"] / ours["p50_ms"]
    interval = ratio_interval(blocks, float_blocks)
    warnings = _instabilities(scatter, speedup, interval, others)
    slower = [_slower(speedup, interval)] if speedup < 1 else []
    twin = {f"float_{name}": value for name, value in theirs.items()}
    return Latency.model_validate(
        {
            **facts,
            **ours,
            **twin,
            "speedup": speedup,
            "ratio_interval": interval,
            "stable": not warnings,
            "warnings": (*slower, *warnings),
        }
    )


def _statistics(blocks: list[Seconds]) -> dict[str, Any]:
    """Runs, percentiles in milliseconds and coefficient of variation of all timed calls."""
    times = np.concatenate(blocks)
    quantiles = np.percentile(times, np.arange(101)) * 1e3
    p50, p90, p99 = quantiles[[50, 90, 99]]
    if p50 <= 0:
        raise TightfitError("half of the calls took no time on this clock: too fast to be timed one by one.")
    variation = times.std() / times.mean()
    named = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "quantiles_ms": tuple(quantiles.tolist())}
    return {"runs": times.size, **named, "cv": variation}


def _block_cv(blocks: list[Seconds]) -> float:
    """Coefficient of variation of the blocks' medians: how much the machine drifted."""
    medians = np.array([np.median(block) for block in blocks])
    return float(medians.std() / medians.mean())


def _instabilities(
    scatter: list[tuple[str, float]],
    speedup: float | None,
    interval: tuple[float, float] | None,
    others: float | None,
) -> list[str]:
    """Each reason for which the times are too unstable to compare; none when they are stable."""
    found = [
        f"unstable timing: the block medians of {who} vary by {cv:.0%} (limit {MAX_BLOCK_CV:.0%})"
        for who, cv in scatter
        if not cv < MAX_BLOCK_CV
    ]
    if speedup is not None and interval is not None:
        half_width = (interval[1] - interval[0]) / 2 / speedup
        if not half_width < MAX_HALF_WIDTH:
            found.append(
                f"unstable timing: the speed-up is known to ±{half_width:.0%} only (limit {MAX_HALF_WIDTH:.0%})"
            )
    if others is not None and not others < MAX_OTHERS:
        found.append(f"unstable timing: other processes took {others:.0%} of the cores (limit {MAX_OTHERS:.0%})")
    return found


def _slower(speedup: float, interval: tuple[float, float]) -> str:
    sure = "" if interval[1] < 1 else ", though the interval reaches 1"
    return f"slower than float: {speedup:.2f}x (95 % interval {interval[0]:.2f} to {interval[1]:.2f}{sure})"


def _thin(blocks: list[Seconds]) -> list[Seconds]:
    """Evenly spaced order statistics of every block, in proportion to its length."""
    step = math.ceil(max(len(block) for block in blocks) / _THINNED)
    if step == 1:
        return blocks
    thinned = []
    for block in blocks:
        start = min(step // 2, (len(block) - 1) // 2)
        thinned.append(np.sort(block)[start::step])
    return thinned


def _median(blocks: list[Seconds]) -> float:
    return float(np.median(np.concatenate(blocks)))
