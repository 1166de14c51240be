"""`adb:[serial]`: an Android device at the adb server of this machine. Not run on hardware.

Written from adb's documents and tested against a server that speaks them; the server is asked directly (127.0.0.1:5037,
or where ADB_SERVER_SOCKET and ANDROID_ADB_SERVER_PORT say), and started with `adb` where it does not run. Files go to
/data/local/tmp/tightfit-XXXXXX, which is removed at the end.
"""

import contextlib
import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from targets.errors import TargetError

from . import Finished, Line
from ._adb_server import devices, features, version
from ._adb_shell import Shell
from ._adb_sync import Sync

HOME = "/data/local/tmp"
_PYTHONS = ("python3", "/data/data/com.termux/files/usr/bin/python3")
_STATES = {
    "unauthorized": "it has not been allowed to be debugged from this computer: unlock it and accept the question",
    "authorizing": "it is still being asked whether this computer may debug it: unlock it and accept the question",
    "offline": "it is offline: unplug it and plug it in again, or `adb reconnect`",
    "no permissions": "this user may not open its USB connection: a udev rule for it is missing",
    "recovery": "it is in recovery; start Android",
    "sideload": "it waits for a sideload; start Android",
    "bootloader": "it is in its boot loader; start Android",
}
_PROPERTIES = {
    "device": "ro.product.model",
    "manufacturer": "ro.product.manufacturer",
    "soc": "ro.soc.model",
    "android": "ro.build.version.release",
    "abi": "ro.product.cpu.abi",
    "build": "ro.build.fingerprint",
}


