"""The keeper's end of one connection: a thread that reads frames, and one that writes them.

Writing has a thread of its own because a network that went silent blocks whoever writes. Runs on the device: standard
library, Python 3.9.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from targets.transports._ssh_frames import BEAT, CHUNK, DATA, WINDOW, frames, note, pack

Took = Callable[["Line", bytes, bytes], None]


class Line:
    """One connection to the host, once started: `took` gets what comes, and `send` never waits."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], Any], took: Took) -> None:
        self.heard = time.monotonic()
        self.closed: float | None = None
        self._read, self._write, self._took = read, write, took
        self._waiting: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._change = threading.Condition()

    def start(self) -> None:
        """Read and write from now on."""
        for work in (self._reading, self._writing):
            threading.Thread(target=work, daemon=True).start()

    def send(self, frame: bytes) -> None:
        """Queue a frame."""
        with self._change:
            self._waiting.append(frame)
            self._size += len(frame)
            self._change.notify_all()

    def say(self, **fields: Any) -> None:
        """Queue a note."""
        self.send(note(**fields))

    def send_data(self, part: bytes) -> bool:
        """Queue data as soon as little else waits; False where the connection is gone."""
        with self._change:
            while self._size > WINDOW and self.closed is None:
                self._change.wait()
        self.send(pack(DATA, part))
        return self.closed is None

    def flush(self, seconds: float) -> None:
        """Wait until all is written, or so long."""
        deadline = time.monotonic() + seconds
        with self._change:
            while self._size and self.closed is None and time.monotonic() < deadline:
                self._change.wait(0.05)

    def _reading(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            for kind, payload in frames(self._hear):
                if kind == BEAT:
                    self.send(pack(BEAT))
                self._took(self, kind, payload)
        self._end()

    def _hear(self, count: int) -> bytes:
        part = self._read(min(count, CHUNK))
        self.heard = time.monotonic()
        return part

    def _writing(self) -> None:
        while True:
            with self._change:
                while not self._waiting:
                    self._change.wait()
                frame = self._waiting.popleft()
            try:
                self._write(frame)
            except (OSError, ValueError):
                self._end()
                return
            with self._change:
                self._size -= len(frame)
                self._change.notify_all()

    def _end(self) -> None:
        with self._change:
            self.closed = self.closed or time.monotonic()
            self._change.notify_all()
