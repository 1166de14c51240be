"""Sessions over a real OpenSSH server on loopback: files, commands, and what is left of them, which is nothing."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_client import DAEMON, PATIENT, SHORT, big, client
from ssh_server import SshServer, login_script, network, ssh_server

from targets.errors import MissingRuntime, TargetError
from targets.transports import opened
from targets.transports._ssh_connection import Patience
from targets.transports.ssh import SshTransport


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with ssh_server(tmp_path) as found:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(found.config))
        yield found


def at(port: int, patience: Patience = PATIENT) -> SshTransport:
    return SshTransport(f"ssh://127.0.0.1:{port}", patience)


def test_files_go_there_and_come_back_and_nothing_is_left(server: SshServer, tmp_path: Path) -> None:
    sent = {"model with blank.onnx": big(tmp_path / "a"), "empty.txt": tmp_path / "b"}
    sent["empty.txt"].write_bytes(b"")
    with opened(server.address()) as device:
        device.push(sent)
        lines: list[str] = []
        program = "import os, sys; print(*sorted(os.listdir()), sep='\\n'); print('why', file=sys.stderr); sys.exit(7)"
        done = device.run([*device.python, "-c", program], seconds=20, line=lines.append)
        assert (done.code, done.errors, lines) == (7, "why", ["empty.txt", "model with blank.onnx"])
        for name, path in sent.items():
            device.fetch(name, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
        assert len(server.sessions()) == 1, "the folder is looked for where it is"
        assert server.processes(), "processes are looked for where they are"
        assert not device.emulated
        assert device.facts()["host_key"].startswith("ssh-ed25519 SHA256:")
    server.demand_nothing_left(0)
    device.close()


def test_a_file_that_is_there_is_not_sent_again(server: SshServer, tmp_path: Path) -> None:
    path = big(tmp_path / "a")
    with network(server.port) as way, opened(f"ssh://127.0.0.1:{way.port}") as device:
        device.push({"a": path})
        before = way.passed[0]
        assert before > 6 << 20
        device.push({"a": path})
        assert way.passed[0] - before < 1 << 16
        path.write_bytes(b"other")
        device.push({"a": path})
        device.fetch("a", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"other"


def test_lines_come_while_the_command_runs_and_a_signal_is_told(server: SshServer) -> None:
    came: list[float] = []
    program = "import os, time; print(1, flush=True); time.sleep(1); print(2, flush=True); os.kill(os.getpid(), 11)"
    with opened(server.address()) as device:
        done = device.run([*device.python, "-c", program], seconds=20, line=lambda _: came.append(time.monotonic()))
    assert done.code == -signal.SIGSEGV
    assert came[1] - came[0] > 0.5


def test_ten_thousand_lines_arrive_in_order_and_only_the_last_of_stderr_are_kept(server: SshServer) -> None:
    lines: list[str] = []
    program = "import sys\nfor i in range(10000): print(i); print('e', i, file=sys.stderr)"
    with opened(server.address()) as device:
        done = device.run([*device.python, "-c", program], seconds=60, line=lines.append)
    assert lines == [str(i) for i in range(10000)]
    assert done.errors.splitlines() == [f"e {i}" for i in range(10000 - 40, 10000)]


@pytest.mark.parametrize("name", ["", "a/b", "..", "-rf", ".hidden", "a\nb", "half.part"])
def test_a_name_that_is_no_plain_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    device = SshTransport("ssh://nowhere.invalid")
    with pytest.raises(TargetError, match="no name for a file on a device"):
        device.push({name: tmp_path / "a"})
    with pytest.raises(TargetError, match="no name for a file on a device"):
        device.fetch(name, tmp_path / "b")


def test_fetching_what_is_not_there_leaves_nothing_here(server: SshServer, tmp_path: Path) -> None:
    with opened(server.address()) as device:
        with pytest.raises(TargetError, match=r"failed while fetching 'missing'.*No such file"):
            device.fetch("missing", tmp_path / "got")
        (tmp_path / "a").write_bytes(b"a")
        device.push({"a": tmp_path / "a"})
        with pytest.raises(TargetError, match="cannot be written to"):
            device.fetch("a", tmp_path / "no folder" / "got")
        device.fetch("a", tmp_path / "got")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("got")] == ["got"]


def test_a_command_that_hangs_is_ended_on_the_device_with_its_daemons(server: SshServer) -> None:
    lines: list[str] = []
    with opened(server.address()) as device:
        with pytest.raises(TargetError, match=r"was not done on .* after 2 s, and was ended there") as caught:
            device.run([*device.python, "-c", DAEMON, "600"], seconds=2, line=lines.append)
        assert "Give it less to do" in str(caught.value)
        assert lines == ["started"]
        assert [text for text in server.processes() if "setsid" in text] == []
        assert device.run([*device.python, "-c", "pass"], seconds=20).code == 0, "the session goes on"
    server.demand_nothing_left(0)


def test_what_a_command_leaves_running_ends_with_it(server: SshServer) -> None:
    with opened(server.address()) as device:
        assert device.run([*device.python, "-c", DAEMON, "0"], seconds=20).code == 0
        assert [text for text in server.processes() if "setsid" in text] == []


def test_what_a_command_leaves_in_the_temporary_folder_goes_with_the_session(server: SshServer) -> None:
    program = "import tempfile; open(tempfile.gettempdir() + '/left', 'w').write('x')"
    with opened(server.address()) as device:
        assert device.run([*device.python, "-c", program], seconds=20).code == 0
        assert [p.name for p in (server.sessions()[0] / "tmp").iterdir()] == ["left"]
    server.demand_nothing_left(0)


def test_a_program_that_is_not_there_is_a_missing_runtime(server: SshServer) -> None:
    with opened(server.address()) as device, pytest.raises(MissingRuntime, match="'trtexec' cannot be started on"):
        device.run(["trtexec"], seconds=5)


def test_a_broken_connection_is_made_again_and_a_file_goes_on_where_it_stopped(
    server: SshServer, tmp_path: Path
) -> None:
    path = big(tmp_path / "a", 12 << 20)
    with network(server.port, cut_after=8 << 20) as way:
        device = at(way.port)
        try:
            device.open()
            device.push({"a": path})
            assert way.connections == 2
            # Sent anew, it would be 20 MiB.
            assert way.passed[0] < 16 << 20
            device.fetch("a", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
        finally:
            device.close()
        server.demand_nothing_left(0)


def test_a_command_goes_on_while_its_connection_is_made_again(server: SshServer) -> None:
    lines: list[str] = []
    program = "import time\nfor i in range(30): print(i, flush=True); time.sleep(0.05)"
    with network(server.port) as way:
        device = at(way.port)

        def take(text: str) -> None:
            lines.append(text)
            if text == "5":
                way.cut()

        try:
            device.open()
            assert device.run([*device.python, "-c", program], seconds=30, line=take).code == 0
        finally:
            device.close()
        assert way.connections == 2
    assert lines == [str(i) for i in range(30)]
    server.demand_nothing_left(0)


def test_what_arrived_wrong_before_the_connection_broke_is_sent_anew(server: SshServer, tmp_path: Path) -> None:
    path = big(tmp_path / "a", 2 << 20)
    with opened(server.address()) as device:
        (server.sessions()[0] / "work" / "a.part").write_bytes(b"x" * (1 << 20))
        device.push({"a": path})
        device.fetch("a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_network_that_stays_dead_is_told_and_the_device_cleans_itself(
    server: SshServer, tmp_path: Path, how: str
) -> None:
    path = big(tmp_path / "a", 40 << 20)
    with network(server.port) as way:
        device = at(way.port, SHORT)

        def die() -> None:
            while way.passed[0] < 4 << 20:
                time.sleep(0.005)
            if how == "silent":
                way.silent = True
            else:
                way.stop()

        try:
            device.open()
            threading.Thread(target=die, daemon=True).start()
            with pytest.raises(TargetError, match=r"broke while sending 'a'.*removes its folder by itself"):
                device.push({"a": path})
        finally:
            device.close()
        # Without what passes afterwards: the network stays dead while the device cleans.
        server.demand_nothing_left(SHORT.silence + SHORT.grace + 3)


@pytest.mark.slow
def test_a_client_that_was_killed_leaves_nothing(server: SshServer) -> None:
    with client(server):
        pass  # and kill it
    server.demand_nothing_left(SHORT.grace + 4)


def test_control_c_ends_the_command_there_at_once(server: SshServer) -> None:
    with client(server) as child:
        assert any("setsid" in text for text in server.processes())
        child.send_signal(signal.SIGINT)
        assert child.wait(20) != 0
    # No grace: when the client has ended, everything has.
    server.demand_nothing_left(0)


def test_a_login_that_the_device_ends_leaves_nothing(server: SshServer) -> None:
    device = SshTransport(server.address(), PATIENT)
    device.open()
    (keeper,) = server.running()
    os.kill(keeper, signal.SIGTERM)
    server.demand_nothing_left()
    with pytest.raises(TargetError, match="its session is gone"):
        device.run([*device.python, "-c", "pass"], seconds=5)
    device.close()


def test_what_a_dead_keeper_left_is_removed_by_the_next_session(server: SshServer) -> None:
    left, other = server.device / "tightfit-ssh-dead", server.device / "tightfit-ssh-other"
    for folder in (left, other):
        folder.mkdir()
        (folder / "big").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(left / "line"))
    for folder in (left, other):
        os.utime(folder, (0, 0))
    with opened(server.address()):
        assert not left.exists()
        assert other.exists(), "a folder that no keeper made is not ours"
    other.joinpath("big").unlink()
    other.rmdir()


def test_a_full_disk_is_told_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path, monkeypatch, "size=4m") as server, opened(server.address()) as device:
        with pytest.raises(TargetError, match=r"is too full .*: [\d.]+ MiB are free .*, 9\.0 MiB are needed") as caught:
            device.push({"a": big(tmp_path / "a", 8 << 20)})
        assert "Make room there" in str(caught.value)
        device.push({"a": big(tmp_path / "a", 1 << 20)})


def test_a_disk_that_becomes_full_on_the_way_is_told_and_nothing_of_the_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = login_script(tmp_path / "login", "ulimit -f 4096")  # blocks of 512 bytes: 2 MiB
    with ssh_server(tmp_path, limit) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        with opened(server.address()) as device:
            device.push({"small": big(tmp_path / "a", 1 << 20)})
            with pytest.raises(TargetError, match=r"became full while sending 'large'.*MiB are free"):
                device.push({"large": big(tmp_path / "b", 8 << 20)})
            assert [p.name for p in (server.sessions()[0] / "work").iterdir()] == ["small"]
        server.demand_nothing_left(0)


def test_a_disk_without_room_for_one_more_file_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are free say nothing here: the sixth thing on that disk gets the device's own ENOSPC."""
    with small_disk(tmp_path, monkeypatch, "size=9m,nr_inodes=6") as server, opened(server.address()) as device:
        device.push({"a": big(tmp_path / "a", 1000)})
        with pytest.raises(TargetError, match=r"became full while sending 'b'.*No space left on device"):
            device.push({"b": big(tmp_path / "b", 1000)})
    with (
        small_disk(tmp_path / "more", monkeypatch, "size=9m,nr_inodes=2") as server,
        pytest.raises(TargetError, match="cannot make a folder for the session"),
        opened(server.address()),
    ):
        pass


