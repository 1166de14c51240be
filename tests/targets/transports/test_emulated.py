"""Commands on emulated boards: the board's programs run, are counted, end when they must, and leave nothing."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_boards import built, counting

from targets.errors import MissingRuntime, TargetError
from targets.transports import INSTRUCTIONS, find, opened
from targets.transports.emulated import EmulatedTransport, transport

BOARD = "raspberry-pi-4b"
# Work whose cost is Python's own, then its mark.
PROGRAM = """
import os
os.getppid()
for _ in range(3):
    sum({str(i): i for i in range(2000)}.values())
    os.getppid()
"""


@pytest.fixture
def place() -> Iterator[EmulatedTransport]:
    built(BOARD)
    with opened(f"emulated:{BOARD}") as made:
        assert isinstance(made, EmulatedTransport)
        yield made


def folder(place: EmulatedTransport) -> Path:
    assert place._folder is not None
    return place._folder


def test_an_address_names_a_board() -> None:
    assert find("emulated:x86-no-vnni").emulated
    for address, words in (
        ("emulated:", "names no board; there are emulated:raspberry-pi-4b"),
        ("emulated", "names no board"),
        ("emulated:raspberrypi-4b", "Did you mean 'raspberry-pi-4b'"),
        ("emulated:raspberry-pi-4b/torch", "may only stand /tflite-runtime"),
        ("emulated:raspberry-pi-4b/", "may only stand /tflite-runtime"),
    ):
        with pytest.raises(TargetError, match=words):
            find(address)


def test_a_board_that_is_not_built_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    with pytest.raises(MissingRuntime, match=f"tightfit emulator build {BOARD}"), opened(f"emulated:{BOARD}"):
        pass
    with pytest.raises(TargetError, match="not open"):
        transport(f"emulated:{BOARD}").facts()


def test_the_boards_own_python_and_packages_run(place: EmulatedTransport, tmp_path: Path) -> None:
    lines: list[str] = []
    program = tmp_path / "program.py"
    program.write_text(
        "import os, platform, sys, numpy, tempfile\nfrom importlib.util import find_spec\n"
        "print(platform.machine(), platform.release(), numpy.__version__)\n"
        "print([line for line in open('/proc/cpuinfo') if 'part' in line][0].split()[-1])\n"
        "print(tempfile.gettempdir() == os.getcwd(), find_spec('hypothesis'), 'TIGHTFIT_CACHE' in os.environ)\n"
        "print('last words', file=sys.stderr); open('left', 'w').write('there'); sys.exit(3)\n"
    )
    place.push({"program.py": program})
    done = place.run([*place.python, "program.py"], seconds=60, line=lines.append)
    assert lines == ["aarch64 6.6.51 2.4.6", "0xd08", "True None False"]
    assert (done.code, done.errors) == (3, "last words")
    place.fetch("left", tmp_path / "left")
    assert (tmp_path / "left").read_text() == "there"
    assert place.facts()["device"] == "Raspberry Pi 4 Model B, emulated"
    assert place.facts()["emulator"].startswith("qemu-user 1:7")


def test_counts_of_two_sessions_agree(tmp_path: Path) -> None:
    counting(BOARD)
    (tmp_path / "program.py").write_text(PROGRAM)
    found = []
    for _ in range(2):
        with opened(f"emulated:{BOARD}") as place:
            assert place.counts
            place.push({"program.py": tmp_path / "program.py"})
            assert place.run([*place.python, "program.py"], seconds=60, count=True).code == 0
            place.fetch(INSTRUCTIONS, tmp_path / "counts")
        found.append([json.loads(line) for line in (tmp_path / "counts").read_text().splitlines()])
    first, second = found
    assert len(first) == 4, "a line for each mark"
    assert first[1]["all"] > 100_000
    for one, other in zip(first, second, strict=True):
        assert abs(one["all"] / other["all"] - 1) < 0.001, "the promise: 0.1 %"


def test_another_thread_is_not_counted(place: EmulatedTransport, tmp_path: Path) -> None:
    counting(BOARD)
    found = []
    for work in ("", "while not done: pass"):
        (tmp_path / "program.py").write_text(
            "import os, threading, time\ndone = []\n"
            f"def other():\n    {work or 'pass'}\n"
            "thread = threading.Thread(target=other); thread.start()\n"
            "os.getppid(); time.sleep(0.2); os.getppid()\ndone.append(1); thread.join()\n"
        )
        place.push({"program.py": tmp_path / "program.py"})
        place.run([*place.python, "program.py"], seconds=60, count=True)
        place.fetch(INSTRUCTIONS, tmp_path / "counts")
        found.append(json.loads((tmp_path / "counts").read_text().splitlines()[1])["all"])
    # It waits for the interpreter's lock meanwhile, in some thousands of instructions; the other spins in millions.
    assert found[1] < found[0] + 200_000


def running(place: EmulatedTransport) -> list[str]:
    """Processes of this machine that work in the session's folder."""
    here = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder(place)):
                here.append(process.name)
        except OSError:
            continue
    return here


def test_a_command_that_hangs_is_killed_with_its_children(place: EmulatedTransport, tmp_path: Path) -> None:
    program = "import os, time\nos.fork()\nos.write(1, b'up\\n')\ntime.sleep(100)\n"
    (tmp_path / "program.py").write_text(program)
    place.push({"program.py": tmp_path / "program.py"})
    lines: list[str] = []
    seen: list[int] = []

    def heard(text: str) -> None:
        lines.append(text)
        if len(lines) == 2:
            seen.append(len(running(place)))

    with pytest.raises(TargetError, match="did not end within 8 s and was killed"):
        place.run([*place.python, "program.py"], seconds=8, line=heard)
    assert lines == ["up", "up"]
    assert seen == [2]
    for _ in range(50):
        if not running(place):
            break
        time.sleep(0.02)
    assert running(place) == []


def test_nothing_is_left_of_a_session(tmp_path: Path) -> None:
    built(BOARD)
    with opened(f"emulated:{BOARD}") as place:
        assert isinstance(place, EmulatedTransport)
        where = folder(place)
        (tmp_path / "a").write_text("a")
        place.push({"a": tmp_path / "a"})
        assert where.exists()
    assert not where.exists()


def test_the_other_runtime_is_chosen_by_the_address(tmp_path: Path) -> None:
    built(BOARD, "tflite-runtime")
    (tmp_path / "program.py").write_text("import tflite_runtime as t, numpy\nprint(t.__version__, numpy.__version__)\n")
    lines: list[str] = []
    with opened(f"emulated:{BOARD}/tflite-runtime") as place:
        place.push({"program.py": tmp_path / "program.py"})
        place.run([*place.python, "program.py"], seconds=60, line=lines.append)
    assert lines == ["2.14.0 1.26.4"]
