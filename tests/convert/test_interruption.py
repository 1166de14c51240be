"""Ctrl-C, kills and full disks half-way: a clean end, nothing half-written, and a second run that succeeds."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Said, Tightfit, command, contents, in_own_process

from convert import artifact

CONVERT = "convert net.pt2 -d generic-x86 --recipe float32 -o deep/out"
FULL = "the disk is full. Nothing was left behind. Free some space, or name another disk with -o."


class Started:
    """`tightfit convert` in a process group of its own, waiting for the user's data in a child interpreter."""

    def __init__(self, desk: Path) -> None:
        arguments = f"{CONVERT} --calibration data:slow"
        self.process = subprocess.Popen(
            command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        marker = desk / "started"
        deadline = time.monotonic() + 300
        while not marker.exists() or not marker.read_text():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.child = int(marker.read_text())
        marker.unlink()

    def end(self) -> Said:
        out, err = self.process.communicate(timeout=240)
        return Said(self.process.returncode, out, err)

    def child_is_alive(self) -> bool:
        try:
            os.kill(self.child, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def started(desk: Path) -> Iterator[Started]:
    found = Started(desk)
    yield found
    with contextlib.suppress(ProcessLookupError):
        os.killpg(found.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [(signal.SIGINT, 130, True), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, False)],
    ids=["Ctrl-C", "an interrupt to us alone", "kill"],
)
def test_a_stop_while_the_users_code_runs_is_clean(
    number: signal.Signals, code: int, group: bool, started: Started, desk: Path
) -> None:
    assert started.child_is_alive()
    (os.killpg if group else os.kill)(started.process.pid, number)
    said = started.end()
    assert said.code == code
    assert said.out == ""
    assert said.err == "  capture\nstopped; nothing was left behind.\n"
    assert not started.child_is_alive()
    assert not (desk / "deep").exists()


def test_a_stop_after_the_artifact_is_written_is_clean(
    tightfit: Tightfit, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, written = contents(desk), set[str]()

    def interrupted(*arguments: object) -> None:
        written.update(contents(desk))
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(artifact, "_judged", interrupted)
    said = tightfit(f"{CONVERT} --calibration cal.npz")
    assert (said.code, said.out) == (130, "")
    assert said.err.endswith("stopped; nothing was left behind.\n")
    assert any(name.endswith("generic-x86/net.onnx") for name in written)
    assert contents(desk) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_after_a_kill_half_way_a_second_run_succeeds_and_clears_the_remains(tightfit: Tightfit, desk: Path) -> None:
    die = "import os\nfrom convert import artifact\nartifact._judged = lambda *a: os.kill(os.getpid(), 9)"
    said = in_own_process(f"{CONVERT} --calibration cal.npz", before=die)
    assert said.code == -signal.SIGKILL
    assert not (desk / "deep" / "out").exists()
    assert any(name.endswith("generic-x86/net.onnx") for name in contents(desk))
    assert tightfit(f"{CONVERT} --calibration cal.npz").code == 0
    assert os.listdir(desk / "deep") == ["out"]
    assert (desk / "deep" / "out" / "report.json").exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `folder`; the test is skipped where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["8k", "16k", "32k"], ids=["at capture", "at lowering", "at the report"])
def test_a_full_disk_is_named_and_nothing_is_left(size: str, tightfit: Tightfit, desk: Path) -> None:
    with small_disk(desk / "disk", size):
        said = tightfit(f"{CONVERT} --calibration cal.npz -o disk/out")
        assert (said.code, said.out) == (2, "")
        assert said.error == f"cannot write disk/out: {FULL}"
        assert os.listdir(desk / "disk") == []


def test_a_full_disk_is_named_where_the_users_code_meets_it(tightfit: Tightfit, desk: Path) -> None:
    with small_disk(desk / "disk", "4k"):
        said = tightfit("convert net.pt2 -d generic-x86 -o disk/out --calibration data:chatty")
        assert said.error == f"cannot write disk/out: {FULL}"
        assert os.listdir(desk / "disk") == []


def test_a_file_size_limit_is_an_error_with_its_reason(desk: Path) -> None:
    before = contents(desk)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    said = in_own_process(f"{CONVERT} --calibration cal.npz", before=limit)
    assert (said.code, said.out) == (2, "")
    assert "File too large. Nothing was left behind. Free some space" in said.error
    assert contents(desk) == before
