"""What an Android device says of itself: battery, thermal status, clocks, by documented commands; not run on hardware.

Sources: `dumpsys battery` (temperature in tenths of a degree), `dumpsys thermalservice` (AOSP, hardware/interfaces/
thermal: status 0 none to 6 shutdown; a temperature's type 0 is a processor's), and the kernel's cpufreq files.
"""

import re
from dataclasses import dataclass
from typing import Any

THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
# From this status on the system limits what may run how fast.
THROTTLED = 1
_PROCESSOR = "0"
_CPU = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"
_FILES = ("scaling_cur_freq", "cpuinfo_max_freq", "scaling_governor")
COMMAND = (
    "echo '#battery'; dumpsys battery 2>/dev/null; echo '#thermal'; dumpsys thermalservice 2>/dev/null; echo '#cpu'; "
    f"for f in {' '.join(f'{_CPU}/{name}' for name in _FILES)}; "
    'do [ -r "$f" ] && echo "$f $(cat "$f")"; done; true'
)
"""A shell command that prints all of it, to be read by `parsed`."""


@dataclass(frozen=True)
class State:
    """The device at one moment. `limits`: the highest clock of each core in MHz, by its number. `level`: the battery's,
    in percent; `charging`: whether it is plugged in. None is what it does not say."""

    clock_mhz: float | None
    temperature_c: float | None
    governor: str | None
    thermal: int | None
    level: int | None
    charging: bool | None
    limits: dict[int, float]

    @property
    def throttled(self) -> str | None:
        """What slows it down, in words."""
        if self.thermal is None or self.thermal < THROTTLED:
            return None
        return f"thermal status {THERMAL[min(self.thermal, len(THERMAL) - 1)]}"

    def entry(self, moment: str, minute: float) -> dict[str, Any]:
        """As an entry of an answer's `board`."""
        return {
            "moment": moment,
            "minute": minute,
            "clock_mhz": self.clock_mhz,
            "temperature_c": self.temperature_c,
            "governor": self.governor,
            "throttled": self.throttled,
            "power_w": None,
        }


def parsed(text: str) -> State:
    """The state that COMMAND printed. What is missing or strange in it is None."""
    parts = {name: body for name, _, body in (part.partition("\n") for part in f"\n{text}".split("\n#"))}
    battery, thermal = parts.get("battery", ""), parts.get("thermal", "")
    files = dict(re.findall(r"^(/sys/\S+) (.+)$", parts.get("cpu", ""), re.MULTILINE))
    clocks = [float(v) / 1e3 for k, v in files.items() if k.endswith("scaling_cur_freq") and v.isdigit()]
    governors = sorted({v for k, v in files.items() if k.endswith("scaling_governor")})
    limits = {
        int(re.findall(r"/cpu(\d+)/", k)[0]): float(v) / 1e3
        for k, v in files.items()
        if k.endswith("cpuinfo_max_freq") and v.isdigit()
    }
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    level = re.search(r"^\s*level: (\d+)", battery, re.MULTILINE)
    plugged = re.findall(r"^\s*\w+ powered: (true|false)", battery, re.MULTILINE)
    return State(
        clock_mhz=max(clocks, default=None),
        temperature_c=_processor(thermal) or _battery(battery),
        governor=", ".join(governors) or None,
        thermal=int(status[1]) if status else None,
        level=int(level[1]) if level else None,
        charging="true" in plugged if plugged else None,
        limits=limits,
    )


def _processor(thermal: str) -> float | None:
    """The hottest processor's temperature now; those in front of "from HAL" are remembered ones."""
    now = thermal.partition("Current temperatures from HAL")[2].partition("Current cooling")[0] or thermal
    found = re.findall(r"Temperature\{mValue=(-?[0-9.]+), mType=(-?\d+),", now)
    return max((float(value) for value, kind in found if kind == _PROCESSOR), default=None)


def _battery(battery: str) -> float | None:
    found = re.search(r"^\s*temperature: (-?\d+)", battery, re.MULTILINE)
    return int(found[1]) / 10 if found else None
