"""A .tflite file as `benchmark_model` sees it: inputs as bytes in its order, outputs out of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Batch
from targets._tflite_file import SIGNATURE
from targets._tflite_run import fitted, load
from targets.errors import TargetError


@dataclass(frozen=True)
class Slot:
    """One input or output: its name in the signature, and what the runtime says of its tensor."""

    name: str
    detail: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Batch included."""
        return tuple(int(d) for d in self.detail["shape"])

    @property
    def bytes(self) -> int:
        """The size of its tensor."""
        return int(np.prod(self.shape)) * np.dtype(self.detail["dtype"]).itemsize


@dataclass(frozen=True)
class Layout:
    """The inputs and outputs of a file, in the order in which its graph has them."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    @classmethod
    def of(cls, path: Path) -> "Layout":
        """Read with the runtime of this machine. Raises TargetError, or MissingRuntime where there is none."""
        interpreter, name = load(path, 1)
        if SIGNATURE not in interpreter.get_signature_list():
            raise TargetError(f"{path.name} has no signature '{SIGNATURE}'; it was not written by Tightfit ({name}).")
        runner = interpreter.get_signature_runner(SIGNATURE)
        inputs = _ordered(runner.get_input_details(), interpreter.get_input_details())
        return cls(inputs, _ordered(runner.get_output_details(), interpreter.get_output_details()))

    def slices(self, inputs: Batch, batch: int) -> Iterator[list[bytes]]:
        """The bytes of every input, for one slice of samples after the other."""
        missing = [slot.name for slot in self.inputs if slot.name not in inputs]
        if missing:
            raise TargetError(f"the input '{missing[0]}' is missing; there are {', '.join(inputs)}.")
        for start in range(0, len(next(iter(inputs.values()))), batch):
            values = [np.asarray(inputs[slot.name][start : start + batch]) for slot in self.inputs]
            yield [
                np.ascontiguousarray(fitted(slot.name, value, slot.detail)).tobytes()
                for slot, value in zip(self.inputs, values, strict=True)
            ]

    def results(self, content: bytes, slices: int, where: str) -> Batch:
        """All outputs of so many slices, one behind the other, as float where the file has codes."""
        size = sum(slot.bytes for slot in self.outputs)
        if len(content) != size * slices:
            raise TargetError(
                f"{where}: benchmark_model left {len(content)} bytes of outputs, of {size * slices}. A newer one knows "
                "--output_filepath."
            )
        found: dict[str, list[NDArray[Any]]] = {slot.name: [] for slot in self.outputs}
        at = 0
        for _ in range(slices):
            for slot in self.outputs:
                raw = np.frombuffer(content[at : at + slot.bytes], dtype=slot.detail["dtype"]).reshape(slot.shape)
                found[slot.name].append(_real(raw, slot.detail))
                at += slot.bytes
        return {name: np.concatenate(parts) for name, parts in found.items()}


def _ordered(named: dict[str, dict[str, Any]], tensors: list[dict[str, Any]]) -> tuple[Slot, ...]:
    """The signature's names in the order of the graph's tensors."""
    names = {detail["index"]: name for name, detail in named.items()}
    return tuple(Slot(names[detail["index"]], detail) for detail in tensors if detail["index"] in names)


def _real(codes: NDArray[Any], detail: dict[str, Any]) -> NDArray[Any]:
    scale, zero = detail["quantization"]
    if scale and np.issubdtype(codes.dtype, np.integer):
        return (codes.astype(np.float32) - np.float32(zero)) * np.float32(scale)
    return codes.copy()
