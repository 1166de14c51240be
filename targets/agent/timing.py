"""The one loop that times calls, on this machine and on devices: it returns raw seconds, and judges nothing.

Protocol: all contestants are warmed up; then they are timed in ROUNDS rounds, one block of calls each per round. The
order inside a round alternates (ABBA), so that a slow drift of the clock frequency cancels. A block starts with one
untimed call, since another contestant has just used the caches. Every timed call counts: no outlier is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

ROUNDS = 20

_STUCK_CALLS = 10_000

Call = Callable[[], object]
Clock = Callable[[], float]
# One untimed call, then at least so many timed ones for at least so many seconds; returns the seconds of each.
Block = Callable[[int, float], "list[float]"]


class TimingError(ValueError):
    """Nothing can be measured: limits that ask for nothing, or a clock that stands still."""


def in_rounds(
    contestants: Sequence[Block],
    *,
    min_runs: int,
    min_seconds: float,
    warmup_seconds: float,
    between: Callable[[int], None] | None = None,
) -> list[list[list[float]]]:
    """Time contestants in turns, each at least `min_runs` calls and `min_seconds`: seconds, [contestant][round][call].

    `between` is told, after every round, how many are done; what it does is not timed. Raises TimingError for limits
    that measure nothing.
    """
    demand_limits(min_runs, min_seconds, warmup_seconds)
    for block in contestants:
        block(0, warmup_seconds)
    times: list[list[list[float]]] = [[] for _ in contestants]
    numbers = list(range(len(contestants)))
    for done in range(ROUNDS):
        for which in numbers if done % 2 == 0 else numbers[::-1]:
            times[which].append(contestants[which](math.ceil(min_runs / ROUNDS), min_seconds / ROUNDS))
        if between is not None:
            between(done + 1)
    return times


def demand_limits(min_runs: int, min_seconds: float, warmup_seconds: float) -> None:
    """Raise TimingError for limits that measure nothing."""
    if min_runs < ROUNDS or not min_seconds >= 0 or not warmup_seconds >= 0:
        raise TimingError(
            f"cannot time {min_runs} runs in {min_seconds} s after {warmup_seconds} s: at least {ROUNDS} runs (one per "
            "round), and no negative time."
        )


def block_of(call: Call, clock: Clock = time.perf_counter) -> Block:
    """The block of a plain call. It raises TimingError where the clock does not advance."""

    def block(runs: int, seconds: float) -> list[float]:
        call()
        times: list[float] = []
        total = 0.0
        while len(times) < runs or total < seconds:
            start = clock()
            call()
            times.append(clock() - start)
            total += times[-1]
            if len(times) >= _STUCK_CALLS and total <= 0:
                raise TimingError(
                    f"{len(times)} calls took no time at all on this clock: the call does nothing, or the clock "
                    "stands still."
                )
        return times

    return block
