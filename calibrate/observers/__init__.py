"""Range observers: from a tensor's histogram to candidate ranges. One per file; the file's name is its name."""

import functools
from collections.abc import Callable

from calibrate.histogram import Floats, Histogram

from .. import registry

# Mean squared error of turning a tensor into codes over each of some ranges: (lows, highs), which broadcast.
Quantizer = Callable[[Floats, Floats], Floats]
# An observer proposes ranges [(low, high), ...] with low <= 0 <= high, in the tensor's own unit.
Observer = Callable[[Histogram, Quantizer], list[tuple[float, float]]]


def names() -> list[str]:
    """The observers there are; imports none."""
    return registry.names(__path__)


@functools.cache
def find(name: str) -> Observer:
    """The observer called `name`. Raises CalibrationError when there is none."""
    found: Observer = registry.find(__name__, __path__, name, "ranges", "observer")
    return found
