"""`adb:` against a server that really speaks the protocol; its devices are folders. No phone has been near it."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_adb_server import Device, Server

from targets.errors import MissingRuntime, TargetError
from targets.transports import find, opened

# Seconds that only this run's processes sleep: by these they are known.
ONE, TWO = f"sleep 4{os.getpid()}1", f"sleep 4{os.getpid()}2"
PHONE = {"ro.product.model": "Test Phone", "ro.build.version.release": "15", "ro.product.cpu.abi": "arm64-v8a"}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Device]]:
    """Start a server with one device (or more, by serial); gives the device named first."""
    servers = []

    def start(*serials: str, **traits: object) -> Device:
        devices = {s: Device(tmp_path / s, properties=PHONE, **traits) for s in serials or ("R58",)}  # type: ignore[arg-type]
        server = Server(devices)
        server.__enter__()
        servers.append(server)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        return next(iter(devices.values()))

    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def phone(serve: Callable[..., Device]) -> Device:
    return serve()


def names_of(process_text: str) -> list[str]:
    """The command lines of this machine's processes that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if process_text in line:
            found.append(line)
    return found


def gone(process_text: str) -> bool:
    """Whether such processes end within a second or two."""
    until = time.monotonic() + 3
    while names_of(process_text) and time.monotonic() < until:
        time.sleep(0.05)
    return not names_of(process_text)


def test_files_travel_there_and_back_and_nothing_stays(phone: Device, tmp_path: Path) -> None:
    sent = tmp_path / "model.tflite"
    sent.write_bytes(os.urandom(200_000))  # more than one chunk
    with opened("adb:") as device:
        assert device.python == ()
        device.push({"a model.tflite": sent})
        said: list[str] = []
        done = device.run(["cp", "a model.tflite", "copy"], seconds=20, line=said.append)
        assert (done.code, said) == (0, [])
        device.fetch("copy", tmp_path / "back")
        assert len(phone.left()) == 1
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()
    assert phone.left() == []
    assert not list(tmp_path.glob("*.part"))


def test_a_file_that_is_there_already_is_not_sent_again(phone: Device, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    with opened("adb:") as device:
        device.push({"x": tmp_path / "one"})
        device.push({"x": tmp_path / "one"})
        assert phone.sent == ["x.part"]
        device.push({"x": tmp_path / "two"})
        assert phone.sent == ["x.part", "x.part"]


def test_exit_codes_lines_and_errors_come_apart(phone: Device) -> None:
    said: list[str] = []
    with opened("adb:") as device:
        done = device.run(["sh", "-c", "echo one; echo bad >&2; printf 'zwei ä'; exit 7"], seconds=20, line=said.append)
    assert (done.code, done.errors, said) == (7, "bad", ["one", "zwei ä"])


def test_arguments_reach_the_command_as_they_are(phone: Device) -> None:
    said: list[str] = []
    odd = ["a b", "$HOME", "`id`", "'q'", "*", ""]
    with opened("adb:") as device:
        device.run(["sh", "-c", 'for a in "$@"; do echo "[$a]"; done', "sh", *odd], seconds=20, line=said.append)
    assert said == [f"[{a}]" for a in odd]


def test_a_command_that_hangs_is_killed_there_with_its_children(phone: Device) -> None:
    with opened("adb:") as device:
        with pytest.raises(TargetError, match="did not end within 1 s and was killed"):
            device.run(["sh", "-c", f"{ONE} & {TWO}"], seconds=1)
        assert gone(ONE)
        assert gone(TWO)
    assert phone.left() == []


def test_what_a_command_leaves_running_ends_with_it(phone: Device) -> None:
    with opened("adb:") as device:
        done = device.run(["sh", "-c", f"{ONE} >/dev/null 2>&1 & exit 0"], seconds=20)
        assert done.code == 0
        assert gone(ONE)
        assert gone(phone.left()[0])


def test_control_c_leaves_nothing_there(phone: Device) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened("adb:") as device:
        device.run(["sh", "-c", f"echo now; {ONE}"], seconds=20, line=interrupt)
    assert gone(ONE)
    assert phone.left() == []


def test_facts_name_the_device(phone: Device) -> None:
    with opened("adb:R58") as device:
        facts = device.facts()
    assert facts["serial"] == "R58"
    assert facts["device"] == "Test Phone"
    assert facts["android"] == "15"
    assert facts["adb server"] == "41"


def test_a_python_there_is_found(phone: Device) -> None:
    phone.tool("python3", "exit 0")
    with opened("adb:") as device:
        assert device.python == ("python3",)


def test_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    with Server({}) as empty:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(empty.port))
        with pytest.raises(TargetError, match="adb sees no device"):
            find("adb:").open()


