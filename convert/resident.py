"""How much memory an artifact keeps resident once it is loaded and has run: measured in a process of its own.

A file of one bit per weight may stand in memory as floats, because its runtime unpacks it on loading. What a first
session allocates also holds what the runtime needs once, so the second session of the same file is measured.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import targets
from calibrate.samples import Batch

SECONDS = 300
# Whose sessions run in the process that opens them, by a runtime that devices have too.
TARGETS = ("onnx", "tflite")
PROGRAM = "import sys; from convert.resident import main; main(sys.argv[1:])"


def resident_bytes(target: str, paths: Sequence[Path], threads: int = 1) -> list[int] | str:
    """Bytes that each artifact keeps resident, in a child process; in words, why that cannot be told."""
    if target not in TARGETS:
        return "no runtime of devices runs it inside a process here"
    if not Path("/proc/self/statm").exists():
        return "this system has no /proc"
    command = [sys.executable, "-c", PROGRAM, target, str(threads), *map(str, paths)]
    here = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": here + (os.pathsep + known if known else "")}
    try:
        said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=True)
        return [int(count) for count in json.loads(said.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        return f"loading and running took more than {SECONDS} s"
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the process that measures it failed: {last}"


def main(arguments: Sequence[str]) -> None:
    """Print the bytes of each path as a JSON list. Arguments: target, threads, paths."""
    target, threads, *paths = arguments
    print("\n" + json.dumps([_of(target, Path(path), int(threads)) for path in paths]))


def _of(name: str, path: Path, threads: int) -> int:
    target = targets.find(name)
    kept = []
    counts = []
    for _ in range(2):
        counts.append(_now())
        session = target.open(path, threads=threads)
        session.run(_zeros(session))
        kept.append(session)
    return max(_now() - counts[-1], 0)


def _zeros(session: targets.Session) -> Batch:
    return {i.name: np.zeros(i.shape, i.dtype) for i in session.inputs}


def _now() -> int:
    """Resident bytes, after what was freed went back to the system: else a session would live on what another left."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