class AdbTransport:
    """See `targets.transports.Transport`. `python` is () on nearly all devices: Android has none."""

    emulated = False
    counts = False
    processor: tuple[str, str] | None = None

    def __init__(self, address: str) -> None:
        self.address = address
        self.python: tuple[str, ...] = ()
        self._wanted = address.partition(":")[2]
        self._serial = ""
        self._folder: str | None = None
        self._shell: Shell | None = None

    def open(self) -> None:
        """Choose the device, look for a Python there, and make the folder."""
        self._serial = _chosen(self.address, self._wanted, devices(self.address))
        if "shell_v2" not in features(self.address, self._serial):
            raise TargetError(
                f"{self.address}: the device's adb cannot report exit codes; Android 7 or newer can (shell_v2)."
            )
        self._shell = shell = Shell(self.address, self._serial)
        # What a broken connection once left there, a day ago or more.
        shell.say(f"find {HOME} -maxdepth 1 -name 'tightfit-*' -mtime +0 -exec rm -rf {{}} + 2>/dev/null; true")
        made = shell.demand(f"mktemp -d {HOME}/tightfit-XXXXXX", "no folder could be made there").strip()
        if not made.startswith(f"{HOME}/tightfit-"):
            raise TargetError(f"{self.address}: the device made a folder '{made[:100]}', which was not asked for.")
        self._folder = made
        self.python = self._found_python(shell)

    def push(self, files: Mapping[str, Path]) -> None:
        """Copy files into the folder, except those that are there already."""
        there = self._hashes(list(files))
        with Sync(self.address, self._serial) as sync:
            for name, path in files.items():
                digest = _sha256(path)
                if there.get(name) == digest:
                    continue
                target, part = self._there(name), self._there(f"{name}.part")
                sync.send(path, part, 0o755 if os.access(path, os.X_OK) else 0o644)
                if self._hashes([f"{name}.part"]).get(f"{name}.part") != digest:
                    raise TargetError(
                        f"{self.address}: {name} arrived damaged on the device. Try another cable, and free some room "
                        "on the device."
                    )
                self._sh().demand(f"mv {shlex.quote(part)} {shlex.quote(target)}", f"{name} could not be put in place")

    def run(
        self, command: Sequence[str], *, seconds: float, line: Line = lambda _: None, count: bool = False
    ) -> Finished:
        """Run a command in the folder."""
        if count:
            raise ValueError("instructions are counted on emulated devices only")
        self._there("x")
        assert self._folder is not None
        return self._sh().run(self._folder, command, seconds, line)

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of the folder, whole or not at all."""
        there = self._there(name)
        with Sync(self.address, self._serial) as sync:
            entry = sync.stat(there)
            if not entry.mode:
                raise TargetError(f"{self.address}: the command left no file {name}.")
            size = sync.receive(there, path)
        if size & 0xFFFFFFFF != entry.size:
            path.unlink(missing_ok=True)
            raise TargetError(
                f"{self.address}: {name} came back with {size} bytes of {entry.size}. Run it again, with another cable."
            )

    def facts(self) -> dict[str, str]:
        """The device's model, processor, Android and adb server."""
        _, said = self._sh().say("; ".join(f"getprop {name}" for name in _PROPERTIES.values()))
        values = [text.strip() for text in said.split("\n")]
        known = {key: value for key, value in zip(_PROPERTIES, values, strict=False) if value}
        return {"serial": self._serial, **known, "adb server": version(self.address)}

    def close(self) -> None:
        """Kill what still runs, and remove the folder. A device that is gone keeps it until it is next used."""
        folder, shell = self._folder, self._shell
        self._folder = self._shell = None
        if folder is None or shell is None:
            return
        shell.end(folder)
        with contextlib.suppress(TargetError):
            shell.say(f"rm -rf {shlex.quote(folder)}")

    def _sh(self) -> Shell:
        if self._shell is None:
            raise TargetError(f"{self.address} is not open.")
        return self._shell

    def _there(self, name: str) -> str:
        if self._folder is None:
            raise TargetError(f"{self.address} is not open.")
        if not name or name != Path(name).name:
            raise ValueError(f"'{name}' is no name for a file in the folder")
        return f"{self._folder}/{name}"

    def _hashes(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of those of these files that are there."""
        paths = " ".join(shlex.quote(self._there(name)) for name in names)
        _, said = self._sh().say(f"sha256sum {paths} 2>/dev/null", seconds=600)
        rows = (line.split(maxsplit=1) for line in said.splitlines())
        return {Path(row[1].strip().lstrip("*")).name: row[0] for row in rows if len(row) == 2}

    def _found_python(self, shell: Shell) -> tuple[str, ...]:
        """A Python that starts and is new enough for the agent."""
        for name in _PYTHONS:
            code, _ = shell.say(f'{name} -c "import sys; sys.exit(sys.version_info < (3, 9))" >/dev/null 2>&1')
            if code == 0:
                return (name,)
        return ()


def transport(address: str) -> AdbTransport:
    """A device at this machine's adb server. Raises TargetError for a serial that can be none."""
    serial = address.partition(":")[2]
    if any(c.isspace() for c in serial):
        raise TargetError(f"'{address}' is no place to run: adb:SERIAL, with a serial that `adb devices` lists.")
    return AdbTransport(address)


def _chosen(address: str, wanted: str, found: Mapping[str, str]) -> str:
    """The serial of the device that is meant, and ready. Raises TargetError else."""
    listed = ", ".join(f"{serial} ({state})" for serial, state in found.items())
    if not found:
        raise TargetError(
            f"{address}: adb sees no device. Connect one, allow USB debugging in its developer options, and look at "
            "`adb devices`."
        )
    serial = wanted or os.environ.get("ANDROID_SERIAL", "")
    if not serial and len(found) > 1:
        raise TargetError(f"{address}: there is more than one device: {listed}. Name one: adb:{next(iter(found))}.")
    serial = serial or next(iter(found))
    if serial not in found:
        raise TargetError(f"{address}: adb sees no device '{serial}'; it sees {listed}.")
    state = found[serial]
    if state != "device":
        why = next((text for name, text in _STATES.items() if state.startswith(name)), f"its state is '{state}'")
        raise TargetError(f"{address}: the device {serial} cannot be used: {why}.")
    return serial


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror}.") from error