def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, options: str):  # type: ignore[no-untyped-def]
    """A server whose logins have a small disk of their own for TMPDIR, seen by them alone."""
    folder.mkdir(exist_ok=True)
    inside = f'mount -t tmpfs -o {options} none "$TMPDIR" && exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces of a user here: a full disk was not tried")
    script = login_script(folder / "login", f"exec unshare -Urm /bin/sh -c '{inside}'")
    found = ssh_server(folder, script)
    monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(folder / "ssh_config"))
    return found


def test_control_c_while_a_file_is_sent_leaves_nothing(server: SshServer, tmp_path: Path) -> None:
    with network(server.port) as way:
        device = at(way.port)

        def interrupt() -> None:
            while way.passed[0] < 4 << 20:
                time.sleep(0.005)
            signal.raise_signal(signal.SIGINT)

        device.open()
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            device.push({"a": big(tmp_path / "a", 100 << 20)})
        assert way.passed[0] < 100 << 20
        device.push({"b": big(tmp_path / "b", 1 << 20)})
        assert sorted(p.name for p in (server.sessions()[0] / "work").iterdir()) == ["a.part", "b"]
        device.close()
        server.demand_nothing_left(0)


def test_a_connection_that_the_user_shares_is_used_and_left_to_him(server: SshServer) -> None:
    shared = server.folder / "cm"
    with server.config.open("a") as file:
        file.write(f"  ControlPath {shared}\n  ControlMaster auto\n  ControlPersist 60\n")
    with opened(server.address()):
        pass
    assert not shared.exists(), "none is left behind by us"
    login = ["ssh", "-F", str(server.config), "-p", str(server.port)]
    subprocess.run([*login, "-fN", "127.0.0.1"], check=True, stderr=subprocess.DEVNULL)
    try:
        with opened(server.address()) as device:
            assert "host_key" not in device.facts(), "which is told by a new connection"
        assert shared.exists()
    finally:
        subprocess.run([*login, "-O", "exit", "127.0.0.1"], check=True, stderr=subprocess.DEVNULL)


def test_a_command_that_floods_waits_for_whoever_reads(server: SshServer) -> None:
    count = 0

    def slowly(_: str) -> None:
        nonlocal count
        count += 1
        if count == 1:
            time.sleep(1)

    with opened(server.address()) as device:
        program = "for i in range(50000): print('x' * 100)"
        assert device.run([*device.python, "-c", program], seconds=120, line=slowly).code == 0
    assert count == 50000
