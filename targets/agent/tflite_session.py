"""A .tflite file in the runtime there is: LiteRT, else tflite-runtime, whose silent errors are looked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import known_answer
from .problems import FAILED, REFUSED, Problem, first_line, missing
from .timing import Block, Call, block_of

if TYPE_CHECKING:
    from .runtimes import Arrays

SIGNATURE = "serving_default"
RUNTIMES = (
    ("ai_edge_litert.interpreter", "LiteRT", "ai-edge-litert"),
    ("tflite_runtime.interpreter", "tflite-runtime", "tflite-runtime"),
)
NEWER = "Install the newer runtime on the device: pip install ai-edge-litert"


class TFLiteSession:
    """See `runtimes.Session`; inputs and outputs go by the names of the file's signature.

    Raises Problem (refused) where the file has layers that this runtime is known to compute wrong without a word.
    """

    def __init__(self, path: Path, threads: int) -> None:
        cls, name = _interpreter_class()
        start = time.perf_counter()
        try:
            self._interpreter = cls(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise Problem(FAILED, f"{name} there does not load {path.name}: {first_line(error)} {NEWER}.") from error
        self.load_seconds = time.perf_counter() - start
        if SIGNATURE not in self._interpreter.get_signature_list():
            raise Problem(FAILED, f"{path.name} has no signature '{SIGNATURE}'; it was not written by Tightfit.")
        # The runner itself is not kept: tflite-runtime refuses to invoke while there is a second reference.
        runner = self._interpreter.get_signature_runner(SIGNATURE)
        self._inputs: dict[str, dict[str, Any]] = runner.get_input_details()
        self._outputs: dict[str, dict[str, Any]] = runner.get_output_details()
        del runner
        layers = known_answer.layers_at_risk(self._interpreter)
        if layers and not known_answer.is_right(cls, threads):
            raise Problem(
                REFUSED,
                f"{name} there computes linear layers with per-channel int8 weights and dynamic activations wrong, and "
                f"says nothing: a layer with a known answer came out wrong, and {path.name} has {layers} such "
                f"{'layer' if layers == 1 else 'layers'}. {NEWER}, or convert with another recipe than int8-dynamic.",
            )
        operators = [detail["op_name"] for detail in self._interpreter._get_ops_details()]
        kernels = "XNNPACK" if "DELEGATE" in operators else "built-in kernels"
        self.executor = f"{name} ({kernels}, {threads} thread{'s' * (threads > 1)})"
        self.warnings: list[str] = []
        self.in_process = True

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch of exactly the artifact's shape; outputs by name, copied, floats where the file has int8."""
        self._set(inputs)
        self._interpreter.invoke()
        return {name: self._get(detail) for name, detail in self._outputs.items()}

    def bind(self, inputs: Arrays) -> Call:
        """Set `inputs` once and return the bare call that runs them."""
        self._set(inputs)
        invoke: Call = self._interpreter.invoke
        return invoke

    def block(self, inputs: Arrays) -> Block:
        """Timed bare calls."""
        return block_of(self.bind(inputs))

    def _set(self, inputs: Arrays) -> None:
        for name, detail in self._inputs.items():
            if name not in inputs:
                raise Problem(FAILED, f"the input '{name}' is missing; the artifact takes {', '.join(self._inputs)}.")
            self._interpreter.set_tensor(detail["index"], fitted(name, np.asarray(inputs[name]), detail))

    def _get(self, detail: dict[str, Any]) -> np.ndarray:
        values: np.ndarray = self._interpreter.get_tensor(detail["index"])  # a copy
        scale, zero = detail["quantization"]
        if scale and np.issubdtype(values.dtype, np.integer):
            return (values.astype(np.float32) - np.float32(zero)) * np.float32(scale)
        return values


def fitted(name: str, values: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """`values` in the dtype the artifact takes; refuses another shape, and integers that do not fit.

    The same rule as on the host (`targets/_tflite_run.py`): codes are the reciprocal's product, rounded to even.
    """
    expected = tuple(int(length) for length in detail["shape"])
    if values.shape != expected:
        raise Problem(FAILED, f"the input '{name}' has the shape {values.shape}; the artifact takes {expected}.")
    wanted = np.dtype(detail["dtype"])
    if values.dtype == wanted:
        return values
    scale, zero = detail["quantization"]
    if scale and values.dtype.kind == "f" and wanted.kind in "iu":
        limits = np.iinfo(wanted)
        codes = np.rint(values.astype(np.float32) * (np.float32(1) / np.float32(scale))) + zero
        return np.clip(codes, limits.min, limits.max).astype(wanted)
    if values.dtype.kind != wanted.kind and not (values.dtype.kind in "iub" and wanted.kind in "iub"):
        raise Problem(FAILED, f"the input '{name}' is {values.dtype}; the artifact takes {wanted}.")
    cast = values.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(cast, values):
        raise Problem(FAILED, f"the input '{name}' holds integers beyond {wanted}, which is what the artifact takes.")
    return cast


def _interpreter_class() -> tuple[Any, str]:
    """The interpreter there is, and its name with version."""
    failures: list[ImportError] = []
    for module, name, package in RUNTIMES:
        try:
            found = importlib.import_module(module).Interpreter
        except ImportError as error:
            failures.append(error)
            continue
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        return found, f"{name} {version}"
    broken = [error for error in failures if not isinstance(error, ModuleNotFoundError)]
    raise missing("a TFLite runtime", "ai-edge-litert", (broken or failures)[0])
