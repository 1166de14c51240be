"""`local`: this machine as a device, with the Python that runs this; a folder of its own, and processes of its own."""

import collections
import contextlib
import hashlib
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from targets.errors import TargetError
from targets.transports import Finished, Line

STDERR_LINES = 40


class LocalTransport:
    """See `targets.transports.Transport`. A command runs in a process group of its own, which ends with it."""

    emulated = False
    counts = False
    # This machine's own, as its compiler sees it.
    processor: tuple[str, str] | None = (platform.machine(), "native")
    prefix = "tightfit-local-"

    def __init__(self, address: str) -> None:
        self.address = address
        self.python: tuple[str, ...] = (sys.executable,)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Make the folder."""
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=self.prefix))
        except OSError as error:
            raise TargetError(f"{self.address}: there is no room for a folder here: {error}") from error

    def push(self, files: Mapping[str, Path]) -> None:
        """Copy files into the folder."""
        for name, path in files.items():
            there = self._there(name)
            if not (there.is_file() and _sha256(there) == _sha256(path)):
                self._copied(path, there)

    def run(
        self, command: Sequence[str], *, seconds: float, line: Line = lambda _: None, count: bool = False
    ) -> Finished:
        """Run a command in the folder."""
        started, environment = self._launch(command, count)
        try:
            self._process = process = subprocess.Popen(
                started,
                env=environment,
                cwd=self._there(""),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(f"{self.address}: {command[0]} does not start: {error}") from error
        errors: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [_reader(process.stdout, lines.put), _reader(process.stderr, errors.append)]
        try:
            late = not _listen(process, lines, line, time.monotonic() + seconds)
        finally:
            self._end()
        for reader in readers:
            reader.join(5)  # a process that left the group may hold the pipe
        while not lines.empty():
            line(lines.get())
        if late:
            raise TargetError(
                f"{self.address}: the command did not end within {seconds:g} s and was killed. A model that hangs, or "
                "one that is too slow for this machine: try fewer samples, or a smaller one."
            )
        return Finished(process.returncode, "\n".join(errors))

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of the folder."""
        there = self._there(name)
        if not there.is_file():
            raise TargetError(f"{self.address}: the command left no file {name}.")
        self._copied(there, path)

    def facts(self) -> dict[str, str]:
        """Nothing that the agent would not say itself."""
        return {}

    def close(self) -> None:
        """Kill what still runs, and remove the folder."""
        self._end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _launch(self, command: Sequence[str], count: bool) -> tuple[list[str], dict[str, str] | None]:
        """What is started for a command, and with which variables; None for those of this process."""
        if count:
            raise ValueError("instructions are counted on emulated devices only")
        return list(command), None

    def _there(self, name: str) -> Path:
        if self._folder is None:
            raise TargetError(f"{self.address} is not open.")
        if name != Path(name).name:
            raise ValueError(f"'{name}' is no name for a file in the folder")
        return self._folder / name

    def _copied(self, source: Path, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        try:
            shutil.copyfile(source, part)
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise TargetError(f"{self.address}: {source.name} could not be copied: {error}") from error

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def transport(address: str) -> LocalTransport:
    """This machine. Raises TargetError for more than the one word."""
    if address != "local":
        raise TargetError(f"'{address}' is no place to run: local, this machine, takes nothing behind it.")
    return LocalTransport(address)


def _listen(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[str]", line: Line, deadline: float) -> bool:
    """Pass lines on until the process ends; False when the deadline comes first."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(queue.Empty):
            line(lines.get(timeout=0.05))
    return True


def _reader(file: IO[bytes], take: Line) -> threading.Thread:
    def read() -> None:
        with file:
            for raw in file:
                take(raw.decode("utf-8", "replace").rstrip("\r\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
