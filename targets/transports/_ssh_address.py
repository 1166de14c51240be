"""Addresses of devices reached by ssh, and the command line of OpenSSH's client that goes there."""

import os
import re
import shutil
from dataclasses import dataclass

from targets.errors import MissingRuntime, TargetError

FORM = "ssh://[user@]host[:port][/path/to/python]"
# As ssh's own: letters in any case (a name in the user's configuration), numbers, IPv6 in brackets; no leading dash.
ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+\\-]*\$?)@)?"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/.*)?"
)


@dataclass(frozen=True)
class Address:
    """Where to log in. `user` and `port` None: as the user's configuration says. `python`: None for python3 there."""

    host: str
    user: str | None
    port: int | None
    python: str | None

    @property
    def name(self) -> str:
        """What messages call it: user@host:port, of which as much as was given."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return user + host + (f":{self.port}" if self.port else "")

    @property
    def login(self) -> str:
        """What follows `ssh` when one logs in by hand."""
        port = f"-p {self.port} " if self.port else ""
        return port + (f"{self.user}@" if self.user else "") + self.host


def parse(text: str) -> Address:
    """The parts of an address; TargetError where it is none."""
    found = ADDRESS.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 65536):
        secret = " A password cannot be given: log in with a key." if re.match(r"ssh://[^@/]*:[^@/]*@", text) else ""
        raise TargetError(f"'{_without_secret(text)}' is no address of a device. It is written {FORM}.{secret}")
    path = found["path"] or ""
    python = path.removeprefix("/") if path.startswith("/~/") else path
    if python == "/":
        python = ""
    if not python.isprintable() or python.endswith("/"):
        raise TargetError(
            f"'{python}' in '{text}' is no path of a Python on the device, as /home/pi/venv/bin/python is."
        )
    return Address(found["six"] or found["host"], found["user"], port, python or None)


def _without_secret(text: str) -> str:
    return re.sub(r"(://[^@/:]*):[^@/]*@", r"\1:...@", text)


def client() -> str:
    """The path of OpenSSH's client; MissingRuntime where there is none."""
    found = shutil.which("ssh")
    if found is None:
        raise MissingRuntime(
            "there is no ssh on this machine, by which devices are reached. Install OpenSSH's client (Debian, Ubuntu: "
            "apt-get install openssh-client; macOS and Windows have it) and see that `ssh` is on the PATH."
        )
    return found


def command_line(address: Address, remote: str, connect_seconds: float, *, fresh: bool) -> list[str]:
    """The command that runs `remote` there by the user's configuration and keys, asking nothing, forwarding nothing.

    One connection carries a whole session. A connection that the user's configuration shares (ControlPath) is used,
    unless `fresh`, but none is left behind.
    """
    config = os.environ.get("TIGHTFIT_SSH_CONFIG")
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(max(1, round(connect_seconds))),
        "ConnectionAttempts": "1",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "ControlMaster": "no",
    }
    if fresh:
        options["ControlPath"] = "none"
    return [
        client(),
        *(("-F", config) if config else ()),
        *("-v", "-T", "-a", "-x"),  # -v tells the fingerprint of a key that is refused
        *(f"-o{name}={value}" for name, value in options.items()),
        *(("-p", str(address.port)) if address.port else ()),
        *(("-l", address.user) if address.user else ()),
        "--",
        address.host,
        remote,
    ]
