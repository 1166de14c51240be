"""What keeps a session from coming about: each cause is told by its name, with what to do next."""

import ast
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_server import SshServer, free_port, key_pair, login_script, ssh_server

from targets.errors import MissingRuntime, TargetError
from targets.transports import find, opened
from targets.transports import ssh as ssh_transport
from targets.transports._ssh_address import parse
from targets.transports._ssh_boot import MODULES, OLDEST, PYTHON, remote_command
from targets.transports._ssh_connection import Patience
from targets.transports.ssh import SshTransport

QUICK = Patience(connect=5, greet=60)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with ssh_server(tmp_path) as found:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(found.config))
        yield found
        found.demand_nothing_left()


def refusal(address: str, kind: type[TargetError] = TargetError, patience: Patience = QUICK) -> str:
    """What is told of an address that cannot be opened: one paragraph."""
    device = SshTransport(address, patience)
    with pytest.raises(TargetError) as caught:
        device.open()
    device.close()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert "debug1" not in text
    return text


def test_the_same_login_works_when_nothing_is_wrong(server: SshServer) -> None:
    """The negative control of all that follows."""
    with opened(server.address()) as device:
        assert device.python


def test_a_wrong_key_is_told(server: SshServer) -> None:
    key_pair(server.folder / "stranger")
    server.write_client(key="stranger")
    text = refusal(server.address())
    assert "refused the login" in text
    assert "Permission denied (publickey)" in text
    assert f"ssh-copy-id -p {server.port} 127.0.0.1" in text


def test_a_key_that_others_may_read_is_told(server: SshServer) -> None:
    (server.folder / "user").chmod(0o644)
    assert "chmod 600" in refusal(server.address())


def test_an_unknown_host_key_is_shown_with_how_to_take_it_on(server: SshServer) -> None:
    server.known.write_text("")
    text = refusal(server.address())
    assert "is not known here" in text
    assert fingerprint(server) in text
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> ~/.ssh/known_hosts" in text
    assert server.known.read_text() == "", "nothing is taken on by itself"


def test_a_changed_host_key_warns_of_interception(server: SshServer) -> None:
    key_pair(server.folder / "before")
    server.trust("before")
    text = refusal(server.address())
    assert "is NOT the one stored for it" in text
    assert f"line 1 of {server.known}" in text
    assert "somebody is between you and it" in text
    assert "forget the old key with `ssh-keygen" in text
    assert fingerprint(server) in text


def fingerprint(server: SshServer) -> str:
    command = ["ssh-keygen", "-lf", str(server.folder / "host.pub")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def test_a_port_where_nobody_listens_is_told(server: SshServer) -> None:
    text = refusal(f"ssh://127.0.0.1:{free_port()}")
    assert "Connection refused" in text
    assert "does not answer" in text


def test_a_server_that_never_speaks_is_told_in_time(server: SshServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = refusal(f"ssh://127.0.0.1:{silent.getsockname()[1]}", patience=Patience(connect=1, greet=10))
    assert "does not answer" in text
    assert "timed out" in text


def test_an_unknown_name_is_told(server: SshServer) -> None:
    text = refusal("ssh://no-such-board.invalid", patience=Patience(connect=10, greet=30))
    assert "the name 'no-such-board.invalid' means no machine" in text


def test_a_configuration_that_ssh_refuses_is_told(server: SshServer) -> None:
    server.config.write_text("Host *\n  Prot 22\n")
    assert "ssh does not accept its configuration" in refusal(server.address())


def test_a_machine_without_ssh_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt-get install openssh-client" in refusal("ssh://pi", MissingRuntime)


def test_a_device_without_python_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    with ssh_server(tmp_path, login_script(tmp_path / "login", f"PATH={tmp_path / 'bin'}")) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        text = refusal(server.address(), MissingRuntime)
        assert "no python3 on its PATH" in text
        assert "apt-get install python3" in text
        assert "ssh://host/home/pi/venv/bin/python" in text
        server.demand_nothing_left(0)
        with opened(server.address(sys.executable)) as device:
            assert device.python == (sys.executable,)


def test_a_path_where_no_python_is_is_told(server: SshServer) -> None:
    assert "'/opt/no python' is not there" in refusal(server.address("/opt/no python"), MissingRuntime)


def test_a_python_that_is_too_old_is_told(server: SshServer) -> None:
    """A Python of today that says it is 3.7, since none so old is here."""
    old = server.folder / "old"
    lie = 'import sys; sys.version_info = (3, 7, 3); sys.version = "3.7.3 (default)"; exec(sys.argv[-1])'
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{lie}' \"$@\"\n")
    old.chmod(0o755)
    assert "is 3.7.3; 3.9 or newer is needed" in refusal(server.address(str(old)), MissingRuntime)


def test_what_runs_on_devices_is_written_for_the_oldest_python_they_may_have() -> None:
    folder = Path(ssh_transport.__file__).parent
    sources = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    for source in [*sources, PYTHON]:
        ast.parse(source, feature_version=OLDEST)
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n  case 1: pass", feature_version=OLDEST)
    imports = {alias.split(".")[0] for source in sources for alias in _imports(source)}
    assert imports - set(sys.stdlib_module_names) == {"targets"}


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_a_login_that_prints_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssh_server(tmp_path, login_script(tmp_path / "login", "echo welcome; printf 'no end of line'")) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        with opened(server.address()) as device:
            assert device.run([*device.python, "-c", "pass"], seconds=20).code == 0


def test_a_login_that_runs_nothing_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssh_server(tmp_path, login_script(tmp_path / "login", "echo 'this account is closed'; exit 1")) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        text = refusal(server.address())
        assert "this account is closed" in text
        assert "by hand" in text


def test_modules_in_the_login_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('the wrong socket')")
    with ssh_server(tmp_path, login_script(tmp_path / "login", f"cd {tmp_path}")) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        with opened(server.address()):
            pass


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("ssh://pi", ("pi", None, None, None)),
        ("ssh://pi@Board.local", ("Board.local", "pi", None, None)),
        ("ssh://me@10.0.0.7:2222/opt/py thon", ("10.0.0.7", "me", 2222, "/opt/py thon")),
        ("ssh://[fe80::1%eth0]:22/~/venv/bin/python", ("fe80::1%eth0", None, 22, "~/venv/bin/python")),
        ("ssh://pi/", ("pi", None, None, None)),
    ],
)
def test_addresses_are_read(address: str, parts: tuple[object, ...]) -> None:
    found = parse(address)
    assert (found.host, found.user, found.port, found.python) == parts
    assert isinstance(find(address), SshTransport)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "ssh:",
            "ssh://",
            "ssh:pi",
            "ssh:///usr/bin/python3",
            "ssh://-oProxyCommand=true",
            "ssh://-l@pi",
            "ssh://a b",
        ),
        *(
            "ssh://pi:0",
            "ssh://pi:99999",
            "ssh://pi:x",
            "ssh://pi\n",
            "ssh://pi/bin/\npython",
            "ssh://$(id)",
            "ssh://pi/x/",
        ),
    ],
)
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(TargetError, match=r"is no address of a device|is no path of a Python"):
        find(address)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(TargetError, match="log in with a key") as caught:
        find("ssh://pi:geheim@board")
    assert "geheim" not in str(caught.value)


def test_a_path_full_of_quotes_stays_one_word_of_the_shell_there(server: SshServer) -> None:
    path = '/tmp/a\'b "c" $(touch pwned) `id` ; exit 0 #'
    assert "is not there" in refusal(server.address(path), MissingRuntime)
    assert "\n" not in remote_command(path)
    assert "!" not in remote_command(None), "a C shell would replace it"
