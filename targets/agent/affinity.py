"""Binding to the fastest cores, so that a run does not wander between big and little ones."""

from __future__ import annotations

import os
from pathlib import Path


def fastest(cores: set[int], root: Path) -> set[int]:
    """Of these cores those with the highest clock that cpufreq allows; none where it says nothing, or all are alike."""
    limits = {}
    for core in cores:
        try:
            path = root / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq"
            limits[core] = int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return set()
    best = {core for core, limit in limits.items() if limit == max(limits.values())}
    return set() if best == cores else best


def bind(threads: int, root: Path = Path("/")) -> tuple[str, str | None]:
    """Bind this process, and the threads it starts from now on, to the big cores; what was done, and a warning.

    To be called before a runtime starts its threads, since those it has keep their cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return "not bound: this system has no affinity", None
    allowed = os.sched_getaffinity(0)
    if threads > len(allowed):
        return _all(allowed), f"{threads} threads share {len(allowed)} cores"
    big = fastest(allowed, root)
    if not big:
        return _all(allowed), None
    if threads > len(big):
        return _all(allowed), f"{threads} threads are more than the {len(big)} big cores, so none was bound to these"
    try:
        os.sched_setaffinity(0, big)
    except OSError as error:
        return f"not bound: {error}", f"binding to the big cores failed: {error}"
    return f"bound to the big cores {_words(big)}", None


def _all(cores: set[int]) -> str:
    return f"not bound: any of the cores {_words(cores)}"


def _words(cores: set[int]) -> str:
    return ", ".join(str(core) for core in sorted(cores))
