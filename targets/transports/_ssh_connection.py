"""One ssh process on this machine, and the keeper at its other end: frames in, frames out, a heartbeat, its stderr."""

import contextlib
import json
import queue
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

from targets.transports._ssh_frames import BEAT, GREETING, frames, note, pack

# Of what ssh and the device write to stderr: the beginning tells the host key, the end why it ended.
FIRST_LINES, LAST_LINES = 300, 40
MOST_PRINTED = 1 << 16


@dataclass(frozen=True)
class Patience:
    """Seconds: to reach the device, until the keeper greets, between heartbeats, without a word until the network
    counts as dead, for a new connection after that, and for the keeper to clean up. The keeper waits as long.
    """

    connect: float = 10.0
    greet: float = 60.0
    beat: float = 3.0
    silence: float = 15.0
    grace: float = 20.0
    close: float = 15.0


class LostError(Exception):
    """The connection ended or went silent; the message says what ssh said of it."""


class NotGreetedError(Exception):
    """ssh ended, or was silent, before the keeper greeted. `printed`: what came on stdout instead."""

    def __init__(self, said: list[str], printed: bytes) -> None:
        super().__init__("no greeting")
        self.said, self.printed = said, printed


class Connection:
    """Started at once; `hello` waits for the keeper. Threads read and write, so that Ctrl-C breaks no frame."""

    def __init__(self, command: list[str], first: bytes, patience: Patience) -> None:
        self.patience = patience
        self.seen = (0, 0)  # the command's number and how many of its events arrived, told with every heartbeat
        self._said: list[str] = []
        self._printed = b""
        self._greeted = threading.Event()
        self._inbox: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue()
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self._heard = time.monotonic()
        # A session of its own: Ctrl-C at the terminal must reach this program alone, which then ends the session.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._outbox.put(first)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._reading, self._writing, self._listening)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def said(self) -> list[str]:
        """The lines that ssh and the device wrote to stderr."""
        return list(self._said)

    @property
    def alive(self) -> bool:
        """Whether ssh still runs."""
        return self._process.poll() is None

    def hello(self, seconds: float) -> dict[str, Any]:
        """The keeper's first note; NotGreetedError where none comes."""
        self._greeted.wait(seconds)
        try:
            first = self._inbox.get(timeout=seconds if self._greeted.is_set() else 0.01)
        except queue.Empty:
            first = None
        if first is None:
            self._threads[2].join(1)
            raise NotGreetedError(self.said, self._printed)
        found: dict[str, Any] = json.loads(first[1])
        return found

    def send(self, frame: bytes) -> None:
        """Queue a frame."""
        self._outbox.put(frame)

    def say(self, **fields: Any) -> None:
        """Queue a note."""
        self.send(note(**fields))

    def acknowledge(self) -> None:
        """Tell at once what was seen."""
        self.send(self._beat())

    def receive(self, until: float | None = None) -> tuple[bytes, bytes]:
        """The next frame that is no heartbeat; LostError where none can come any more, TimeoutError after `until`."""
        while True:
            if until is not None and time.monotonic() > until:
                raise TimeoutError
            try:
                found = self._inbox.get(timeout=min(0.5, self.patience.silence / 4))
            except queue.Empty:
                silent = time.monotonic() - self._heard
                if silent > self.patience.silence:
                    raise LostError(f"nothing was heard for {silent:.0f} s") from None
                continue
            if found is None:
                self._inbox.put(None)
                self._threads[2].join(1)
                raise LostError("the connection was closed")
            return found

    def end(self, seconds: float) -> None:
        """Let ssh send what is queued and end; kill it after so long."""
        self._outbox.put(None)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        finally:
            self._process.kill()
            self._process.wait()
            for thread in self._threads:
                thread.join(1)

    def _beat(self) -> bytes:
        return pack(BEAT, json.dumps(self.seen).encode())

    def _writing(self) -> None:
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(OSError, ValueError), pipe:
            while True:
                try:
                    frame = self._outbox.get(timeout=self.patience.beat)
                except queue.Empty:
                    frame = self._beat()
                if frame is None:
                    return
                pipe.write(frame)
                pipe.flush()

    def _reading(self) -> None:
        pipe = self._process.stdout
        assert pipe

        def read(count: int) -> bytes:
            part = pipe.read1(count)  # type: ignore[attr-defined]
            self._heard = time.monotonic()
            return part

        with contextlib.suppress(OSError, ValueError, EOFError), pipe:
            while (line := pipe.readline(MOST_PRINTED)).strip() != GREETING:
                if not line:
                    return self._over()
                self._printed = (self._printed + line)[-MOST_PRINTED:]
            self._heard = time.monotonic()
            self._greeted.set()
            for kind, payload in frames(read):
                if kind != BEAT:
                    self._inbox.put((kind, payload))
        self._over()

    def _over(self) -> None:
        self._inbox.put(None)
        self._greeted.set()

    def _listening(self) -> None:
        pipe = self._process.stderr
        assert pipe
        with contextlib.suppress(OSError, ValueError), pipe:
            for raw in pipe:
                self._said.append(raw.decode("utf-8", "replace").rstrip("\r\n"))
                if len(self._said) > FIRST_LINES + LAST_LINES:
                    del self._said[FIRST_LINES]
