"""The bounds of a relu or clamp, however it is spelled."""

import math

from torch.fx import Node

from .affine import value_of
from .graph import kind, operator_name

INFINITE = math.inf


def clamp_bounds(node: object) -> tuple[float, float] | None:
    """(least, largest) of a relu or clamp with plain numbers on floats; None for anything else."""
    if not isinstance(node, Node) or kind(node) not in ("relu", "clamp"):
        return None
    made = value_of(node)
    if made is not None and not made.is_floating_point():
        return None
    name = operator_name(node).rstrip("_")
    if name in ("relu", "relu6"):
        return 0.0, INFINITE if name == "relu" else 6.0
    low, high = (-1.0, 1.0) if name == "hardtanh" else (None, None)
    first, second = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    if name == "clamp_max":
        first, second = "max", "min"
    given = [*node.args[1:3], None, None][:2]
    one, two = (node.kwargs.get(n, v) for n, v in ((first, given[0]), (second, given[1])))
    if name == "clamp_max":
        one, two = None, one
    if any(isinstance(v, Node) for v in (one, two)):
        return None
    low = float(one) if isinstance(one, int | float) else low
    high = float(two) if isinstance(two, int | float) else high
    found = (-INFINITE if low is None else low, INFINITE if high is None else high)
    return found if found[0] <= found[1] else (found[1], found[1])  # torch gives the upper bound then
