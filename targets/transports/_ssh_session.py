"""A session with the keeper on a device, which outlives its connection: what was asked is asked again by a new one."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from targets.errors import TargetError
from targets.transports import _ssh_errors
from targets.transports._ssh_address import Address, command_line
from targets.transports._ssh_boot import first_bytes, remote_command
from targets.transports._ssh_connection import Connection, LostError, NotGreetedError, Patience
from targets.transports._ssh_frames import NOTE

T = TypeVar("T")
MIB = 1 << 20
MOST_BREAKS = 20
ROOM = "Make room there (df -h), or set TMPDIR for its login to a folder on a larger disk."


class Session:
    """Not begun yet. `hello` is what the keeper said of itself, {} before the beginning and after the end."""

    def __init__(self, address: Address, patience: Patience) -> None:
        self.name = address.name
        self.hello: dict[str, Any] = {}
        self._address, self._patience = address, patience
        self._connection: Connection | None = None
        self._asked = 0

    @property
    def said(self) -> list[str]:
        """The lines that ssh wrote to stderr since it connected."""
        return self._connection.said if self._connection else []

    def begin(self) -> None:
        """Log in, and let the keeper make the folder."""
        patience = self._patience
        config = {"silence": patience.silence, "grace": patience.grace}
        hello = self._connect(config, patience.greet, fresh=False)
        if "broken" in hello:
            raise TargetError(
                f"'{self.name}' cannot make a folder for the session in {hello['folder']}: {hello['broken']}. {ROOM}"
            )
        self.hello = hello

    def end(self) -> None:
        """Let the keeper end what runs and remove the folder; where it is out of reach, it does so by itself."""
        connection, hello = self._connection, self.hello
        self.hello = {}
        left = False
        try:
            if hello and (connection is None or not connection.alive):
                connection = self._once_more(hello, connection)
            if connection is not None:
                connection.say(do="close")
                left = bool(hello) and self._leaves_something(connection)
        finally:
            # Ctrl-C may have come while another connection was made.
            for one in {connection, self._connection} - {None}:
                one.end(2)  # type: ignore[union-attr]
            self._connection = None
        if left:
            raise TargetError(
                f"'{self.name}' could not end all that the session started, or not remove {hello['folder']}: see "
                "there, by `ps` and `ls`, what is stuck; mostly a driver or a disk that does not answer."
            )

    def steadily(self, what: str, act: Callable[[Connection], T]) -> T:
        """Do something that can be begun anew, until a connection lasts for it."""
        for _ in range(MOST_BREAKS):
            if not self.hello:
                raise TargetError(f"no session is open on '{self.name}' {what}; it was lost, or closed.")
            try:
                if self._connection is None:
                    raise LostError("the connection was closed")
                return act(self._connection)
            except LostError as lost:
                self._reconnect(what, lost)
        raise TargetError(
            f"the connection to '{self.name}' broke {MOST_BREAKS} times {what}. Bring the device nearer to its "
            "network, or connect it by cable, then run again."
        )

    def ask(self, connection: Connection, **fields: Any) -> int:
        """Send a request; its number is what `answer` waits for."""
        self._asked += 1
        connection.say(id=self._asked, **fields)
        return self._asked

    def answer(self, connection: Connection, asked: int, what: str) -> dict[str, Any]:
        """The answer to a request; what belongs to those given up before is passed over."""
        while True:
            kind, payload = connection.receive()
            answer: dict[str, Any] = json.loads(payload) if kind == NOTE else {}
            if answer.get("to") == asked:
                return self.checked(answer, what)

    def checked(self, answer: dict[str, Any], what: str) -> dict[str, Any]:
        """The answer itself, or TargetError where it says that something failed."""
        if answer.get("full"):
            raise TargetError(
                f"the disk of '{self.name}' became full {what} ({answer['error']}): {answer['free'] / MIB:.1f} "
                f"MiB are free for {self.hello['folder']}. Nothing of that file was kept. {ROOM}"
            )
        if "error" in answer:
            raise TargetError(f"'{self.name}' failed {what}: {answer['error']}.")
        return answer

    def _connect(self, config: dict[str, Any], seconds: float, *, fresh: bool) -> dict[str, Any]:
        limit = min(self._patience.connect, seconds)
        command = command_line(self._address, remote_command(self._address.python), limit, fresh=fresh)
        self._connection = connection = Connection(command, first_bytes(config), self._patience)
        try:
            return connection.hello(seconds)
        except NotGreetedError as error:
            connection.end(0)
            self._connection = None
            raise _ssh_errors.refused(self._address, error.said, error.printed, seconds) from None

    def _once_more(self, hello: dict[str, Any], before: Connection | None) -> Connection | None:
        if before is not None:
            before.end(0)
        with contextlib.suppress(TargetError):
            self._connect({"join": hello["folder"]}, min(self._patience.grace, self._patience.connect), fresh=True)
            return self._connection
        return None

    def _leaves_something(self, connection: Connection) -> bool:
        """Wait for the keeper's last word; True where it says that something is left."""
        until = time.monotonic() + self._patience.close
        with contextlib.suppress(LostError, TimeoutError):
            while True:
                kind, payload = connection.receive(until)
                if kind == NOTE and "closed" in (said := json.loads(payload)):
                    return not (said["ended"] and said["gone"])
        return False

    def _reconnect(self, what: str, lost: LostError) -> None:
        until = time.monotonic() + self._patience.grace
        join = {"join": self.hello["folder"]}
        said = _ssh_errors.plain(self.said)[-1:]
        if self._connection is not None:
            self._connection.end(0)
            self._connection = None
        while True:
            left = max(1.0, until - time.monotonic())
            try:
                hello = self._connect(join, min(left, self._patience.greet), fresh=True)
                break
            except TargetError as error:
                if time.monotonic() > until:
                    self.hello = {}
                    raise TargetError(self._cut(what, [str(lost), *said], error)) from None
            time.sleep(min(1.0, self._patience.grace / 10))
        if "lost" in hello:
            self.hello = {}
            raise TargetError(
                f"the connection to '{self.name}' broke {what}, and its session is gone: the device was restarted, "
                "ended the login, or had already cleaned up. Run again."
            )

    def _cut(self, what: str, why: list[str], error: TargetError) -> str:
        patience = self._patience
        return (
            f"the connection to '{self.name}' broke {what} ({'; '.join(why).rstrip('.')}), and could not be made "
            f"again within {patience.grace:g} s: {error} The device ends the session and removes its folder by itself, "
            f"at most {patience.silence + patience.grace:g} s after it last heard from here."
        )
