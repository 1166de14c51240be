"""Fixtures of the command line; and the helpers beside this file can be imported in every test below its folder."""

from pathlib import Path
from unittest import mock

import pytest
from command_line import Said, Tightfit, fill, in_process
from made_out import hasty


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A newcomer's folder, and we are in it; see `command_line.fill`."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def tightfit(desk: Path, capfd: pytest.CaptureFixture[str]) -> Tightfit:
    """Run a command line on the desk, in this process; what it prints is caught where C++ code prints, too."""

    def run(arguments: str) -> Said:
        capfd.readouterr()
        with mock.patch("convert.artifact.measure", hasty):
            code = in_process(arguments)
        said = capfd.readouterr()
        return Said(code, said.out, said.err)

    return run
