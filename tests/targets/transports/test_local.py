"""This machine as a device: files come and go, commands end when they must, nothing is left."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from targets.errors import TargetError
from targets.transports import find, opened
from targets.transports.local import LocalTransport, transport


@pytest.fixture
def place() -> Iterator[LocalTransport]:
    made = transport("local")
    made.open()
    yield made
    made.close()


def folder(place: LocalTransport) -> Path:
    assert place._folder is not None
    return place._folder


def ended(pid: int) -> bool:
    """Whether a process ends within 5 s: a killed one that is nobody's child takes a moment that nobody waits for."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_the_address_is_the_one_word() -> None:
    assert find("local").address == "local"
    with pytest.raises(TargetError, match="takes nothing behind it"):
        find("local:elsewhere")


def test_files_go_there_and_come_back_whole(place: LocalTransport, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"\0bytes\n")
    place.push({"there": tmp_path / "here"})
    place.fetch("there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"\0bytes\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "here"]


def test_a_file_that_is_there_already_is_not_copied_again(place: LocalTransport, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("one")
    place.push({"there": tmp_path / "here"})
    before = (folder(place) / "there").stat().st_ino
    place.push({"there": tmp_path / "here"})
    assert (folder(place) / "there").stat().st_ino == before
    (tmp_path / "here").write_text("two")
    place.push({"there": tmp_path / "here"})
    assert (folder(place) / "there").read_text() == "two"


def test_names_do_not_lead_out_of_the_folder(place: LocalTransport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no name"):
        place.push({"../out": tmp_path / "here"})
    with pytest.raises(ValueError, match="no name"):
        place.fetch("/etc/hostname", tmp_path / "back")


def test_a_missing_file_is_named(place: LocalTransport, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no file answer\.json"):
        place.fetch("answer.json", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_lines_and_the_exit_code_come_as_the_command_gives_them(place: LocalTransport) -> None:
    lines: list[str] = []
    program = "import sys, os; print(os.getcwd()); print('two'); print('why', file=sys.stderr); sys.exit(7)"
    finished = place.run([sys.executable, "-c", program], seconds=30, line=lines.append)
    assert lines == [os.path.realpath(folder(place)), "two"]
    assert (finished.code, finished.errors) == (7, "why")


def test_the_last_lines_of_much_output_are_not_lost(place: LocalTransport) -> None:
    lines: list[str] = []
    place.run([sys.executable, "-c", "print('x\\n' * 5000 + 'end')"], seconds=30, line=lines.append)
    assert len(lines) == 5001
    assert lines[-1] == "end"


def test_a_command_that_hangs_is_killed_with_its_children(place: LocalTransport) -> None:
    pids: list[str] = []
    start = time.monotonic()
    with pytest.raises(TargetError, match=r"did not end within 0\.5 s and was killed"):
        place.run(["sh", "-c", "sleep 60 & echo $!; echo $$; wait"], seconds=0.5, line=pids.append)
    assert time.monotonic() - start < 20
    assert len(pids) == 2
    assert all(ended(int(pid)) for pid in pids)


def test_a_child_left_behind_does_not_outlive_the_command(place: LocalTransport) -> None:
    pids: list[str] = []
    assert place.run(["sh", "-c", "sleep 60 & echo $!"], seconds=30, line=pids.append).code == 0
    assert ended(int(pids[0]))


def test_an_interruption_ends_the_command(place: LocalTransport) -> None:
    pids: list[str] = []

    def interrupt(line: str) -> None:
        pids.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.run(["sh", "-c", "echo $$; sleep 60"], seconds=30, line=interrupt)
    assert ended(int(pids[0]))


def test_a_command_that_does_not_exist_is_named(place: LocalTransport) -> None:
    with pytest.raises(TargetError, match="no-such-python does not start"):
        place.run(["no-such-python"], seconds=1)


def test_the_folder_is_gone_afterwards_and_closing_twice_is_fine() -> None:
    with opened("local") as place:
        assert isinstance(place, LocalTransport)
        kept = folder(place)
        place.run(["touch", "left"], seconds=10)
        assert (kept / "left").exists()
    assert not kept.exists()
    place.close()
    with pytest.raises(TargetError, match="not open"):
        place.run(["true"], seconds=1)


def test_this_machine_counts_no_instructions(place: LocalTransport) -> None:
    with pytest.raises(ValueError, match="emulated devices only"):
        place.run(["true"], seconds=1, count=True)
