"""What the keeper does when asked: take a file, give one, run a command. Runs on the device: stdlib, Python 3.9."""

from __future__ import annotations

import collections
import errno
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from targets.transports._ssh_frames import CHUNK, DATA, NOTE, acceptable, digest
from targets.transports._ssh_line import Line
from targets.transports._ssh_processes import die_first, dies_with_parent, end_all

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STDERR_LINES, LONGEST_LINE = 40, 1 << 16
UNHEARD = 2048


class Errands:
    """Does what is asked in `folder`, one request after the other; a command runs beside that.

    `line()` is the connection in use now: what comes from another one is stale.
    """

    def __init__(self, folder: Path, line: Callable[[], Line | None]) -> None:
        self.folder, self.line = folder, line
        self.requests: queue.Queue[tuple[Line, bytes, bytes]] = queue.Queue()
        self.command = Command(folder, line)
        self._next: tuple[Line, bytes, bytes] | None = None
        self._id = 0
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        # Data without a push, as after one that failed, is no note and passed over.
        do: dict[str, Callable[..., None]] = {
            "look": self.look,
            "push": self.push,
            "fetch": self.fetch,
            "run": self.run,
        }
        while True:
            line, kind, payload = self._next or self.requests.get()
            self._next = None
            if kind != NOTE or line is not self.line():
                continue
            asked = json.loads(payload)
            self._id = asked.pop("id")
            try:
                do[asked.pop("do")](line, **asked)
            except (OSError, ValueError, KeyError, TypeError) as error:
                full = getattr(error, "errno", None) in FULL
                self._answer(line, error=str(error) or repr(error), full=full, free=self._free())

    def _answer(self, line: Line, **fields: Any) -> None:
        line.say(to=self._id, **fields)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _path(self, name: str, ending: str = "") -> Path:
        if not acceptable(name):
            raise ValueError(f"{name!r} is no name for a file here")
        return self.folder / (name + ending)

    def look(self, line: Line, files: dict[str, str]) -> None:
        """Of files by their SHA-256: which are here, and how much of the others with which hash; and the free bytes."""
        here, parts = [], {}
        for name, sha256 in files.items():
            path, part = self._path(name), self._path(name, ".part")
            if path.is_file() and digest(path) == sha256:
                here.append(name)
            elif part.is_file():
                size = part.stat().st_size
                parts[name] = [size, digest(part, size)]
        self._answer(line, here=here, parts=parts, free=self._free())

    def push(self, line: Line, name: str, size: int, sha256: str, start: int) -> None:
        """Take the bytes of a file from `start` on; what is there is kept for another try where the connection ends."""
        path, part = self._path(name), self._path(name, ".part")
        try:
            with part.open("r+b" if start else "wb", buffering=0) as file:
                file.truncate(start)
                file.seek(start)
                if not self._take(line, file, size):
                    return
                os.fsync(file.fileno())
            found = digest(part)
            if found == sha256:
                part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        if found != sha256:
            part.unlink()
        self._answer(line, pushed=name, sha256=found)

    def _take(self, line: Line, file: IO[bytes], size: int) -> bool:
        while file.tell() < size:
            item = self.requests.get()
            if item[0] is not self.line():
                continue
            if item[1] != DATA:  # the host begins anew, by another connection
                self._next = item
                return False
            rest = memoryview(item[2])
            while rest:
                rest = rest[file.write(rest) :]
            self._answer(line, got=file.tell())
        return True

    def fetch(self, line: Line, name: str, start: int) -> None:
        """Give size and SHA-256 of a file, then its bytes from `start` on."""
        path = self._path(name)
        size = path.stat().st_size
        self._answer(line, size=size, sha256=digest(path))
        with path.open("rb") as file:
            file.seek(start)
            while part := file.read(CHUNK):
                if not line.send_data(part):
                    return

    def run(self, line: Line, number: int, seen: int, command: list[str], seconds: float) -> None:
        """Start a command, or, where it is the one that was started before, tell again what was not seen."""
        if number == self.command.number:
            self.command.tell_again(line, seen)
        else:
            self.command.start(number, command, seconds)


class Command:
    """One command at a time, and what it says: kept until the host has seen it, whatever becomes of the connection."""

    def __init__(self, folder: Path, line: Callable[[], Line | None]) -> None:
        self.number = 0
        self.leader: int | None = None
        self._folder, self._line = folder, line
        self._thread: threading.Thread | None = None
        self._events: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._count = 0
        self._change = threading.Condition()

    def start(self, number: int, command: list[str], seconds: float) -> None:
        """Run a command in the folder for `seconds` at most. One that still runs, as nobody waits for it, is ended."""
        with self._change:
            self.number, self._count = number, 0
            self._events.clear()
            self._change.notify_all()
        if self._thread is not None:
            end_all(self.leader)
            self._thread.join()
        self._thread = threading.Thread(target=self._run, args=(number, command, seconds), daemon=True)
        self._thread.start()

    def saw(self, count: int) -> None:
        """The host has seen so many events."""
        with self._change:
            while self._events and self._events[0][0] <= count:
                self._events.popleft()
            self._change.notify_all()

    def tell_again(self, line: Line, seen: int) -> None:
        """Send what came after the first `seen` events."""
        self.saw(seen)
        with self._change:
            for count, fields in self._events:
                line.say(event=count, run=self.number, **fields)

    def _tell(self, number: int, **fields: Any) -> None:
        with self._change:
            while len(self._events) >= UNHEARD and number == self.number:
                self._change.wait()
            if number != self.number:
                return
            self._count += 1
            self._events.append((self._count, fields))
            line = self._line()
            if line is not None:
                line.say(event=self._count, run=number, **fields)

    def _run(self, number: int, command: list[str], seconds: float) -> None:
        try:
            process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**os.environ, **_own_folders(self._folder.parent / "tmp")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._tell(number, failed=str(error), missing=isinstance(error, FileNotFoundError))
            return
        self.leader = process.pid
        die_first(process.pid)
        late = threading.Event()
        limit = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._expire, args=(process.pid, late))
        limit.daemon = True
        limit.start()
        errors: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        readers = [
            threading.Thread(target=_lines, args=(process.stdout, lambda t: self._tell(number, line=t)), daemon=True),
            threading.Thread(target=_lines, args=(process.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        process.wait()  # without a limit: one would wake twenty times a second, beside what is timed
        limit.cancel()
        ended = end_all(process.pid)
        limit.join()  # where it ends processes too it must be done: the next command's would be among them
        for reader in readers:
            reader.join(None if ended else 5)  # what does not die may hold its pipes open for ever
        self.leader = None
        self._tell(number, end=process.returncode, late=late.is_set(), errors="\n".join(errors), ended=ended)

    def _expire(self, leader: int, late: threading.Event) -> None:
        late.set()
        end_all(leader)


def _own_folders(folder: Path) -> dict[str, str]:
    """Where a command's temporary files and caches go: runtimes leave some, and these go with the session."""
    return {"TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}


def _lines(file: IO[bytes], take: Callable[[str], object]) -> None:
    while raw := file.readline(LONGEST_LINE):
        take(raw.decode("utf-8", "replace").rstrip("\r\n"))
