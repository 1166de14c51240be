"""A real OpenSSH server on loopback for tests: own port, keys and configuration, the current user, key login only.

Also a TCP proxy before it, to be cut, silenced or slowed as a network is.
"""

import contextlib
import getpass
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SSHD = "/usr/sbin/sshd"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def key_pair(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


class SshServer:
    """`folder` holds keys and logs; `device` is the TMPDIR of logins, where sessions make their folders."""

    def __init__(self, folder: Path, login: str | None = None, board: str | None = None) -> None:
        self.folder, self.port, self.board = folder, free_port(), board
        self.device = folder / "device" / ("tmp" if board else "")
        self.device.mkdir(parents=True)
        if board:
            login = board_login(folder, board, login)
        self.config = folder / "ssh_config"
        self.known = folder / "known_hosts"
        host, user = key_pair(folder / "host"), key_pair(folder / "user")
        (folder / "authorized").write_bytes(user.with_suffix(".pub").read_bytes())
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {host}",
            f"PidFile {folder / 'sshd.pid'}",
            f"AuthorizedKeysFile {folder / 'authorized'}",
            *("StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"),
            *("PermitRootLogin prohibit-password", "PrintMotd no", "LogLevel ERROR", "MaxStartups 100"),
            # A home without scripts: those of whoever runs the tests may be slow, or print.
            f"SetEnv TMPDIR={self.device} HOME={folder} PATH={sys.base_prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            *((f"ForceCommand {login}",) if login else ()),
        ]
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.write_client()
        self.trust()

    def write_client(self, key: str = "user") -> None:
        """The client's configuration, as a user would have it."""
        self.config.write_text(
            "Host *\n"
            f"  User {getpass.getuser()}\n"
            f"  IdentityFile {self.folder / key}\n"
            "  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.known}\n"
            "  GlobalKnownHostsFile /dev/null\n"
            "  HostKeyAlias device\n"
        )

    def trust(self, key: str = "host") -> None:
        """Let the client know a host key."""
        self.known.write_text("device " + (self.folder / f"{key}.pub").read_text())

    def address(self, python: str = "") -> str:
        return f"ssh://127.0.0.1:{self.port}{python}"

    def sessions(self) -> list[Path]:
        """What lies about on the device."""
        return sorted(self.device.iterdir())

    def processes(self) -> list[str]:
        """The command lines of all that runs on the device."""
        return list(self.running().values())

    def running(self) -> dict[int, str]:
        """The same, by process: what has the device's TMPDIR, or the emulated board's /tmp."""
        if self.board:
            return dict(_processes("mountinfo", lambda found: str(self.device).encode() in found))
        return dict(_processes("environ", lambda found: f"\0TMPDIR={self.device}".encode() in b"\0" + found))

    def demand_nothing_left(self, seconds: float = 5.0) -> None:
        """Nothing runs, nothing lies about, within so long."""
        until = time.monotonic() + seconds
        while (self.processes() or self.sessions()) and time.monotonic() < until:
            time.sleep(0.05)
        assert self.processes() == [], self.running()
        assert self.sessions() == [], self.sessions()


def _processes(kind: str, ours: Callable[[bytes], bool]) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if ours((entry / kind).read_bytes()):
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                    if text:  # else it has ended
                        yield int(entry.name), text


@contextlib.contextmanager
def ssh_server(folder: Path, login: str | None = None, board: str | None = None) -> Iterator[SshServer]:
    """A running server, of this machine or of an emulated board; skips where there is none to run.

    `login`: the ForceCommand; on a board, shell that comes before entering it.
    """
    if not os.access(SSHD, os.X_OK):
        pytest.skip(f"there is no {SSHD} (install openssh-server): ssh was not tried against a real server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = SshServer(folder, login, board)
    log = folder / "sshd.log"
    with log.open("wb") as file:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=file)
    try:
        _wait_for(server.port, process, log)
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")


def login_script(path: Path, *lines: str) -> str:
    """A ForceCommand: `lines` of shell before the command that was asked for."""
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + '\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    path.chmod(0o755)
    return shlex.quote(str(path))


def board_login(folder: Path, board: str, before: str | None) -> str:
    """A ForceCommand that enters an emulated board, whose /tmp is device/tmp; skips where that cannot be."""
    from targets.emulator import login_command
    from targets.errors import TargetError

    try:
        command = login_command(board, folder / "device")
    except TargetError as error:
        pytest.skip(f"a login of an emulated {board} was not tried: {error}")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if tried.returncode:
        pytest.skip(f"a login of an emulated {board} was not tried: {tried.stderr.strip()}")
    path = folder / "enter"
    path.write_text(f'#!/bin/sh\n{before or ":"}\nexec {shlex.join(command)} "$SSH_ORIGINAL_COMMAND"\n')
    path.chmod(0o755)
    return shlex.quote(str(path))


class Network:
    """A proxy on `port` before `target`. `cut_after`: bytes towards the device, then the first connection breaks."""

    def __init__(self, target: int, cut_after: int | None = None) -> None:
        self.target, self.cut_after = target, cut_after
        self.connections = 0
        self.passed = [0, 0]
        self.silent = self.closed = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections; new ones are taken unless `closed`."""
        for pair in self._pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.closed = True
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.closed:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.connections += 1
            self._pairs.append((near, far))
            for way, (one, other) in enumerate(((near, far), (far, near))):
                threading.Thread(target=self._pass, args=(one, other, way), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while part := one.recv(1 << 14):
                while self.silent:
                    time.sleep(0.05)
                self.passed[way] += len(part)
                other.sendall(part)
                if self.cut_after is not None and self.passed[0] > self.cut_after:
                    self.cut_after = None
                    self.cut()
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def network(target: int, cut_after: int | None = None) -> Iterator[Network]:
    """A proxy that is stopped in the end."""
    found = Network(target, cut_after)
    try:
        yield found
    finally:
        found.stop()
