"""Electric power, where the board measures it, and the energy of one inference.

A Raspberry Pi 5 has the regulator's readings (`vcgencmd pmic_read_adc`): the sum over rails of volts times amperes,
without what the 5 V rail feeds directly. Jetsons have an INA3221 with the board's input (VDD_IN). Elsewhere a single
`power*_input` of hwmon is taken; of several, none is known to be the whole, so none is. Not run on hardware.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .timing import Block

INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "5V_IN")
STRETCH_SECONDS = 2.0
_INTERVAL = 0.1
_RAIL = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)


class Meter:
    """The one source of power readings below `root`; `watts` is None for ever where there is none."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._vcgencmd = shutil.which("vcgencmd")
        self._read: Callable[[], float | None] | None = None
        for candidate in (_ina(root), _single(root), self._regulator):
            if candidate is not None and candidate() is not None:
                self._read = candidate
                break

    def watts(self) -> float | None:
        """The power now."""
        return None if self._read is None else self._read()

    def energy_mj(self, block: Block, seconds: float = STRETCH_SECONDS) -> float | None:
        """Millijoules per call: mean power over a stretch of calls times their median time, of the whole board.

        A stretch of its own, since reading the power disturbs times.
        """
        if self._read is None:
            return None
        readings: list[float] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_INTERVAL):
                value = self.watts()
                if value is not None:
                    readings.append(value)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        times = block(1, seconds)
        over.set()
        watcher.join()
        if not readings or time.perf_counter() - start < _INTERVAL:
            return None
        return statistics.fmean(readings) * statistics.median(times) * 1e3

    def _regulator(self) -> float | None:
        if self._vcgencmd is None:
            return None
        try:
            done = subprocess.run(
                [self._vcgencmd, "pmic_read_adc"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return rails_watts(done.stdout.decode("utf-8", "replace"))


def rails_watts(text: str) -> float | None:
    """Watts of what `vcgencmd pmic_read_adc` prints: rails of which both current and voltage are known."""
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for name, unit, value in _RAIL.findall(text):
        (amperes if unit == "A" else volts)[name] = float(value)
    rails = [amperes[name] * volts[name] for name in amperes if name in volts]
    return sum(rails) if rails else None


def _ina(root: Path) -> Callable[[], float | None] | None:
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        rail = re.match(r"in(\d+)_label", label.name)
        if rail and _read(label) in INPUT_RAILS:
            millivolts, milliamperes = (label.with_name(f"{kind}{rail.group(1)}_input") for kind in ("in", "curr"))
            return lambda: _product(millivolts, milliamperes, 1e-6)
    return None


def _single(root: Path) -> Callable[[], float | None] | None:
    sensors = sorted((root / "sys/class/hwmon").glob("hwmon*/power*_input"))
    return (lambda: _product(sensors[0], None, 1e-6)) if len(sensors) == 1 else None  # microwatts


def _product(first: Path, second: Path | None, unit: float) -> float | None:
    try:
        return float(_read(first)) * (1.0 if second is None else float(_read(second))) * unit
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
