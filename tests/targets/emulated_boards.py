"""Emulated boards for tests: used where they are built, built where TIGHTFIT_TEST_EMULATOR=1 asks, else skipped."""

import os

import pytest

from targets import emulator
from targets.emulator.machine import Machine
from targets.errors import MissingRuntime


def built(name: str, *extras: str) -> Machine:
    """The board; skips the test, visibly, where it is not there."""
    if os.environ.get("TIGHTFIT_TEST_EMULATOR") == "1":
        emulator.build(name, lambda what, done, total: None, extras)
    try:
        machine = emulator.find(name)
        if lacking := set(extras) - machine.extras:
            raise MissingRuntime(f"{name} was built without {' and '.join(sorted(lacking))}.")
    except MissingRuntime as error:
        pytest.skip(f"not run on an emulated board: {error} Or set TIGHTFIT_TEST_EMULATOR=1.")
    return machine


def counting(name: str) -> Machine:
    """The board, with what counts instructions; skips the test where it is not there."""
    machine = built(name)
    if machine.plugin is None:
        pytest.skip(f"no instruction was counted: {machine.uncounted}")
    return machine
