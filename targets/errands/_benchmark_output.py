"""What TFLite's `benchmark_model` prints, as numbers.

Source: google-ai-edge/LiteRT, tflite/tools/benchmark/benchmark_model.cc, and tensorflow/core/util/stats_calculator.h
(Stat::OutputToStream): after the warm-up, and again after the timed calls, a line of statistics over calls in
microseconds; at the end a line with the times of loading and of the first call. No call is printed by itself, but of up
to three the statistics leave no doubt but that of the mean's six digits.
"""

import re
from dataclasses import dataclass

EXACT_CALLS = 3
"""How many calls of one process can be told from its statistics."""

_STATS = re.compile(r"\bcount=(\d+)(?: first=(\d+))? curr=(\d+)(?:\(all same\)| min=(\d+) max=(\d+) avg=([0-9.e+]+))?")
_TIMINGS = re.compile(r"Inference timings in us: Init: (\d+), First inference: (\d+),")
_DELEGATED = re.compile(r"applied (\S+) delegate, and the model graph will be (completely|partially) executed")


@dataclass(frozen=True)
class Process:
    """What one process said: its timed calls, loading, and the first call, in seconds."""

    calls: tuple[float, ...]
    load: float
    first: float


def process(text: str) -> Process | None:
    """The numbers of one process, None where it printed none, or more calls than can be told apart."""
    stats, timings = _STATS.findall(text), _TIMINGS.search(text)
    if not stats or timings is None:
        return None
    calls = _calls(*stats[-1])
    if calls is None:
        return None
    load, first = (int(value) / 1e6 for value in timings.groups())
    return Process(tuple(call / 1e6 for call in calls), load, first)


def delegate(text: str) -> str | None:
    """Which delegate ran the model, and whether all of it: "XNNPACK, completely"."""
    found = _DELEGATED.search(text)
    return f"{found[1]}, {found[2]}" if found else None


def _calls(count: str, first: str, newest: str, low: str, high: str, mean: str) -> list[int] | None:
    """Each call in microseconds. The mean is printed with six digits, so that it serves where nothing better does."""
    number, last = int(count), int(newest)
    if not low:  # one call, or all took the same
        return [last] * number if number else None
    ends = [int(first), last]
    if number == 2:
        return ends
    if number != EXACT_CALLS:
        return None
    extreme = next((int(x) for x in (low, high) if int(x) not in ends), None)
    between = round(3 * float(mean)) - sum(ends)
    third = extreme if extreme is not None else min(max(between, min(ends)), max(ends))
    return [ends[0], third, ends[1]]
