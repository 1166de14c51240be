"""What the machine is called."""

import platform
from pathlib import Path

import numpy as np

from convert.host import cpu_name, environment, governor, versions

X86 = "processor\t: 0\nmodel name\t: Invented CPU 9000\n\nprocessor\t: 1\nmodel name\t: Another\n"
RASPBERRY = "processor\t: 0\nBogoMIPS\t: 108.00\n\nRevision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"


def test_the_first_core_names_the_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(X86, encoding="utf-8")
    assert cpu_name(tmp_path / "cpuinfo") == f"Invented CPU 9000 ({platform.machine()})"


def test_an_arm_board_is_named_where_the_processor_is_not(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(RASPBERRY, encoding="utf-8")
    assert cpu_name(tmp_path / "cpuinfo") == f"Raspberry Pi 4 Model B Rev 1.4 ({platform.machine()})"


def test_a_system_that_says_nothing_still_has_a_name(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "none")


def test_the_governor_is_read_or_unknown(tmp_path: Path) -> None:
    (tmp_path / "governor").write_text("schedutil\n", encoding="ascii")
    assert governor(tmp_path / "governor") == "schedutil"
    assert governor(tmp_path / "none") is None


def test_the_environment_names_installed_packages_only() -> None:
    assert versions()["numpy"] == np.__version__
    made = environment()
    assert made.python == platform.python_version()
    assert all(made.packages.values())
