"""An adb server with devices that are folders of this machine: it speaks adb's protocol on a real socket.

Commands run in this machine's `sh`, with the device's /data/local/tmp put in place of a folder, and with `getprop` and
the like from the device's own `bin`. As adbd does, it leaves a command running whose client has gone.
"""

import os
import socketserver
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = "/data/local/tmp"
CHUNK = 1 << 16


@dataclass
class Device:
    """A device and what is wrong with it. `cut` ends file transfers after so many bytes; `full` refuses to write;
    `silent` never answers a command; `damage` flips a bit of every file that arrives."""

    folder: Path
    state: str = "device"
    features: str = "shell_v2,cmd,stat_v2"
    properties: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    full: bool = False
    silent: bool = False
    damage: bool = False
    commands: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True)
        bin_ = self.folder / "bin"
        bin_.mkdir()
        known = "".join(f"{key}) echo '{value}';;\n" for key, value in self.properties.items())
        self.tool("getprop", f'case "$1" in\n{known}*) echo;;\nesac')
        self.tool("python3", "exit 127")

    @property
    def home(self) -> Path:
        """Where its /data/local/tmp lies."""
        return self.folder / "tmp"

    def tool(self, name: str, script: str) -> None:
        """Give it a command."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """A path or command of the device, as this machine's."""
        return text.replace(HOME, str(self.home))

    def left(self) -> list[str]:
        """What lies in its /data/local/tmp."""
        return sorted(p.name for p in self.home.iterdir())


class Server:
    """The server, listening while in a `with` block. `port` is its own, free one."""

    def __init__(self, devices: dict[str, Device]) -> None:
        self.devices = devices
        self._server = _Listener(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    owner: Server


class _Handler(socketserver.StreamRequestHandler):
    """One connection, from the first request to the service it ends in."""

    server: Any

    def handle(self) -> None:
        device: Device | None = None
        try:
            while True:
                digits = self.rfile.read(4)
                if len(digits) < 4:
                    return
                request = self.rfile.read(int(digits, 16)).decode()
                if device is None:
                    device = self._host(request)
                    if device is None:
                        return
                else:
                    self._service(device, request)
                    return
        except (BrokenPipeError, ConnectionResetError):
            return

    def _host(self, request: str) -> Device | None:
        """Answer a host request; the device, where the connection has been handed on to one."""
        devices = self.server.owner.devices
        if request == "host:version":
            self._okay("0029")
        elif request == "host:devices":
            self._okay("".join(f"{serial}\t{device.state}\n" for serial, device in devices.items()))
        elif request.startswith("host-serial:") and request.endswith(":features"):
            self._okay(devices[request.removeprefix("host-serial:").removesuffix(":features")].features)
        elif request.startswith("host:transport:"):
            serial = request.removeprefix("host:transport:")
            if serial not in devices:
                self._fail(f"device '{serial}' not found")
            elif devices[serial].state != "device":
                self._fail(f"device {devices[serial].state}")
            else:
                self.wfile.write(b"OKAY")
                return devices[serial]
        else:
            self._fail(f"unknown host service '{request}'")
        return None

    def _okay(self, text: str) -> None:
        self.wfile.write(b"OKAY%04x%s" % (len(text), text.encode()))

    def _fail(self, text: str) -> None:
        self.wfile.write(b"FAIL%04x%s" % (len(text), text.encode()))

    def _service(self, device: Device, request: str) -> None:
        if request == "sync:":
            self.wfile.write(b"OKAY")
            self._sync(device)
        elif request.startswith("shell,v2,raw:"):
            self.wfile.write(b"OKAY")
            self._shell(device, request.removeprefix("shell,v2,raw:"))
        else:
            self._fail("closed")

    def _shell(self, device: Device, command: str) -> None:
        device.commands.append(command)
        if device.silent:
            self.rfile.read(1)
            return
        process = subprocess.Popen(
            ["sh", "-c", device.here(command)],
            cwd=device.folder,
            env={**os.environ, "PATH": f"{device.folder / 'bin'}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        lock = threading.Lock()
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=self._pass_on, args=(kind, file, lock, device), daemon=True)
            for kind, file in ((1, process.stdout), (2, process.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        code = process.wait()
        self._packet(3, bytes([code if code >= 0 else 128 - code]), lock)

    def _pass_on(self, kind: int, file: Any, lock: threading.Lock, device: Device) -> None:
        with file:
            while data := file.read1(CHUNK):
                self._packet(kind, data.replace(str(device.home).encode(), HOME.encode()), lock)

    def _packet(self, kind: int, data: bytes, lock: threading.Lock) -> None:
        with lock:
            try:
                self.wfile.write(struct.pack("<BI", kind, len(data)) + data)
            except (OSError, ValueError):
                return

    def _sync(self, device: Device) -> None:
        while True:
            head = self.rfile.read(8)
            if len(head) < 8:
                return
            name, length = struct.unpack("<4sI", head)
            path = self.rfile.read(length).decode()
            if name == b"STAT":
                self._stat(Path(device.here(path)))
            elif name == b"SEND":
                target, _, mode = path.rpartition(",")
                if not self._receive(device, Path(device.here(target)), int(mode)):
                    return
            elif name == b"RECV":
                if not self._send(device, Path(device.here(path))):
                    return
            else:
                return

    def _stat(self, path: Path) -> None:
        found = path.stat() if path.is_file() else None
        numbers = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
        self.wfile.write(struct.pack("<4sIII", b"STAT", *numbers))

    def _receive(self, device: Device, path: Path, mode: int) -> bool:
        device.sent.append(path.name)
        content = b""
        while True:
            name, length = struct.unpack("<4sI", self.rfile.read(8))
            if name == b"DONE":
                break
            content += self.rfile.read(length)
            if device.full:
                said = b"write failed: No space left on device"
                self.wfile.write(struct.pack("<4sI", b"FAIL", len(said)) + said)
                return False
            if device.cut is not None and len(content) >= device.cut:
                return False
        if device.damage and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(content)
        path.chmod(mode & 0o777)
        self.wfile.write(struct.pack("<4sI", b"OKAY", 0))
        return True

    def _send(self, device: Device, path: Path) -> bool:
        content = path.read_bytes()
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            self.wfile.write(struct.pack("<4sI", b"DATA", len(chunk)))
            if device.cut is not None and start + len(chunk) >= device.cut:
                self.wfile.write(chunk[: device.cut - start])
                return False
            self.wfile.write(chunk)
        self.wfile.write(struct.pack("<4sI", b"DONE", 0))
        return True
