"""Watches the board while calls are timed, and says when their times do not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .board import Board

INTERVAL = 1.0


class Watch:
    """The board's states before, during and after the timing, from the moment it is made.

    `void` afterwards: why the times do not count: something slowed the processor down at any moment that was looked
    at, or has done so in between, which the board counts.
    """

    def __init__(self, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self._board, self._clock = board, clock
        self._start = self._last = clock()
        self._before = board.events()
        self.states: list[dict[str, Any]] = []
        self.void: str | None = None
        self._look("before")

    @property
    def minute(self) -> float:
        """Minutes since the timing began."""
        return (self._clock() - self._start) / 60

    def during(self) -> None:
        """Look, unless that was less than INTERVAL ago."""
        if self._clock() - self._last >= INTERVAL:
            self._look("during")

    def after(self) -> None:
        """Look for the last time, and at what the board counted meanwhile."""
        self._look("after")
        events = self._board.events()
        grown = [cause for cause, count in events.items() if count > self._before.get(cause, count)]
        if grown and self.void is None:
            self.void = f"the processor was slowed down during the timing ({', '.join(grown)})"

    def _look(self, moment: str) -> None:
        state = self._board.state(moment, self.minute)
        self.states.append(state)
        self._last = self._clock()
        if state["throttled"] and self.void is None:
            self.void = f"the processor was slowed down {moment} the timing ({state['throttled']})"

    def warnings(self) -> list[str]:
        """What makes these times less sure than they look, in words."""
        found = [self._board.blind()]
        governor = self.states[0]["governor"]
        if governor and governor != "performance":
            found.append(f"the frequency governor is {governor}, not performance: clocks may change while it is timed")
        earlier = [cause for cause, count in self._before.items() if count and cause not in ("over-current",)]
        if earlier:
            found.append(f"the board was slowed down before the timing, since its start ({', '.join(earlier)})")
        return [text for text in found if text]
