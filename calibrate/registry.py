"""The folder is the registry: one thing per file, whose name is its name."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from .errors import CalibrationError


def names(path: Iterable[str]) -> list[str]:
    """The names in a package's `__path__`; imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(path))


def find(package: str, path: Iterable[str], name: str, attribute: str, noun: str) -> Any:
    """The `attribute` of the one file `name` of `package`. Raises CalibrationError, with `noun`, when there is none."""
    known = names(path)
    if name not in known:
        raise CalibrationError(f"there is no {noun} '{name}'; there are {', '.join(known)}")
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


def refuse_unknown(who: str, known: Iterable[str], given: Iterable[str]) -> None:
    """Raise CalibrationError for the first option `given` that `who` does not know, with those it does."""
    names = list(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise CalibrationError(f"{who} has no option '{unknown[0]}'; it has {', '.join(names) or 'none'}")
