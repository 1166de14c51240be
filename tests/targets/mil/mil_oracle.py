"""A second opinion on a MIL operator: what coremltools itself computes when all arguments are constants."""

import copy
from typing import Any

import numpy as np
from torch import Tensor

from targets.mil import OPERATORS, coremltools, quiet
from targets.mil.program import Program


def inferred(operator: str, **arguments: Any) -> list[np.ndarray]:
    """coremltools' own (NumPy) results of one operator. AssertionError where it does not infer any."""
    op = _operation(operator, arguments)
    values = [var.val for var in op.outputs]
    assert all(value is not None for value in values), f"coremltools infers no value of {operator}"
    return [np.asarray(value) for value in values]


def executed(operator: str, **arguments: Any) -> list[np.ndarray]:
    """Our results of the same operator, its arguments bound as those of a program read from disk."""
    op = _operation(operator, arguments)
    program = Program.__new__(Program)
    program._initial, program._slots = [], {}
    step = program._step(op)
    step.run(program._initial)
    results = [program._initial[slot] for slot, _ in step.results]
    return [result.numpy() for result in results if isinstance(result, Tensor)]


def _operation(operator: str, arguments: dict[str, Any]) -> Any:
    """The operator as coremltools builds it, in a function of its own, on copies: its inference writes into them."""
    arguments = copy.deepcopy(arguments)
    ct = coremltools()
    from coremltools.converters.mil.mil import Builder, Function

    assert operator in OPERATORS
    with quiet(), Function({}, opset_version=ct.target.iOS18):
        result = getattr(Builder, operator)(**arguments)
    return (result[0] if isinstance(result, list | tuple) else result).op
