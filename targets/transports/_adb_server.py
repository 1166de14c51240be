"""The adb server, spoken to through its smart-socket protocol; not run on hardware.

Sources: AOSP packages/modules/adb: OVERVIEW.TXT and SERVICES.TXT (requests), SYNC.TXT (files), shell_protocol.h
(shell,v2). A request is four hexadecimal digits of its length and its text; the server answers OKAY, or FAIL and a text
of the same form. After `host:transport:SERIAL` the same connection speaks with the device.
"""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

from targets.errors import MissingRuntime, TargetError

PORT = 5037
CONNECT_SECONDS = 10.0
START_SECONDS = 20.0
WAIT_SECONDS = 5.0
LARGEST_TEXT = 1 << 20


def server_address() -> tuple[str, int] | str:
    """Where the server listens: (host, port), or the path of a socket; as adb itself reads the environment.

    Raises TargetError for an ADB_SERVER_SOCKET of another kind.
    """
    text = os.environ.get("ADB_SERVER_SOCKET", "")
    if text:
        kind, _, rest = text.partition(":")
        if kind == "localfilesystem" and rest:
            return rest
        host, _, port = rest.rpartition(":")
        if kind == "tcp" and port.isdigit():
            return host or "127.0.0.1", int(port)
        raise TargetError(f"ADB_SERVER_SOCKET is '{text}'; Tightfit knows tcp:HOST:PORT and localfilesystem:PATH.")
    port = os.environ.get("ANDROID_ADB_SERVER_PORT", str(PORT))
    if not port.isdigit():
        raise TargetError(f"ANDROID_ADB_SERVER_PORT is '{port}', which is no port.")
    return os.environ.get("ANDROID_ADB_SERVER_ADDRESS", "127.0.0.1"), int(port)


class Connection:
    """One connection to the server. Everything that goes wrong on it is a TargetError."""

    def __init__(self, link: socket.socket, who: str) -> None:
        self._link = link
        self.who = who

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def deadline(self, seconds: float | None) -> None:
        """How long the next read or write may take; TimeoutError after that."""
        self._link.settimeout(seconds)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        try:
            self._link.sendall(data)
        except TimeoutError:
            raise
        except OSError as error:
            raise TargetError(f"{self.who}: the connection broke while sending: {error}. {RECONNECT}") from error

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises TargetError where the connection ends before."""
        parts, missing = [], count
        while missing:
            try:
                part = self._link.recv(min(missing, 1 << 16))
            except TimeoutError:
                raise
            except OSError as error:
                raise TargetError(f"{self.who}: the connection broke: {error}. {RECONNECT}") from error
            if not part:
                raise TargetError(
                    f"{self.who}: the connection ended in the middle of an answer, {missing} of {count} bytes were "
                    f"missing. {RECONNECT}"
                )
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def request(self, text: str) -> None:
        """Ask for a service. Raises TargetError with the server's own words where it refuses."""
        data = text.encode()
        try:
            self.send(b"%04x%s" % (len(data), data))
            status = self.read(4)
            if status == b"FAIL":
                raise TargetError(f"{self.who}: {self.text()}")
        except TimeoutError:
            raise TargetError(f"{self.who}: the adb server does not answer; try `adb kill-server`.") from None
        if status != b"OKAY":
            raise TargetError(f"{self.who}: what answers there is no adb server: {status!r}.")

    def text(self) -> str:
        """A text with its length in front."""
        digits = self.read(4)
        try:
            length = int(digits, 16)
        except ValueError:
            raise TargetError(f"{self.who}: what answers there is no adb server: {digits!r}.") from None
        return self.read(length).decode("utf-8", "replace")


RECONNECT = "Look at the cable and `adb devices`, then run it again."


def connect(who: str) -> Connection:
    """A connection to the server, which is started where it is not running and there is an `adb`.

    Raises MissingRuntime where there is neither.
    """
    address = server_address()
    with contextlib.suppress(OSError):
        return Connection(_socket(address), who)
    adb = shutil.which("adb")
    where = address if isinstance(address, str) else "{}:{}".format(*address)
    if adb is None:
        raise MissingRuntime(
            f"{who}: no adb server answers at {where}, and there is no adb in PATH to start one. Install Android's "
            "platform-tools (Debian: apt install adb)."
        )
    return Connection(_started(adb, address, who, where), who)


def _socket(address: tuple[str, int] | str) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=CONNECT_SECONDS)
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(CONNECT_SECONDS)
    try:
        link.connect(address)
    except OSError:
        link.close()
        raise
    return link


def _started(adb: str, address: tuple[str, int] | str, who: str, where: str) -> socket.socket:
    """Start the server and connect. It inherits nothing of ours: it outlives this program, as adb's server does."""
    try:
        done = subprocess.run(
            [adb, "start-server"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_SECONDS,
            check=False,
        )
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return _socket(address)
        except OSError as error:
            if time.monotonic() > until:
                last = said[-1] if said else str(error)
                raise TargetError(f"{who}: `adb start-server` started no server at {where}: {last}.") from error
        time.sleep(0.1)


def devices(who: str) -> dict[str, str]:
    """The serials of all devices the server sees, with their states: device, offline, unauthorized, ..."""
    with connect(who) as link:
        link.request("host:devices")
        rows = (line.split("\t") for line in link.text().splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}


def version(who: str) -> str:
    """The server's protocol version, as a number."""
    with connect(who) as link:
        link.request("host:version")
        text = link.text()
    return str(int(text, 16)) if text.strip() else text


def to_device(who: str, serial: str, service: str) -> Connection:
    """A connection on which a service of the device has been opened: `sync:`, `shell,v2,raw:command`."""
    link = connect(who)
    try:
        link.request(f"host:transport:{serial}")
        link.request(service)
    except BaseException:
        link.__exit__()
        raise
    return link


def features(who: str, serial: str) -> set[str]:
    """What the device's adb daemon can do."""
    with connect(who) as link:
        link.request(f"host-serial:{serial}:features")
        return set(link.text().split(","))


# Kinds of shell,v2 packets: one byte, a little-endian length of four, the data.
STDOUT, STDERR, EXIT = 1, 2, 3


def packets(link: Connection) -> Iterator[tuple[int, bytes]]:
    """The packets of a shell,v2 service up to its exit code. Raises TargetError where the connection ends before."""
    while True:
        kind, length = struct.unpack("<BI", link.read(5))
        if length > LARGEST_TEXT:
            raise TargetError(f"{link.who}: a packet of {length} bytes came, which no adb daemon sends.")
        data = link.read(length)
        yield kind, data
        if kind == EXIT:
            return
