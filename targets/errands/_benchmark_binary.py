"""An errand on an Android device without Python: done by TFLite's own `benchmark_model`. Not run on hardware.

The user names a binary built for the device (TIGHTFIT_BENCHMARK_MODEL); it is pushed along. It prints statistics and no
single calls, so every process times EXACT_CALLS of them after a warm-up, and many processes of artifact and float twin
take turns. Flags: google-ai-edge/LiteRT, tflite/tools/benchmark, its README.md and benchmark_tflite_model.cc.
"""

import hashlib
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.agent.timing import ROUNDS
from targets.errors import MissingRuntime, TargetError
from targets.transports import Transport
from targets.transports._adb_state import COMMAND, State, parsed

from ._benchmark_files import Layout
from ._benchmark_output import EXACT_CALLS, Process, delegate, process
from .nouns import Answer, Errand, FileAnswer

VARIABLE = "TIGHTFIT_BENCHMARK_MODEL"
BINARY = "benchmark_model"
WHERE = "https://ai.google.dev/edge/litert/models/measurement"
# Each process warms up for itself; the kernels' packed weights and the caches are what it needs.
_WARM_RUNS, _WARM_SECONDS = 2, 0.05
_STRETCH_SECONDS = 10.0
UNREADABLE = "benchmark_model printed no times that can be read"
Progress = Callable[[str, int | None, int | None], None]


def suits(transport: Transport) -> bool:
    """Whether an errand on this device is one for the binary: an Android device without Python."""
    return not transport.python and transport.address.startswith("adb:")


def carry_out(transport: Transport, errand: Errand, progress: Progress) -> Answer:
    """Outputs of all inputs, and times where they are asked for.

    Raises MissingRuntime without a binary, TargetError for files that are no .tflite and for all that fails there.
    """
    binary = _binary(transport.address)
    files = {"artifact": errand.artifact} | ({"float": errand.twin} if errand.twin is not None else {})
    for path in files.values():
        if path.suffix != ".tflite":
            raise TargetError(
                f"{transport.address}: {path.name} cannot run there: without Python the device runs .tflite files only "
                "(convert with --target tflite)."
            )
    with TemporaryDirectory(prefix="tightfit-errand-") as name:
        return _Work(transport, errand, progress, Path(name), binary, files).answer()


def _binary(address: str) -> Path:
    path = Path(os.environ.get(VARIABLE, ""))
    if not path.is_file():
        found = f"{VARIABLE} names no file ({path})" if os.environ.get(VARIABLE) else f"{VARIABLE} is not set"
        raise MissingRuntime(
            f"{address}: there is no Python on the device, so TFLite's benchmark_model has to run the file, and "
            f"{found}. Get or build the command-line binary for the device's processor ({WHERE}), and set {VARIABLE} "
            "to its path."
        )
    return path


