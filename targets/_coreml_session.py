"""Run a .mlpackage: Core ML where there is macOS, the MIL reference executor everywhere."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.samples import Batch, InputSpec

from . import Session
from ._coreml_package import stored_names
from .errors import TargetError
from .mil.program import Program
from .mil.reader import coremltools, quiet, read_spec
from .mil.values import torch_dtype


def open_session(path: Path, threads: int) -> Session:
    """Core ML on macOS, else the reference executor. Raises TargetError for a damaged package."""
    names = stored_names(read_spec(path))
    if platform.system() == "Darwin":
        return CoreMLSession(path, names)
    return ReferenceSession(path, names, threads)


class ReferenceSession:
    """The MIL program run by torch, operator by operator: right numbers, meaningless times."""

    measures_latency = False

    def __init__(self, path: Path, names: Mapping[str, str], threads: int) -> None:
        self.executor = f"MIL reference executor (torch {torch.__version__}), not Core ML"
        self._program = Program.load(path)
        self._names = names
        self._threads = threads

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes, by the job's names."""
        return tuple(
            InputSpec(
                self._names.get(value.name, value.name),
                value.shape,
                str(torch_dtype(value.dtype)).removeprefix("torch."),
                dynamic_batch=False,
            )
            for value in self._program.inputs
        )

    def run(self, inputs: Batch) -> Batch:
        """Outputs by the job's names; float16 comes out as float32, integers as int32."""
        with _Threads(self._threads):
            outputs = self._program.run(_features(inputs, self._names))
        return {self._names.get(name, name): value for name, value in outputs.items()}

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """A call that runs once, its inputs converted beforehand."""
        bound = self._program.bound(_features(inputs, self._names))

        def call() -> object:
            with _Threads(self._threads):
                return self._program.run_bound(bound)

        return call


class CoreMLSession:
    """Core ML's own prediction, as coremltools documents it; not run on hardware by this project's tests."""

    measures_latency = True

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        ct = coremltools()
        try:
            with quiet():
                self._model: Any = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL)
        except Exception as error:
            raise TargetError(f"Core ML cannot load {path}: {error}") from error
        description = self._model.get_spec().description
        self._order = [feature.name for feature in description.output]
        self._inputs = list(description.input)
        self._integers = {f.name for f in description.input if f.type.multiArrayType.dataType == _INT32}
        self._names = names
        self.executor = f"Core ML on macOS {platform.mac_ver()[0]} (coremltools {ct.__version__})"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes, by the job's names."""
        return tuple(
            InputSpec(
                self._names.get(feature.name, feature.name),
                tuple(int(d) for d in feature.type.multiArrayType.shape),
                "int32" if feature.name in self._integers else "float32",
                dynamic_batch=False,
            )
            for feature in self._inputs
        )

    def run(self, inputs: Batch) -> Batch:
        """Outputs by the job's names, in the model's order."""
        outputs = self._model.predict(self._ready(inputs))
        return {self._names.get(name, name): np.asarray(outputs[name]) for name in self._order}

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """A call that predicts once, its inputs converted beforehand."""
        ready = self._ready(inputs)
        return lambda: self._model.predict(ready)

    def _ready(self, inputs: Batch) -> dict[str, np.ndarray]:
        return {
            name: np.ascontiguousarray(value, np.int32 if name in self._integers else np.float32)
            for name, value in _features(inputs, self._names).items()
        }


_INT32 = 131104  # ArrayFeatureType.ArrayDataType.INT32 in Core ML's FeatureTypes.proto


def _features(inputs: Batch, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The batch under the package's feature names."""
    features = {name: feature for feature, name in names.items()}
    return {features.get(name, name): np.asarray(value) for name, value in inputs.items()}


class _Threads:
    """torch's thread count for a while: it belongs to the process."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        if self._before != self._count:
            torch.set_num_threads(self._before)
