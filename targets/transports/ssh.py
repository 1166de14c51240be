"""A device reached by OpenSSH: `ssh://[user@]host[:port][/path/to/python]`, with the user's own configuration and keys.

One login carries a session. At its other end a keeper (`_ssh_keeper.py`) makes the folder, takes and gives files, runs
commands and, when this side is silent for too long, ends all of it by itself. A connection that breaks is made again
while the keeper waits; files go on from where they stopped.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from targets.errors import MissingRuntime, TargetError
from targets.transports import Finished, Line, _ssh_errors
from targets.transports._ssh_address import client, parse
from targets.transports._ssh_connection import Connection, Patience
from targets.transports._ssh_frames import CHUNK, DATA, NOTE, WINDOW, acceptable, digest, pack
from targets.transports._ssh_session import MIB, ROOM, Session

# Left free on the device's disk, for what the run itself writes.
SPARE = 1 * MIB
ACKNOWLEDGED = 256


def transport(address: str) -> "SshTransport":
    """The transport for an `ssh://` address, not opened yet."""
    return SshTransport(address)


class SshTransport:
    """See `targets.transports.Transport`. `emulated` is told by the login, where it is no board but an emulated one."""

    counts = False
    processor: tuple[str, str] | None = None

    def __init__(self, address: str, patience: Patience | None = None) -> None:
        self.address = address
        self.emulated = False
        self.python: tuple[str, ...] = ()
        self._patience = patience or Patience()
        self._to = parse(address)
        self._session = Session(self._to, self._patience)
        self._there = f"'{self._to.name}'"
        self._facts: dict[str, str] = {}
        self._runs = 0

    def open(self) -> None:
        """Log in, find Python, and let the keeper make the folder."""
        self._session.begin()
        hello, said = self._session.hello, self._session.said
        self.python = (hello["python"] or self._to.python or "python3",)
        self.emulated = hello["emulated"]
        version = subprocess.run([client(), "-V"], capture_output=True, text=True).stderr.strip()
        found = {
            "ssh": version,
            "ssh_server": _ssh_errors.server(said),
            "host_key": _ssh_errors.host_key(said),
            "python": hello["version"],
            "system": hello["system"],
        }
        self._facts = {name: text for name, text in found.items() if text}

    def facts(self) -> dict[str, str]:
        """The login's client and server, the host key, and what the keeper says of its system and Python."""
        return dict(self._facts)

    def close(self) -> None:
        """Let the keeper end what runs and remove the folder; where it is out of reach, it does so by itself."""
        self._session.end()

    def push(self, files: Mapping[str, Path]) -> None:
        """Copy files into the folder, each whole by its SHA-256 or not at all; what is there is not sent."""
        for name, path in files.items():
            _demand_name(name)
            if not path.is_file():
                raise TargetError(f"{path}, which is to be sent to {self._there}, is no file.")
        what = f"while sending {_list(files)}"
        try:
            hashes = {name: digest(path) for name, path in files.items()}
            self._session.steadily(what, lambda connection: self._push(connection, files, hashes))
        except OSError as error:
            raise TargetError(f"a file cannot be read {what} to {self._there}: {error}.") from error

    def _push(self, connection: Connection, files: Mapping[str, Path], hashes: dict[str, str]) -> None:
        what = f"while sending {_list(files)}"
        found = self._session.answer(connection, self._session.ask(connection, do="look", files=hashes), what)
        starts = {}
        for name in files.keys() - set(found["here"]):
            size, sha256 = found["parts"].get(name, (0, ""))
            whole = files[name].stat().st_size
            starts[name] = size if 0 < size <= whole and digest(files[name], size) == sha256 else 0
        needed = sum(files[name].stat().st_size - start for name, start in starts.items())
        if starts and needed + SPARE > found["free"]:
            raise TargetError(
                f"the disk of {self._there} is too full {what}: {found['free'] / MIB:.1f} MiB are free for "
                f"{self._session.hello['folder']}, {(needed + SPARE) / MIB:.1f} MiB are needed. Nothing was sent. "
                f"{ROOM}"
            )
        for name in files:
            if name in starts:
                self._send(connection, name, files[name], hashes[name], starts[name])

    def _send(self, connection: Connection, name: str, path: Path, sha256: str, start: int) -> None:
        what, size, sent, got = f"while sending '{name}'", path.stat().st_size, start, start
        asked = self._session.ask(connection, do="push", name=name, size=size, sha256=sha256, start=start)
        with path.open("rb") as file:
            file.seek(start)
            while part := file.read(min(CHUNK, size - sent)):
                connection.send(pack(DATA, part))
                sent += len(part)
                while sent - got >= WINDOW:
                    got = self._session.answer(connection, asked, what)["got"]
        if sent < size:
            raise TargetError(f"{path} became shorter {what}; write it anew, then run again.")
        while "pushed" not in (answer := self._session.answer(connection, asked, what)):
            pass
        if answer["sha256"] != sha256:
            raise TargetError(
                f"'{name}' arrived on {self._there} as another file than was sent: {path} was changed meanwhile, "
                "or the device's disk is damaged. It was removed there; run again."
            )

    def fetch(self, name: str, path: Path) -> None:
        """Copy one file of the folder to `path`, whole by its SHA-256 or not at all."""
        _demand_name(name)
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(b"")
            self._session.steadily(f"while fetching '{name}'", lambda connection: self._fetch(connection, name, part))
            os.replace(part, path)
        except OSError as error:
            raise TargetError(f"'{name}' of {self._there} cannot be written to {path}: {error}.") from error
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, connection: Connection, name: str, part: Path) -> None:
        what, start = f"while fetching '{name}'", part.stat().st_size
        asked = self._session.ask(connection, do="fetch", name=name, start=start)
        answer = self._session.answer(connection, asked, what)
        with part.open("ab") as file:
            while file.tell() < answer["size"]:
                kind, payload = connection.receive()
                if kind == DATA:
                    file.write(payload)
                elif (said := json.loads(payload)).get("to") == asked:
                    self._session.checked(said, what)
        if digest(part) != answer["sha256"]:
            raise TargetError(
                f"'{name}' came from {self._there} as another file than it is there: it was changed meanwhile, or "
                "a disk is damaged. Run again."
            )

    def run(
        self, command: Sequence[str], *, seconds: float, line: Line = lambda _: None, count: bool = False
    ) -> Finished:
        """Run a command in the folder. A signal that ended it is told as a negative code, as by `subprocess`."""
        if count:
            raise TargetError(f"'{self.address}' cannot count instructions: only emulated:<board> can.")
        self._runs += 1
        state = _Run(self._runs, list(command), seconds, line, self._patience)
        end = self._session.steadily(
            f"while '{_short(command)}' ran", lambda connection: self._follow(connection, state)
        )
        if "failed" in end:
            text = f"'{command[0]}' cannot be started on {self._there}: {end['failed']}."
            raise MissingRuntime(text + " Install it there.") if end["missing"] else TargetError(text)
        if end["late"]:
            told = f" Its last words: {end['errors'].splitlines()[-1]}" if end["errors"] else ""
            how = "was ended there with all that it had started" if end["ended"] else "could not be killed there"
            raise TargetError(
                f"'{_short(command)}' was not done on {self._there} after {seconds:g} s, and {how}.{told} Give it "
                "less to do, or more time."
            )
        return Finished(code=end["end"], errors=end["errors"])

    def _follow(self, connection: Connection, run: "_Run") -> dict[str, Any]:
        connection.seen = (run.number, run.seen)
        self._session.ask(
            connection, do="run", number=run.number, seen=run.seen, command=run.command, seconds=run.seconds
        )
        while True:
            try:
                kind, payload = connection.receive(run.until)
            except TimeoutError:
                raise TargetError(
                    f"'{_short(run.command)}' was to be ended on {self._there} after {run.seconds:g} s, and cannot be: "
                    "mostly a driver or a disk that does not answer. Restart the device."
                ) from None
            said: dict[str, Any] = json.loads(payload) if kind == NOTE else {}
            # After a reconnection, what came before is told again first: another order means that it is still to come.
            if said.get("run") != run.number or said["event"] != run.seen + 1:
                continue
            run.seen += 1
            connection.seen = (run.number, run.seen)
            if run.seen % ACKNOWLEDGED == 0:
                connection.acknowledge()
            if "line" not in said:
                return said
            run.line(said["line"])


class _Run:
    """A command under way, and how many of its events were seen here."""

    def __init__(self, number: int, command: list[str], seconds: float, line: Line, patience: Patience) -> None:
        self.number, self.command, self.seconds, self.line = number, command, seconds, line
        self.seen = 0
        self.until = time.monotonic() + seconds + patience.silence + patience.grace + patience.close


def _demand_name(name: str) -> None:
    if not acceptable(name):
        raise TargetError(f"'{name}' is no name for a file on a device: no slash, no '-' or '.' at its beginning.")


def _list(files: Mapping[str, Path]) -> str:
    return ", ".join(f"'{name}'" for name in files)


def _short(command: Sequence[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 80 else text[:77] + "..."
