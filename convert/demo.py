"""The main job on what the package carries: two small models, four artifacts each, one report each."""

from pathlib import Path

import numpy as np

from convert.gates import Budget
from convert.out_folder import written_whole
from convert.pipeline import Options, convert
from convert.progress import Progress
from convert.report.schema import Report

# A Raspberry Pi in TFLite and ONNX, an iPhone in Core ML, a Jetson in ONNX.
PAIRS = (
    ("raspberry-pi-4b", "tflite"),
    ("raspberry-pi-4b", "onnx"),
    ("iphone-a17-pro", "coreml"),
    ("jetson-orin-nano", "onnx"),
)
CALIBRATION_SAMPLES = 256
# What a user might ask for: a hundredth of the signal's power as noise, one point of accuracy, no surprise in the file.
BUDGET = Budget().with_limits(min_sqnr_db=20.0, max_accuracy_drop=0.01, require_match=True)


def demo(out: Path, *, threads: int, force: bool, command: str, progress: Progress) -> dict[str, Report]:
    """Convert both demo models; writes OUT/<model>/ for each and returns {model: report}. All or nothing."""
    from convert.demo_assets import FOLDER, MODELS, factory, weights

    reports = {}
    with written_whole(out, force) as folder:
        data = folder / "data"
        data.mkdir()
        _write_data(data)
        for model in MODELS:
            options = Options(
                model=factory(model),
                devices=(),
                pairs=PAIRS,
                out=folder / model,
                calibration=str(data / "calibration.npz"),
                evaluation=str(data / "test.npz"),
                weights=weights(model),
                search_path=FOLDER,
                threads=threads,
                budget=BUDGET,
                command=command,
            )
            reports[model] = convert(options, _Titled(progress, model))
    return reports


def _write_data(folder: Path) -> None:
    from convert.demo_assets import digits_arrays

    train, _ = digits_arrays("train")
    test, labels = digits_arrays("test")
    np.savez(folder / "calibration.npz", x=train[:CALIBRATION_SAMPLES])
    np.savez(folder / "test.npz", x=test, labels=labels)


class _Titled:
    """Progress with the model's name in front."""

    def __init__(self, inner: Progress, title: str) -> None:
        self.inner, self.title = inner, title

    def stage(self, text: str) -> None:
        self.inner.stage(f"{self.title}: {text}")

    def advance(self, done: int, total: int | None = None, what: str = "") -> None:
        self.inner.advance(done, total, what)
