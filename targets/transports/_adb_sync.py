"""Files to and from an Android device: adb's sync service; not run on hardware.

Each request is four letters, a little-endian length of four bytes, and so much data (AOSP, packages/modules/adb,
SYNC.TXT): SEND "path,mode", then DATA chunks and DONE with the time of change; RECV path, answered by DATA chunks and
DONE; STAT path, answered by mode, size and time.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from targets.errors import TargetError

from ._adb_server import Connection, to_device

CHUNK = 1 << 16
# Without a sign of life for so long the device is gone.
SILENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Entry:
    """A file there; `mode` 0: there is none. `size` modulo 2^32, as the protocol has it."""

    mode: int
    size: int


class Sync:
    """A session of the sync service."""

    def __init__(self, who: str, serial: str) -> None:
        self._link: Connection = to_device(who, serial, "sync:")
        self._link.deadline(SILENCE_SECONDS)
        self._who = who

    def __enter__(self) -> "Sync":
        return self

    def __exit__(self, *_: object) -> None:
        self._link.__exit__()

    def stat(self, path: str) -> Entry:
        """What is at a path there."""
        self._ask(b"STAT", path.encode())
        name, mode, size, _ = struct.unpack("<4sIII", self._read(16))
        if name != b"STAT":
            raise TargetError(f"{self._who}: the device answered STAT with {name!r}.")
        return Entry(mode, size)

    def send(self, source: Path, path: str, mode: int) -> None:
        """Copy a file there. Raises TargetError in the device's own words where it could not be written."""
        try:
            with source.open("rb") as file:
                self._ask(b"SEND", f"{path},{0o100000 | mode}".encode())
                while chunk := file.read(CHUNK):
                    self._send(struct.pack("<4sI", b"DATA", len(chunk)) + chunk)
        except OSError as error:
            raise TargetError(f"{source} cannot be read: {error.strerror}.") from error
        except TargetError as broken:
            raise self._refusal(path) or broken from None
        self._send(struct.pack("<4sI", b"DONE", int(source.stat().st_mtime) & 0xFFFFFFFF))
        status, length = struct.unpack("<4sI", self._read(8))
        if status != b"OKAY":
            raise self._failed(path, status, length)

    def receive(self, path: str, target: Path) -> int:
        """Copy a file from there to `target`, whole or not at all; returns its size."""
        self._ask(b"RECV", path.encode())
        part = target.with_name(target.name + ".part")
        size = 0
        try:
            with part.open("wb") as file:
                while True:
                    status, length = struct.unpack("<4sI", self._read(8))
                    if status == b"DONE":
                        break
                    if status != b"DATA" or length > CHUNK:
                        raise self._failed(path, status, length)
                    size += file.write(self._read(length))
            os.replace(part, target)
        except OSError as error:
            raise TargetError(f"{target} cannot be written: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)
        return size

    def _ask(self, name: bytes, data: bytes) -> None:
        self._send(struct.pack("<4sI", name, len(data)) + data)

    def _send(self, data: bytes) -> None:
        try:
            self._link.send(data)
        except TimeoutError:
            raise self._silent() from None

    def _read(self, count: int) -> bytes:
        try:
            return self._link.read(count)
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> TargetError:
        return TargetError(
            f"{self._who}: the device has said nothing for {SILENCE_SECONDS:g} s while a file was copied. Look at the "
            "cable and `adb devices`, then run it again."
        )

    def _refusal(self, path: str) -> TargetError | None:
        """A device that cannot write says so and hangs up while it is still being sent to."""
        try:
            status, length = struct.unpack("<4sI", self._link.read(8))
            return self._failed(path, status, length) if status == b"FAIL" else None
        except (TargetError, TimeoutError):
            return None

    def _failed(self, path: str, status: bytes, length: int) -> TargetError:
        if status != b"FAIL":
            return TargetError(f"{self._who}: the device answered {status!r} while {path} was copied.")
        said = self._read(min(length, CHUNK)).decode("utf-8", "replace")
        room = " Free some room on the device." if "space" in said else ""
        return TargetError(f"{self._who}: {path} could not be copied: {said}.{room}")
