"""An .onnx file in TensorRT, through the trtexec that JetPack brings. Not run on hardware.

Written from trtexec's documented options and the formats of its exports (NVIDIA/TensorRT, samples/common:
sampleOptions.cpp, sampleReporting.cpp). Every block of timed calls is a process of its own, which loads the engine and
warms it up anew. A time is trtexec's `latencyMs`: inputs to the GPU, computation, outputs back. Outputs are exported
with six digits. Loading is TensorRT's building of the engine.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .problems import FAILED, Problem
from .timing import Block, Call

if TYPE_CHECKING:
    from .runtimes import Arrays

JETPACK = "/usr/src/tensorrt/bin/trtexec"
WARMUP_MS = 200


def trtexec(root: Path = Path("/")) -> str | None:
    """Where trtexec is on a Jetson; None on any other machine, and where it is not installed."""
    if not (root / "etc/nv_tegra_release").exists():
        return None
    return shutil.which("trtexec") or shutil.which(JETPACK)


class TensorRTSession:
    """See `runtimes.Session`; an engine built by trtexec, in the precision that the file says."""

    def __init__(self, path: Path, executable: str) -> None:
        self._executable, self._folder = executable, path.parent
        self._engine = path.with_suffix(".engine")
        self.in_process = False
        version = version_of(_run([executable, "--help"], path.parent))
        precision = precision_options(version)
        build = [executable, f"--onnx={path.name}", f"--saveEngine={self._engine.name}", "--skipInference", *precision]
        start = time.perf_counter()
        _run(build, path.parent)
        self.load_seconds = time.perf_counter() - start
        self.executor = f"TensorRT {'.'.join(str(part) for part in version)} (trtexec)"
        self.warnings = ["trtexec: load time is the building of the engine, and outputs have six digits"]

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch in a process of its own."""
        exported = self._folder / "trtexec-output.json"
        self._infer(inputs, [f"--exportOutput={exported.name}", "--iterations=1", "--duration=0", "--warmUp=0"])
        return outputs_of(exported.read_text(encoding="utf-8"))

    def bind(self, inputs: Arrays) -> Call:
        """A call in a process of its own, whose start it contains."""
        return lambda: self.run(inputs)

    def block(self, inputs: Arrays) -> Block:
        """Calls that trtexec times itself, after WARMUP_MS of others."""

        def block(runs: int, seconds: float) -> list[float]:
            exported = self._folder / "trtexec-times.json"
            limits = [f"--iterations={max(runs, 1)}", f"--duration={_whole(seconds)}", f"--warmUp={WARMUP_MS}"]
            self._infer(inputs, [f"--exportTimes={exported.name}", *limits])
            return times_of(exported.read_text(encoding="utf-8"), WARMUP_MS)

        return block

    def _infer(self, inputs: Arrays, options: list[str]) -> None:
        files = []
        for index, name in enumerate(inputs):
            np.ascontiguousarray(inputs[name]).tofile(str(self._folder / f"trtexec-input-{index}.bin"))
            files.append(f"'{name}':trtexec-input-{index}.bin")
        load = [f"--loadEngine={self._engine.name}", f"--loadInputs={','.join(files)}"]
        _run([self._executable, *load, *options], self._folder)


def version_of(text: str) -> tuple[int, ...]:
    """TensorRT's version from what trtexec prints first, "[TensorRT v100300]" or, before 10, "[TensorRT v8502]"."""
    found = re.search(r"TensorRT v(\d+)", text)
    if not found:
        raise Problem(FAILED, f"trtexec there does not say its version: {text.strip()[:200]}")
    number = int(found.group(1))
    if number >= 100000:
        return number // 10000, number // 100 % 100, number % 100
    return number // 1000, number // 100 % 10, number % 100


def precision_options(version: tuple[int, ...]) -> list[str]:
    """What makes TensorRT compute in the precision that the file says: it has no say from 11 on, and none before 10."""
    if version[0] >= 11:
        return []
    return ["--stronglyTyped"] if version[0] == 10 else ["--int8", "--fp16"]


def outputs_of(text: str) -> Arrays:
    """The arrays of an --exportOutput file, float32."""
    return {
        str(entry["name"]): np.array(entry["values"], np.float32).reshape(
            [int(length) for length in str(entry["dimensions"]).split("x")]
        )
        for entry in _parsed(text)
    }


def times_of(text: str, warmup_ms: float) -> list[float]:
    """The seconds of each inference in an --exportTimes file that began after the warm-up."""
    times = [entry["latencyMs"] / 1e3 for entry in _parsed(text) if entry["startComputeMs"] >= warmup_ms]
    if not times:
        raise Problem(FAILED, "trtexec there timed no inference after its warm-up.")
    return times


def _parsed(text: str) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(text)
    except ValueError as error:
        raise Problem(FAILED, f"trtexec there exported what is no JSON: {error}") from error
    return entries


def _whole(seconds: float) -> int:
    return int(-(-seconds // 1))


def _run(command: list[str], folder: Path) -> str:
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "[E]" in line] or done.stdout.splitlines()[-1:]
        raise Problem(
            FAILED,
            f"trtexec there failed after {time.monotonic() - start:.0f} s, with exit code {done.returncode}: "
            f"{' '.join(lines)[:500]}",
        )
    return done.stdout
