"""Read a budget file.

version = 1
[gates]                                  # for every result
min_sqnr_db = 20
[device.raspberry-pi-4b]                 # closer sections win
max_p50_ms = 15
[device.raspberry-pi-4b.onnx]
min_speedup = false                      # false switches a gate off
[on."ssh://pi@kitchen"]                  # what is measured at an address, with --on
max_p50_ms = 20
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from .errors import TightfitError
from .gates import GATES, Budget, find

VERSION = 1


def read_budget(path: Path) -> Budget:
    """The budget in the TOML file `path`.

    Raises TightfitError: no file, no TOML (with line), another version, an unknown section, gate or target (with
    the nearest known), a limit that is no number or does not fit its metric.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TightfitError(f"cannot read the budget {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TightfitError(f"the budget {path} is not TOML: {error}.") from error
    try:
        return _budget(data)
    except TightfitError as error:
        raise TightfitError(f"the budget {path}: {error}") from error


def _budget(data: dict[str, Any]) -> Budget:
    known = ("version", "gates", "device", "on")
    for key in data:
        if key not in known:
            raise TightfitError(f"there is no section '{key}'; {_nearest(key, known)}")
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise TightfitError(f"version = {data.get('version')!r} cannot be read; write version = {VERSION}.")
    devices: dict[str, dict[str, float | None]] = {}
    targets: dict[tuple[str, str], dict[str, float | None]] = {}
    for device, section in _table(data.get("device", {}), "device").items():
        own = _table(section, f"device.{device}")
        devices[device] = _limits({k: v for k, v in own.items() if not isinstance(v, dict)})
        for target, limits in own.items():
            if isinstance(limits, dict):
                targets[device, _target(target)] = _limits(limits)
    on = _table(data.get("on", {}), "on")
    places = {address: _limits(_table(limits, f"on.{address}")) for address, limits in on.items()}
    return Budget(_limits(_table(data.get("gates", {}), "gates")), devices, targets, places)


def _limits(section: dict[str, Any]) -> dict[str, float | None]:
    return {find(name).name: _limit(name, value) for name, value in section.items()}


def _limit(name: str, value: object) -> float | None:
    """The limit a TOML value stands for; `false` is None."""
    if value is False:
        return None
    if name == "require_match" and value is True:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TightfitError(f"{name} = {value!r} is not a number (or false, to switch the gate off).")
    return float(value)


def _target(name: str) -> str:
    from targets import names

    known = names()
    if name not in known:
        raise TightfitError(f"there is no target '{name}'; {_nearest(name, known)}")
    return name


def _table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        near = difflib.get_close_matches(name.rpartition(".")[2], GATES, n=1)
        hint = f" Gates such as {near[0]} stand under [gates]." if near else ""
        raise TightfitError(f"'{name}' must be a section of its own, [{name}].{hint}")
    return value


def _nearest(name: str, known: "tuple[str, ...] | list[str]") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
