"""What a job asks for, done: outputs on all inputs, marks around counted calls, times, and the board beside them."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import affinity, timing
from .board import Board
from .job import Artifact, Job
from .load import Others
from .problems import FAILED, Problem, first_line
from .runtimes import Session, open_session
from .watch import Watch

STRETCH_SECONDS = 10.0
COUNT_WARMUP = 2

Progress = Callable[[str, "int | None", "int | None"], None]


class Loaded:
    """One artifact, loaded, with what it gave: its load and first call in seconds, and its outputs [n, ...]."""

    def __init__(self, artifact: Artifact, folder: Path, job: Job, inputs: dict[str, np.ndarray]) -> None:
        self.name, self.file = artifact.name, artifact.file
        self.first = {name: array[: job.batch] for name, array in inputs.items()}
        try:
            self.session: Session = open_session(artifact, folder, job.threads)
            call = self.session.bind(self.first)
            start = time.perf_counter()
            call()
            self.first_seconds = time.perf_counter() - start
        except Problem:
            raise
        except Exception as error:  # runtimes share no base class for what a file or an input does to them
            raise Problem(FAILED, f"{artifact.file} does not run there: {first_line(error)}") from error
        self.outputs: dict[str, np.ndarray] = {}
        self.marked: dict[str, int] = {"counted": 0}

    def run_all(self, inputs: dict[str, np.ndarray], batch: int, progress: Progress) -> None:
        """Outputs of all samples, batch by batch."""
        samples = len(next(iter(inputs.values())))
        parts = []
        for start in range(0, samples, batch):
            parts.append(self.session.run({name: array[start : start + batch] for name, array in inputs.items()}))
            progress(f"run {self.file}", min(start + batch, samples), samples)
        self.outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Marks:
    """Marks for the emulator that counts instructions: a getppid() each, numbered from 0."""

    def __init__(self) -> None:
        self.made = 0

    def around(self, call: timing.Call, count: int) -> int:
        """Mark before the first and after each of `count` calls; returns the number of the first mark."""
        first = self.made
        mark = os.getppid
        gc.collect()
        gc.disable()  # a collection would be counted as a call's
        mark()
        for _ in range(count):
            call()
            mark()
        gc.enable()
        self.made += count + 1
        return first


def carry_out(job: Job, folder: Path, board: Board, progress: Progress) -> tuple[dict[str, Any], list[Loaded], Any]:
    """Do the job: the answer's fields, the loaded artifacts with their outputs, and times {artifact/round: seconds}.

    Raises Problem for what cannot be done.
    """
    answer: dict[str, Any] = {"facts": board.facts(), "warnings": []}
    if job.timing is not None and job.timing.affinity == "big":
        answer["facts"]["affinity"], warning = affinity.bind(job.threads)
        answer["warnings"] += [warning] if warning else []
    inputs = _inputs(folder / job.inputs)
    loaded = []
    for artifact in job.artifacts:
        progress(f"load {artifact.file}", None, None)
        loaded.append(Loaded(artifact, folder, job, inputs))
        loaded[-1].run_all(inputs, job.batch, progress)
    if job.count:
        _count(loaded, job.count, progress)
    times: dict[str, np.ndarray] = {}
    if job.timing is not None:
        times = _time(loaded, job.timing, board, answer, progress)
    for one in loaded:
        answer["warnings"] += one.session.warnings
    return answer, loaded, times


def _inputs(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            inputs = {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        raise Problem(FAILED, f"{path.name} cannot be read there: {first_line(error)}") from error
    if not inputs or len({len(array) for array in inputs.values()}) != 1:
        raise Problem(FAILED, f"{path.name} holds no inputs of one length.")
    return inputs


def _count(loaded: list[Loaded], count: int, progress: Progress) -> None:
    marks = Marks()
    for one in loaded:
        progress(f"count {one.file}", None, None)
        if not one.session.in_process:
            raise Problem(FAILED, f"{one.session.executor} runs in a process of its own, which nothing can count.")
        call = one.session.bind(one.first)
        for _ in range(COUNT_WARMUP):
            call()
        one.marked = {"counted": count, "first_mark": marks.around(call, count)}


def _time(
    loaded: list[Loaded], wanted: Any, board: Board, answer: dict[str, Any], progress: Progress
) -> dict[str, np.ndarray]:
    """Times of all, in turns; then the first one's energy, and its times for as long as heat is to be watched."""
    blocks = [one.session.block(one.first) for one in loaded]
    progress("time", 0, timing.ROUNDS)
    watch, others = Watch(board), Others()

    def between(done: int) -> None:
        watch.during()
        progress("time", done, timing.ROUNDS)

    try:
        seconds = timing.in_rounds(
            blocks,
            min_runs=wanted.min_runs,
            min_seconds=wanted.min_seconds,
            warmup_seconds=wanted.warmup_seconds,
            between=between,
        )
    except timing.TimingError as error:
        raise Problem(FAILED, str(error)) from error
    answer["others"] = others.share()
    watch.after()
    answer["void"] = watch.void
    answer["warnings"] += watch.warnings()
    if loaded[0].session.in_process:
        answer["energy_mj"] = board.meter.energy_mj(blocks[0])
    if wanted.sustained_seconds:
        answer["sustained"] = sustained(blocks[0], wanted.sustained_seconds, watch, board, progress)
    answer["board"] = watch.states
    return {
        f"{one.name}/{index}": np.array(block)
        for which, one in enumerate(loaded)
        for index, block in enumerate(seconds[which])
    }


def sustained(
    block: timing.Block, seconds: float, watch: Watch, board: Board, progress: Progress
) -> list[dict[str, Any]]:
    """Go on calling for `seconds`: a point per stretch of STRETCH_SECONDS, and the board's state at the end."""
    points: list[dict[str, Any]] = []
    start = time.monotonic()
    while True:
        elapsed = time.monotonic() - start
        progress("sustained", round(elapsed), round(seconds))
        if elapsed >= seconds:
            break
        times = block(1, min(STRETCH_SECONDS, seconds - elapsed))
        points.append(
            {
                "minute": watch.minute,
                "p50_ms": statistics.median(times) * 1e3,
                "temperature_c": board.temperature_c(),
                "clock_mhz": board.clock_mhz(),
            }
        )
    watch.states.append(board.state("after", watch.minute))
    return points
