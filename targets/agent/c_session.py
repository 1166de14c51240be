"""A model of the target `c`, compiled for this device by the host: a shared library, called through ctypes."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .problems import FAILED, Problem, first_line
from .timing import Block, Call, block_of

if TYPE_CHECKING:
    from .runtimes import Arrays


class CSession:
    """See `runtimes.Session`. `config` has the manifest's "inputs" and "outputs" as JSON, and the "compiler".

    The kernels run in one thread.
    """

    def __init__(self, path: Path, config: dict[str, str]) -> None:
        try:
            self._inputs: list[dict[str, Any]] = json.loads(config["inputs"])
            self._outputs: list[dict[str, Any]] = json.loads(config["outputs"])
            compiler = config["compiler"]
        except (KeyError, ValueError) as error:
            raise Problem(FAILED, f"{path.name} came without a description of its inputs: {error!r}") from error
        start = time.perf_counter()
        try:
            self._run = ctypes.CDLL(str(path.absolute())).model_run
        except (OSError, AttributeError) as error:
            raise Problem(
                FAILED,
                f"the compiled model {path.name} does not load there: {first_line(error)}. It was built by {compiler}; "
                "where the device's C library is older than that compiler's, build it on the device with make.",
            ) from error
        self._run.restype = None
        self.load_seconds = time.perf_counter() - start
        self.executor = f"C99 compiled by {compiler}"
        self.warnings: list[str] = []
        self.in_process = True

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch; {output name: array} in memory of their own."""
        call, results = self._bound(inputs)
        call()
        return results

    def bind(self, inputs: Arrays) -> Call:
        """A call on inputs and outputs that stay where they are."""
        return self._bound(inputs)[0]

    def block(self, inputs: Arrays) -> Block:
        """Timed calls of `bind`."""
        return block_of(self.bind(inputs))

    def _bound(self, inputs: Arrays) -> tuple[Call, Arrays]:
        given = [_fitted(spec, inputs) for spec in self._inputs]
        results = {spec["name"]: np.empty(spec["shape"], spec["dtype"]) for spec in self._outputs}
        read = (ctypes.c_void_p * (len(given) + 1))(*(a.ctypes.data for a in given))
        written = (ctypes.c_void_p * (len(results) + 1))(*(a.ctypes.data for a in results.values()))
        run = self._run

        def call(keep: object = (given, results, self)) -> None:
            run(read, written)

        return call, results


def _fitted(spec: dict[str, Any], inputs: Arrays) -> np.ndarray:
    name = spec["name"]
    if name not in inputs:
        raise Problem(FAILED, f"the artifact's input '{name}' is not among {', '.join(inputs) or 'none'}.")
    array = np.ascontiguousarray(inputs[name].astype(spec["dtype"], copy=False))
    if list(array.shape) != list(spec["shape"]):
        raise Problem(FAILED, f"the artifact's input '{name}' has the shape {spec['shape']}, not {list(array.shape)}.")
    return array