@dataclass
class _Work:
    """One errand while it is done."""

    transport: Transport
    errand: Errand
    progress: Progress
    folder: Path
    binary: Path
    files: dict[str, Path]
    layouts: dict[str, Layout] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    delegates: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, Process] = field(default_factory=dict)
    processes: dict[str, list[Process]] = field(default_factory=dict)
    blocks: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    board: list[dict[str, Any]] = field(default_factory=list)
    sustained: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mask: str = ""
    void: str | None = None

    def __post_init__(self) -> None:
        minutes = self.errand.timing.sustained_minutes if self.errand.timing else 0.0
        self.until = time.monotonic() + self.errand.seconds + minutes * 60
        self.start = time.monotonic()

    def answer(self) -> Answer:
        """Do it."""
        self.layouts = {name: Layout.of(path) for name, path in self.files.items()}
        self._send()
        state = self._look("before") if self.errand.timing else self._state()
        for name in self.files:
            self._run_samples(name)
        if self.errand.timing is not None:
            self._bind(state)
            self._time()
            self._stay(self.errand.timing.sustained_minutes)
            self._look("after")
        return Answer(
            artifact=self._file("artifact"),
            twin=self._file("float") if "float" in self.files else None,
            facts=self._facts(state),
            board=self.board,
            sustained=self.sustained,
            void=self.void,
            warnings=tuple(self.warnings),
        )

    def _send(self) -> None:
        self.progress("send", None, None)
        sent = {BINARY: self.binary}
        for name, path in self.files.items():
            sent[f"{name}.tflite"] = path
            slices = list(self.layouts[name].slices(self.errand.inputs, self.errand.batch))
            for index in range(len(self.layouts[name].inputs)):
                there = f"{name}.in{index}.all"
                (self.folder / there).write_bytes(b"".join(one[index] for one in slices))
                sent[there] = self.folder / there
        self.transport.push(sent)
        self._sh(f"chmod 755 {BINARY}", "the binary could not be made executable")

    def _sh(self, script: str, failure: str) -> list[str]:
        """The lines a script prints there. Raises TargetError with its last words where it fails."""
        lines: list[str] = []
        left = max(self.until - time.monotonic(), 1.0)
        done = self.transport.run(["sh", "-c", script], seconds=left, line=lines.append)
        if done.code:
            said = " ".join((done.errors.strip().splitlines() or [f"exit code {done.code}"])[-3:])[:1000]
            raise TargetError(f"{self.transport.address}: {failure}: {said}")
        return lines

    def _call(self, name: str, *flags: str) -> str:
        """One process, whose words go to the file `log`."""
        layout, threads = self.layouts[name], self.errand.threads
        names = [f"in{i}" for i in range(len(layout.inputs))]
        shapes = ":".join(",".join(map(str, slot.shape)) for slot in layout.inputs)
        values = ",".join(f"{one}:{name}.{one}" for one in names)
        command = [
            f"./{BINARY}",
            f"--graph={name}.tflite",
            f"--num_threads={threads}",
            "--use_xnnpack=true",
            f"--input_layer={','.join(names)}",
            f"--input_layer_shape={shapes}",
            f"--input_layer_value_files={values}",
            *flags,
        ]
        bound = f"taskset {self.mask} " if self.mask else ""
        return f"{bound}{shlex.join(command)} >log 2>&1 || {{ code=$?; tail -n 5 log >&2; exit $code; }}"

    def _run_samples(self, name: str) -> None:
        """Every slice of samples once; what the process says of its delegate is kept."""
        layout = self.layouts[name]
        count = len(next(iter(self.errand.inputs.values()))) // self.errand.batch
        cut = "; ".join(
            f"dd if={name}.in{i}.all of={name}.in{i} bs={slot.bytes} skip=$i count=1 2>/dev/null || exit 3"
            for i, slot in enumerate(layout.inputs)
        )
        once = ("--num_runs=1", "--min_secs=0", "--warmup_runs=0", "--warmup_min_secs=0")
        call = self._call(name, *once, f"--output_filepath={name}.out")
        self.progress(f"run {name}", 0, count)
        lines = self._sh(
            f"rm -f {name}.outputs; i=0; while [ $i -lt {count} ]; do {cut}; {call}; "
            f"cat {name}.out >> {name}.outputs || exit 3; i=$((i+1)); done; cat log",
            f"benchmark_model did not run {self.files[name].name}",
        )
        said = "\n".join(lines)
        self.delegates[name] = delegate(said) or "no delegate named"
        last = process(said)
        if last is None:
            raise TargetError(f"{self.transport.address}: {UNREADABLE}: {' '.join(said.split()[-20:])[:300]}")
        self.loaded[name] = replace(last, first=last.calls[0])  # without a warm-up the timed call is the first
        self.transport.fetch(f"{name}.outputs", self.folder / "outputs")
        self.outputs[name] = layout.results((self.folder / "outputs").read_bytes(), count, self.transport.address)

    def _bind(self, state: State) -> None:
        """To the cores of the highest clock, where that is some of them, and enough."""
        timing = self.errand.timing
        best = [core for core, limit in state.limits.items() if limit == max(state.limits.values())]
        if timing is None or timing.affinity != "big" or not best or len(best) == len(state.limits):
            return
        if self.errand.threads > len(best):
            self.warnings.append(f"{self.errand.threads} threads are more than the {len(best)} big cores: not bound")
            return
        mask = f"{sum(1 << core for core in best):x}"
        try:
            self._sh(f"taskset {mask} true", "no taskset")
            self.mask = mask
        except TargetError:
            self.warnings.append("binding to the big cores failed: there is no taskset that takes their mask")

    def _round(self, names: Sequence[str], times: int) -> dict[str, list[Process]]:
        """So many processes of each, in turns."""
        flags = (f"--num_runs={EXACT_CALLS}", "--min_secs=0")
        warm = (f"--warmup_runs={_WARM_RUNS}", f"--warmup_min_secs={_WARM_SECONDS}")
        calls = "; ".join(f"echo '#{name}'; {self._call(name, *flags, *warm)}; cat log" for name in names)
        lines = self._sh(
            f"i=0; while [ $i -lt {times} ]; do {calls}; i=$((i+1)); done", "benchmark_model failed while it was timed"
        )
        found: dict[str, list[Process]] = {name: [] for name in names}
        for part in f"\n{chr(10).join(lines)}".split("\n#")[1:]:
            name, _, text = part.partition("\n")
            said = process(text)
            if name not in found or said is None:
                raise TargetError(f"{self.transport.address}: {UNREADABLE}: {' '.join(text.split()[-20:])[:300]}")
            found[name].append(said)
        return found

    def _time(self) -> None:
        timing = self.errand.timing
        assert timing is not None
        names = list(self.files)
        self.progress("time", 0, ROUNDS)
        probe = self._round(names, 1)
        fastest = min(min(one.calls) for processes in probe.values() for one in processes)
        runs = max(timing.min_runs, math.ceil(timing.min_seconds / max(fastest, 1e-6)))
        times = math.ceil(runs / ROUNDS / EXACT_CALLS)
        self.processes = {name: [] for name in names}
        self.blocks = {name: [] for name in names}
        for done in range(ROUNDS):
            for name, processes in self._round(names, times).items():
                self.processes[name] += processes
                self.blocks[name].append(np.array([call for one in processes for call in one.calls]))
            self._look("during")
            self.progress("time", done + 1, ROUNDS)
        self.warnings.append(
            f"timed by benchmark_model: {EXACT_CALLS} calls a process, each process after a warm-up of its own"
        )

    def _stay(self, minutes: float) -> None:
        """Go on with the artifact alone for so long, for heat."""
        until = time.monotonic() + minutes * 60
        one = sum(self.blocks["artifact"][0]) / len(self.blocks["artifact"][0]) if self.blocks else 0.0
        times = max(1, round(_STRETCH_SECONDS / (EXACT_CALLS * one + _WARM_SECONDS))) if one else 1
        while time.monotonic() < until:
            calls = [call for p in self._round(["artifact"], times)["artifact"] for call in p.calls]
            state = self._look("during")
            self.sustained.append(
                {
                    "minute": self._minute(),
                    "p50_ms": float(np.median(calls)) * 1e3,
                    "temperature_c": state.temperature_c,
                    "clock_mhz": state.clock_mhz,
                }
            )

    def _state(self) -> State:
        return parsed("\n".join(self._sh(COMMAND, "its state could not be read")))

    def _minute(self) -> float:
        return (time.monotonic() - self.start) / 60

    def _look(self, moment: str) -> State:
        state = self._state()
        self.board.append(state.entry(moment, self._minute()))
        if state.throttled and self.void is None:
            self.void = f"the processor was slowed down {moment} the timing ({state.throttled})"
        if moment == "before":
            if state.thermal is None:
                self.warnings.append("the device does not say whether it is throttled (dumpsys thermalservice)")
            if state.charging is False and state.level is not None and state.level < 30:
                self.warnings.append(f"the battery is at {state.level} %: the system may save power")
        return state

    def _file(self, name: str) -> FileAnswer:
        threads = f"{self.errand.threads} thread{'s' * (self.errand.threads > 1)}"
        processes = self.processes.get(name) or [self.loaded[name]]
        return FileAnswer(
            executor=f"TFLite benchmark_model ({self.delegates[name]}, {threads})",
            outputs=self.outputs[name],
            load_ms=float(np.median([p.load for p in processes])) * 1e3,
            first_ms=float(np.median([p.first for p in processes])) * 1e3,
            blocks=self.blocks.get(name, []),
        )

    def _facts(self, state: State) -> dict[str, str]:
        digest = hashlib.sha256(self.binary.read_bytes()).hexdigest()
        battery = {} if state.level is None else {"battery": f"{state.level} %{', plugged in' * bool(state.charging)}"}
        bound = {"cores": f"bound by taskset {self.mask}"} if self.mask else {}
        return {"benchmark_model": f"sha256 {digest[:16]}", **battery, **bound}
