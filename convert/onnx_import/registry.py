"""The operators: ONNX's name -> the function that computes it.

A function takes the node and its inputs (None where an optional one is absent) and returns a tensor or a tuple of
them. Inputs are tensors, except those listed in `host`, which arrive as a list of Python numbers, and those listed in
`hint`, which arrive as `Numbers` where they are known before the run.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from convert.errors import TightfitError

Function = Callable[..., Any]


@dataclass(frozen=True)
class OnnxNode:
    """One node: `opset` is that of its domain; `inputs` and `outputs` are names, "" for an absent one."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    attributes: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default that ONNX's specification gives it."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> TightfitError:
        """The error for a form of the operator that isn't supported."""
        return TightfitError(f"the ONNX node '{self.name}' ({self.op}) {what}, which capture does not support.")


@dataclass(frozen=True)
class Operator:
    """`host`: positions of inputs that must be known to Python; `hint`: that arrive as `Numbers` where known."""

    function: Function
    host: frozenset[int] = frozenset()
    hint: frozenset[int] = frozenset()


OPERATORS: dict[str, Operator] = {}
FAMILIES_START = "ops_"


def operator(*names: str, host: Iterable[int] = (), hint: Iterable[int] = ()) -> Callable[[Function], Function]:
    """Register a function for the operators `names`."""

    def register(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = Operator(function, frozenset(host), frozenset(hint))
        return function

    return register


def unary(table: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Register elementwise functions without attributes."""
    for name, function in table.items():
        OPERATORS[name] = Operator(lambda node, x, f=function: f(x))


def operators() -> dict[str, Operator]:
    """All operators there are; imports the files of this folder that hold them."""
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(folder):
        if module.name.startswith(FAMILIES_START):
            importlib.import_module(f"{package}.{module.name}")
    return OPERATORS
