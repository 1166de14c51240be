"""Runs a .tflite file on LiteRT, or on tflite-runtime where a device has that."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.samples import Array, Batch, InputSpec

from ._tflite_file import SIGNATURE
from .errors import MissingRuntime, TargetError

MISSING = "pip install 'tightfit[tflite]'"


@contextlib.contextmanager
def discarded_stderr() -> Iterator[None]:
    """Throw away what C++ writes to descriptor 2, which no logging setting reaches."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def interpreter_class() -> tuple[Any, str]:
    """The interpreter there is, and its name with version. Raises MissingRuntime when there is none."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"LiteRT {importlib.metadata.version('ai-edge-litert')}"
    except ImportError:
        pass
    try:
        from tflite_runtime.interpreter import Interpreter as Older

        return Older, f"tflite-runtime {importlib.metadata.version('tflite-runtime')}"
    except ImportError:
        raise MissingRuntime(f"no TFLite runtime is installed; {MISSING} brings LiteRT.") from None


def load(path: Path, threads: int) -> tuple[Any, str]:
    """An interpreter with its tensors allocated, and its name. Raises TargetError when the file does not load."""
    cls, name = interpreter_class()
    try:
        with discarded_stderr():
            interpreter = cls(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise TargetError(f"{name} does not load {path.name}: {str(error).splitlines()[0]}") from error
    return interpreter, name


class TFLiteSession:
    """A loaded .tflite file; inputs and outputs go by the names of its signature."""

    measures_latency = True

    def __init__(self, path: Path, threads: int) -> None:
        self._interpreter, name = load(path, threads)
        signatures = self._interpreter.get_signature_list()
        if SIGNATURE not in signatures:
            raise TargetError(f"{path.name} has no signature '{SIGNATURE}'; it was not written by Tightfit.")
        runner = self._interpreter.get_signature_runner(SIGNATURE)
        self._inputs: dict[str, dict[str, Any]] = runner.get_input_details()
        self._outputs: dict[str, dict[str, Any]] = runner.get_output_details()
        xnnpack = any(d["op_name"] == "DELEGATE" for d in self._interpreter._get_ops_details())
        self.executor = (
            f"{name} ({'XNNPACK' if xnnpack else 'built-in kernels'}, {threads} thread{'s' * (threads > 1)})"
        )

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes."""
        return tuple(
            InputSpec(name, tuple(int(d) for d in detail["shape"]), np.dtype(detail["dtype"]).name, dynamic_batch=False)
            for name, detail in self._inputs.items()
        )

    def run(self, inputs: Batch) -> Batch:
        """Run one batch of exactly the artifact's shape; outputs by name, copied, floats where the file has int8."""
        self._set(inputs)
        self._interpreter.invoke()
        return {name: self._get(detail) for name, detail in self._outputs.items()}

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """Set `inputs` once and return the bare call that runs them."""
        self._set(inputs)
        invoke: Callable[[], object] = self._interpreter.invoke
        return invoke

    def _set(self, inputs: Batch) -> None:
        for name, detail in self._inputs.items():
            if name not in inputs:
                raise TargetError(f"the input '{name}' is missing; the artifact takes {', '.join(self._inputs)}.")
            self._interpreter.set_tensor(detail["index"], fitted(name, np.asarray(inputs[name]), detail))

    def _get(self, detail: dict[str, Any]) -> Array:
        values: Array = self._interpreter.get_tensor(detail["index"])  # a copy, no reference into the interpreter
        scale, zero = detail["quantization"]
        if scale and np.issubdtype(values.dtype, np.integer):
            return (values.astype(np.float32) - np.float32(zero)) * np.float32(scale)
        return values


def fitted(name: str, values: Array, detail: dict[str, Any]) -> Array:
    """`values` in the dtype the artifact takes; refuses another shape, and integers that do not fit."""
    expected = tuple(int(d) for d in detail["shape"])
    if values.shape != expected:
        raise TargetError(f"the input '{name}' has the shape {values.shape}; the artifact takes {expected}.")
    wanted = np.dtype(detail["dtype"])
    if values.dtype == wanted:
        return values
    scale, zero = detail["quantization"]
    if scale and values.dtype.kind == "f" and wanted.kind in "iu":
        limits = np.iinfo(wanted)
        codes = np.rint(values.astype(np.float32) * (np.float32(1) / np.float32(scale))) + zero
        return np.clip(codes, limits.min, limits.max).astype(wanted)
    if values.dtype.kind != wanted.kind and not (values.dtype.kind in "iub" and wanted.kind in "iub"):
        raise TargetError(f"the input '{name}' is {values.dtype}; the artifact takes {wanted}.")
    cast = values.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(cast, values):
        raise TargetError(f"the input '{name}' holds integers beyond {wanted}, which is what the artifact takes.")
    return cast


def try_once(content: bytes, inputs: Batch) -> None:
    """Run a file's bytes once where a runtime is installed; raises TargetError when it cannot run them."""
    try:
        cls, name = interpreter_class()
    except MissingRuntime:
        return
    try:
        with discarded_stderr():
            interpreter = cls(model_content=content, num_threads=1)
            interpreter.allocate_tensors()
        details = interpreter.get_signature_runner(SIGNATURE).get_input_details()
        for key, detail in details.items():
            interpreter.set_tensor(detail["index"], fitted(key, inputs[key], detail))
        interpreter.invoke()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, TargetError):
            raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise TargetError(
            f"litert-torch wrote a file that {name} cannot run: {reason} Write the part of the model that fails with "
            "simpler operators, or choose another target."
        ) from error


def delegation(path: Path) -> dict[str, int]:
    """How many of the file's operators XNNPACK executes here and how many the built-in kernels do.

    Empty where no runtime is installed. A DELEGATE node stands for the operators between its inputs and its outputs.
    """
    try:
        interpreter, _ = load(path, 1)
    except MissingRuntime:
        return {}
    details = interpreter._get_ops_details()
    delegates = [d for d in details if d["op_name"] == "DELEGATE"]
    producers = {int(t): d for d in details if d["op_name"] != "DELEGATE" for t in d["outputs"]}
    taken: set[int] = set()
    for delegate in delegates:
        outside = {int(t) for t in delegate["inputs"]}
        pending = [int(t) for t in delegate["outputs"]]
        while pending:
            producer = producers.get(pending.pop())
            if producer is not None and producer["index"] not in taken:
                taken.add(producer["index"])
                pending += [int(t) for t in producer["inputs"] if int(t) >= 0 and int(t) not in outside]
    total = len(details) - len(delegates)
    return {"XNNPACK operators": len(taken), "built-in operators": total - len(taken)}
