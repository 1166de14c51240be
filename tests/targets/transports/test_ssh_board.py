"""Sessions over a real OpenSSH server whose login is an emulated Raspberry Pi: what ends them leaves nothing there."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from ssh_client import DAEMON, PATIENT, SHORT, big, client
from ssh_server import SshServer, key_pair, network, ssh_server

from targets.errands import Errand, carry_out
from targets.errors import MissingRuntime, TargetError
from targets.transports.ssh import SshTransport

pytestmark = pytest.mark.slow

BOARD = "raspberry-pi-4b"
# For what shall give up.
HASTY = dataclasses.replace(PATIENT, silence=6, grace=4)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("ssh"), board=BOARD) as found:
        yield found


@pytest.fixture
def server(board: SshServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(board.config))
    yield board
    board.demand_nothing_left(0)


def test_files_and_runtimes_of_the_board_are_used(server: SshServer, tmp_path: Path) -> None:
    path, lines = big(tmp_path / "a"), []
    device = SshTransport(server.address(), PATIENT)
    try:
        device.open()
        assert device.emulated, "the login says so, so that nothing is timed there"
        device.push({"a": path})
        program = "import os, platform, numpy; print(platform.machine(), os.path.getsize('a'), flush=True); os.abort()"
        done = device.run([*device.python, "-c", program], seconds=120, line=lines.append)
        assert (done.code, lines) == (-signal.SIGABRT, [f"aarch64 {6 << 20}"])
        device.fetch("a", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        assert server.sessions(), "what is left is looked for where it would be"
        assert server.processes()
    finally:
        device.close()


def test_a_broken_connection_is_made_again_by_another_login(server: SshServer, tmp_path: Path) -> None:
    path = big(tmp_path / "a", 12 << 20)
    with network(server.port, cut_after=8 << 20) as way:
        device = SshTransport(f"ssh://127.0.0.1:{way.port}", PATIENT)
        try:
            device.open()
            device.push({"a": path})
            assert way.connections == 2
            assert way.passed[0] < 16 << 20
            device.fetch("a", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
        finally:
            device.close()


@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_network_that_stays_dead_is_told_and_the_board_cleans_itself(
    server: SshServer, tmp_path: Path, how: str
) -> None:
    path = big(tmp_path / "a", 40 << 20)
    with network(server.port) as way:
        device = SshTransport(f"ssh://127.0.0.1:{way.port}", HASTY)

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
        server.demand_nothing_left(HASTY.silence + HASTY.grace + 10)


def test_a_command_that_hangs_is_ended_there_with_its_daemons(server: SshServer) -> None:
    lines: list[str] = []
    device = SshTransport(server.address(), PATIENT)
    try:
        device.open()
        before = len(server.running())
        with pytest.raises(TargetError, match="after 8 s, and was ended there"):
            device.run([*device.python, "-c", DAEMON, "600"], seconds=8, line=lines.append)
        assert lines == ["started"]
        assert len(server.running()) == before
    finally:
        device.close()


def test_control_c_ends_the_command_there_at_once(server: SshServer) -> None:
    with client(server, PATIENT) as child:
        assert any("setsid" in text for text in server.processes())
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
    server.demand_nothing_left(1)


def test_a_client_that_was_killed_leaves_nothing(server: SshServer) -> None:
    with client(server, HASTY):
        pass  # and kill it
    server.demand_nothing_left(HASTY.grace + 10)


def test_a_program_or_python_that_the_board_lacks_is_a_missing_runtime(server: SshServer) -> None:
    device = SshTransport(server.address(), PATIENT)
    try:
        device.open()
        with pytest.raises(MissingRuntime, match="'trtexec' cannot be started"):
            device.run(["trtexec"], seconds=20)
    finally:
        device.close()
    with pytest.raises(MissingRuntime, match=r"'/opt/none' is not there"):
        SshTransport(server.address("/opt/none"), PATIENT).open()


def test_a_login_that_is_refused_starts_nothing_there(server: SshServer) -> None:
    key_pair(server.folder / "stranger")
    try:
        server.write_client(key="stranger")
        with pytest.raises(TargetError, match="refused the login"):
            SshTransport(server.address(), SHORT).open()
        server.write_client()
        server.known.write_text("")
        with pytest.raises(TargetError, match="is not known here"):
            SshTransport(server.address(), SHORT).open()
    finally:
        server.write_client()
        server.trust()


def test_a_disk_that_becomes_full_on_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssh_server(tmp_path, "ulimit -f 4096", BOARD) as server:
        monkeypatch.setenv("TIGHTFIT_SSH_CONFIG", str(server.config))
        device = SshTransport(server.address(), PATIENT)
        try:
            device.open()
            with pytest.raises(TargetError, match="became full while sending 'large'"):
                device.push({"large": big(tmp_path / "b", 8 << 20)})
            assert list((server.sessions()[0] / "work").iterdir()) == []
        finally:
            device.close()
        server.demand_nothing_left(0)


def test_an_errand_runs_on_the_board_and_its_outputs_are_those_of_this_machine(
    server: SshServer, tmp_path: Path
) -> None:
    path = tmp_path / "conv.onnx"
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((8, 3, 3, 3), np.float32), "w")
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 9, 9]), ("y", [1, 8, 7, 7]))
    ]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    inputs = {"x": rng.standard_normal((4, 3, 9, 9), np.float32)}
    device = SshTransport(server.address(), PATIENT)
    try:
        device.open()
        errand = Errand(artifact=path, twin=None, inputs=inputs, batch=1, seconds=300)
        answer = carry_out(device, errand, lambda *_: None)
    finally:
        device.close()
    here = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = np.concatenate([here.run(None, {"x": inputs["x"][i : i + 1]})[0] for i in range(4)])
    assert "Raspberry Pi 4" in answer.facts["machine"]
    # Sums of 27 products of numbers near 1, added in another order.
    np.testing.assert_allclose(answer.artifact.outputs["y"], expected, rtol=0, atol=2e-5)
    assert np.abs(expected).max() > 1
    assert list((server.device.parent / "root").iterdir()) == [], "nothing in the user's folder either"
