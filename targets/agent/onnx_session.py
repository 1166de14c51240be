"""An .onnx file in ONNX Runtime's CPU provider, with the options that the host asks for."""

from __future__ import annotations

import importlib
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .problems import FAILED, Problem, first_line, missing
from .timing import Block, Call, block_of

if TYPE_CHECKING:
    from .runtimes import Arrays

PROVIDERS = ["CPUExecutionProvider"]
SATURATES = (
    "this x86 processor has no VNNI: ONNX Runtime adds products of unsigned activations and 8-bit weights in 16 bits "
    "there, which may saturate; outputs are what it gives, and not what Arm boards or x86 with VNNI give"
)


class OnnxSession:
    """See `runtimes.Session`: sequential execution, `threads` threads within an operator."""

    def __init__(self, path: Path, threads: int, config: dict[str, str], disabled: list[str]) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        more = {"disabled_optimizers": disabled} if disabled else {}
        start = time.perf_counter()
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=PROVIDERS, **more)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise Problem(
                FAILED, f"ONNX Runtime {runtime.__version__} there can't load {path.name}: {first_line(error)}"
            ) from error
        self.load_seconds = time.perf_counter() - start
        self._names = [output.name for output in self._session.get_outputs()]
        self.executor = f"ONNX Runtime {runtime.__version__} ({', '.join(self._session.get_providers())})"
        self.warnings = [SATURATES] if may_saturate(path) else []
        self.in_process = True

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch; {output name: array}."""
        arrays = self._session.run(self._names, self._checked(inputs))
        return {name: arrays[index] for index, name in enumerate(self._names)}

    def bind(self, inputs: Arrays) -> Call:
        """A call with inputs and outputs bound to memory beforehand."""
        binding = self._session.io_binding()
        for name, array in self._checked(inputs).items():
            binding.bind_cpu_input(name, array)
        for name in self._names:
            binding.bind_output(name, "cpu")
        return lambda: self._session.run_with_iobinding(binding)

    def block(self, inputs: Arrays) -> Block:
        """Timed calls of the bound session."""
        return block_of(self.bind(inputs))

    def _checked(self, inputs: Arrays) -> Arrays:
        arrays = {}
        for spec in self._session.get_inputs():
            if spec.name not in inputs:
                raise Problem(FAILED, f"the artifact's input '{spec.name}' is not among {', '.join(inputs) or 'none'}.")
            array = np.ascontiguousarray(inputs[spec.name])
            if list(array.shape) != list(spec.shape):
                raise Problem(
                    FAILED, f"the artifact's input '{spec.name}' has the shape {spec.shape}, not {list(array.shape)}."
                )
            arrays[spec.name] = array
        return arrays


def may_saturate(path: Path, machine: str = platform.machine(), cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a file with quantized layers is run on an x86 that does not say it has VNNI."""
    if machine not in ("x86_64", "AMD64"):
        return False
    try:
        if "vnni" in cpuinfo.read_text(encoding="utf-8", errors="replace"):
            return False
    except OSError:
        pass  # as on Windows: nothing says that it has
    return b"uantizeLinear" in path.read_bytes()  # and DequantizeLinear, which weights need


def _runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise missing("ONNX Runtime", "onnxruntime", error) from error
