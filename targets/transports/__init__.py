"""How files and commands get to where an artifact shall run. One transport per file, named by the address's scheme.

An address is `local`, `emulated:<board>`, `ssh://[user@]host[:port][/path/to/python]` or `adb:[serial]`. A transport
knows nothing of models: it opens a folder of its own on the device, carries files in and out, runs commands there, and
leaves nothing behind, neither files nor processes, however a session ends.
"""

import contextlib
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from targets.errors import TargetError

Line = Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit code, and the last lines of what it wrote to stderr."""

    code: int
    errors: str


class Transport(Protocol):
    """One way to one device. All methods raise a TargetError that names the cause and the next step.

    `emulated`: outputs and instruction counts are the device's, times say nothing. `counts`: `run` can count
    instructions. `python` starts the device's Python, () where it has none. `processor`: what C sources are compiled
    for here, (the kernel's architecture, QEMU's name of the core); None where that is not known.
    """

    address: str
    emulated: bool
    counts: bool
    python: tuple[str, ...]
    processor: tuple[str, str] | None

    def open(self) -> None:
        """Reach the device, find its Python, and make the session's folder there."""
        ...

    def push(self, files: Mapping[str, Path]) -> None:
        """Copy files into the folder, {name there: path here}. What is there already, by its SHA-256, is not sent."""
        ...

    def run(self, command: Sequence[str], *, seconds: float, line: Line = ..., count: bool = False) -> Finished:
        """Run a command in the folder; `line` gets every line of its stdout as it comes.

        After `seconds` the command and all its children are killed, on the device itself too, and TargetError says so.
        With `count`, INSTRUCTIONS is there to be fetched afterwards.
        """
        ...

    def fetch(self, name: str, path: Path) -> None:
        """Copy one file of the folder to `path`, whole or not at all."""
        ...

    def facts(self) -> dict[str, str]:
        """What the device is, as far as the transport itself knows (emulator and its version, host key, ...)."""
        ...

    def close(self) -> None:
        """End what still runs and remove the folder. May be called twice, and after a failed `open`."""
        ...


# What `run(count=True)` leaves in the folder: one JSON object a line, written at every mark (the guest's getppid()),
# with the instructions executed since the mark before, by class.
INSTRUCTIONS = "instructions.jsonl"


def names() -> list[str]:
    """The names of all transports; imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(address: str) -> Transport:
    """The transport for an address, not opened yet. Raises TargetError for an address that means nothing."""
    scheme = address.partition(":")[0]
    if scheme not in names():
        near = difflib.get_close_matches(scheme, names(), 1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise TargetError(
            f"'{address}' is no place to run. {hint}"
            "There are local, emulated:raspberry-pi-4b, ssh://user@host and adb:serial."
        )
    transport: Transport = importlib.import_module(f"{__name__}.{scheme}").transport(address)
    return transport


@contextlib.contextmanager
def opened(address: str) -> Iterator[Transport]:
    """The transport for an address, open, and closed afterwards whatever happens."""
    transport = find(address)
    try:
        transport.open()
        yield transport
    finally:
        transport.close()
