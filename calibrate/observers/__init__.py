"""Range observers: from a tensor's histogram to candidate ranges. One per file; the file's name is its name."""

import functools
import importlib
import pkgutil
from collections.abc import Callable

from calibrate.histogram import Floats, Histogram

from ..errors import CalibrationError

# Mean squared error of turning a tensor into codes over each of some ranges: (lows, highs), which broadcast.
Quantizer = Callable[[Floats, Floats], Floats]
# An observer proposes ranges [(low, high), ...] with low <= 0 <= high, in the tensor's own unit.
Observer = Callable[[Histogram, Quantizer], list[tuple[float, float]]]


def names() -> list[str]:
    """The observers there are; imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


@functools.cache
def find(name: str) -> Observer:
    """The observer called `name`. Raises CalibrationError when there is none."""
    if name not in names():
        raise CalibrationError(f"there is no observer '{name}'; there are {', '.join(names())}")
    observer: Observer = importlib.import_module(f"{__name__}.{name}").ranges
    return observer
