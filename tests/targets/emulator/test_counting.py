"""Counts of instructions are exact, class by class, against programs whose every word is known."""

import dataclasses
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from arm_instructions import INSTRUCTIONS
from arm_programs import NOP, marked, program
from emulated_boards import counting

from targets.emulator.counting import compile_plugin
from targets.emulator.machine import Machine
from targets.errors import MissingRuntime

CLASSES = ["all", "simd", "dot", "mla", "fmla", "load_store", "branch"]


def counts(machine: Machine, words: list[int], folder: Path, cpu: str) -> list[dict[str, int]]:
    """What the plugin writes at the marks of a program."""
    path = program(folder / "program", words)
    machine = dataclasses.replace(machine, board=dataclasses.replace(machine.board, cpu=cpu), root=folder)
    command = machine.command(["/program"], str(folder / "counts"))
    assert path.exists()
    subprocess.run(command, env={}, check=True, timeout=60)
    return [json.loads(line) for line in (folder / "counts").read_text().splitlines()]


@pytest.fixture(scope="module")
def pi() -> Machine:
    return counting("raspberry-pi-5")


def test_a_loop_is_counted_to_the_instruction(pi: Machine, tmp_path: Path) -> None:
    sdot = INSTRUCTIONS[0][0]
    found = counts(pi, marked(sdot, NOP, NOP, times=1000), tmp_path, "cortex-a76")
    assert found[0]["all"] == 3, "from the start to the first mark"
    assert found[1] == {
        "all": 1000 * (3 + 2) + 3,
        "simd": 1000,
        "dot": 1000,
        "mla": 0,
        "fmla": 0,
        "load_store": 0,
        "branch": 1000,
    }


@pytest.mark.parametrize(("word", "text", "classes"), INSTRUCTIONS, ids=[text for _, text, _ in INSTRUCTIONS])
def test_an_instruction_is_counted_in_its_classes(
    pi: Machine, tmp_path: Path, word: int, text: str, classes: str
) -> None:
    # `max` has all instructions that any board of today has.
    found = counts(pi, marked(word), tmp_path, "max")[1]
    expected = Counter({"all": 3 + 2 + 1, "branch": 1}) + Counter(classes.split())
    assert {name: count for name, count in found.items() if count} == dict(expected)
    assert list(found) == CLASSES


def test_a_board_without_dot_products_does_not_know_them(tmp_path: Path) -> None:
    machine = counting("raspberry-pi-4b")
    with pytest.raises(subprocess.CalledProcessError):
        counts(machine, marked(INSTRUCTIONS[0][0]), tmp_path, machine.board.cpu)


def test_without_a_compiler_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in (compile_plugin(tmp_path / "a.so") or "")
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'cost.c: it does not' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    assert "cost.c: it does not" in (compile_plugin(tmp_path / "a.so") or "")


def test_what_cannot_count_says_why_when_asked(pi: Machine, tmp_path: Path) -> None:
    machine = dataclasses.replace(pi, plugin=None, uncounted="no C compiler was found")
    assert machine.command(["/usr/bin/python3.11"])
    with pytest.raises(MissingRuntime, match=r"no C compiler was found\. .*tightfit emulator build raspberry-pi-5"):
        machine.command(["/usr/bin/python3.11"], "counts")
