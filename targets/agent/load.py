"""What other processes did meanwhile on the cores that this one may use: times on a busy machine do not repeat."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Others:
    """Counts from the moment it is made. Linux; elsewhere nothing is known."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._stat = root / "proc/stat"
        self._start = time.monotonic()
        self._before = self._seconds()

    def share(self) -> float | None:
        """The share of these cores' time that others took since then, 0 to 1."""
        after, elapsed = self._seconds(), time.monotonic() - self._start
        if self._before is None or after is None or elapsed <= 0:
            return None
        return min(max((after - self._before) / (elapsed * len(_cores())), 0.0), 1.0)

    def _seconds(self) -> float | None:
        """Seconds that these cores were busy since the start, less what this process and its children took."""
        cores = _cores()
        try:
            ticks = float(os.sysconf("SC_CLK_TCK"))
            rows = [line.split() for line in self._stat.read_text(encoding="ascii").splitlines()]
            # user nice system idle iowait irq softirq steal: all but idle and iowait
            busy = sum(
                sum(int(value) for value in (*row[1:4], *row[6:9]))
                for row in rows
                if row and row[0][:3] == "cpu" and row[0][3:].isdigit() and int(row[0][3:]) in cores
            )
        except (OSError, ValueError, AttributeError):
            return None
        own = os.times()
        return busy / ticks - (own.user + own.system + own.children_user + own.children_system)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
