"""What a board says of itself: clock, temperature, governor, what slows it down; from files and the vendors' tools.

Sources: the kernel's cpufreq, thermal and hwmon files; on a Raspberry Pi `vcgencmd get_throttled`; on a Jetson
`nvpmodel -q`, `tegrastats` and the counters of the over-current protection (`oc*_event_cnt`). What is
not there is None. The Raspberry Pi's and the Jetson's parts are written from documentation: not run on hardware.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .power import Meter

# The bits of `vcgencmd get_throttled`: what is now, and from bit 16 on what has been since the start.
PI_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
SINCE_START = 16
_CPU_ZONES = re.compile("cpu|soc|pkg|tj", re.IGNORECASE)
_CPU_COOLERS = re.compile("cpufreq|processor", re.IGNORECASE)


class Board:
    """Reads the board below `root`; tools are looked up in PATH."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._vcgencmd = shutil.which("vcgencmd")
        self.meter = Meter(root)

    def state(self, moment: str, minute: float) -> dict[str, Any]:
        """One entry of the answer's `board`. MHz, degrees Celsius, watts."""
        return {
            "moment": moment,
            "minute": minute,
            "clock_mhz": self.clock_mhz(),
            "temperature_c": self.temperature_c(),
            "governor": self.governor(),
            "throttled": ", ".join(self.slowed()) or None,
            "power_w": self.meter.watts(),
        }

    def clock_mhz(self) -> float | None:
        """The highest clock that any of this process's cores has now."""
        values = [_number(path) for path in self._cores("scaling_cur_freq")]
        clocks = [value / 1e3 for value in values if value is not None]
        if not clocks:
            text = _text(self._root / "proc/cpuinfo") or ""
            clocks = [float(found) for found in re.findall(r"^cpu MHz\s*:\s*([0-9.]+)$", text, re.MULTILINE)]
        return max(clocks, default=None)

    def temperature_c(self) -> float | None:
        """The hottest of the processor's thermal zones, or of all where none is named after it."""
        zones = {}
        for path in sorted((self._root / "sys/class/thermal").glob("thermal_zone*/temp")):
            value = _number(path)
            if value is not None:
                zones[path] = value / 1e3
        named = [v for path, v in zones.items() if _CPU_ZONES.search(_text(path.with_name("type")) or "")]
        return max(named or zones.values(), default=None)

    def governor(self) -> str | None:
        """The frequency governors of this process's cores."""
        found = {_text(path) for path in self._cores("scaling_governor")}
        return ", ".join(sorted(name for name in found if name)) or None

    def slowed(self) -> list[str]:
        """What slows the processor down at this moment, in words."""
        bits = self.throttled_bits() or 0
        found = [words for bit, words in PI_BITS.items() if bits >> bit & 1]
        for path in sorted((self._root / "sys/class/thermal").glob("cooling_device*/cur_state")):
            kind = _text(path.with_name("type")) or ""
            if _CPU_COOLERS.search(kind) and (_number(path) or 0) > 0:
                found.append(f"the kernel cools by lowering clocks ({kind})")
                break
        return found

    def events(self) -> dict[str, int]:
        """How often the processor has been slowed down since the start, by cause; what grows has happened anew."""
        bits = self.throttled_bits()
        found = {} if bits is None else {w: bits >> (bit + SINCE_START) & 1 for bit, w in PI_BITS.items()}
        counters = [("over-current", "sys/class/hwmon/hwmon*/oc*_event_cnt")]
        counters.append(("throttled for heat", "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"))
        for cause, pattern in counters:
            values = [_number(path) for path in self._root.glob(pattern)]
            if values:
                found[cause] = int(sum(value or 0 for value in values))
        return found

    def throttled_bits(self) -> int | None:
        """The word of `vcgencmd get_throttled`."""
        if self._vcgencmd is None:
            return None
        found = re.search(r"throttled=0x([0-9a-fA-F]+)", output_of([self._vcgencmd, "get_throttled"]))
        return int(found.group(1), 16) if found else None

    def machine(self) -> str | None:
        """The board's or the processor's name for itself."""
        model = _text(self._root / "proc/device-tree/model")
        if model:
            return model
        text = _text(self._root / "proc/cpuinfo") or ""
        for key in ("Model", "model name", "Hardware"):
            found = re.search(rf"^{key}\s*:\s*(\S.*)$", text, re.MULTILINE)
            if found:
                return found.group(1)
        return platform.processor() or None

    def facts(self) -> dict[str, str]:
        """System, kernel, Python and power mode, by name; only what is known."""
        release = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(self._root / "etc/os-release") or "", re.MULTILINE)
        mode = output_of(["nvpmodel", "-q"]).replace("NV Power Mode:", "").split()
        found = {
            "machine": self.machine(),
            "processor": platform.machine(),
            "system": release.group(1) if release else platform.system(),
            "kernel": f"{platform.system()} {platform.release()}",
            "python": sys.version.split()[0],
            "power mode": " ".join(mode),
            "tegrastats": _one_line(["tegrastats", "--interval", "100"]) if shutil.which("tegrastats") else None,
        }
        return {name: value for name, value in found.items() if value}

    def blind(self) -> str | None:
        """Why throttling on a Raspberry Pi would go unseen; None where it would not, and on other boards."""
        if "raspberry pi" not in (self.machine() or "").lower() or self.throttled_bits() is not None:
            return None
        why = "`vcgencmd get_throttled` fails; add the user to the group video" if self._vcgencmd else "no vcgencmd"
        return f"whether the board was throttled can't be seen: {why}"

    def _cores(self, name: str) -> list[Path]:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        return [self._root / f"sys/devices/system/cpu/cpu{core}/cpufreq/{name}" for core in sorted(allowed)]


def output_of(command: list[str], seconds: float = 5.0) -> str:
    """What a tool prints; empty where it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds, text=True)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return "" if done.returncode else done.stdout.strip()


def _one_line(command: list[str]) -> str:
    """The first line of a tool that goes on printing."""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = process.stdout.readline().strip() if process.stdout else ""
            process.kill()
    except OSError:
        return ""
    return line


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
