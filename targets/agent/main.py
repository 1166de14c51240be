"""The agent's start: read a job, carry it out, and write what came of it, errors too, beside it.

`python agent.pyz job.json` writes answer.json, outputs.npz and times.npz into the job's folder, each whole or not at
all, and progress to stdout, one JSON object a line. Its exit code is 0, or ERROR where answer.json holds an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .job import VERSION, Job, read
from .problems import FAILED, Problem, first_line, missing

ERROR = 3
ANSWER, OUTPUTS, TIMES = "answer.json", "outputs.npz", "times.npz"
_INTERVAL = 0.2


def main(arguments: list[str]) -> int:
    """Do the job in the file that is the one argument; returns the exit code."""
    path = Path(arguments[0])
    folder = path.absolute().parent
    for name in (ANSWER, OUTPUTS, TIMES):
        if (folder / name).exists():
            (folder / name).unlink()
    answer = _blank()
    try:
        job = read(path)
        answer["identity"] = job.identity
        _carry_out(job, folder, answer)
    except Problem as problem:
        answer["error"] = {"kind": problem.kind, "text": problem.text}
    except (Exception, MemoryError) as error:
        text = f"the agent failed with {type(error).__name__}: {first_line(error)}"
        answer["error"] = {"kind": FAILED, "text": text}
    answer["peak_rss_mib"] = peak_rss_mib()
    _whole(folder / ANSWER, lambda file: file.write(json.dumps(answer).encode()))
    return ERROR if answer["error"] else 0


def _carry_out(job: Job, folder: Path, answer: dict[str, Any]) -> None:
    try:
        import numpy as np
    except ImportError as error:
        raise missing("numpy", "numpy", error) from error
    from .board import Board
    from .measure import carry_out

    found, loaded, times = carry_out(job, folder, Board(), Progress())
    answer.update(found)
    answer["facts"]["numpy"] = np.__version__
    answer["artifacts"] = {
        one.name: {
            "executor": one.session.executor,
            "load_ms": one.session.load_seconds * 1e3,
            "first_ms": one.first_seconds * 1e3,
            **one.marked,
        }
        for one in loaded
    }
    outputs: Any = {f"{one.name}/{name}": array for one in loaded for name, array in one.outputs.items()}
    _whole(folder / OUTPUTS, lambda file: np.savez(file, **outputs))
    if times:
        _whole(folder / TIMES, lambda file: np.savez(file, **times))


def _blank() -> dict[str, Any]:
    return {
        "version": VERSION,
        "identity": "",
        "facts": {},
        "artifacts": {},
        "board": [],
        "sustained": [],
        "peak_rss_mib": None,
        "energy_mj": None,
        "void": None,
        "others": None,
        "warnings": [],
        "error": None,
    }


class Progress:
    """Tells the host how far the agent is, not oftener than every _INTERVAL seconds for one stage."""

    def __init__(self) -> None:
        self._stage, self._last = "", 0.0

    def __call__(self, stage: str, done: int | None, total: int | None) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._last < _INTERVAL and done != total:
            return
        self._stage, self._last = stage, now
        print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)


def peak_rss_mib() -> float | None:
    """The most memory this process has had resident, in MiB.

    Not what getrusage says on Linux: that is inherited from the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS, the one system without /proc


def _whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