def test_of_several_devices_one_has_to_be_named(serve: Callable[..., Device], monkeypatch: pytest.MonkeyPatch) -> None:
    first = serve("A1", "B2")
    with pytest.raises(TargetError, match=r"more than one device: A1 \(device\), B2 \(device\). Name one: adb:A1"):
        find("adb:").open()
    with opened("adb:A1"):
        assert len(first.left()) == 1
    monkeypatch.setenv("ANDROID_SERIAL", "B2")
    with opened("adb:"):
        assert first.left() == []


def test_a_wrong_serial_is_said_with_those_there_are(phone: Device) -> None:
    with pytest.raises(TargetError, match=r"no device 'R59'; it sees R58 \(device\)"):
        find("adb:R59").open()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("unauthorized", "unlock it and accept"),
        ("offline", "unplug it"),
        ("no permissions (user in plugdev group)", "udev rule"),
        ("recovery", "start Android"),
        ("odd", "its state is 'odd'"),
    ],
)
def test_a_device_that_cannot_be_used_says_why(serve: Callable[..., Device], state: str, words: str) -> None:
    serve(state=state)
    with pytest.raises(TargetError, match=words):
        find("adb:").open()


def test_an_android_without_exit_codes_is_refused(serve: Callable[..., Device]) -> None:
    serve(features="cmd")
    with pytest.raises(TargetError, match="Android 7 or newer"):
        find("adb:").open()


def test_a_transfer_cut_off_leaves_no_file_here(phone: Device, tmp_path: Path) -> None:
    with opened("adb:") as device:
        device.run(["sh", "-c", "head -c 100000 /dev/zero > big"], seconds=20)
        phone.cut = 70_000
        with pytest.raises(TargetError, match="ended in the middle"):
            device.fetch("big", tmp_path / "big")
    assert not list(tmp_path.glob("big*"))


def test_a_transfer_cut_off_leaves_no_file_there(phone: Device, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(300_000))
    with opened("adb:") as device:
        phone.cut = 100_000
        with pytest.raises(TargetError):
            device.push({"big": tmp_path / "big"})
        (folder,) = phone.home.iterdir()
        assert not (folder / "big").exists()
    assert phone.left() == []


def test_a_file_damaged_on_the_way_is_not_used(phone: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    phone.damage = True
    with opened("adb:") as device, pytest.raises(TargetError, match="arrived damaged"):
        device.push({"file": tmp_path / "file"})


def test_a_full_device_says_so(phone: Device, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(300_000))
    phone.full = True
    with opened("adb:") as device, pytest.raises(TargetError, match="No space left on device"):
        device.push({"big": tmp_path / "big"})
    assert phone.left() == []


def test_a_file_that_is_not_there_is_said(phone: Device, tmp_path: Path) -> None:
    with opened("adb:") as device, pytest.raises(TargetError, match=r"left no file answer\.json"):
        device.fetch("answer.json", tmp_path / "answer.json")


def test_names_that_lead_out_of_the_folder_are_refused(phone: Device, tmp_path: Path) -> None:
    with opened("adb:") as device:
        for name in ("../x", "a/b", ""):
            with pytest.raises(ValueError, match="no name for a file"):
                device.fetch(name, tmp_path / "x")


def test_a_device_that_falls_silent_is_given_up(phone: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("adb:") as device:
        phone.silent = True
        monkeypatch.setattr("targets.transports._adb_shell.SHORT_SECONDS", 0.2)
        with pytest.raises(TargetError, match="did not end within 1 s"):
            device.run(["true"], seconds=1)
        phone.silent = False
    assert phone.left() == []


def test_without_server_and_adb_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(_free_port()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRuntime, match="platform-tools"):
        find("adb:").open()


def test_an_adb_that_starts_no_server_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adb").write_text("#!/bin/sh\necho 'cannot bind' >&2\nexit 1\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setattr("targets.transports._adb_server.WAIT_SECONDS", 0.2)
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(_free_port()))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(TargetError, match="cannot bind"):
        find("adb:").open()


def test_the_server_is_looked_for_where_the_environment_says(phone: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    port = os.environ["ANDROID_ADB_SERVER_PORT"]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(_free_port()))
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"tcp:localhost:{port}")
    with opened("adb:"):
        assert len(phone.left()) == 1
    monkeypatch.setenv("ADB_SERVER_SOCKET", "vsock:3")
    with pytest.raises(TargetError, match="ADB_SERVER_SOCKET is 'vsock:3'"):
        find("adb:").open()


def test_what_is_no_adb_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listener.getsockname()[1]))

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(100)
                link.sendall(b"HTTP/1.1 400\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(TargetError, match="no adb server"):
            find("adb:").open()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
