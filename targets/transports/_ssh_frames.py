"""What passes between this machine and the keeper on a device: frames of a kind, a length and that many bytes.

Runs on both ends, so: standard library, Python 3.9.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEAD = struct.Struct(">cI")
BEAT, NOTE, DATA = b"h", b"n", b"d"
CHUNK = 1 << 16
# So much may be under way unanswered: enough for a fast network, and a slow one still hears a heartbeat every few s.
WINDOW = 16 * CHUNK
LONGEST = 1 << 24
# Login scripts may print; what comes before this line is theirs.
GREETING = b"tightfit-keeper-1"
OLD_PYTHON = b"tightfit-old-python"
NO_PYTHON = b"tightfit-no-python"


def pack(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEAD.pack(kind, len(payload)) + payload


def note(**fields: Any) -> bytes:
    """One frame that carries a JSON object."""
    return pack(NOTE, json.dumps(fields).encode())


def exactly(read: Callable[[int], bytes], count: int) -> bytes:
    """`count` bytes from `read`, which may give fewer at a time; EOFError where they end before."""
    parts = []
    while count:
        part = read(min(count, CHUNK))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def frames(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(kind, payload) of every frame, to the end; EOFError in the middle of one, ValueError for what is none."""
    while True:
        first = read(HEAD.size)
        if not first:
            return
        kind, length = HEAD.unpack(first + exactly(read, HEAD.size - len(first)))
        if kind not in (BEAT, NOTE, DATA) or length > LONGEST:
            raise ValueError("what came is no frame")
        yield kind, exactly(read, length)


def digest(path: Path, count: int | None = None) -> str:
    """The SHA-256 of a file, or of its first `count` bytes, in hexadecimal."""
    found = hashlib.sha256()
    left = path.stat().st_size if count is None else count
    with path.open("rb") as file:
        while left > 0:
            part = file.read(min(left, 1 << 20))
            if not part:
                break
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def acceptable(name: str) -> bool:
    """Whether a name can be a file of the session's folder: no path, no option, nothing hidden, no unfinished file."""
    short = 0 < len(name.encode()) <= 200
    return short and name[0] not in "-." and "/" not in name and name.isprintable() and not name.endswith(".part")
