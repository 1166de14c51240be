"""What building a board refuses before it fetches anything, and that a built one is left as it is."""

import importlib.util
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulated_boards import built

from targets import emulator
from targets.emulator import wheels
from targets.errors import MissingRuntime, TargetError


def untold(what: str, done: int, total: int | None) -> None:
    raise AssertionError(f"something was done: {what}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    return tmp_path


def test_an_unknown_board_and_an_unknown_extra_are_refused(cache: Path) -> None:
    with pytest.raises(TargetError, match="Did you mean 'x86-no-vnni'"):
        emulator.build("x86-vnni", untold)
    with pytest.raises(TargetError, match="nothing called 'desktop'"):
        emulator.build("x86-no-vnni", untold, extras=("desktop",))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64")])
def test_a_machine_that_cannot_emulate_is_told_what_can(
    cache: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system, machine=machine))
    with pytest.raises(MissingRuntime, match=f"{system} on {machine}.*ssh"):
        emulator.build("x86-no-vnni", untold)
    assert list(cache.iterdir()) == []


def test_a_python_without_pip_is_told_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingRuntime, match="ensurepip"):
        wheels.install(["numpy==2.4.6"], tmp_path / "site", "aarch64", "3.11", ["manylinux_2_28"])


def test_what_pip_cannot_fetch_is_said_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot fetch the board's packages \(\./nothing\.whl\): ERROR"):
        wheels.install(["./nothing.whl"], tmp_path / "site", "aarch64", "3.11", ["manylinux_2_28"])


def test_a_built_board_is_left_as_it_is() -> None:
    machine = built("raspberry-pi-5")
    assert emulator.build("raspberry-pi-5", untold) == machine.root


def test_a_login_is_the_board_all_the_way_down(tmp_path: Path) -> None:
    built("raspberry-pi-4b", "login")
    login = emulator.login_command("raspberry-pi-4b", tmp_path)
    shell = "uname -m; uname -n; python3 -c 'import os; os.system(\"uname -m\")'; touch ~/mine; touch /usr/x; exit 7"
    done = subprocess.run([*login, shell], capture_output=True, text=True, timeout=60)
    if done.returncode == 126:
        pytest.skip(f"nobody logged in: {done.stderr}")
    assert done.stdout.split() == ["aarch64", "raspberry-pi-4b", "aarch64"]
    assert done.returncode == 7, "the command's own exit code"
    assert "Read-only file system" in done.stderr
    assert (tmp_path / "root/mine").exists()


def test_nobody_logs_in_to_a_board_of_this_machines_kind(tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("this machine is of another kind than x86-no-vnni")
    built("x86-no-vnni")
    with pytest.raises(TargetError, match=r"Nobody can log in|without a shell"):
        emulator.login_command("x86-no-vnni", tmp_path)
