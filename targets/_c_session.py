"""Compiles a folder of C sources with this machine's compiler and runs it in a shared library."""

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.samples import Array, Batch, InputSpec

from .errors import MissingRuntime, TargetError

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=c99", "-ffp-contract=off")


def compiler() -> str:
    """The C compiler there is: $CC, else cc, gcc or clang. Raises MissingRuntime when there is none."""
    asked = os.environ.get("CC")
    for name in (asked,) if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    looked = f"CC is '{asked}', which is not there" if asked else f"looked for {', '.join(COMPILERS)}"
    raise MissingRuntime(
        f"there is no C compiler here ({looked}), and the target 'c' is run by compiling it. Install gcc or clang with "
        "your system's package manager (apt install gcc), or set CC."
    )


def compiler_version(command: str) -> str:
    """The name and version of a compiler, such as "gcc 12.2.0"."""
    said = subprocess.run([command, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return f"{Path(command).name} {said.stdout.strip()}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises TargetError for what is none."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path.name} has no readable manifest.json: it was not written by Tightfit.") from error
    wanted = {"version", "name", "sources", "inputs", "outputs"}
    if not isinstance(found, dict) or not wanted <= set(found) or found["version"] != 1:
        raise TargetError(f"{path.name}/manifest.json is not of this version of Tightfit.")
    names = found["sources"]
    if not all(isinstance(n, str) and Path(n).name == n and n.endswith(".c") for n in names):
        raise TargetError(f"{path.name}/manifest.json names sources outside its folder.")
    return found


def build(path: Path, output: Path, *extra: str, command: str | None = None, driver: bool = False) -> None:
    """Compile an artifact to a shared library, or with `driver` to a program. Raises TargetError when that fails."""
    manifest = read_manifest(path)
    sources = [str(path / name) for name in manifest["sources"]] + ([str(path / "driver.c")] if driver else [])
    kind = () if driver else ("-shared", "-fPIC")
    done = subprocess.run(
        [command or compiler(), *FLAGS, *extra, *kind, *sources, "-o", str(output), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise TargetError(f"{path.name} does not compile: {lines[0] if lines else 'the compiler gave no reason'}")


class CSession:
    """An artifact compiled for this machine, in one thread."""

    measures_latency = True

    def __init__(self, path: Path) -> None:
        manifest = read_manifest(path)
        command = compiler()
        self._folder = tempfile.mkdtemp(prefix="tightfit-c-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        library = Path(self._folder) / "model.so"
        try:
            build(path, library, "-march=native", command=command)
        except TargetError:
            build(path, library, command=command)  # a compiler that does not know -march=native, or a broken source
        self._run = ctypes.CDLL(str(library)).model_run
        self._run.restype = None
        self._inputs = tuple(
            InputSpec(i["name"], tuple(i["shape"]), i["dtype"], dynamic_batch=False) for i in manifest["inputs"]
        )
        self._outputs = tuple(
            InputSpec(o["name"], tuple(o["shape"]), o["dtype"], dynamic_batch=False) for o in manifest["outputs"]
        )
        self.executor = f"C99 compiled by {compiler_version(command)} (1 thread)"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes."""
        return self._inputs

    def run(self, inputs: Batch) -> Batch:
        """Run one batch of exactly the artifact's shape; outputs by name, in memory of their own."""
        call, results = self._bound(inputs)
        call()
        return results

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """A call that runs once on `inputs`."""
        return self._bound(inputs)[0]

    def _bound(self, inputs: Batch) -> tuple[Callable[[], object], dict[str, Array]]:
        given = [_fitted(spec, inputs) for spec in self._inputs]
        results = {spec.name: np.empty(spec.shape, spec.dtype) for spec in self._outputs}
        from_ = (ctypes.c_void_p * (len(given) + 1))(*(a.ctypes.data for a in given))
        to = (ctypes.c_void_p * (len(results) + 1))(*(a.ctypes.data for a in results.values()))
        run = self._run

        def call(keep: object = (given, results, self)) -> None:
            run(from_, to)

        return call, results


def _fitted(spec: InputSpec, inputs: Batch) -> Array:
    if spec.name not in inputs:
        raise TargetError(f"the input '{spec.name}' is missing")
    values = np.asarray(inputs[spec.name])
    if values.shape != spec.shape:
        raise TargetError(f"the input '{spec.name}' has shape {values.shape}; the artifact takes {spec.shape}.")
    if values.dtype.kind != np.dtype(spec.dtype).kind and not (values.dtype.kind in "iub" and spec.dtype != "float32"):
        raise TargetError(f"the input '{spec.name}' is {values.dtype}; the artifact takes {spec.dtype}.")
    return np.ascontiguousarray(values.astype(spec.dtype))
