"""Run a MIL program without Core ML: every operator by torch, in the order of the file."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.errors import TargetError

from .operators import OPERATORS
from .reader import read_function
from .values import argument, round_to_half, tensor_of, torch_dtype

Slots = int | tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """An input, output or result: its name, shape, and type by MIL's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Step:
    """One operator, bound: what it takes from which slot, what is fixed, where its results go."""

    operator: str
    name: str
    function: Callable[..., Any]
    fixed: dict[str, Any]
    taken: dict[str, Slots]
    results: list[tuple[int, Value]]
    released: tuple[int, ...] = ()

    def slots(self) -> set[int]:
        """Every slot this step reads."""
        return {s for slots in self.taken.values() for s in (slots if isinstance(slots, tuple) else (slots,))}

    def run(self, values: list[Tensor | None]) -> None:
        """Compute the results into their slots, then let go of what no later step reads."""
        taken = {
            key: [values[s] for s in slots] if isinstance(slots, tuple) else values[slots]
            for key, slots in self.taken.items()
        }
        try:
            result = self.function(**self.fixed, **taken)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise TargetError(f"MIL operator '{self.operator}' ({self.name}) cannot run: {error}") from error
        outputs = result if isinstance(result, tuple) else (result,)
        for (slot, value), output in zip(self.results, outputs, strict=True):
            values[slot] = _typed(output, value, self.operator)
        for slot in self.released:
            values[slot] = None


def _array(value: Tensor | None) -> np.ndarray:
    """A copy: an output may share memory with a constant."""
    assert value is not None, "an output's slot is never released"
    return value.numpy().copy()


def _typed(output: Tensor, value: Value, operator: str) -> Tensor:
    """The result in its declared type, rounded to float16 where declared so. Raises TargetError on another shape."""
    if tuple(output.shape) != value.shape:
        raise TargetError(
            f"MIL operator '{operator}' ({value.name}) gave the shape {tuple(output.shape)}, not {value.shape}"
        )
    dtype = torch_dtype(value.dtype)
    output = output if output.dtype is dtype else output.to(dtype)
    return round_to_half(output) if value.dtype == "fp16" else output


class Program:
    """A MIL program, loaded and bound once; `run` only computes.

    Numbers: integer operators are exact; float32 is torch's; every float16 result is computed in float32 and rounded
    once, at the operator's output. Core ML's hardware may accumulate in float16 or in another order.
    """

    def __init__(self, function: Any) -> None:
        """Bind coremltools' in-memory function. Raises TargetError for an operator that is not known, by name."""
        self.operators: Counter[str] = Counter(op.op_type for op in function.operations if op.op_type != "const")
        _refuse_unknown(self.operators)
        self.inputs = tuple(_value(var) for var in function.inputs.values())
        self.outputs = tuple(_value(var) for var in function.outputs)
        self._initial: list[Tensor | None] = []
        self._slots: dict[Any, int] = {}
        self._entry = {var.name: self._new(var) for var in function.inputs.values()}
        steps = [self._step(op) for op in function.operations if op.op_type != "const"]
        self._exit = {var.name: self._slot(var) for var in function.outputs}
        self._steps = self._fold(steps)
        self._release()

    @classmethod
    def load(cls, path: Path) -> "Program":
        """Read a .mlpackage from disk. Raises TargetError when it is damaged or holds an unknown operator."""
        return cls(read_function(path))

    def bound(self, inputs: Mapping[str, np.ndarray]) -> dict[int, Tensor]:
        """The inputs as tensors in the program's types. Raises TargetError for a wrong name or shape."""
        if set(inputs) != set(self._entry):
            raise TargetError(f"the program takes {sorted(self._entry)}, not {sorted(inputs)}")
        ready = {}
        for value in self.inputs:
            array = inputs[value.name]
            if tuple(array.shape) != value.shape:
                raise TargetError(f"input '{value.name}' has the shape {tuple(array.shape)}, not {value.shape}")
            ready[self._entry[value.name]] = _typed(torch.from_numpy(np.array(array)), value, "input")
        return ready

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in the program's order; float16 comes out as float32."""
        return self.run_bound(self.bound(inputs))

    @torch.inference_mode()
    def run_bound(self, inputs: Mapping[int, Tensor]) -> dict[str, np.ndarray]:
        """`run` on what `bound` made."""
        values = list(self._initial)
        for slot, tensor in inputs.items():
            values[slot] = tensor
        for step in self._steps:
            step.run(values)
        return {name: _array(values[slot]) for name, slot in self._exit.items()}

    def _new(self, var: Any, constant: Tensor | None = None) -> int:
        self._slots[var] = len(self._initial)
        self._initial.append(constant)
        return self._slots[var]

    def _slot(self, var: Any) -> int:
        """Where a value lives; a constant gets its slot, filled, at its first use."""
        if var not in self._slots:
            self._new(var, tensor_of(var.val, _dtype(var)))
        return self._slots[var]

    def _step(self, op: Any) -> Step:
        fixed: dict[str, Any] = {}
        taken: dict[str, Slots] = {}
        for key, var in op.inputs.items():
            if isinstance(var, list | tuple):
                taken[key] = tuple(self._slot(v) for v in var)
            elif _is_parameter(op, key, var):
                fixed[key] = argument(var.val, _dtype(var), static=True)
            else:
                taken[key] = self._slot(var)
        results = [(self._new(var), _value(var)) for var in op.outputs]
        return Step(op.op_type, op.name, OPERATORS[op.op_type], fixed, taken, results)

    def _fold(self, steps: list[Step]) -> list[Step]:
        """Run now what depends on no input (weights are unpacked once); return the rest."""
        dynamic = set(self._entry.values())
        rest = []
        for step in steps:
            if step.slots() & dynamic:
                dynamic.update(slot for slot, _ in step.results)
                rest.append(step)
            else:
                step.run(self._initial)
        return rest

    def _release(self) -> None:
        """Let every step free the results it is the last to read, and constants that no step reads."""
        needed = set(self._exit.values())
        for step in reversed(self._steps):
            made = {slot for slot, _ in step.results}
            step.released = tuple(sorted((step.slots() | made) - needed))
            needed |= step.slots()
        self._initial = [value if slot in needed else None for slot, value in enumerate(self._initial)]


def _is_parameter(op: Any, key: str, var: Any) -> bool:
    """Whether an argument is fixed by the operator's definition: strides, axes, modes; never packed weights."""
    if var.op is None or var.op.op_type != "const" or not op.input_spec.input_types[key].const:
        return False
    return not op.op_type.startswith("constexpr_") or np.ndim(var.val) == 0


def _refuse_unknown(operators: Mapping[str, int]) -> None:
    unknown = sorted(set(operators) - set(OPERATORS))
    if unknown:
        raise TargetError(f"the MIL executor does not know {', '.join(unknown)}; run this package on a Mac")


def _dtype(var: Any) -> str:
    from coremltools.converters.mil.mil import types

    return types.builtin_to_string(var.dtype)


def _value(var: Any) -> Value:
    shape = tuple(int(size) if str(size).isdigit() else -1 for size in var.shape)
    if -1 in shape:
        raise TargetError(f"'{var.name}' has the shape {var.shape}: the MIL executor runs static shapes only")
    return Value(var.name, shape, _dtype(var))
