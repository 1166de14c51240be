"""Which runtime runs a file here, and what the agent asks of any of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from . import tensorrt
from .job import Artifact
from .problems import FAILED, Problem

if TYPE_CHECKING:
    import numpy as np

    from .timing import Block, Call

    Arrays = dict[str, np.ndarray]


class Session(Protocol):
    """A loaded file. `executor`: runtime and version. `warnings`: what the user must know about how it runs.

    `in_process`: a call runs in this process and contains nothing else. `load_seconds`: the file's loading, once.
    """

    executor: str
    warnings: list[str]
    in_process: bool
    load_seconds: float

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch of exactly the file's shape; outputs by name. Raises Problem for inputs it does not take."""
        ...

    def bind(self, inputs: Arrays) -> Call:
        """A call that runs once, with the inputs set beforehand."""
        ...

    def block(self, inputs: Arrays) -> Block:
        """What `timing.in_rounds` times."""
        ...


def open_session(artifact: Artifact, folder: Path, threads: int) -> Session:
    """Load a file into the runtime there is. Raises Problem where there is none, or where it refuses the file."""
    path = _in_place(artifact, folder)
    if path.suffix == ".tflite":
        from .tflite_session import TFLiteSession

        return TFLiteSession(path, threads)
    if path.suffix == ".so":
        from .c_session import CSession

        return CSession(path, artifact.config)
    if path.suffix != ".onnx":
        raise Problem(
            FAILED, f"a {path.suffix or 'folder'} can't run here: the agent runs .onnx and .tflite files, and .so of C."
        )
    executable = tensorrt.trtexec()
    if executable is not None:
        return tensorrt.TensorRTSession(path, executable)
    from .onnx_session import OnnxSession

    return OnnxSession(path, threads, artifact.config, artifact.disabled)


def _in_place(artifact: Artifact, folder: Path) -> Path:
    """The path to load. Files of constants go with it to a folder of its own, under the names that it knows."""
    path = folder / artifact.file
    if not artifact.data:
        return path
    own = folder / f"{artifact.name}.files"
    own.mkdir(exist_ok=True)
    for here, known in {artifact.file: artifact.file, **artifact.data}.items():
        if Path(known).name != known:
            raise Problem(FAILED, f"{artifact.file} refers to '{known}', which is no plain file name.")
        if (folder / here).exists():
            os.replace(folder / here, own / known)
    return own / artifact.file
