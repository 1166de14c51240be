"""An ONNX file loaded into ONNX Runtime on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from calibrate.samples import Batch, InputSpec

from ._onnx_exact import exact_model
from .errors import TargetError

FLOAT8 = frozenset((onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2))
PROVIDERS = ["CPUExecutionProvider"]
# int8 activations stay int8 on x86 too, as they do on Arm: the rewriting to uint8 that ONNX Runtime does there leaves
# residual blocks unfused (a code tensor with two readers). Weights of 4 bits in groups, as a file for TensorRT has
# them, are multiplied in float32: left alone, ONNX Runtime quantizes the activation beside them.
CONFIG = {"session.qdqisint8allowed": "1", "session.qdq_matmulnbits_accuracy_level": "1"}
_DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names where they are not NumPy's


class OnnxSession:
    """See `targets.Session`: sequential execution, `threads` threads within an operator."""

    measures_latency = True

    def __init__(self, path: Path, threads: int) -> None:
        options = session_options()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        for key, value in spinning(threads).items():
            options.add_session_config_entry(key, value)
        exact = exact_model(path)
        self._session = load(path, options, exact)
        self._names = [o.name for o in self._session.get_outputs()]
        providers = ", ".join(self._session.get_providers())
        sums = "" if exact is None else ", exact sums: without VNNI the fast ones saturate"
        self.executor = f"ONNX Runtime {onnxruntime.__version__} ({providers}{sums})"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes; raises TargetError for an axis without a fixed length."""
        return tuple(_spec(value) for value in self._session.get_inputs())

    def run(self, inputs: Batch) -> Batch:
        """Run one batch; {output name: array}."""
        outputs = self._session.run(self._names, self._checked(inputs))
        return dict(zip(self._names, outputs, strict=True))

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """A call that runs once, with inputs and outputs bound to memory beforehand."""
        binding = self._session.io_binding()
        for name, array in self._checked(inputs).items():
            binding.bind_cpu_input(name, array)
        for name in self._names:
            binding.bind_output(name, "cpu")
        return lambda: self._session.run_with_iobinding(binding)

    def _checked(self, inputs: Batch) -> Batch:
        """The inputs, contiguous; raises TargetError on a missing name or another shape."""
        arrays: Batch = {}
        for spec in self._session.get_inputs():
            if spec.name not in inputs:
                raise TargetError(f"the artifact's input '{spec.name}' is not among {', '.join(inputs) or 'none'}")
            array = np.ascontiguousarray(inputs[spec.name])
            if list(array.shape) != list(spec.shape):
                raise TargetError(
                    f"the artifact's input '{spec.name}' has the shape {spec.shape}, not {list(array.shape)}"
                )
            arrays[spec.name] = array
        return arrays


def _spec(value: onnxruntime.NodeArg) -> InputSpec:
    if not all(isinstance(length, int) for length in value.shape):
        raise TargetError(f"the artifact's input '{value.name}' has the open shape {value.shape}; export fixed shapes.")
    name = value.type.removeprefix("tensor(").removesuffix(")")
    return InputSpec(value.name, tuple(value.shape), _DTYPES.get(name, name), dynamic_batch=False)


def session_options() -> onnxruntime.SessionOptions:
    """What placement and running share: CONFIG, and no warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    return options


def spinning(threads: int) -> dict[str, str]:
    """The config entry that lets threads wait busily where there are several, and not where there is one."""
    return {"session.intra_op.allow_spinning": "1" if threads > 1 else "0"}


def unfused(path: Path) -> tuple[dict[str, str], list[str]]:
    """Config entries, and the optimizers to switch off, where the file has 8-bit floats; see `load`."""
    if not holds_float8(path):
        return {}, []
    return {"session.disable_quant_qdq": "1"}, ["ReluQuantRewrite", "ClipQuantRewrite"]


def load(path: Path, options: onnxruntime.SessionOptions, exact: bytes | None = None) -> onnxruntime.InferenceSession:
    """A CPU session on the file, or on its model for exact sums (`exact_model`).

    8-bit floats are computed as the file has them, unfused. As of 1.32 rewritings that are meant for integers take them
    for such: a relu before a Quantize goes, since the zero point's byte is 0, a clamp there is an error, and Quantize
    nodes that are put in elsewhere write uint8.

    Raises TargetError with the runtime's own words where it refuses the model.
    """
    entries, disabled = unfused(path)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if exact is not None:
        options.add_session_config_entry("session.x64quantprecision", "1")
        disabled = ["ConstantSharing"]  # would undo what exact_model did
    try:
        return onnxruntime.InferenceSession(
            exact or str(path), options, providers=PROVIDERS, disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        first = str(error).strip().splitlines()[0]
        raise TargetError(f"ONNX Runtime {onnxruntime.__version__} can't load {path.name}: {first}") from error


def holds_float8(path: Path) -> bool:
    """Whether the file has constants of 8-bit floats; False for a file that is no model, of which the runtime tells."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return False
    return any(tensor.data_type in FLOAT8 for tensor in model.graph.initializer)
