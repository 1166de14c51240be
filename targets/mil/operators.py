"""Every MIL operator the executor knows: name -> function of MIL's parameters.

Left out on purpose: operators whose result's shape depends on data (non_zero, non_maximum_suppression), that draw
random numbers, that hold lists, states or blocks (while_loop, cond), and those that exist for classifiers only.
A program that holds one is refused by name.
"""

from collections.abc import Callable
from typing import Any

from . import (
    activation,
    conv,
    elementwise,
    gather_scatter,
    linear,
    norm,
    pool,
    quantization,
    recurrent,
    reduction,
    resize,
    shape,
    tensor,
)

_FAMILIES = (
    activation,
    conv,
    elementwise,
    gather_scatter,
    linear,
    norm,
    pool,
    quantization,
    recurrent,
    reduction,
    resize,
    shape,
    tensor,
)

OPERATORS: dict[str, Callable[..., Any]] = {
    name: function for family in _FAMILIES for name, function in family.OPS.items()
}
