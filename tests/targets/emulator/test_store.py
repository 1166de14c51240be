"""Parts of boards are whole or not there, and known by what they were made of."""

import errno
import shutil
from pathlib import Path

import pytest

from targets import emulator
from targets.emulator import machine, store
from targets.errors import MissingRuntime, TargetError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    return tmp_path / "emulator"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "own"))
    assert store.folder() == tmp_path / "own/emulator"
    monkeypatch.delenv("TIGHTFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert store.folder() == tmp_path / "shared/tightfit/emulator"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.folder() == Path.home() / ".cache/tightfit/emulator"


def test_a_part_takes_its_place_when_it_is_whole(cache: Path) -> None:
    for text in ("old", "new"):
        with store.building(cache / "part", {"identity": text}) as fresh:
            (fresh / "file").write_text(text)
            assert (cache / "part").exists() == (text == "new"), "what is there stays until the end"
    assert (cache / "part/file").read_text() == "new"
    assert store.manifest(cache / "part") == {"identity": "new"}
    assert [path.name for path in cache.iterdir()] == ["part"]


def test_what_fails_leaves_what_was_there(cache: Path) -> None:
    with store.building(cache / "part", {}) as fresh:
        (fresh / "file").write_text("old")

    def fail() -> None:
        with store.building(cache / "part", {}) as fresh:
            (fresh / "file").write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TargetError, match="The disk is full"):
        fail()
    assert (cache / "part/file").read_text() == "old"
    assert [path.name for path in cache.iterdir()] == ["part"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(TargetError, match="TIGHTFIT_CACHE"), store.locked(lambda: None):
        pass


def test_a_board_that_is_not_built_is_missing_with_the_command(cache: Path) -> None:
    assert not emulator.is_built("raspberry-pi-4b")
    with pytest.raises(MissingRuntime, match="`tightfit emulator build raspberry-pi-4b`"):
        emulator.find("raspberry-pi-4b")


def made(board: str) -> None:
    """A board's manifests, without what they speak of."""
    loaded = machine.boards.load(board)
    for place, identity in (
        (store.folder() / board, machine.of_board(board)),
        (machine.base_of(loaded), machine.of_base()),
        (store.folder() / "qemu", machine.of_emulator()),
    ):
        with store.building(place, {"identity": identity, "version": "1", "uncounted": None, "extras": []}):
            pass


@pytest.mark.parametrize("part", ["raspberry-pi-5", "debian-arm64", "qemu"])
def test_a_board_with_a_part_of_another_version_is_built_again_with_words(cache: Path, part: str) -> None:
    made("raspberry-pi-5")
    assert emulator.is_built("raspberry-pi-5")
    manifest = cache / part / store.MANIFEST
    manifest.write_text(manifest.read_text().replace('"identity": "', '"identity": "0'))
    assert not emulator.is_built("raspberry-pi-5")
    with pytest.raises(MissingRuntime, match="another version of Tightfit: `tightfit emulator build raspberry-pi-5`"):
        emulator.find("raspberry-pi-5")
    shutil.rmtree(cache / part)
    with pytest.raises(MissingRuntime, match="is not built yet"):
        emulator.find("raspberry-pi-5")


def test_a_login_needs_what_was_built_for_it(cache: Path, tmp_path: Path) -> None:
    made("raspberry-pi-5")
    with pytest.raises(MissingRuntime, match="without a shell: `tightfit emulator build raspberry-pi-5/login`"):
        emulator.login_command("raspberry-pi-5", tmp_path / "home")
