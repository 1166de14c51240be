"""The keeper: the process on the device that holds a session, and ends it when nobody is there any more.

It makes the session's folder, hears a heartbeat from the host, and does its errands. When the host closes the session,
or has been silent for longer than a reconnection takes, or the device ends the login, it kills everything that the
session started and removes the folder. After a broken connection another `ssh` brings a relay, which joins the keeper
through a socket that only this user can reach.

Runs on the device: standard library, Python 3.9.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from targets.transports._ssh_errands import Errands
from targets.transports._ssh_frames import BEAT, CHUNK, GREETING, NOTE, note
from targets.transports._ssh_line import Line
from targets.transports._ssh_processes import adopt_orphans, end_all

PREFIX = "tightfit-ssh-"
FRESH_SECONDS = 60.0


class Keeper:
    """One session. `silence` s without a word, then `grace` s for a new connection; after a closed one, `grace`."""

    def __init__(self, silence: float, grace: float) -> None:
        self.silence, self.grace = silence, grace
        # Written to when the session shall end. No Event: a signal may come while its lock is held, for ever.
        self.bell = os.pipe()
        self.line: Line | None = None
        self.base = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.errands = Errands(self.base / "work", lambda: self.line)
        self.socket = socket.socket(socket.AF_UNIX)

    def prepare(self) -> None:
        """Make the folder and the socket; let signals end the session."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: self.end())
        adopt_orphans()
        for folder in (self.errands.folder, self.base / "tmp"):
            folder.mkdir()
        self.socket.bind(str(self.base / "line"))
        self.socket.listen(4)

    def keep(self) -> None:
        """Hold the session until it ends."""
        self._join(_read_in, _write_out)
        threading.Thread(target=self._accept, daemon=True).start()
        # Seldom: the device may be timing something.
        pause = min(1.0, self.grace / 4)
        while not select.select([self.bell[0]], [], [], pause)[0] and time.monotonic() < self._deadline():
            pass

    def end(self) -> None:
        """Let `keep` return."""
        os.write(self.bell[1], b".")

    def clean(self) -> None:
        """Kill what the session started, and remove its folder."""
        ended = end_all(self.errands.command.leader)
        gone = _remove(self.base)
        if self.line is not None:
            self.line.say(closed=True, ended=ended, gone=gone, folder=str(self.base))
            self.line.flush(2)

    def _accept(self) -> None:
        while True:
            peer, _ = self.socket.accept()
            self._join(peer.recv, peer.sendall)

    def _join(self, read: Any, write: Any) -> None:
        line = self.line = Line(read, write, self._take)
        line.start()
        line.say(**self._hello())

    def _hello(self) -> dict[str, Any]:
        return {
            "folder": str(self.base),
            "python": sys.executable,
            "version": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(),
            # Set by logins that are no board but an emulated one: what is timed there means nothing.
            "emulated": "QEMU_CPU" in os.environ or "TIGHTFIT_EMULATED" in os.environ,
        }

    def _take(self, line: Line, kind: bytes, payload: bytes) -> None:
        if line is not self.line:
            return
        if kind == NOTE and json.loads(payload).get("do") == "close":
            self.end()
        elif kind == BEAT:
            if payload:
                number, seen = json.loads(payload)
                if number == self.errands.command.number:
                    self.errands.command.saw(seen)
        else:
            self.errands.requests.put((line, kind, payload))

    def _deadline(self) -> float:
        line = self.line
        if line is None:
            return time.monotonic() + self.grace
        return line.heard + self.silence + self.grace if line.closed is None else line.closed + self.grace


def start(config: dict[str, Any]) -> None:
    """Hold a session, or join the host to the one in `config["join"]`; ends this process."""
    _write_out(b"\n" + GREETING + b"\n")
    if "join" in config:
        _relay(config["join"])
        os._exit(0)
    keeper: Keeper | None = None
    try:
        _sweep()
        keeper = Keeper(config["silence"], config["grace"])
        keeper.prepare()
    except OSError as error:
        if keeper is not None:
            _remove(keeper.base)
        _write_out(note(broken=str(error), folder=tempfile.gettempdir() if keeper else "its temporary folder"))
        os._exit(1)
    try:
        keeper.keep()
    finally:
        keeper.clean()
        os._exit(0)


def _read_in(count: int) -> bytes:
    # By the buffer: it may hold what came right behind the sources of these modules.
    return sys.stdin.buffer.read1(count)  # type: ignore[union-attr]


def _write_out(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def _relay(base: str) -> None:
    """Pass bytes between this login and the keeper, until one of them ends."""
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(str(Path(base) / "line"))
    except OSError as error:
        _write_out(note(lost=str(error)))
        return

    def inwards() -> None:
        with contextlib.suppress(OSError):
            while part := _read_in(CHUNK):
                peer.sendall(part)
            peer.shutdown(socket.SHUT_WR)

    def outwards() -> None:
        with contextlib.suppress(OSError):
            while part := peer.recv(CHUNK):
                _write_out(part)

    threads = [threading.Thread(target=work, daemon=True) for work in (inwards, outwards)]
    for thread in threads:
        thread.start()
    # Whoever writes to a network that went silent waits for ever; this thread sees the keeper go nevertheless.
    ends = select.poll()
    ends.register(peer, 0)
    while not ends.poll(1000) and threads[1].is_alive():
        pass
    threads[1].join(2)


def _remove(folder: Path) -> bool:
    """Remove a folder with all in it; what is killed just now may still make files, so more than once."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return True
        with contextlib.suppress(OSError):
            for path in [folder, *folder.rglob("*")]:
                if path.is_dir() and not path.is_symlink():
                    path.chmod(stat.S_IRWXU)
        time.sleep(0.05)
    return False


def _sweep() -> None:
    """Remove what sessions left whose keeper is dead: killed by the system, or the device lost its power."""
    for base in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            found = base.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            if time.time() - found.st_mtime > FRESH_SECONDS and not _answers(base / "line"):
                _remove(base)


def _answers(path: Path) -> bool:
    """Whether a keeper still listens. A folder of that name without a socket was made by something else: kept."""
    if not path.exists():
        return True
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(1)
        try:
            peer.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
