"""Commands on an Android device: adb's shell,v2 service, with exit codes and a time limit; not run on hardware.

A command that outlives its connection goes on running there, so every command gets a session of its own (`setsid`),
whose process group is killed from here when it ends, and from a watcher inside it when nobody comes.
"""

import codecs
import collections
import contextlib
import shlex
import time
from collections.abc import Callable, Sequence

from targets.errors import TargetError

from . import Finished, Line
from ._adb_server import EXIT, STDERR, STDOUT, Connection, packets, to_device

STDERR_LINES = 40
SHORT_SECONDS = 30.0
# After the time limit the device has so long to kill it from here, before its own watcher does.
GRACE_SECONDS = 15.0
GROUP = ".group"
# $0: seconds; the rest: the command. The watcher holds neither our pipes nor the exit code.
_WRAPPER = f'echo $$ > {GROUP}; (sleep "$0"; kill -s KILL -- -$$) </dev/null >/dev/null 2>&1 & "$@" </dev/null; exit $?'


class Shell:
    """The shell of one device. `who` is how messages name it."""

    def __init__(self, who: str, serial: str) -> None:
        self.who = who
        self._serial = serial

    def say(self, command: str, seconds: float | None = None) -> tuple[int, str]:
        """Run one short command; its exit code and what it wrote to stdout. Raises TargetError when it hangs."""
        seconds = SHORT_SECONDS if seconds is None else seconds
        lines: list[str] = []
        try:
            done = self._listen(command, seconds, lines.append)
        except TimeoutError:
            raise TargetError(f"{self.who}: the device did not answer '{command[:60]}' within {seconds:g} s.") from None
        return done.code, "\n".join(lines)

    def demand(self, command: str, what: str) -> str:
        """What a command writes, which has to end well; else TargetError says that `what` failed."""
        code, said = self.say(f"{{ {command}; }} 2>&1")
        if code:
            raise TargetError(f"{self.who}: {what}: {said.strip() or f'exit code {code}'}.")
        return said

    def run(self, folder: str, command: Sequence[str], seconds: float, line: Line) -> Finished:
        """Run a command in a folder; nothing of it runs on afterwards. Raises TargetError after `seconds`."""
        inner = shlex.join([str(int(seconds + GRACE_SECONDS)), *command])
        try:
            # Not the shell's last command: a shell that turns into setsid leads its group, so setsid would fork and go.
            started = f"cd {shlex.quote(folder)} || exit 1; setsid sh -c {shlex.quote(_WRAPPER)} {inner}; exit $?"
            return self._listen(started, seconds, line)
        except TimeoutError:
            raise TargetError(
                f"{self.who}: the command did not end within {seconds:g} s and was killed. A model that hangs, or one "
                "that is too slow for this device: try fewer samples, or a smaller one."
            ) from None
        finally:
            self.end(folder)

    def end(self, folder: str) -> None:
        """Kill what a command left running, the watcher too. A device that is gone cannot be told."""
        group = shlex.quote(f"{folder}/{GROUP}")
        with contextlib.suppress(TargetError):
            self.say(f"[ -f {group} ] && kill -s KILL -- -$(cat {group}) 2>/dev/null; rm -f {group}; true")

    def _listen(self, command: str, seconds: float, line: Line) -> Finished:
        """Pass stdout on, line by line, until the exit code comes. Raises TimeoutError after `seconds`."""
        until = time.monotonic() + seconds
        errors: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        out, err = _Lines(line), _Lines(errors.append)
        with to_device(self.who, self._serial, f"shell,v2,raw:{command}") as link:
            for kind, data in packets(_Until(link, until)):
                if kind == STDOUT:
                    out.feed(data)
                elif kind == STDERR:
                    err.feed(data)
                elif kind == EXIT:
                    code = data[0] if data else 255
        out.end()
        err.end()
        return Finished(code, "\n".join(errors))


class _Until(Connection):
    """A connection of which every read ends at one moment."""

    def __init__(self, link: Connection, until: float) -> None:
        super().__init__(link._link, link.who)
        self._until = until

    def read(self, count: int) -> bytes:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.deadline(left)
        return super().read(count)


class _Lines:
    """Bytes in, whole lines out."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        self._rest += self._decoder.decode(data)
        *whole, self._rest = self._rest.split("\n")
        for text in whole:
            self._take(text.rstrip("\r"))

    def end(self) -> None:
        if self._rest:
            self._take(self._rest)
            self._rest = ""
