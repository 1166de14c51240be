"""The folder a command writes: whole or not at all, and what a killed run leaves is cleared by the next."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import ROOT, contents

from convert.errors import TightfitError
from convert.out_folder import raise_if_full, written_whole


@contextmanager
def failing(out: Path, error: BaseException, force: bool = False) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Write half a result to `out`, raise `error`, and give what comes out."""
    with pytest.raises(BaseException) as caught, written_whole(out, force) as work:  # noqa: PT011, PT012
        (work / "half").touch()
        raise error
    yield caught


def make(out: Path, name: str = "report.json", force: bool = False) -> None:
    with written_whole(out, force) as work:
        (work / name).touch()


def killed(out: Path, where: str) -> None:
    """A process that writes to `out` and is killed at `where`."""
    code = (
        f"import os, pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import convert.out_folder as o\n"
        "die = lambda *a: os.kill(os.getpid(), 9)\n"
        f"out = pathlib.Path({str(out)!r})\n"
        f"with o.written_whole(out, force=True) as work:\n    (work / 'half').touch()\n    {where}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_nothing_is_at_its_place_before_all_is_written(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with written_whole(out) as work:
        (work / "report.json").touch()
        assert not out.exists()
    assert contents(tmp_path) == {"a", "a/out", "a/out/report.json"}
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failure_leaves_nothing_not_even_the_parents_it_made(error: BaseException, tmp_path: Path) -> None:
    with failing(tmp_path / "a" / "b" / "out", error) as caught:
        assert contents(tmp_path) == set()
    assert isinstance(caught.value, TightfitError if isinstance(error, OSError) else type(error))


def test_a_failure_keeps_the_earlier_result(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with failing(tmp_path / "out", ValueError("bug"), force=True):
        assert contents(tmp_path) == {"out", "out/report.json"}


def test_a_full_disk_is_named_however_deep_it_is_buried(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise ValueError("the file cannot be written") from full
    except ValueError as middle:
        buried = TightfitError("save it again")
        buried.__cause__ = middle
    with failing(tmp_path / "out", buried) as caught:
        assert "the disk is full. Nothing was left behind. Free some space" in str(caught.value)
    with failing(tmp_path / "out", TightfitError("another reason")) as caught:
        assert str(caught.value) == "another reason"


def test_an_error_on_another_file_names_that_file(tmp_path: Path) -> None:
    with failing(tmp_path / "out", PermissionError(errno.EACCES, "Permission denied", "/secret/key")) as caught:
        assert str(caught.value).startswith("/secret/key: Permission denied.")


def test_room_on_a_disk_is_no_error(tmp_path: Path) -> None:
    raise_if_full(tmp_path)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed(tmp_path / "out", "die()")
    assert any(name.endswith("/half") for name in contents(tmp_path))
    make(tmp_path / "out")
    assert contents(tmp_path) == {"out", "out/report.json"}


def test_a_run_that_is_alive_keeps_its_folder(tmp_path: Path) -> None:
    with written_whole(tmp_path / "out") as work:
        make(tmp_path / "out")
        assert work.is_dir()
        (tmp_path / "out" / "report.json").unlink()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out").is_dir()


def test_other_folders_are_none_of_its_business(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".out.partial-link").symlink_to(tmp_path / "mine")
    (tmp_path / ".other.partial-1").mkdir()
    make(tmp_path / "out")
    assert contents(tmp_path) >= {"mine/file", ".out.partial-link", ".other.partial-1"}


def test_an_earlier_result_comes_back_when_its_replacement_was_killed(tmp_path: Path) -> None:
    make(tmp_path / "out", "report.json")
    # Between the two renames: the earlier result is aside, the new one not yet in place.
    killed(tmp_path / "out", "rename, o.os.rename = o.os.rename, lambda a, b: (rename(a, b), die())")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TightfitError, match="exists already"):
        make(tmp_path / "out")
    assert contents(tmp_path) == {"out", "out/report.json"}


def test_a_folder_that_holds_the_user_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for out in (Path("."), Path(".."), tmp_path, Path("/")):
        with pytest.raises(TightfitError, match="is the folder you are in"):
            make(out, force=True)
    assert os.listdir(tmp_path) == ["sub"]
